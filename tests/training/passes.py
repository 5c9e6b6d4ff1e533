"""A forward and backward pass by the core and by what stands in for it, side by side."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pass = tuple[Tensor, dict[str, Tensor]]  # logits, and the gradients of the parameters that have one
Forward = Callable[..., Tensor]


def one(core: nn.Module, forward: Forward, ids: Tensor, positions: Tensor | None = None) -> Pass:
    """A pass by `forward`, whose parameters are those of `core`."""
    core.zero_grad(set_to_none=True)
    logits = forward(ids, positions)
    F.cross_entropy(logits.flatten(0, 1), ids.roll(-1).flatten(), reduction="sum").backward()
    return logits.detach(), {name: p.grad for name, p in core.named_parameters() if p.grad is not None}


def starts(B: int, T: int) -> Tensor:
    """Positions [B, T] of documents of 23 ids, that begin elsewhere in each row."""
    place = torch.arange(T)
    return torch.minimum((place + torch.arange(B)[:, None]) % 23, place)


def assert_gradients(found: Pass, expected: Pass, most: float) -> None:
    """The same parameters have gradients, and they differ by at most `most` of their norm, or of 1."""
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert (grad - found[1][name]).norm() <= most * max(1.0, grad.norm().item()), name


def assert_same_bits(core: nn.Module, forward: Forward, ids: Tensor) -> None:
    """21 passes over the same ids give the same bits."""
    first = one(core, forward, ids)
    for _ in range(20):
        again = one(core, forward, ids)
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])
