"""What training minimises, and where its gradients go."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from dfcli.data.batches import IGNORED

# A pass forwards and backwards: of ids, targets and positions [B, T], and how many targets the mean is over. Adds the
# mean's gradients to those of the parameters, and gives the sum, see `cross_entropy`.
Backward = Callable[[Tensor, Tensor, Tensor | None, int], Tensor]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits [B, T, V] and targets int64 [B, T], in nats, in float32, summed over the targets that are
    not IGNORED; a scalar."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def add_gradient(p: Tensor, grad: Tensor) -> None:
    """Add a gradient to the one that a parameter may have."""
    p.grad = grad if p.grad is None else p.grad + grad
