from __future__ import annotations

import pytest

from dfcli.errors import UsageError
from dfcli.training.settings import Recipe, change, override


def test_overrides_go_where_they_belong_with_their_types() -> None:
    config, recipe = override(
        "gpt", {"layers": "3", "bias": "false", "dropout": "0.1", "betas": "0.9,0.95", "clip": "1"}
    )
    assert config == {"layers": 3, "bias": False, "dropout": 0.1}
    assert recipe == {"betas": (0.9, 0.95), "clip": 1.0}
    assert isinstance(recipe["clip"], float)


def test_tuples_of_numbers() -> None:
    assert override("wavenet", {"dilations": "1,2,4"})[0] == {"dilations": (1, 2, 4)}


def test_an_unknown_key_lists_those_there_are() -> None:
    with pytest.raises(UsageError) as caught:
        override("wavenet", {"layers": "3"})
    assert "`layers`" in caught.value.message
    assert "dilations" in caught.value.hint
    assert "checkpoint_every" in caught.value.hint
    assert "vocab_size" not in caught.value.hint
    with pytest.raises(UsageError) as caught:
        override("gpt", {"layrs": "3"})
    assert caught.value.hint.startswith("did you mean `layers`?")


def test_the_vocabulary_is_not_a_choice() -> None:
    with pytest.raises(UsageError, match="vocab_size"):
        override("gpt", {"vocab_size": "10"})


@pytest.mark.parametrize(
    ("key", "text"),
    [("layers", "three"), ("layers", "3.5"), ("bias", "maybe"), ("lr", "fast"), ("dilations", "1,,2"), ("layers", "")],
)
def test_a_value_of_another_type_is_refused(key: str, text: str) -> None:
    core = "gpt" if key != "dilations" else "wavenet"
    with pytest.raises(UsageError, match="expected") as caught:
        override(core, {key: text})
    example = caught.value.hint.removeprefix(f"for example `--set {key}=").removesuffix("`")
    assert any(override(core, {key: example}))  # it works as it is typed


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", float("nan")), ("lr", -1.0), ("lr", float("inf")), ("batch_size", 0), ("batch_size", 10**9),
        ("optimizer", "adam"), ("schedule", "x"), ("betas", (0.9,)), ("betas", (0.9, 1.0)), ("clip", -0.1),
        ("packing", "all"), ("steps", -1), ("momentum", 2.0), ("final_lr", 1.5), ("on_nonfinite", "ignore"),
    ],
)  # fmt: skip
def test_a_recipe_checks_its_bounds(key: str, value: object) -> None:
    with pytest.raises(UsageError, match=key):
        change(Recipe(), {key: value})


def test_a_budget_replaces_the_other() -> None:
    recipe = change(Recipe(steps=10), {"minutes": 2.0})
    assert (recipe.steps, recipe.minutes) == (0, 2.0)
    recipe = change(recipe, {"steps": 5})
    assert (recipe.steps, recipe.minutes) == (5, 0.0)
    with pytest.raises(UsageError, match="exclude"):
        change(Recipe(), {"steps": 5, "minutes": 1.0})


def test_a_recipe_survives_json() -> None:
    import json
    from dataclasses import asdict

    recipe = Recipe(betas=(0.8, 0.95), steps=7)
    assert Recipe(**json.loads(json.dumps(asdict(recipe)))) == recipe
