"""How likely a model finds what it made: the mean loss of a clip under the model that generated it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from dfcli.cores import GPTConfig
from dfcli.generation.generator import Model

CHUNK = 4096  # ids scored in one forward pass of a core without windows


def mean_nats(model: Model, opening: NDArray[np.int64], ids: NDArray[np.integer[Any]]) -> float:
    """Nats per id of `ids` [n] after `opening` [m], each seen with at least half of the model's context."""
    core: Any = model.core
    whole = np.concatenate([opening, ids.astype(np.int64)])
    context = model.context
    step = max(1, context // 2) if isinstance(core.config, GPTConfig) else CHUNK
    reach = context if isinstance(core.config, GPTConfig) else context + step - 1
    first = max(1, len(opening))
    nats = 0.0
    with torch.inference_mode(), model.device.autocast():
        for start in range(first, len(whole), step):
            stop = min(start + step, len(whole))
            inputs = torch.from_numpy(whole[max(0, stop - 1 - reach) : stop - 1][None]).to(model.device.torch_device)
            targets = torch.from_numpy(whole[start:stop]).to(model.device.torch_device)
            logits = core(inputs)[0, -(stop - start) :].float()
            nats += float(F.cross_entropy(logits, targets, reduction="sum").double())
    return nats / max(1, len(whole) - first)
