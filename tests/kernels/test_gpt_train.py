"""The compiled functions give the core's loss and gradients, whatever the shape and however many threads share them."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch

from dfcli.cores import GPT, GPTConfig
from dfcli.data.batches import IGNORED
from dfcli.kernels.gpt_train import build
from dfcli.kernels.threads import WorkerPool
from dfcli.system.events import ignore
from tests.kernels import passes

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="for x86-64 processors")

KIND = {
    "vocab_size": 20, "layers": 2, "heads": 2, "channels": 32, "position": "rotary", "norm": "rmsnorm",
    "activation": "relu2", "bias": False, "qkv_bias": False, "qk_norm": True, "tied_head": False, "init": "torch",
}  # fmt: skip
CASES: list[tuple[dict[str, Any], int, int, int]] = [  # config, sequences, positions, threads
    ({}, 6, 16, 2),
    ({"heads": 1, "channels": 16, "layers": 1}, 1, 1, 1),
    ({"heads": 1, "channels": 48, "ngrams": 3}, 3, 77, 2),
    ({"channels": 64, "layers": 3, "ngrams": 8, "ngram_dropout": 0.4}, 2, 130, 3),
    ({"vocab_size": 300}, 5, 63, 4),
]


def model(seed: int = 0, **config: Any) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{"context": 160, **KIND, **config}))


@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize(("config", "B", "T", "threads"), CASES)
def test_loss_and_gradients_are_the_cores(
    config: dict[str, Any], B: int, T: int, threads: int, documents: bool
) -> None:
    core = model(**config)
    ids = torch.randint(core.config.vocab_size, (B, T))
    positions = passes.starts(B, T) if documents else None
    targets = torch.randint(core.config.vocab_size, (B, T)).masked_fill(torch.rand(B, T) < 0.1, IGNORED)
    expected = passes.one(core, passes.plain(core), ids, targets, positions)
    found = passes.one(core, build(core, WorkerPool(threads), ignore), ids, targets, positions)
    passes.assert_alike(found, expected, 1e-5)


def test_the_same_bits_every_time_and_nan_is_not_hidden() -> None:
    core, ids = model(), torch.randint(20, (5, 100))
    backward = build(core, WorkerPool(2), ignore)
    passes.assert_same_bits(core, backward, ids, ids)
    with torch.no_grad():
        core.blocks[0].attention.qkv.weight[40, 0] = torch.nan  # of a key
    assert passes.one(core, backward, ids, ids)[0].isnan()
