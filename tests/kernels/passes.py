"""The loss and the gradients by the core and by what stands in for it, side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfcli.cores.protocols import Pass as Kernel
from dfcli.system.device import resolve
from dfcli.training.loss import cross_entropy

needs_amx = pytest.mark.skipif(resolve("cpu").precision != "bfloat16", reason="for processors with AMX")
Pass = tuple[Tensor, dict[str, Tensor]]  # the loss, and the gradients of the parameters that have one


def plain(core: nn.Module) -> Kernel:
    """By the core's own `forward`."""

    def backward(ids: Tensor, targets: Tensor, positions: Tensor | None, condition: Any, count: int) -> Any:
        more = {} if condition is None else {"condition": condition}
        loss = cross_entropy(core(ids, positions, **more), targets)
        ps = list(core.parameters())
        grads = torch.autograd.grad(loss / count, ps, allow_unused=True)
        return loss.detach(), [(p, grad) for p, grad in zip(ps, grads, strict=True) if grad is not None]

    return backward


def autocast(core: nn.Module) -> Kernel:
    """By the core's own `forward` with products in bfloat16."""

    def backward(*given: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(core)(*given)

    return backward


def both(core: nn.Module) -> tuple[Kernel, Kernel]:
    """By PyTorch in float32 and in bfloat16."""
    return plain(core), autocast(core)


def one(
    core: nn.Module,
    kernel: Kernel,
    ids: Tensor,
    targets: Tensor,
    positions: Tensor | None = None,
    condition: Any = None,
) -> Pass:
    """A pass by `kernel`, whose parameters are those of `core`, twice, as by two micro-batches; the same noise every
    time."""
    torch.manual_seed(0)
    loss, grads = kernel(ids, targets, positions, condition, 3)
    _, more = kernel(ids.flip(0), targets, positions, condition, 3)
    names = {p: name for name, p in core.named_parameters()}
    total: dict[str, Tensor] = {}
    for p, grad in grads + more:
        grad = grad.to_dense() if grad.is_sparse else grad
        total[names[p]] = total[names[p]] + grad if names[p] in total else grad
    return loss, total


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


def assert_same_bits(core: nn.Module, kernel: Kernel, ids: Tensor, targets: Tensor) -> None:
    """21 passes over the same ids give the same bits."""
    first = one(core, kernel, ids, targets)
    for _ in range(20):
        again = one(core, kernel, ids, targets)
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])


def assert_rounded(found: Pass, expected: Pass, autocast: Pass) -> None:
    """`found` is not `expected`, but no farther from it than twice what PyTorch's products in bfloat16 are, all in all
    and in each parameter, where the least error that counts is a thousandth of the norm."""
    assert found[0] != expected[0]
    assert abs(found[0] - expected[0]) <= 2 * abs(autocast[0] - expected[0]) + 1e-3 * expected[0]
    for name, grad in expected[1].items():
        error, usual = ((each[1][name] - grad).norm() for each in (found, autocast))
        assert error <= 2 * usual + 1e-3 * grad.norm(), name
