"""Figures as a person reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from dfcli.system.words import size as size


def count(n: float) -> str:
    """1234567 -> "1,234,567"."""
    return f"{n:,.0f}"


def short(n: float) -> str:
    """Three digits and a prefix: 803456 -> "803k", 12345678 -> "12.3M"."""
    for limit, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= limit * 0.9995:
            return f"{n / limit:.3g}{prefix}" if abs(n) < 999.5 * limit else f"{n / limit:.0f}{prefix}"
    return f"{n:.3g}"


def si(n: float) -> str:
    """A figure with a prefix for the unit that follows: 12345 -> "12.3 k", 61.2e9 -> "61.2 G"."""
    for limit, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= limit:
            return f"{n / limit:.1f} {prefix}"
    return f"{n:.1f} "


def duration(seconds: float) -> str:
    """83 -> "1:23", 5025 -> "1:23:45"."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def age(seconds: float) -> str:
    """How long ago, in one unit: 83 -> "1 min", 90000 -> "1 day"."""
    for length, unit in ((86400, "day"), (3600, "h"), (60, "min")):
        if seconds >= length:
            n = int(seconds // length)
            return f"{n} {unit}{'s' if unit == 'day' and n > 1 else ''}"
    return f"{max(0, int(seconds))} s"


def sparkline(values: Sequence[float], width: int = 40, unicode: bool = True, top: float | None = None) -> str:
    """The course of `values` in at most `width` block characters, the lowest value as the lowest block.

    Values from `top` on are the highest block; without it the largest value is.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    if len(finite) > width:  # means of equal parts
        edges = [round(i * len(finite) / width) for i in range(width + 1)]
        finite = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    blocks = "▁▂▃▄▅▆▇█" if unicode else "_.-=+*#@"
    low, high = min(finite), max(finite)
    if top is not None and low < top < high:
        high = top
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((min(value, high) - low) * scale)] for value in finite)


def usual(values: Sequence[float]) -> float | None:
    """The value that nine of ten stay below: the top of a sparkline that the first steps do not flatten."""
    finite = sorted(value for value in values if math.isfinite(value))
    return finite[len(finite) * 9 // 10] if finite else None


class Course:
    """A series of any length kept as at most `limit` means of equally many values, for a sparkline."""

    def __init__(self, limit: int = 256) -> None:
        self.limit = limit
        self.values: list[float] = []
        self._each = 1  # values that one mean stands for
        self._sum = 0.0
        self._count = 0  # values in `_sum`, which are not yet a mean

    def add(self, value: float) -> None:
        """Append a value; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        self._sum += value
        self._count += 1
        if self._count == self._each:
            self.values.append(self._sum / self._count)
            self._sum, self._count = 0.0, 0
            if len(self.values) == self.limit:
                pairs = zip(self.values[::2], self.values[1::2], strict=True)
                self.values = [(a + b) / 2 for a, b in pairs]
                self._each *= 2
