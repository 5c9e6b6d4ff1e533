"""Pictures of the report, without a drawing library: a chart as SVG, a spectrogram as PNG."""

from __future__ import annotations

import html
import math
import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 720, 300  # pixels of a chart
LEFT, TOP, RIGHT, BOTTOM = 60, 30, 10, 40  # its margins
COLOURS = ("#1f77b4", "#2ca02c", "#d62728", "#9467bd")
TICKS = 5
USUAL = 0.98  # the share of the values that a chart shows: the first steps would flatten the rest
FFT, HOP = 512, 128  # samples of a window of a spectrogram and of its step
FLOOR = 80.0  # dB below the loudest that are drawn
COLUMNS = 900  # pixels of a spectrogram at most


def chart(series: Mapping[str, Points], x: str, y: str) -> str:
    """Lines through points (x, y), as an SVG element; `x` and `y` name the axes. Values that are not finite are left
    out; "" where nothing is left."""
    lines = {name: [(a, b) for a, b in points if math.isfinite(b)] for name, points in series.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    every = [point for points in lines.values() for point in points]
    values = sorted(b for _, b in every)
    low, high = values[0], values[min(len(values) - 1, int(USUAL * len(values)))]
    high = high if high > low else low + 1.0
    first, last = min(a for a, _ in every), max(a for a, _ in every)
    across = (WIDTH - LEFT - RIGHT) / max(last - first, 1e-9)
    down = (HEIGHT - TOP - BOTTOM) / (high - low)

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return LEFT + (point[0] - first) * across, TOP + (high - min(point[1], high)) * down

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(y)} by {html.escape(x)}">']
    for k in range(TICKS):
        a, b = first + (last - first) * k / (TICKS - 1), low + (high - low) * k / (TICKS - 1)
        px, py = at((a, b))
        parts.append(f'<line x1="{LEFT}" y1="{py:.1f}" x2="{WIDTH - RIGHT}" y2="{py:.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{b:.3f}</text>')
        parts.append(f'<text x="{px:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{a:,.0f}</text>')
    for (name, points), colour, k in zip(lines.items(), COLOURS, range(len(lines)), strict=False):
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in map(at, points))
        if len(points) == 1:
            px, py = at(points[0])
            parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{colour}"/>')
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<text x="{LEFT + 150 * k}" y="16" fill="{colour}">{html.escape(name)}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(x)}</text></svg>')
    return "".join(parts)


def spectrogram(samples: NDArray[np.float32]) -> bytes:
    """A log-magnitude spectrogram of mono samples [n] as a grey PNG: time to the right, frequency upwards."""
    padded = np.pad(samples, (0, max(0, FFT - len(samples))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, FFT)[::HOP]
    frames = frames[:: -(-len(frames) // COLUMNS)]
    power = np.abs(np.fft.rfft(frames * np.hanning(FFT), axis=1)) + 1e-9
    decibel = 20 * np.log10(power / power.max())
    return png((255 * np.clip(1 + decibel / FLOOR, 0, 1)).astype(np.uint8).T[::-1])


def png(grey: NDArray[np.uint8]) -> bytes:
    """A PNG file (ISO/IEC 15948) of grey values [height, width]."""
    height, width = grey.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = np.concatenate([np.zeros((height, 1), np.uint8), grey], axis=1)  # 0: no filter
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes())) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
