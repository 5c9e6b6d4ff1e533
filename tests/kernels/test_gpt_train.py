"""The compiled GPT gives the core's loss and gradients, whatever the config, the shape and the number of threads."""

from __future__ import annotations

import platform
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

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
NANO = {"position": "learned", "norm": "layernorm", "activation": "gelu", "qk_norm": False, "tied_head": True}
LECTURE = NANO | {"activation": "relu", "bias": True, "head_bias": True, "tied_head": False}
MAKEMORE = NANO | {"activation": "gelu_tanh", "bias": True, "qkv_bias": True, "tied_head": False}
CASES: list[tuple[dict[str, Any], int, int, int]] = [  # config, sequences, positions, threads
    ({}, 6, 16, 2),
    ({"heads": 1, "channels": 16, "layers": 1}, 1, 1, 1),
    ({"heads": 1, "channels": 48, "ngrams": 3}, 3, 77, 2),
    ({"channels": 64, "layers": 3, "ngrams": 8, "ngram_dropout": 0.4}, 2, 130, 3),
    ({"vocab_size": 300}, 5, 63, 4),
    (NANO, 3, 40, 2),
    (LECTURE, 2, 70, 1),
    (MAKEMORE | {"channels": 64, "heads": 4}, 5, 16, 3),
]


def model(seed: int = 0, **config: Any) -> GPT:
    torch.manual_seed(seed)
    core = GPT(GPTConfig(**{"context": 160, **KIND, **config}))
    with torch.no_grad():
        for p in core.parameters():
            if p.ndim == 1:  # gains and biases
                p += 0.1 * torch.randn_like(p)
    return core


