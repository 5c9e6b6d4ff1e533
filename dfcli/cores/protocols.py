"""What training and generation expect of the code that computes: a backend for steps, an engine for generation.

The protocols stand below everything that implements or uses them. PyTorch's own implementations are the references
(`training/backend.py`, `generation/plain.py`); `kernels/` holds compiled ones, which may be absent.

Shapes: B sequences, T positions, V ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from .wavenet import Condition

CHUNK = 8192  # positions that `prefill` reads at once: their activations must fit into memory


class Picking(NamedTuple):
    """How an id is picked from logits, as plain numbers for compiled code. The defaults filter nothing.

    `generation.sampling` has the rules, and `generation.request.Filters` makes and checks one."""

    temperature: float = 1.0  # 0: the largest logit
    top_k: int = 2**31 - 1  # ids to keep; V or more keeps all
    top_p: float = 1.0
    min_p: float = 0.0


class Engine(Protocol):
    """A model in mid-sequence, for B sequences that advance together."""

    name: str  # as the result calls it: "plain", "numba", ...
    reason: str  # why one would take it, a clause

    def start(self, batch: int) -> None:
        """Forget everything; B = batch from here on."""
        ...

    def prefill(self, ids: NDArray[np.int64], condition: Condition | None = None) -> None:
        """Read ids [B, T], T >= 1, at once. Called once after `start`, with at most the core's context of ids.

        The index of `condition` is [B, T], of these ids. A conditioned model needs one in every call."""
        ...

    def generate(
        self, uniforms: NDArray[np.float64], picking: Picking, condition: Condition | None = None
    ) -> NDArray[np.int64]:
        """Make n further ids of each sequence: uniforms [B, n] in [0, 1) -> ids [B, n]. The index of `condition` is
        [B, n], of the ids that are made and read here: the row of an id is about the id after it.

        Id j is `sampling.pick` of the logits after everything before it, with uniforms[:, j]. It is then read in turn,
        so that calls can follow each other: where the chunks are cut changes nothing."""
        ...

    def finite(self) -> bool:
        """Whether the logits after the newest id are finite. Where they are not, the ids mean nothing."""
        ...


# A compiled pass of a micro-batch, called as `Backend.backward`: gives the summed cross-entropy and the gradients.
Pass = Callable[[Tensor, Tensor, Tensor | None, Any, int], tuple[Tensor, list[tuple[Tensor, Tensor]]]]


class Backend(Protocol):
    """Computes a training step's loss, gradients and the parts of the optimiser that have compiled versions."""

    name: str  # "torch" or "compiled"
    threads: int  # that PyTorch's own operations should use beside this backend
    sparse: bool  # whether gradients of n-gram tables hold only the rows that were read

    def warm_up(self, batch: Callable[[], Any], on_event: Callable[[object], None]) -> None:
        """Do what has to be done once in a process and counts as training time. `batch` gives a batch to try."""
        ...

    def backward(self, ids: Tensor, targets: Tensor, positions: Tensor | None, condition: Any, count: int) -> Tensor:
        """The pass of a micro-batch, forward and backward: ids and targets int64 [B, T]; positions int64 [B, T], how
        far each id is from its document's start, or None; the core's condition, or None.

        Adds the gradients of the cross-entropy over `count` to those of the parameters. Returns the cross-entropy
        in nats, summed over the targets that are scored; a scalar. Dropout draws from torch's default generator."""
        ...

    def orthogonalise_all(self, matrices: list[Tensor]) -> list[Tensor]:
        """`training.optim.orthogonalise_all`: Muon's Newton-Schulz steps of each matrix [m, n]."""
        ...

    def update_rows(self, tables: list[tuple[Tensor, ...]], lr: float, eps: float) -> None:
        """`training.optim.update_rows`: RMSprop of the rows of n-gram tables, in place."""
        ...


def prefill(core: nn.Module, ids: Tensor, state: Any, condition: Condition | None = None) -> tuple[Tensor, Any]:
    """Let a core read ids [B, T] after `state`, at most CHUNK positions at once -> logits [B, V], the new state."""
    model: Any = core  # every core has `prefill`, which nn.Module's type does not tell
    logits, size = ids.new_empty(0), max(1, CHUNK // len(ids))
    for begin in range(0, ids.shape[1], size):
        columns = slice(begin, begin + size)
        part = () if condition is None else (condition._replace(index=condition.index[:, columns]),)
        logits, state = model.prefill(ids[:, columns], state, *part)
    return logits, state
