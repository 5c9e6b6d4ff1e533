"""What a run's folder keeps: it goes on under another name, in another place, and as version 0.1 left it.

`golden/version-0.1` is a data home that version 0.1 wrote on a CPU, by this line, on 3,000 characters of nonsense:
df train gpt --data poem.txt --steps 9 --name old --seed 1 --batch-size 4 --set layers=1 --set heads=2 --set channels=8
--set context=16 --set dropout=0.1 --set log_every=2 --set eval_every=3 --set checkpoint_every=4 --set eval_tokens=200
--set compile=off --set ngrams=2
"""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dfcli.evaluation.evaluate import evaluate
from dfcli.runs.run import Run, rename
from dfcli.system.events import Note
from dfcli.system.files import read_json
from dfcli.training.events import Closing, Overfitting
from dfcli.training.train import finish, train

GOLDEN = Path(__file__).parent / "golden" / "version-0.1"
TINY = {"layers": "1", "heads": "2", "channels": "8", "context": "16", "batch_size": "4", "compile": "off"}
PARTLY = {"eval_every": "2", "eval_tokens": "64"}


def test_a_finished_run_of_version_0_1_has_its_result_in_its_new_place(home: Path) -> None:
    shutil.copytree(GOLDEN, home)
    result = train("gpt", name="old", resume=True)
    assert (result.run, result.path) == ("old", str(home / "runs" / "old"))
    assert (result.steps, result.best_step, result.tokens_seen, result.stopped) == (9, 9, 576, None)
    assert (result.closed, result.overfitting, result.last_val_loss) == (True, False, None)
    assert evaluate("old").loss == pytest.approx(result.val_loss, abs=1e-5)


def test_a_run_of_version_0_1_that_was_interrupted_ends_as_it_did_then(home: Path) -> None:
    shutil.copytree(GOLDEN, home)
    run = Run.open("old")
    weights, loss = run.load(9).model, read_json(run.path / "result.json")["val_loss"]
    shutil.rmtree(run.path / "step-00000009")
    (run.path / "result.json").unlink()
    result = train("gpt", name="old", resume=True)
    assert (result.steps, result.tokens_seen) == (9, 576)
    assert result.val_loss == pytest.approx(loss, abs=1e-4)
    for name, tensor in Run.open("old").load(9).model.items():
        assert torch.allclose(tensor, weights[name], atol=1e-5), name
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 6, 8, 9]


def test_a_run_that_is_renamed_and_copied_knows_where_it_lies(text: str, home: Path) -> None:
    first = train("gpt", [text], steps=3, name="a", overrides=TINY)
    rename("a", "b")
    shutil.copytree(home / "runs" / "b", home / "runs" / "c")
    for name in ("b", "c"):
        wanted = replace(first, run=name, path=str(home / "runs" / name))
        assert train("gpt", name=name, resume=True) == wanted
        assert finish(Run.open(name)) == wanted


def test_a_copy_of_an_interrupted_run_goes_on_by_itself(text: str, home: Path) -> None:
    line: dict[str, Any] = {"data": [text], "steps": 6, "overrides": TINY}
    polls = iter(range(100))
    train("gpt", **line, name="a", stop=lambda: "interrupted" if next(polls) >= 3 else None)
    shutil.copytree(home / "runs" / "a", home / "runs" / "b")
    results = [train("gpt", **line, name=name, resume=True) for name in ("b", "a")]
    assert results[0].path == str(home / "runs" / "b")
    assert results[0].val_loss == results[1].val_loss
    assert Run.open("b").steps() == Run.open("a").steps()


def test_resume_takes_the_same_data_from_another_folder(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line: dict[str, Any] = {"steps": 4, "name": "a", "resume": True, "overrides": TINY}
    polls = iter(range(100))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    first = train("gpt", ["../text.txt"], **line, stop=lambda: "interrupted" if next(polls) >= 2 else None)
    assert (first.steps, first.stopped) == (2, "interrupted")
    monkeypatch.chdir(tmp_path)
    assert train("gpt", ["text.txt"], **line).steps == 4
    (tmp_path / "link.txt").symlink_to("text.txt")
    assert train("gpt", ["link.txt"], **line).stopped is None


@pytest.mark.parametrize("way", ["resume", "finish", "evaluate"])
def test_a_stop_in_the_closing_evaluation_leaves_its_figure_to_the_next_command(text: str, way: str) -> None:
    closing = False

    def watch(event: object) -> None:
        nonlocal closing
        closing = closing or isinstance(event, Closing)

    line: dict[str, Any] = {"name": "a", "steps": 4, "overrides": TINY | PARTLY}
    result = train("gpt", [text], **line, on_event=watch, stop=lambda: "interrupted" if closing else None)
    assert (result.steps, result.stopped, result.closed) == (4, None, False)
    run = Run.open("a")
    assert result.val_loss == run.state(run.resolve("best"))["val_loss"]  # over a part
    assert run.result is not None
    assert not run.result["closed"]
    if way == "evaluate":
        whole = evaluate("a").loss
    else:
        done = finish(run) if way == "finish" else train("gpt", **line, resume=True)
        assert done.closed
        whole = done.val_loss
        assert whole == pytest.approx(evaluate("a").loss, abs=1e-6)
    assert whole != result.val_loss
    assert run.result["val_loss"] == whole
    assert run.result["closed"]


def test_overfitting_is_told_when_it_begins_and_at_the_end(tmp_path: Path) -> None:
    """1,800 random letters, which can be learned by heart, and 200 others."""
    letters = random.Random(0)
    (tmp_path / "noise.txt").write_text("".join(letters.choices("abcdefgh", k=2000)))
    wide = TINY | {"channels": "64", "batch_size": "16", "ngrams": "1", "dropout": "0"}
    events: list[object] = []
    result = train(
        "gpt", [str(tmp_path / "noise.txt")], steps=120, lr=0.02, name="a",
        overrides=wide | {"eval_every": "10", "eval_tokens": "0", "schedule": "constant"}, on_event=events.append,
    )  # fmt: skip
    assert result.overfitting
    assert result.best_step is not None
    assert 0 < result.best_step <= 80
    rows = Run.open("a").metrics()
    losses = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    assert min(losses, key=losses.__getitem__) == result.best_step
    (told,) = (event for event in events if isinstance(event, Overfitting))
    assert (told.best_step, told.best_val_loss) == (result.best_step, losses[result.best_step])
    assert told.val_loss == losses[told.step] > 1.01 * told.best_val_loss
    wanted = f"overfitting: the validation loss was lowest at step {result.best_step} of 120, and rose while"
    assert any(isinstance(event, Note) and event.text.startswith(wanted) for event in events)
