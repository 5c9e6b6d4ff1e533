"""The presets against what their sources publish."""

from __future__ import annotations

from typing import Any

import pytest

from dfcli import cores
from dfcli.errors import UsageError
from dfcli.training.presets import PRESETS, preset
from dfcli.training.settings import Recipe

EVERY = [(kind, name) for kind in PRESETS for name in PRESETS[kind]]


def config_of(kind: str, name: str) -> Any:
    entry = preset(kind, name)
    return cores.config(entry["core"], {"vocab_size": entry["vocab_size"]} | entry["config"])


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_preset_is_valid_and_names_its_source(kind: str, name: str) -> None:
    entry = preset(kind, name)
    recipe = Recipe(**entry["recipe"])
    assert config_of(kind, name).parameters() > 0
    assert recipe.steps > 0
    assert min(recipe.log_every, recipe.eval_every, recipe.checkpoint_every) > 0
    assert entry["source"]
    assert entry["published"]
    assert set(entry) <= {
        "core", "vocab_size", "config", "recipe", "seed", "data", "corpus", "source", "published", "notes", "start",
        "condition",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name", "parameters"),
    [
        ("wavenet", "makemore", 76_579),
        ("wavenet", "sc09", 4_244_480),
        # table, 30 layers (dilated taps and mel to the gates, residual), skips, head
        ("wavenet", "vocoder", 256 * 128 + 30 * (256 * (3 * 128 + 80 + 1) + 128 * 129) + 128 * 3841 + 384 * 129),
        ("gpt", "nano", 10_745_088),
        ("gpt", "gpt2", 124_439_808),
        ("gpt", "gpt2-medium", 354_823_168),
        ("gpt", "gpt2-large", 774_030_080),
        ("gpt", "gpt2-xl", 1_557_611_200),
    ],
)
def test_published_parameter_counts(kind: str, name: str, parameters: int) -> None:
    assert config_of(kind, name).parameters() == parameters


@pytest.mark.parametrize(
    ("name", "context"), [("paper", 3070), ("speaker", 5116), ("vocoder", 6139), ("sc09", 4093), ("makemore", 8)]
)
def test_published_receptive_fields(name: str, context: int) -> None:
    assert config_of("wavenet", name).context == context


def test_counts_of_the_smaller_gpts() -> None:
    # nanoGPT prints 0.80M without positions; makemore 0.20M without the head; the lecture 10.788929 M.
    nano = config_of("gpt", "nano-cpu")
    assert round((nano.parameters() - nano.context * nano.channels) / 1e6, 2) == 0.80
    makemore = config_of("gpt", "makemore")
    assert round((makemore.parameters() - 27 * 64) / 1e6, 2) == 0.20
    assert config_of("gpt", "lecture").parameters() == 10_788_929


def test_nanogpts_recipe() -> None:
    recipe = Recipe(**preset("gpt", "nano-cpu")["recipe"])
    assert (recipe.batch_size, recipe.steps, recipe.lr, recipe.warmup, recipe.clip) == (12, 2000, 1e-3, 100, 1.0)
    assert (recipe.betas, recipe.weight_decay, recipe.decay) == ((0.9, 0.99), 0.1, "matrices")
    assert recipe.lr * recipe.final_lr == pytest.approx(1e-4)


def test_a_step_of_gpt2_is_half_a_million_tokens() -> None:
    recipe = Recipe(**preset("gpt", "gpt2")["recipe"])
    assert recipe.batch_size * recipe.accumulate * 1024 == 491_520


def test_an_unknown_preset_lists_those_there_are() -> None:
    with pytest.raises(UsageError) as caught:
        preset("wavenet", "nano")
    assert caught.value.hint == "there are makemore, paper, speaker, vocoder, sc09"