def batch(core: GPT, B: int, T: int, documents: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    ids, targets = torch.randint(core.config.vocab_size, (2, B, T))
    return ids, targets.masked_fill(torch.rand(B, T) < 0.1, IGNORED), passes.starts(B, T) if documents else None


@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize(("config", "B", "T", "threads"), CASES)
def test_loss_and_gradients_are_the_cores(
    config: dict[str, Any], B: int, T: int, threads: int, documents: bool
) -> None:
    core = model(**config)
    given = batch(core, B, T, documents)
    expected = passes.one(core, passes.plain(core), *given)
    found = passes.one(core, build(core, WorkerPool(threads), ignore), *given)
    passes.assert_alike(found, expected, 1e-5)


@passes.needs_amx
@pytest.mark.parametrize(("config", "B", "T", "threads"), CASES)
def test_in_bfloat16_they_are_near(config: dict[str, Any], B: int, T: int, threads: int) -> None:
    core = model(**config)
    given = batch(core, B, T, True)
    kernel = build(core, WorkerPool(threads), ignore, "bfloat16")
    found, expected, autocast = (passes.one(core, each, *given) for each in (kernel, *passes.both(core)))
    if core.config.channels % 32:  # is left in float32
        passes.assert_alike(found, expected, 1e-5)
    else:
        passes.assert_rounded(found, expected, autocast)
    passes.assert_same_bits(core, kernel, given[0], given[0])


def test_random_configs() -> None:
    chance = random.Random(7)
    for seed in range(12):
        heads = chance.choice([1, 2, 3])
        config = {
            "heads": heads, "channels": 16 * heads * chance.choice([1, 2]), "layers": chance.choice([1, 2, 3]),
            "position": chance.choice(["learned", "rotary"]), "norm": chance.choice(["layernorm", "rmsnorm"]),
            "activation": chance.choice(["relu", "relu2", "gelu", "gelu_tanh"]), "ngrams": chance.choice([1, 1, 2, 4]),
            "vocab_size": chance.choice([5, 33, 64]),
        }  # fmt: skip
        flags = ("bias", "qkv_bias", "head_bias", "tied_head", "qk_norm")
        core = model(seed, **config, **{flag: chance.random() < 0.5 for flag in flags})
        given = batch(core, chance.choice([1, 3]), chance.choice([5, 64, 90]), chance.random() < 0.5)
        expected = passes.one(core, passes.plain(core), *given)
        passes.assert_alike(passes.one(core, build(core, WorkerPool(2), ignore), *given), expected, 1e-5)


# ---- dropout: the core, with the kernel's masks in place of torch's


def mixed(x: np.ndarray, more: int) -> np.ndarray:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = (((x ^ (x >> 15)) + more) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def mask(seed: int, stream: int, shape: tuple[int, ...], p: float) -> Tensor:
    """What `ops.dropped` multiplies elements of this shape by."""
    low, high = np.array([seed & 0xFFFFFFFF], np.uint64), seed >> 32
    key = mixed(low, stream)
    numbers = np.arange(np.prod(shape), dtype=np.uint64)
    stays = mixed(numbers ^ key, int(mixed(key, high & 0xFFFFFFFF)[0])) >= int(p * 2**32)
    return torch.from_numpy(stays.reshape(shape) / (1 - p)).float()


class Masks:
    """torch's dropout, in the order in which the core asks for it: embedding, then per layer attention, its branch and
    the MLP's."""

    def __init__(self, core: GPT, seeds: Iterator[int]) -> None:
        c = core.config
        self.p, self.seeds = c.dropout, seeds
        streams = [0] * bool(c.embedding_dropout) + [
            3 * layer + kind for layer in range(c.layers) for kind in (1, 2, 3)
        ]
        self.order = iter(streams * 2)
        self.first = streams[0]
        self.seed = 0

    def next(self, shape: tuple[int, ...]) -> Tensor:
        stream = next(self.order)
        if stream == self.first:
            self.seed = next(self.seeds)
        return mask(self.seed, stream, shape, self.p)

    def dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return x * self.next(tuple(x.shape)) if p else x

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Any, dropout_p: float, is_causal: bool) -> Tensor:
        B, H, T, D = q.shape
        causal = torch.ones(T, T, dtype=torch.bool).tril()
        scores = (q @ k.mT / D**0.5).masked_fill(~(causal if attn_mask is None else attn_mask), -torch.inf)
        return (scores.softmax(-1) * self.next((B, T, H, T)).transpose(1, 2)) @ v


@pytest.mark.parametrize("config", [NANO, MAKEMORE, LECTURE | {"embedding_dropout": False}, {}])
def test_dropout_is_the_cores_with_the_same_masks(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    core = model(dropout=0.3, **config)
    given = batch(core, 3, 70, True)  # too long to be computed together
    found = passes.one(core, build(core, WorkerPool(2), ignore), *given)
    torch.manual_seed(0)
    masks = Masks(core, iter([int(torch.randint(2**62, ())) for _ in range(2)]))
    monkeypatch.setattr(F, "dropout", masks.dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", masks.attention)
    passes.assert_alike(found, passes.one(core, passes.plain(core), *given), 1e-5)


def test_dropout_keeps_its_share_and_eval_has_none() -> None:
    shares = torch.stack([mask(seed, 1, (400, 500), 0.2) > 0 for seed in (1, 2**61 + 5)]).double()
    assert (shares.mean((1, 2)) - 0.8).abs().max() < 0.003
    assert abs(np.corrcoef(shares.flatten(1).numpy())[0, 1]) < 0.01
    core = model(dropout=0.5, **NANO).eval()
    given = batch(core, 2, 20, False)
    kernel = build(core, WorkerPool(1), ignore)
    passes.assert_alike(passes.one(core, kernel, *given), passes.one(core, passes.plain(core), *given), 1e-5)


def test_the_same_bits_every_time_and_nan_is_not_hidden() -> None:
    core, ids = model(dropout=0.1), torch.randint(20, (5, 100))
    backward = build(core, WorkerPool(2), ignore)
    passes.assert_same_bits(core, backward, ids, ids)
    with torch.no_grad():
        core.blocks[0].attention.qkv.weight[40, 0] = torch.nan  # of a key
    assert passes.one(core, backward, ids, ids)[0].isnan()
