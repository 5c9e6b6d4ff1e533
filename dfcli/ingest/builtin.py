"""Something to train on without a network: the Python standard library as text, plucked melodies as audio.

Both are made once, under the data dir, and are the same on every machine with the same Python.
"""

from __future__ import annotations

import random
import sys
import sysconfig
from pathlib import Path

import numpy as np

from dfcli.errors import DfError
from dfcli.system.files import building, data_home, os_errors, write_atomic

LIBRARY_BYTES = 2 << 20  # of text: enough for minutes of training, and prepared in a moment
LARGEST_MODULE = 100_000  # bytes; longer ones are mostly tables

RATE = 8000  # Hz
MELODIES = 30
NOTES = 12
LOWEST = 110  # Hz; the highest is 700
NOTE_SECONDS = 0.24
RING_SECONDS = 0.6  # how long a string sounds on while the next notes are played
HARMONICS = 6
SCALE = (0, 2, 4, 7, 9)  # semitones of the major pentatonic: any two of its notes sound well together


def builtin_sources(kind: str) -> list[Path]:
    """The built-in corpus for `kind` "text" (one file) or "audio" (a folder of 30 recordings, 90 s at 8 kHz), which is
    made if it is not there yet. Raises DfError where it cannot be written or Python came without its sources."""
    folder = data_home() / "builtin"
    if kind == "text":
        text = folder / f"python-{sys.version_info.major}.{sys.version_info.minor}.txt"
        if not text.exists():
            write_atomic(text, library_text(Path(sysconfig.get_path("stdlib"))))
        return [text]
    melodies = folder / "melodies"
    if not melodies.exists():
        _write_melodies(melodies)
    return [melodies]


def library_text(library: Path) -> bytes:
    """ASCII sources of the modules directly in `library`, by name, up to about 2 MB, two blank lines between them."""
    parts: list[bytes] = []
    size = 0
    with os_errors("read", library):
        for path in sorted(library.glob("*.py")):
            source = path.read_bytes().replace(b"\r\n", b"\n").strip() + b"\n"
            if not source.isascii() or not 1 < len(source) <= LARGEST_MODULE or size + len(source) > LIBRARY_BYTES:
                continue
            parts.append(source)
            size += len(source) + 2
    if size < LIBRARY_BYTES // 4:
        raise DfError(
            f"this Python came without the sources of its standard library ({library})",
            "give a text with `--data`, for example after `df data get shakespeare`",
        )
    return b"\n\n".join(parts)


def melody(number: int) -> np.ndarray:
    """float32 [n]: recording `number` of the corpus, 12 notes of a plucked string at 8 kHz, with a peak of 0.8."""
    choice = random.Random(number)
    key = choice.randrange(12)
    ladder = [key + 12 * octave + step for octave in range(2) for step in SCALE]
    start, step = choice.randrange(len(ladder)), choice.choice((1, 2, 3))
    direction = choice.choice((1, -1))
    spacing, ring = round(NOTE_SECONDS * RATE), round(RING_SECONDS * RATE)
    sound = np.zeros(spacing * (NOTES - 1) + ring)
    place = start
    for note in range(NOTES):
        sound[note * spacing :][:ring] += pluck(LOWEST * 2 ** (ladder[place] / 12), ring)
        if not 0 <= place + direction * step < len(ladder):
            direction, step = -direction, choice.choice((1, 2, 3))  # an arpeggio turns round, as wide or wider
        place = min(max(place + direction * step, 0), len(ladder) - 1)
    return (0.8 * sound / np.abs(sound).max()).astype(np.float32)


def pluck(frequency: float, samples: int) -> np.ndarray:
    """float64 [samples]: a string of `frequency` Hz whose higher harmonics are softer and die away sooner."""
    t = np.arange(samples) / RATE
    sound = np.zeros(samples)
    for harmonic in range(1, HARMONICS + 1):
        if harmonic * frequency < RATE / 2:
            sound += np.sin(2 * np.pi * harmonic * frequency * t) * np.exp(-(3 + 2 * harmonic) * t) / harmonic
    edges = np.minimum(1, np.minimum(t / 0.005, (t[-1] - t) / 0.02))  # no click at either end
    return sound * edges


def _write_melodies(folder: Path) -> None:
    import soundfile

    with building(folder, replace=True) as new:  # two processes may make it at once
        for number in range(MELODIES):
            soundfile.write(new / f"melody-{number + 1:02}.wav", melody(number), RATE, subtype="PCM_16")
