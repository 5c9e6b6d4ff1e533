"""The page about runs: its pictures have the right values, and it needs nothing beside itself."""

from __future__ import annotations

import base64
import io
import math
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile

import dfcli
from dfcli.report import page
from dfcli.report.drawing import HEIGHT, LEFT, RIGHT, TOP, WIDTH, chart, spectrogram
from tests.generation.runs import gpt_run, wavenet_run


def test_a_chart_puts_points_where_they_belong() -> None:
    drawn = chart({"a<b": [(0, 4.0), (5, math.nan), (10, 2.0)]}, "step", "loss")
    left, right = re.search(r'polyline points="([\d.]+),([\d.]+) ([\d.]+),([\d.]+)"', drawn).group(1, 3)  # pyright: ignore
    assert (float(left), float(right)) == (LEFT, WIDTH - RIGHT)
    assert re.search(rf'points="{LEFT:.1f},{TOP:.1f} ', drawn)  # the highest loss is at the top
    assert f",{HEIGHT - 40:.1f}" in drawn  # the lowest at the bottom
    assert "a&lt;b" in drawn
    assert chart({"a": [(0, math.nan)]}, "step", "loss") == ""
    assert "<circle" in chart({"a": [(0, 1.0)]}, "step", "loss")


def test_a_spectrogram_is_brightest_at_the_tone() -> None:
    data = spectrogram(np.sin(2 * np.pi * 0.25 * np.arange(8000)).astype(np.float32))  # half of the highest frequency
    width, height = struct.unpack(">II", data[16:24])
    body = data[data.index(b"IDAT") + 4 : data.index(b"IEND") - 8]
    rows = np.frombuffer(zlib.decompress(body), np.uint8).reshape(height, width + 1)[:, 1:]
    assert height == 257
    assert rows.mean(1).argmax() == 128
    assert rows.max() == 255


def test_the_page_has_the_figures_and_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "SECONDS", 0.1)
    text, sound = gpt_run(), wavenet_run()
    page.write([text, sound], tmp_path / "r.html", device="cpu")
    shown = (tmp_path / "r.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", shown)
    assert "http" not in shown
    made = dfcli.sample_text(text, num=page.TEXTS, tokens=page.TOKENS, seed=page.SEED, device="cpu").samples
    assert all(f"<pre>{page.html.escape(sample)}</pre>" in shown for sample in made)
    clips = re.findall(r'src="data:audio/wav;base64,([^"]+)"', shown)
    rate = sound.codec.sample_rate  # pyright: ignore
    lengths = [soundfile.info(io.BytesIO(base64.b64decode(clip))).frames for clip in clips]
    assert lengths == [round(0.1 * rate)] * page.CLIPS
    assert shown.count("data:image/png") == page.CLIPS
