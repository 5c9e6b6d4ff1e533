from __future__ import annotations

import math

import pytest
import torch

from dfcli.training.schedule import lr_factor
from dfcli.training.settings import Recipe


def test_cosine_is_nanogpts() -> None:
    recipe = Recipe(steps=2000, schedule="cosine", warmup=100, final_lr=0.1)

    def nanogpt(it: int) -> float:
        if it < 100:
            return (it + 1) / 101
        ratio = (it - 100) / (2000 - 100)
        return 0.1 + 0.5 * (1 + math.cos(math.pi * ratio)) * 0.9

    for step in (0, 1, 50, 99, 100, 101, 777, 1500, 1999):
        assert lr_factor(recipe, step, step / 2000) == pytest.approx(nanogpt(step), abs=1e-12)


def test_linear_holds_then_falls_to_the_end() -> None:
    recipe = Recipe(minutes=1, schedule="linear", warmup=10, decay_start=0.3, final_lr=0.0)
    assert lr_factor(recipe, 0, 0.0) == pytest.approx(1 / 11)
    assert lr_factor(recipe, 10, 0.2) == 1.0
    assert lr_factor(recipe, 50, 0.3) == 1.0
    assert lr_factor(recipe, 90, 0.65) == pytest.approx(0.5)
    assert lr_factor(recipe, 99, 1.0) == 0.0


def test_step_drops_at_its_share() -> None:
    recipe = Recipe(steps=200_000, schedule="step", decay_start=0.75, final_lr=0.1)
    assert lr_factor(recipe, 149_999, 149_999 / 200_000) == 1.0
    assert lr_factor(recipe, 150_000, 150_000 / 200_000) == 0.1


def test_constant_stays() -> None:
    assert {lr_factor(Recipe(steps=10), step, step / 10) for step in range(10)} == {1.0}


@pytest.mark.parametrize(
    "losses",
    [
        [3.0, 2.0, 1.0],
        [1.0] * 20,
        [2.0, 1.9, 1.95, 1.91, 1.9, 1.93, 1.92, 1.9, 1.85, 1.9, 1.9, 1.9, 1.9, 1.9, 1.9, 1.9, 1.8],
    ],
)
def test_plateau_is_torchs(losses: list[float]) -> None:
    recipe = Recipe(steps=1000, schedule="plateau", final_lr=0.2, patience=5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.2, patience=5)
    for i, loss in enumerate(losses):
        scheduler.step(loss)
        assert lr_factor(recipe, 500, 0.5, losses[: i + 1]) == pytest.approx(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "step", "plateau"])
def test_every_schedule_stays_within_bounds(schedule: str) -> None:
    for warmup, start in ((0, 0.0), (5, 1.0), (2000, 0.5), (10, 0.3)):
        recipe = Recipe(steps=100, schedule=schedule, warmup=warmup, decay_start=start, final_lr=0.1)
        factors = [lr_factor(recipe, step, step / 100) for step in range(101)]
        assert all(0 <= factor <= 1 for factor in factors)
