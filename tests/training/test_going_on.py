"""Training that starts from weights: a run's, or those of a Hugging Face folder."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from dfcli.errors import UsageError
from dfcli.evaluation.evaluate import evaluate
from dfcli.ingest.prepare import prepare
from dfcli.runs import Run
from dfcli.runs.export import export
from dfcli.system.events import Note
from dfcli.training.train import plan, train

SMALL = {"layers": "1", "heads": "2", "channels": "16", "context": "16", "ngrams": "1"}


def text(seed: int, words: str) -> str:
    return " ".join(random.Random(seed).choices(words.split(), k=3000))


@pytest.fixture
def start(tmp_path: Path) -> Run:
    (tmp_path / "a.txt").write_text(text(1, "the cat sat on a mat and ran"))
    made = train("gpt", [str(tmp_path / "a.txt")], name="a", steps=60, device="cpu", overrides=SMALL)
    return Run.open(made.run)


def test_going_on_is_never_worse_than_the_start(start: Run, tmp_path: Path) -> None:
    before = start.load().state["val_loss"]
    for lr, better in ((1e-3, True), (50.0, False)):
        events: list[object] = []
        made = train("gpt", init="a", name=f"b{lr}", steps=30, lr=lr, device="cpu", on_event=events.append)
        assert made.val_loss is not None
        assert made.val_loss <= before + 1e-6
        assert (made.best_step != 0, made.val_loss < before - 1e-4) == (better, better)
        run = Run.open(made.run)
        assert 0 in (run.resolve("best"), run.steps()[0]) or better
        assert run.state(run.resolve("best"))["val_loss"] == made.val_loss
        told = [event.text for event in events if isinstance(event, Note)]
        assert any(f"went from {before:.4f} to {made.val_loss:.4f}" in each for each in told)


def test_the_start_is_kept_where_only_a_part_of_the_validation_split_became_better(tmp_path: Path) -> None:
    """The part that is measured on the way, the first window, is like the new data; the rest is like the old."""
    files = {name: str(tmp_path / f"{name}.txt") for name in ("old", "new", "val")}
    Path(files["old"]).write_text("cdefghab" * 500)
    Path(files["new"]).write_text("hgfedcba" * 500)
    Path(files["val"]).write_text("hgfedcba" * 3 + "cdefghab" * 100)
    for name in ("old", "new"):
        prepare([files[name]], val=[files["val"]], name=name).close()
    train("gpt", ["old"], name="a", steps=40, device="cpu", overrides=SMALL)
    events: list[object] = []
    made = train(
        "gpt", ["new"], init="a", name="b", steps=60, lr=0.02, device="cpu", on_event=events.append,
        overrides={"eval_tokens": "16", "eval_every": "10"},
    )  # fmt: skip
    first, run = evaluate("a", device="cpu").loss, Run.open("b")
    on_the_part = run.state(60)["val_losses"]
    assert min(on_the_part) < on_the_part[0] - 0.5  # there, what was trained is far better
    assert (made.start_val_loss, made.val_loss) == (pytest.approx(first), pytest.approx(first))
    assert (made.best_step, run.resolve("best"), run.resolve("last")) == (0, 0, 60)
    assert evaluate("b", device="cpu").loss == pytest.approx(first)
    assert any("nothing was better than the start" in event.text for event in events if isinstance(event, Note))
    assert train("gpt", name="b", resume=True, device="cpu") == made
    assert run.resolve("best") == 0


def test_the_recipe_goes_on_gently(start: Run, tmp_path: Path) -> None:
    earlier = start.info["recipe"]
    made = plan("gpt", init="a", steps=100, device="cpu").recipe
    assert (made.optimizer, made.lr) == (earlier["optimizer"], pytest.approx(0.3 * earlier["lr"]))
    assert (made.warmup, made.final_lr, made.eval_tokens) == (10, 0.0, 0)


def test_the_optimizers_state_goes_on_where_the_optimizer_stays(start: Run) -> None:
    before = start.load("best", optimizer=True).optimizer
    assert before
    for name, overrides in {"same": {}, "other": {"optimizer": "adamw"}}.items():
        train("gpt", init="a", name=name, steps=1, device="cpu", overrides=overrides)
        after = Run.open(name).load(0, optimizer=True).optimizer
        assert after is not None
        kept = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        assert kept == (name == "same")


def test_what_was_known_before_is_measured_again(start: Run, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text(text(2, "ran and sat the cat then that mad man"))
    events: list[object] = []
    train("gpt", [str(tmp_path / "b.txt")], init="a", name="b", steps=40, device="cpu", on_event=events.append)
    told = [event.text for event in events if isinstance(event, Note) and "on the data of run `a`" in event.text]
    assert len(told) == 1
    before, after = (float(word) for word in told[0].split(" from ")[1].split(" to "))
    assert before == pytest.approx(start.load().state["val_loss"], abs=1e-3)
    assert after > before


def test_a_folder_is_trained_on_and_resumed(start: Run, tmp_path: Path) -> None:
    values = SMALL | {"position": "learned", "norm": "layernorm", "qk_norm": "false", "activation": "gelu_tanh"}
    first = train("gpt", [str(tmp_path / "a.txt")], name="g", steps=40, device="cpu", overrides=values)
    export(Run.open("g"), tmp_path / "hf")
    made = train("gpt", [str(tmp_path / "a.txt")], init=str(tmp_path / "hf"), name="h", steps=20, device="cpu")
    assert first.val_loss is not None
    assert made.val_loss is not None
    assert made.val_loss <= first.val_loss + 1e-4
    assert Run.open("h").info["init"] == str(tmp_path / "hf")
    assert Run.open("h").info["recipe"]["optimizer"] == "adamw"
    assert train("gpt", name="h", init=str(tmp_path / "hf"), steps=20, resume=True, device="cpu") == made
    with pytest.raises(UsageError, match="trained elsewhere, on data that are not here"):
        train("gpt", init=str(tmp_path / "hf"), steps=3, device="cpu")


def test_a_preset_that_starts_from_published_weights(start: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="starts from the weights of a published GPT-2") as caught:
        plan("gpt", [str(tmp_path / "a.txt")], preset="finetune_shakespeare")
    assert "--init FOLDER" in caught.value.hint
    values = SMALL | {"position": "learned", "norm": "layernorm", "qk_norm": "false", "activation": "gelu_tanh"}
    train("gpt", [str(tmp_path / "a.txt")], name="g", steps=3, device="cpu", overrides=values)
    export(Run.open("g"), tmp_path / "hf")
    made = plan("gpt", [str(tmp_path / "a.txt")], preset="finetune_shakespeare", init=str(tmp_path / "hf"))
    assert (made.config.channels, made.recipe.lr, made.recipe.steps) == (16, 3e-5, 20)
    with pytest.raises(UsageError, match="--init takes the model of another run"):
        plan("gpt", preset="nano", init="g")
