"""A run of format 1, as the first version wrote it, loads for ever.

It was written by `python -m tests.runs.test_golden`; a new format gets a golden run of its own beside this one.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dfcli.runs import Run
from tests.runs.small import same, tree

GOLDEN = Path(__file__).parent / "golden" / "format-1"
LOGITS = [
    [0.816453, 0.917871, 1.019289],
    [0.816453, 0.917871, 1.019289],
    [0.974428, 0.938291, 0.902155],
    [1.184134, 1.040728, 0.897322],
    [1.178341, 1.040056, 0.901771],
]
"""What this model gave for the ids 0, 1, 2, 1, 0 when it was written."""


def ramp(shape: tuple[int, ...], k: int) -> Tensor:
    """Weights that need no random numbers."""
    count = torch.Size(shape).numel()
    return (((torch.arange(count) * 7 + k) % 13 - 6) / 8).reshape(shape)


def golden_weights() -> dict[str, Tensor]:
    kinds = {
        "tokens.weight": (3, 4), "positions.weight": (5, 4),
        "blocks.0.attention_norm.weight": (4,), "blocks.0.attention_norm.bias": (4,),
        "blocks.0.attention.qkv.weight": (12, 4), "blocks.0.attention.qkv.bias": (12,),
        "blocks.0.attention.projection.weight": (4, 4), "blocks.0.attention.projection.bias": (4,),
        "blocks.0.mlp_norm.weight": (4,), "blocks.0.mlp_norm.bias": (4,),
        "blocks.0.mlp.expansion.weight": (16, 4), "blocks.0.mlp.expansion.bias": (16,),
        "blocks.0.mlp.projection.weight": (4, 16), "blocks.0.mlp.projection.bias": (4,),
        "norm.weight": (4,), "norm.bias": (4,),
    }  # fmt: skip
    weights = {name: ramp(shape, k) for k, (name, shape) in enumerate(kinds.items())}
    return weights | {"head.weight": weights["tokens.weight"]}


def test_it_loads(tmp_path: Path):
    path = tmp_path / "golden"
    shutil.copytree(GOLDEN, path)
    before = tree(path)
    run = Run.open(path)
    assert run.kind == "gpt"
    assert run.info["format"] == 1
    assert run.info["dataset"] == {"name": "golden"}
    assert run.codec.vocab_size == 3
    assert run.steps() == [2, 3]
    assert run.metrics() == [{"step": 2, "val_loss": 1.0}, {"step": 3, "val_loss": 1.5}]
    core, saved = run.build("best")
    assert saved.step == 2
    assert saved.state == {"val_loss": 1.0, "seconds": 0.1}
    assert same(saved.model, golden_weights())
    optimizer = run.load("last", optimizer=True).optimizer
    assert optimizer is not None
    assert same(optimizer, {"moment": torch.full((2,), 3.0), "count": torch.tensor(3)})
    with torch.no_grad():
        logits = core(torch.tensor([[0, 1, 2, 1, 0]]))[0]
    assert torch.allclose(logits, torch.tensor(LOGITS), atol=1e-5)
    assert tree(path) == before


METRICS = b"""\
{"format": 2}
{"step": 2, "val_loss": 1.0, "crc": "d51c300c"}
{"step": 3, "val_loss": 1.5, "crc": "4a247262"}
"""
"""Its history as it is written since lines carry a checksum."""


def test_what_is_written_today_differs_only_in_what_the_day_adds(home: Path):
    write(home)
    ours, golden = tree(home / "runs" / "golden"), tree(GOLDEN)
    assert ours.keys() == golden.keys()
    assert {name for name in golden if ours[name] != golden[name]} <= {"run.json", "metrics.jsonl"}
    assert ours["metrics.jsonl"] == METRICS


def write(home: Path) -> None:
    from dfcli.codecs import Chars

    os.environ["DFCLI_HOME"] = str(home)
    config = {
        "vocab_size": 3, "context": 5, "layers": 1, "heads": 2, "channels": 4, "position": "learned",
        "norm": "layernorm", "activation": "gelu", "bias": True, "tied_head": True,
    }  # fmt: skip
    core = {"name": "gpt", "config": config}
    run = Run.create("golden", {"kind": "gpt", "core": core, "dataset": {"name": "golden"}}, Chars("abc"))
    for step, loss in ((2, 1.0), (3, 1.5)):
        run.log({"step": step, "val_loss": loss})
        optimizer = {"moment": torch.full((2,), float(step)), "count": torch.tensor(step)}
        run.save(step, golden_weights(), optimizer, {"val_loss": loss, "seconds": 0.1})


if __name__ == "__main__":
    if GOLDEN.exists():
        pytest.exit(f"{GOLDEN} is there, and stays as it is")
    scratch = GOLDEN.with_name("scratch")
    write(scratch)
    (scratch / "runs" / "golden").rename(GOLDEN)
    shutil.rmtree(scratch)
