"""What this process may use: processors by affinity and quota, memory by container (Linux cgroups)."""

from __future__ import annotations

import math
import os
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")


def cpus() -> int:
    """Processors this process may use: the smaller of its affinity and its container's quota, at least 1."""
    return max(1, math.ceil(min(len(affinity()), _cpu_quota())))


def affinity() -> list[int]:
    """Numbers of the processors this process may be scheduled on, sorted."""
    if hasattr(os, "sched_getaffinity"):  # Linux; macOS and Windows schedule on all of them
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def memory() -> tuple[int, int]:
    """(free, total) bytes of memory for this process: the machine's, or its container's if less."""
    machine = psutil.virtual_memory()
    free, total = machine.available, machine.total
    for folder in _groups():
        limit, used = _number(folder, "memory.max"), _number(folder, "memory.current")
        if limit is None:  # cgroup version 1
            limit, used = _number(folder, "memory.limit_in_bytes"), _number(folder, "memory.usage_in_bytes")
        if limit is not None and used is not None:
            used -= _cached(folder)
            total, free = min(total, limit), min(free, max(0, limit - used))
    return free, total


def _cpu_quota() -> float:
    """Processors' worth of time that the container grants; infinite where there is no limit."""
    quota = math.inf
    for folder in _groups():
        words = _read(folder / "cpu.max").split()  # version 2: "<quota|max> <period>" in microseconds
        if not words:
            words = [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):  # not "max", not "-1"
            quota = min(quota, int(words[0]) / int(words[1]))
    return quota


def _groups() -> list[Path]:
    """The folders that may limit this process: its own cgroup and those above it."""
    found = {_CGROUPS, _CGROUPS / "cpu", _CGROUPS / "memory"}  # the last two: version 1 inside a container
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        top = _CGROUPS / controllers if controllers else _CGROUPS
        folder = top / path.lstrip("/")
        found.update(part for part in (folder, *folder.parents) if part.is_relative_to(top))
    return sorted(folder for folder in found if folder.is_dir())


def _cached(folder: Path) -> int:
    """Bytes of file cache the group would give back first; the kernel counts them as used."""
    for line in _read(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file") and value.isdigit():
            return int(value)
    return 0


def _number(folder: Path, name: str) -> int | None:
    text = _read(folder / name)
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):  # absent on this system, or not ours to read
        return ""
