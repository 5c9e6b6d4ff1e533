"""The compiled blocks give the core's logits and gradients, whatever the shape and however many threads share them."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dfcli.cores import GPT, GPTConfig
from dfcli.system.events import ignore
from dfcli.training.gpt_cpu import build
from dfcli.training.settings import Recipe
from tests.training.test_trainer import Memory, trainer

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="for x86-64 processors")

KIND = {
    "vocab_size": 20, "layers": 2, "heads": 2, "channels": 32, "position": "rotary", "norm": "rmsnorm",
    "activation": "relu2", "bias": False, "qkv_bias": False, "qk_norm": True, "tied_head": False, "init": "torch",
}  # fmt: skip
CASES: list[tuple[dict[str, Any], int, int, int]] = [  # config, sequences, positions, threads
    ({}, 6, 16, 2),
    ({"heads": 1, "channels": 16, "layers": 1}, 1, 1, 1),
    ({"heads": 1, "channels": 48, "ngrams": 3}, 3, 77, 2),
    ({"channels": 64, "layers": 3, "tied_head": True, "head_bias": True}, 2, 130, 3),
    ({"vocab_size": 300}, 5, 63, 4),
]


def model(seed: int = 0, **config: Any) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{"context": 160, **KIND, **config}))


def gradients(core: GPT, forward: Any, ids: Tensor, positions: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    core.zero_grad(set_to_none=True)
    logits = forward(ids, positions)
    F.cross_entropy(logits.flatten(0, 1), ids.roll(-1).flatten(), reduction="sum").backward()
    return logits.detach(), {name: p.grad for name, p in core.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize(("config", "B", "T", "threads"), CASES)
def test_logits_and_gradients_are_the_cores(
    config: dict[str, Any], B: int, T: int, threads: int, documents: bool
) -> None:
    core = model(**config)
    ids, place = torch.randint(core.config.vocab_size, (B, T)), torch.arange(T)
    positions = torch.minimum((place + torch.arange(B)[:, None]) % 23, place) if documents else None
    logits, grads = gradients(core, core, ids, positions)
    fast_logits, fast_grads = gradients(core, build(core, threads, ignore), ids, positions)
    assert (logits - fast_logits).abs().max() <= 1e-5 * max(1.0, logits.abs().max().item())
    assert fast_grads.keys() == grads.keys()
    for name, grad in grads.items():
        assert (grad - fast_grads[name]).norm() <= 1e-5 * max(1.0, grad.norm().item()), name


def test_the_same_bits_every_time_and_nan_is_not_hidden() -> None:
    core, ids = model(), torch.randint(20, (5, 100))
    forward = build(core, 2, ignore)
    first = gradients(core, forward, ids, None)
    for _ in range(20):
        again = gradients(core, forward, ids, None)
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])
    with torch.no_grad():
        core.blocks[0].attention.qkv.weight[40, 0] = torch.nan  # of a key
    assert gradients(core, forward, ids, None)[0].isnan().all()


def test_training_ends_alike() -> None:
    weights = []
    for compile in ("auto", "off"):
        core = model(vocab_size=11, ngrams=3)
        recipe = Recipe(steps=3, batch_size=2, lr=0.02, optimizer="muon", momentum=0.9, compile=compile)
        made = trainer(core, recipe, Memory())
        assert made.run() is None
        assert (made.forward is core) == (compile == "off")
        weights.append(core.state_dict())
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], atol=1e-3), name
