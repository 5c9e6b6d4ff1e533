"""The learning rate as a pure function of how far training is."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dfcli.training.settings import Recipe


def lr_factor(recipe: Recipe, step: int, fraction: float, val_losses: Sequence[float] = ()) -> float:
    """What the peak learning rate is multiplied by for update `step` (counted from 0).

    `fraction` is the share of the budget used before the update: step / steps, or time spent / time there is.
    The rise is linear over `warmup` steps, without a step at rate 0 (nanoGPT). Then, from `decay_start` of the budget
    on (not before the rise is over): cosine and linear fall to `final_lr` at the end of the budget; step drops to it at
    once. plateau multiplies by `final_lr` each time that more than `patience` evaluations in a row were no better (by a
    share of 1e-4) than the best of `val_losses` (torch's ReduceLROnPlateau).
    """
    rise = (step + 1) / (recipe.warmup + 1) if step < recipe.warmup else 1.0
    final = recipe.final_lr
    if recipe.schedule == "constant":
        return rise
    if recipe.schedule == "step":
        return rise * (final if fraction >= recipe.decay_start else 1.0)
    if recipe.schedule == "plateau":
        return rise * final ** _drops(val_losses, recipe.patience)
    start = max(recipe.decay_start, min(1.0, recipe.warmup / recipe.steps) if recipe.steps else 0.0)
    way = 1.0 if fraction >= 1 else max(0.0, (fraction - start) / (1 - start)) if start < 1 else 0.0
    if recipe.schedule == "cosine":
        way = (1 - math.cos(math.pi * way)) / 2
    return rise * (1 - (1 - final) * way)


def _drops(val_losses: Sequence[float], patience: int) -> int:
    best, bad, drops = math.inf, 0, 0
    for loss in val_losses:
        better = loss < best * (1 - 1e-4)
        best, bad = (loss, 0) if better else (best, bad + 1)
        if bad > patience:
            drops, bad = drops + 1, 0
    return drops
