"""The sweep: a model's loss over a split, every target scored once, the same figure every time.

A document is a sequence of inputs, each with the id that follows as its target. A window of inputs goes
through the model, and scores the targets that no window before it has scored:

    document   0 1 2 3 4 5 6 7 8 9        window 6, stride 3: the first window scores what it reads,
               [0 1 2 3 4 5]              each further one its last 3, with 3 more ids of context;
                     [  . . . 6 7 8]      the last one may be short
                            [ . . . 9]

A GPT reads at most `context` ids: its window is the context, and the stride is the caller's (the context,
if none is given: windows do not overlap). The other cores read any length and see the same receptive field
at every position: their windows are long, and overlap by what a target's receptive field needs.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dfcli.cores import GPTConfig
from dfcli.data.batches import IGNORED
from dfcli.data.conditions import Conditioning, Conditions
from dfcli.data.dataset import Dataset
from dfcli.errors import DfError, UsageError
from dfcli.system.device import Device
from dfcli.system.events import OnEvent, Progress, ignore
from dfcli.system.processes import ALONE, Processes

_BLOCK = 4096  # windows that are sorted by length together, so that little is padded


@dataclass(frozen=True)
class Loss:
    """The result of a sweep. `stride` is 1 for a core that sees its whole receptive field at every position."""

    nats: float  # summed over the targets
    tokens: int  # targets scored
    context: int
    stride: int
    limited: bool = False  # whether only the first targets were scored

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens


def sweep(
    core: nn.Module,
    dataset: Dataset,
    split: str,
    device: Device,
    *,
    stride: int | None = None,
    limit: int | None = None,
    first: int | None = None,
    conditioning: Conditioning | None = None,
    most: int | None = None,
    processes: Processes = ALONE,
    on_event: OnEvent = ignore,
) -> Loss:
    """The loss of `core` (on `device`) over a split of `dataset`; several `processes` share the windows.

    `stride` (a GPT's only): from 1 to the context; each target then sees at least context - stride ids,
    where its document has them. `limit`: about this many targets instead of all, in whole windows spread
    evenly over the split, always the same. `first`: exactly that many targets from the start of the split.
    `conditioning`: what the core is told beside the ids. `most`: positions of one forward pass, or one window.
    Losses are summed in float64; the core is put into eval mode and back.
    Raises UsageError for a stride out of range, DfError if the split has nothing to score, CorruptError
    from the data.
    """
    config: Any = core.config
    context: int = config.context
    windowed = isinstance(config, GPTConfig)
    if stride is not None and not 1 <= stride <= context:
        raise UsageError(f"the stride must be from 1 to the context of {context}, not {stride}")
    if windowed:
        window, step = context, stride or context
    else:
        step = _chunk(context, limit) if first is None else min(_chunk(context, None), max(context, first))
        window = step + context - 1
    plan = _Windows(dataset, split, window, step)
    if plan.targets == 0:
        raise DfError(f"the split {split!r} of {dataset.name} is too short: it has nothing to predict")

    share = 1.0 if limit is None else min(1.0, limit / plan.targets)
    wanted = math.ceil(share * plan.count)
    chosen = np.arange(wanted) * plan.count // wanted
    total = plan.targets if wanted == plan.count else None
    limited = first is not None and first < plan.targets
    if first is not None and limited:
        plan.targets = total = first
        chosen = np.arange(bisect.bisect_left(range(plan.count), first, key=plan.scored_before))
    positions = positions_at_once(config.vocab_size, device)
    positions = min(positions, most or positions)
    conditions = None if conditioning is None else Conditions(conditioning, dataset, split)
    nats, tokens = 0.0, 0
    training = core.training
    core.eval()
    try:
        with torch.no_grad(), device.autocast():  # FSDP cannot train a core that has run in inference mode
            for ids, targets, documents, places in plan.batches(chosen[processes.rank :: processes.count], positions):
                where = device.torch_device
                told = {} if conditions is None else {"condition": conditions.at(documents, places).to(where)}
                logits = core(torch.from_numpy(ids).to(where), **told)
                nats += _nats(logits, torch.from_numpy(targets).to(where))
                tokens += int((targets != IGNORED).sum())
                done = tokens * processes.count  # about: the others have come as far
                on_event(Progress("evaluation", min(done, total or done), total, "tokens"))
    finally:
        core.train(training)
    nats, count = processes.sums([nats, tokens])
    tokens = round(count)
    if total is None:
        on_event(Progress("evaluation", tokens, tokens, "tokens"))  # now it is known: that was all
    return Loss(nats, tokens, context, step if windowed else 1, limited)


def _chunk(context: int, limit: int | None) -> int:
    """Targets per window of a core with a receptive field of `context`: the overlap is at most a quarter of
    the work, unless only a few targets are wanted: then several windows, to see several places."""
    longest = max(8192, 3 * context)
    return longest if limit is None else min(longest, max(context, limit // 8))


def longest_window(config: Any, limit: int | None) -> int:
    """Positions of a window of a sweep over about `limit` targets, where the document is as long."""
    context: int = config.context
    return context if isinstance(config, GPTConfig) else _chunk(context, limit) + context - 1


def positions_at_once(vocab_size: int, device: Device) -> int:
    """Positions of one forward pass: many enough to fill the device, few enough for its memory (the logits
    in float32)."""
    most, logits = (2**13, 2**26) if device.kind == "cpu" else (2**16, 2**28)
    return max(1, min(most, logits // vocab_size))


def _nats(logits: Tensor, targets: Tensor) -> float:
    """Summed cross-entropy of logits [B, T, V] and targets [B, T], where they are not ignored."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return float(np.sum(losses.cpu().numpy(), dtype=np.float64))


class _Windows:
    """All windows of a split, in order, as numbers 0 .. count - 1; the first `targets` targets are scored."""

    def __init__(self, dataset: Dataset, split: str, window: int, stride: int) -> None:
        self.split = dataset.splits[split]
        self.window, self.stride = window, stride
        self.extra = 0 if dataset.boundary is None else dataset.lead - 1  # boundary ids before the stored one
        self.starts = np.asarray(self.split.offsets[:-1])
        # Inputs of each document: the last id has a target only where a line's end is one.
        self.inputs = np.diff(self.split.offsets) + self.extra - (not dataset.lines)
        scored = np.maximum(self.inputs - self.extra, 0)
        further = -(-np.maximum(self.inputs - window, 0) // stride)
        self.ends = np.cumsum(np.where(scored > 0, 1 + further, 0))
        self.count = int(self.ends[-1]) if len(self.ends) else 0
        self.targets = int(scored.sum())
        self.before = np.cumsum(scored) - scored  # targets of the documents before each

    def scored_before(self, window: int) -> int:
        """How many targets stand before the first that a window scores."""
        document = int(np.searchsorted(self.ends, window, side="right"))
        inside = window - (int(self.ends[document - 1]) if document else 0)
        begin = inside * self.stride + self.window - self.stride - self.extra if inside else 0
        return int(self.before[document]) + begin

    def batches(
        self, chosen: NDArray[np.int64], positions: int
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
        """The chosen windows as ids and targets [B, T] int64, B T <= positions (or B = 1), padded to the
        right, which a causal model does not see, with the documents [B, 1] that they are of and the place [B, T] of
        each input in its document. Windows of similar length stand together."""
        for at in range(0, len(chosen), _BLOCK):
            numbers = chosen[at : at + _BLOCK]
            documents = np.searchsorted(self.ends, numbers, side="right")
            firsts = np.where(documents > 0, self.ends[documents - 1], 0)
            begins = (numbers - firsts) * self.stride
            ends = np.minimum(begins + self.window, self.inputs[documents])
            scores = np.where(begins > 0, begins + self.window - self.stride, 0)
            scores = np.maximum(scores, self.extra)
            lengths = ends - begins
            order = np.argsort(-lengths, kind="stable")
            while len(order):
                longest = int(lengths[order[0]])
                rows, order = np.split(order, [max(1, positions // longest)])
                column = begins[rows, None] + np.arange(longest)  # inputs, counted in their document
                inside = column < ends[rows, None]
                place = np.clip(column - self.extra, 0, None)  # the lead repeats the stored boundary
                stored = np.where(inside, self.starts[documents[rows], None] + place, 0)
                targets = self.split.take(stored + 1).astype(np.int64)
                beyond = self.before[documents[rows], None] + column - self.extra >= self.targets
                targets[~inside | beyond | (column < scores[rows, None])] = IGNORED
                ids = self.split.take(stored).astype(np.int64)
                last = self.inputs[documents[rows], None] - 1
                yield ids, targets, documents[rows, None], np.minimum(column, last) - self.extra
