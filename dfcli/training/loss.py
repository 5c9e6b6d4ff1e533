"""What training minimises."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dfcli.data.batches import IGNORED


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits [B, T, V] and targets int64 [B, T], in nats, in float32, summed over the targets that are
    not IGNORED; a scalar."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
