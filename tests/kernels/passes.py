"""The loss and the gradients by the core and by what stands in for it, side by side."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dfcli.training.loss import Backward, cross_entropy

Pass = tuple[Tensor, dict[str, Tensor]]  # the loss, and the gradients of the parameters that have one


def plain(core: nn.Module) -> Backward:
    """By the core's own `forward`."""

    def backward(ids: Tensor, targets: Tensor, positions: Tensor | None, count: int) -> Tensor:
        loss = cross_entropy(core(ids, positions), targets)
        (loss / count).backward()
        return loss.detach()

    return backward


def one(core: nn.Module, backward: Backward, ids: Tensor, targets: Tensor, positions: Tensor | None = None) -> Pass:
    """A pass by `backward`, whose parameters are those of `core`, twice, as by two micro-batches; the same noise every
    time."""
    core.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    loss = backward(ids, targets, positions, 3)
    backward(ids.flip(0), targets, positions, 3)
    grads = {name: p.grad for name, p in core.named_parameters() if p.grad is not None}
    return loss, {name: grad.to_dense() if grad.is_sparse else grad for name, grad in grads.items()}


def starts(B: int, T: int) -> Tensor:
    """Positions [B, T] of documents of 23 ids, that begin elsewhere in each row."""
    place = torch.arange(T)
    return torch.minimum((place + torch.arange(B)[:, None]) % 23, place)


def assert_alike(found: Pass, expected: Pass, most: float) -> None:
    """The losses differ by at most `most` of theirs; the same parameters have gradients, and they differ by at most
    `most` of their norm, or of 1."""
    assert abs(found[0] - expected[0]) <= most * expected[0]
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert (grad - found[1][name]).norm() <= most * max(1.0, grad.norm().item()), name


def assert_same_bits(core: nn.Module, backward: Backward, ids: Tensor, targets: Tensor) -> None:
    """21 passes over the same ids give the same bits."""
    first = one(core, backward, ids, targets)
    for _ in range(20):
        again = one(core, backward, ids, targets)
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])
