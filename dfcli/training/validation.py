"""What a training measures of its model on the way: the validation loss, and a short text to look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dfcli import cores
from dfcli.codecs import TextCodec
from dfcli.cores.protocols import Picking
from dfcli.data.dataset import Dataset, reopen
from dfcli.evaluation.sweep import sweep
from dfcli.generation.plain import Plain
from dfcli.generation.sampling import Dice
from dfcli.runs.huggingface import start
from dfcli.runs.run import Run
from dfcli.system.device import Device
from dfcli.system.events import OnEvent
from dfcli.system.processes import Processes
from dfcli.training.memory import evaluated_together
from dfcli.training.plan import Plan
from dfcli.training.sharding import scoring

PREVIEW_TOKENS = 120
EARLIER_TOKENS = 32_768


@dataclass(frozen=True)
class Validation:
    """How a model in training is evaluated."""

    loss: Callable[[], float]  # the validation loss, in nats a token
    tokens: int  # about how many targets it scores
    preview: Callable[[], str] | None = None  # makes a short text
    of_start: bool = False  # also before the first step: weights that were trained before may stay the best


def validation_of(
    core: cores.Core, dataset: Dataset, plan: Plan, processes: Processes, on_event: OnEvent
) -> Validation | None:
    """The loss of `core` over about as many targets of the validation split as the recipe says; None where there is
    none that has a next token to predict."""
    val, limit = dataset.splits.get("val"), plan.recipe.eval_tokens
    if val is None or val.longest + dataset.lines < 2:
        return None

    def loss() -> float:
        return sweep(
            core, dataset, "val", plan.device, limit=limit or None, conditioning=plan.conditioning, most=_most(plan),
            processes=scoring(core, processes), on_event=on_event,
        ).mean  # fmt: skip

    return Validation(loss, min(limit or val.tokens_count, val.tokens_count), of_start=plan.init is not None)


def _most(plan: Plan) -> int | None:
    """Positions of a forward pass while a training takes its part of a GPU; None: as many as at other times."""
    return evaluated_together(plan.config, plan.recipe, plan.device) if plan.device.kind == "cuda" else None


def earlier_loss(plan: Plan, core: cores.Core, processes: Processes, on_event: OnEvent) -> float | None:
    """The loss on the data that the weights of `plan.init` were trained on, over about EARLIER_TOKENS of its validation
    split; None where that data is gone, or is what is trained on now."""
    parent = start(plan.init) if plan.init else None
    if not isinstance(parent, Run) or not parent.dataset["name"] or plan.dataset is None:
        return None
    if (old := reopen(parent.dataset)) is None:
        return None
    with old:
        if old.fingerprint == plan.dataset.fingerprint or "val" not in old.splits:
            return None
        limit = EARLIER_TOKENS
        return sweep(
            core, old, "val", plan.device, limit=limit, conditioning=parent.conditioning, most=_most(plan),
            processes=scoring(core, processes), on_event=on_event,
        ).mean  # fmt: skip


def preview_of(core: cores.Core, dataset: Dataset, device: Device, seed: int) -> Callable[[], str] | None:
    """Makes a short text with the model as it is; None for audio."""
    codec = dataset.codec
    if not isinstance(codec, TextCodec):
        return None
    first = dataset.boundary if dataset.boundary is not None else codec.id_of_newline
    opening = np.full((1, dataset.lead), 0 if first is None else first, np.int64)

    def preview() -> str:
        core.eval()
        try:
            engine = Plain(core, device)
            engine.start(1)
            engine.prefill(opening[:, -core.context :])
            return codec.decode(engine.generate(Dice(seed, [0]).draw(PREVIEW_TOKENS), Picking(0.8))[0])
        finally:
            core.train()

    return preview
