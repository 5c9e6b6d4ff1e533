"""The default WaveNet recipe beside a plain one: bits per sample by time, and throughput.

    python -m tests.benchmarks.train_wavenet --data fsdd/ [--minutes 5] [--recipe-minutes 5 1.5]

`--data` is a folder of recordings. Where they are called DIGIT_SPEAKER_INDEX.wav, as the Free Spoken Digit Dataset's
are, indices 0 to 4 are the test, as that corpus defines it; else a tenth of the recordings is. Every figure is over
the whole test.

The anchor is a plain eager loop: Conv1d, 20 layers (dilations 1 to 512, twice, kernel 2), 32 residual and 64 skip
channels, one sequence of 4,096 samples a step, AdamW at 3e-3 that falls linearly over the second half, clipped at 1.
It draws the same sequences as the trainer would.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfcli.cores import WaveNetConfig
from dfcli.data.batches import Batches
from dfcli.data.dataset import Dataset
from dfcli.evaluation.sweep import sweep
from dfcli.ingest.prepare import prepare
from dfcli.system.device import resolve
from tests.benchmarks import common
from tests.replications.replicate import df

LR, WINDOW = 3e-3, 4096
TEST = re.compile(r"\d+_\w+_[0-4]\.wav")


class PlainWaveNet(nn.Module):
    """WaveNet as the paper's figure 4 draws it, of Conv1d layers. ids [B, T] -> logits [B, T, 256]"""

    def __init__(self, config: WaveNetConfig) -> None:
        super().__init__()
        self.config = config
        R, S, L = config.residual, config.skip, config.layers
        self.table = nn.Embedding(config.vocab_size, R)
        self.dilated = nn.ModuleList(nn.Conv1d(R, 2 * R, config.kernel, dilation=d) for d in config.all_dilations)
        self.residual = nn.ModuleList(nn.Conv1d(R, R, 1) for _ in range(L - 1))
        self.skip = nn.ModuleList(nn.Conv1d(R, S, 1) for _ in range(L))
        self.head = nn.Sequential(
            nn.ReLU(), nn.Conv1d(S, config.head, 1), nn.ReLU(), nn.Conv1d(config.head, config.vocab_size, 1)
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids).transpose(1, 2)
        total: Tensor | None = None
        for i, (dilated, skip) in enumerate(zip(self.dilated, self.skip, strict=True)):
            past = (self.config.kernel - 1) * self.config.all_dilations[i]
            a, b = dilated(F.pad(x, (past, 0))).chunk(2, dim=1)
            gate = torch.tanh(a) * torch.sigmoid(b)
            total = skip(gate) if total is None else total + skip(gate)
            if i < len(self.residual):
                x = x + self.residual[i](gate)
        assert total is not None
        return self.head(total).transpose(1, 2)


def anchor(dataset: Dataset, minutes: float) -> dict[str, Any]:
    """Train the plain WaveNet for so long and score it."""
    device = resolve("cpu")
    torch.manual_seed(0)
    config = WaveNetConfig(vocab_size=dataset.codec.vocab_size, cycles=2, residual=32, skip=64, head=64)
    core = PlainWaveNet(config)
    batches = Batches(dataset.splits["train"], batch_size=1, window=WINDOW, seed=0, boundary=dataset.boundary)
    optimizer = torch.optim.AdamW(core.parameters(), lr=LR)
    turns = common.Turns(device.threads)
    steps, began, seconds = 0, turns.clock(), 0.0
    while seconds < 60 * minutes:
        turns.stop()
        optimizer.param_groups[0]["lr"] = LR * min(1.0, 2 * (1 - seconds / (60 * minutes)))
        batch = batches.at(steps)
        F.cross_entropy(core(batch.ids).flatten(0, 1), batch.targets.flatten()).backward()
        nn.utils.clip_grad_norm_(core.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps += 1
        seconds = turns.clock() - began
    rate = steps * WINDOW / seconds
    return {
        "minutes": minutes,
        "bits_per_sample": sweep(core, dataset, "val", device).mean / math.log(2),
        "steps": steps,
        "samples_per_second": rate,
        "share_of_product_rate": 3 * config.flops_per_token() * rate / turns.rate(),
        "parameters": sum(p.numel() for p in core.parameters()),
    }


def recipe(dataset: Dataset, minutes: float) -> dict[str, Any]:
    """The default recipe, trained as `df train` does."""
    run, figures = common.trained("wavenet", dataset.name, minutes)
    scored = df("eval", "--run", run, "--device", "cpu")
    figures["samples_per_second"] = figures.pop("tokens_per_second")
    return {
        "bits_per_sample": scored["bits_per_sample"],
        "unigram_bits": scored["baselines"]["unigram"]["bits_per_sample"],
        **figures,
    }


def main(words: Sequence[str] | None = None) -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--data", required=True, type=Path, help="a folder of recordings")
    parser.add_argument("--minutes", type=float, default=5.0, help="of the anchor")
    parser.add_argument("--recipe-minutes", type=float, nargs="*", help="of the recipe; the same and 1.5")
    given = parser.parse_args(words)
    resolve("cpu")
    test = sorted(str(path) for path in given.data.rglob("*.wav") if TEST.fullmatch(path.name))
    with common.home(), prepare([str(given.data)], name="speech", val=test, levels=256) as dataset:
        plain = anchor(dataset, given.minutes)
        runs = []
        for minutes in given.recipe_minutes or [given.minutes, 1.5]:
            run = recipe(dataset, minutes)
            run["bits_below_anchor"] = plain["bits_per_sample"] - run["bits_per_sample"]
            runs.append(run)
        sizes = {name: split.tokens_count for name, split in dataset.splits.items()}
    common.report(
        {
            "benchmark": "train_wavenet",
            "test": "indices 0 to 4" if test else "a tenth of the recordings",
            "samples": sizes,
            "anchor": plain,
            "recipes": runs,
        }
    )


if __name__ == "__main__":
    main()
