"""Small untrained runs on disk to sample from."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from dfcli.codecs import Chars, Codec, MuLaw
from dfcli.cores import CORES, GPT, GPTConfig, WaveNet, WaveNetConfig
from dfcli.data.conditions import Conditioning
from dfcli.runs.run import Run

RATE = 1000  # Hz


def save(
    name: str,
    core: Any,
    codec: Codec,
    *,
    boundary: int | None = None,
    lines: bool = False,
    lead: int = 1,
    normalize: str = "none",
    told: Conditioning | None = None,
) -> Run:
    name_of_core = next(known for known, (_, kind) in CORES.items() if isinstance(core, kind))
    info = {
        "kind": "gpt" if name_of_core == "gpt" else "wavenet",
        "core": {"name": name_of_core, "config": asdict(core.config)},
        "recipe": {},
        "dataset": {
            "name": "none", "path": "none", "fingerprint": "", "boundary": boundary, "lines": lines, "lead": lead,
            "normalize": normalize,
        },
        "seed": 0,
    }  # fmt: skip
    if told:
        info["conditioning"] = told.to_json()
    run = Run.create(name, info, codec)
    run.save(1, core.state_dict(), {}, {"val_loss": 1.0})
    return run


def gpt_run(name: str = "gpt", alphabet: str = "\nabc", context: int = 16, **layout: Any) -> Run:
    torch.manual_seed(4)
    codec = Chars(alphabet)
    config = GPTConfig(codec.vocab_size, context=context, layers=1, heads=2, channels=16, init="torch", tied_head=False)
    core = GPT(config)
    return save(name, core, codec, **layout)


def wavenet_run(name: str = "wavenet", normalize: str = "none") -> Run:
    torch.manual_seed(4)
    core = WaveNet(WaveNetConfig(256, dilations=(1, 2, 4), cycles=1, residual=8, skip=8, head=8))
    return save(name, core, MuLaw(RATE), boundary=128, normalize=normalize)


def conditioned_run(told: Conditioning, name: str = "told") -> Run:
    """A WaveNet with these conditions, which matter."""
    torch.manual_seed(4)
    config = WaveNetConfig(
        256, dilations=(1, 2, 4), cycles=1, residual=8, skip=8, head=8, labels=told.counts,
        condition=4 * bool(told.names), series=told.series,
    )  # fmt: skip
    core = WaveNet(config)
    with torch.no_grad():
        for parameter in core.parameters():
            parameter *= 3
    return save(name, core, MuLaw(RATE), boundary=128, told=told)
