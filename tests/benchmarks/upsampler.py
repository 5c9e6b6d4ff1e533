"""How a vocoder's mel frames are brought to the rate of the samples: repetition, interpolation or a learned upsampler.

    python -m tests.benchmarks.upsampler --data fsdd/ [--steps 300]

Each way trains the same small WaveNet on the same batches, with the same random numbers, and is scored on the same
excerpts of the held-out recordings. The product repeats each frame, as then a layer projects a frame only once.

repeated      each sample is told its frame
interpolated  each sample is told a mixture of its frame and the nearest other one, weighted by their distance
learned       a convolution over 5 frames (r9y9's conv_in), and a transposed convolution over 3 frames for each channel,
              which begins as the interpolation
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfcli.cores.wavenet import Condition, WaveNet, WaveNetConfig
from dfcli.data.conditions import Conditions, conditioning
from dfcli.data.dataset import Dataset
from dfcli.system.device import resolve
from tests.benchmarks import common
from tests.benchmarks.conditioned import dataset

WAYS = ("repeated", "interpolated", "learned")
SIDE = 3  # frames on either side of an excerpt that the upsampler sees
FRAMES, ROWS = 20, 4  # of a batch
DILATIONS = (1, 2, 4, 8, 16, 32, 64, 128)


class Upsampler(nn.Module):
    """Frames [B, SIDE + N + SIDE, C] -> a row for each sample, [B, N hop, C]."""

    def __init__(self, way: str, channels: int, hop: int) -> None:
        super().__init__()
        self.way, self.hop = way, hop
        centre = (torch.arange(hop) + 0.5) / hop - 0.5
        near = torch.stack([(-centre).clamp_min(0), 1 - centre.abs(), centre.clamp_min(0)])  # [3, hop]
        self.taps = near
        if way == "learned":
            self.taps = nn.Parameter(near.repeat(channels, 1, 1))  # [C, 3, hop]
            self.entry = nn.Conv1d(channels, channels, 5, bias=False)
            nn.init.dirac_(self.entry.weight)

    def forward(self, frames: Tensor) -> Tensor:
        x = frames.transpose(1, 2)
        if self.way == "repeated":
            return x[..., SIDE:-SIDE].repeat_interleave(self.hop, dim=-1).transpose(1, 2)
        x = self.entry(x) if self.way == "learned" else x[..., 2:-2]
        around = x.unfold(-1, 3, 1)  # [B, C, N, 3]
        words = "bcnk,ckh->bcnh" if self.way == "learned" else "bcnk,kh->bcnh"
        return torch.einsum(words, around, self.taps).flatten(2).transpose(1, 2)


class Excerpts:
    """Excerpts of FRAMES frames of a split: ids [B, T + 1] and frames [B, SIDE + FRAMES + SIDE, C]."""

    def __init__(self, data: Dataset, split: str) -> None:
        told = conditioning(data, "mel")
        assert told is not None
        assert told.mel is not None
        self.told, self.split = told, data.splits[split]
        self.conditions = Conditions(told, data, split)
        self.room = (np.diff(self.split.offsets) - 1) // told.hop - FRAMES  # frames that an excerpt can begin at
        self.long = np.flatnonzero(self.room > 0)

    def drawn(self, rows: int, seed: int) -> tuple[Tensor, Tensor]:
        random = np.random.default_rng(seed)
        documents = random.choice(self.long, rows)
        starts = (random.random(rows) * self.room[documents]).astype(np.int64)
        hop = self.told.hop
        # The boundary before a recording is its id 0: id s + 1 is sample s, and is predicted from ids up to s.
        begins = zip(documents.tolist(), (starts * hop).tolist(), strict=True)
        ids = [self.split.document(k)[begin : begin + FRAMES * hop + 1] for k, begin in begins]
        places = starts[:, None] + np.arange(-SIDE, FRAMES + SIDE)
        inside = np.clip(places, 0, None)
        found = self.conditions.at(np.broadcast_to(documents[:, None], places.shape), inside * hop)
        assert found.series is not None
        return torch.from_numpy(np.stack(ids)).long(), found.series[found.index]


def trained(way: str, train: Excerpts, held: Excerpts, steps: int) -> dict[str, Any]:
    told, hop = train.told, train.told.hop
    torch.manual_seed(0)
    core = WaveNet(
        WaveNetConfig(dilations=DILATIONS, cycles=2, residual=32, norm="rmsnorm", init="zero", series=told.series)
    )
    upsampler = Upsampler(way, told.series, hop)
    parameters = [*core.parameters(), *upsampler.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=4e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)

    def loss(excerpts: tuple[Tensor, Tensor]) -> Tensor:
        ids, frames = excerpts
        series = upsampler(frames)
        index = torch.arange(series.shape[0] * series.shape[1]).view(series.shape[:2])
        logits = core(ids[:, :-1], condition=Condition(None, series.flatten(0, 1), index))
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    began = time.perf_counter()
    for step in range(steps):
        found = loss(train.drawn(ROWS, step))
        optimizer.zero_grad()
        found.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - began
    with torch.no_grad():
        losses = [float(loss(held.drawn(16, seed))) for seed in range(16)]
    extra = sum(p.numel() for p in upsampler.parameters())
    return {"bits_per_sample": float(np.mean(losses)) / math.log(2), "seconds": seconds, "parameters_more": extra}


def main(words: Sequence[str] | None = None) -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--data", required=True, type=Path, help="a folder of recordings DIGIT_SPEAKER_INDEX.wav")
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args(words)
    source = given.data.resolve()
    resolve("cpu")
    with common.home() as folder, chdir(folder), dataset(source, "digits") as data:
        train, held = Excerpts(data, "train"), Excerpts(data, "val")
        figures = {}
        for way in WAYS:
            figures[way] = trained(way, train, held, given.steps)
            print(way, figures[way], flush=True)
    common.report({"benchmark": "upsampler", "steps": given.steps, **figures})


if __name__ == "__main__":
    main()
