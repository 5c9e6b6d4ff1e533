"""Whole trainings through the API, on tiny models and data."""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from dfcli import cores
from dfcli.data.dataset import Dataset, list_datasets, remove_dataset
from dfcli.errors import CorruptError, DfError, UsageError
from dfcli.evaluation.sweep import sweep
from dfcli.ingest import download
from dfcli.ingest.download import corpus_path
from dfcli.ingest.prepare import prepare
from dfcli.ingest.reopen import origin, run_dataset
from dfcli.runs.run import Run, list_runs
from dfcli.system.device import Device, resolve
from dfcli.system.events import Choice, Note
from dfcli.system.files import read_json, write_json
from dfcli.training import memory
from dfcli.training.events import Finished, Sample, Saved, Started, Step
from dfcli.training.result import TrainResult
from dfcli.training.train import plan, train
from dfcli.training.trainer import Trainer

TINY_GPT = {"layers": "1", "heads": "2", "channels": "8", "context": "16", "dropout": "0.1", "batch_size": "4"}
TINY_WAVENET = {
    "dilations": "1,2",
    "cycles": "1",
    "residual": "4",
    "skip": "4",
    "head": "4",
    "window": "32",
    "batch_size": "2",
}
EVERY = {"log_every": "2", "eval_every": "3", "checkpoint_every": "4", "eval_tokens": "200"}


@pytest.fixture
def names(tmp_path: Path) -> str:
    """A file of 200 lines of 3 to 7 letters."""
    letters = random.Random(0)
    path = tmp_path / "names.txt"
    path.write_text("".join("".join(letters.choices("abcde", k=letters.randint(3, 7))) + "\n" for _ in range(200)))
    return str(path)


@pytest.fixture
def audio(tmp_path: Path) -> str:
    """A folder of 5 recordings of 300 samples."""
    folder = tmp_path / "audio"
    folder.mkdir()
    for i in range(5):
        sound = 0.5 * np.sin(np.arange(300) * (0.1 + 0.05 * i))
        soundfile.write(folder / f"{i}.wav", sound, 8000)
    return str(folder)


def stop_after(steps: int) -> Callable[[], str | None]:
    """Ask to stop when that many steps are made."""
    polls = iter(range(10**6))
    return lambda: "interrupted" if next(polls) >= steps else None


def timeless(run: Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in run.metrics()]


def test_a_training_from_file_to_figures(text: str) -> None:
    events: list[object] = []
    result = train("gpt", [text], steps=7, name="a", overrides=TINY_GPT | EVERY, previews=True, on_event=events.append)
    run = Run.open("a")
    assert (result.run, result.steps, result.stopped, result.preset) == ("a", 7, None, None)
    assert result.path == str(run.path)
    assert result.tokens_seen == 7 * 4 * 16
    assert result.tokens_per_second == pytest.approx(result.tokens_seen / result.train_seconds)

    core, checkpoint = run.build("best")
    dataset = Dataset.open(run.info["dataset"]["name"])
    assert dataset.fingerprint == run.info["dataset"]["fingerprint"]
    assert result.val_loss == pytest.approx(sweep(core, dataset, "val", resolve("cpu")).mean, rel=1e-6)
    assert result.best_step == checkpoint.step
    assert result.parameters == sum(p.numel() for p in core.parameters())

    rows = run.metrics()
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 6, 7]
    assert [row["step"] for row in rows if "val_loss" in row] == [3, 6, 7]
    kinds = [type(event) for event in events]
    assert kinds.index(Choice) < kinds.index(Started) < kinds.index(Step) < kinds.index(Saved) < kinds.index(Finished)
    assert all(len(event.text) == 120 for event in events if isinstance(event, Sample))
    assert sum(isinstance(event, Sample) for event in events) == 3
    assert json.loads((run.path / "result.json").read_text())["val_loss"] == result.val_loss


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "sgd"])
@pytest.mark.parametrize("kind", ["gpt", "wavenet"])
def test_stopped_and_resumed_equals_never_stopped(kind: str, optimizer: str, text: str, audio: str) -> None:
    data = [text] if kind == "gpt" else [audio]
    overrides = (TINY_GPT if kind == "gpt" else TINY_WAVENET) | EVERY | {"optimizer": optimizer, "accumulate": "2"}
    whole = train(kind, data, steps=9, name="whole", overrides=overrides)
    for steps in (2, 3, 100):
        line: dict[str, Any] = {"steps": 9, "name": "parts", "overrides": overrides, "resume": True}
        parts = train(kind, data, **line, stop=stop_after(steps))
        assert parts.stopped == ("interrupted" if steps < 100 else None)
    a, b = Run.open("whole"), Run.open("parts")
    assert timeless(a) == timeless(b)
    assert parts.val_loss == whole.val_loss
    assert (parts.tokens_seen, parts.best_step) == (whole.tokens_seen, whole.best_step)
    assert a.steps() == b.steps()
    for step in a.steps():
        for name in ("model.safetensors", "optimizer.safetensors"):
            files = [run.path / f"step-{step:08d}" / name for run in (a, b)]
            assert files[0].read_bytes() == files[1].read_bytes()


def test_resume_after_a_crash_drops_the_lines_after_the_checkpoint(text: str) -> None:
    class Killed(BaseException):
        pass

    def die(event: object) -> None:
        if isinstance(event, Step) and event.step == 8:
            raise Killed

    line: dict[str, Any] = {"steps": 10, "name": "a", "overrides": TINY_GPT | EVERY}
    with pytest.raises(Killed):
        train("gpt", [text], **line, on_event=die)
    run = Run.open("a")
    assert run.metrics()[-1]["step"] > run.steps()[-1]
    train("gpt", resume=True, name="a")
    train("gpt", [text], **line | {"name": "b"})
    assert timeless(run) == timeless(Run.open("b"))


@pytest.mark.parametrize("damage", ["bit", "gone"])
def test_a_damaged_history_is_set_aside_and_the_training_goes_on_exactly(text: str, damage: str) -> None:
    line: dict[str, Any] = {"steps": 9, "overrides": TINY_GPT | EVERY}
    train("gpt", [text], **line, name="whole")
    train("gpt", [text], **line, name="parts", stop=stop_after(6))
    whole, parts = Run.open("whole"), Run.open("parts")
    history = parts.path / "metrics.jsonl"
    spoiled = history.read_bytes().replace(b'"step": 2', b'"step": 3')
    history.unlink()
    if damage == "bit":
        history.write_bytes(spoiled)
        with pytest.raises(CorruptError, match=r"metrics\.jsonl is damaged"):
            parts.metrics()
    events: list[object] = []
    assert train("gpt", resume=True, name="parts", on_event=events.append).steps == 9
    said = [event.text for event in events if isinstance(event, Note) and "history begins anew" in event.text]
    assert len(said) == 1
    aside = sorted(parts.path.glob("metrics.damaged*"))
    assert [path.read_bytes() for path in aside] == ([spoiled] if damage == "bit" else [])
    assert all(path.name in said[0] for path in aside)
    assert timeless(parts) == [row for row in timeless(whole) if row["step"] > 6]
    for name in ("model.safetensors", "optimizer.safetensors"):
        files = [run.path / "step-00000009" / name for run in (whole, parts)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_makemores_preset_on_names(names: str) -> None:
    result = train("wavenet", [names], preset="makemore", steps=5, name="m", overrides={"eval_every": "2"})
    run = Run.open("m")
    assert run.info["core"]["name"] == "charwavenet"
    assert run.info["dataset"]["lines"]
    assert result.tokens_seen == 5 * 32
    assert result.seed == 42
    rows = run.metrics()
    assert rows[-1]["lr"] == pytest.approx(0.01)
    assert rows[0]["lr"] == pytest.approx(0.1)
    result = train("gpt", [names], preset="makemore", steps=2)
    assert result.run == "gpt-makemore-1"


def test_a_presets_corpus_is_the_fetched_file_whatever_dataset_has_its_name(
    names: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = download.RemoteFile("names.txt", "", Path(names).stat().st_size, "")
    monkeypatch.setitem(download.KNOWN, "names", [file])
    prepare([names], lines=True, name="names").close()
    with pytest.raises(UsageError) as missing:
        train("gpt", preset="makemore", steps=1)
    assert "df data get names" in missing.value.hint
    with pytest.raises(UsageError, match="with another split") as other:
        train("gpt", ["names"], preset="makemore", steps=1)
    assert other.value.hint.endswith(f": {names}")
    download.downloads().mkdir(parents=True)
    (download.downloads() / "names.txt").write_bytes(Path(names).read_bytes())
    for kind in ("gpt", "wavenet"):
        found = Run.open(train(kind, preset="makemore", steps=1).run).dataset
        assert found["name"].startswith("names-")
        assert found["sources"] == [str(download.downloads() / "names.txt")]


def test_any_core_on_any_data(text: str, audio: str, names: str) -> None:
    tiny = {key: value for key, value in TINY_WAVENET.items() if key != "window"} | {"window": "16"}
    assert train("wavenet", [text], steps=2, overrides=tiny).val_loss is not None
    assert train("gpt", [audio], steps=2, overrides=TINY_GPT).val_loss is not None
    lines = train("gpt", [names], preset="makemore", steps=1, overrides={"channels": "8"}, name="lines")
    assert lines.val_loss is not None


# --- resuming


def test_a_finished_run_is_left_alone(text: str) -> None:
    first = train("gpt", [text], steps=2, name="a", overrides=TINY_GPT)
    before = sorted((path, path.stat().st_mtime_ns) for path in Run.open("a").path.rglob("*"))
    os.remove(text)
    for dataset in list_datasets():
        dataset.close()
    events: list[object] = []
    assert train("gpt", resume=True, name="a", on_event=events.append) == first
    assert train("gpt", resume=True) == first
    assert any(isinstance(event, Note) and "finished" in event.text for event in events)
    assert sorted((path, path.stat().st_mtime_ns) for path in Run.open("a").path.rglob("*")) == before


def test_a_damaged_result_or_recipe_is_told(text: str) -> None:
    train("gpt", [text], steps=2, name="a", overrides=TINY_GPT)
    run = Run.open("a")
    wrong: list[dict[str, Any]] = [{"recipe": {"lr": -1}}, {"seed": []}, {"dataset": {}}]
    for name, changes in (("result.json", {"val_loss": []}), *(("run.json", changes) for changes in wrong)):
        good = (run.path / name).read_bytes()
        write_json(run.path / name, read_json(run.path / name) | changes)
        with pytest.raises(CorruptError, match=name):
            train("gpt", resume=True, name="a")
        (run.path / name).write_bytes(good)


def test_batches_that_are_not_finite_are_skipped_on_request_and_counted(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Trainer.backward
    broken = lambda self, batch, count: loss(self, batch, count) * (float("nan") if self.state.step in (2, 4) else 1)  # noqa: E731
    monkeypatch.setattr(Trainer, "backward", broken)
    skip = {"on_nonfinite": "skip", "skip_limit": "2"}
    for name, at in (("whole", 100), ("parts", 4), ("parts", 100)):
        line: dict[str, Any] = {"steps": 7, "name": name, "overrides": TINY_GPT | EVERY | skip, "resume": True}
        result = train("gpt", [text], **line, stop=stop_after(at))
    assert result.skipped == 2
    assert timeless(Run.open("whole")) == timeless(Run.open("parts"))
    with pytest.raises(DfError, match=r"step 5 is not finite \(1 batch was left out before\)"):
        train("gpt", [text], steps=7, name="few", overrides=TINY_GPT | skip | {"skip_limit": "1"})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"steps": 5}, "--steps"), ({"minutes": 1.0}, "--minutes"), ({"seed": 3}, "--seed"), ({"lr": 0.5}, "--lr"),
        ({"batch_size": 5}, "--batch-size"), ({"preset": "nano"}, "--preset"), ({"init": "a"}, "--init"),
        ({"overrides": {"layers": "2"}}, "--set layers"), ({"overrides": {"betas": "0.5,0.6"}}, "--set betas"),
        ({"data": ["other.txt"]}, "--data"),
    ],
)  # fmt: skip
def test_a_changed_option_is_refused_by_its_name(text: str, options: dict[str, Any], named: str) -> None:
    train("gpt", [text], steps=4, name="a", overrides=TINY_GPT, stop=stop_after(1))
    with pytest.raises(UsageError) as caught:
        train("gpt", **{"name": "a", "resume": True} | options)
    assert f"another {named}," in caught.value.message
    assert "--init a" in caught.value.hint
    assert Run.open("a").steps() == [1]


def test_the_same_options_are_no_change(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line: dict[str, Any] = {"steps": 4, "seed": 0, "lr": 0.01, "batch_size": 4, "name": "a"}
    tiny = {key: value for key, value in TINY_GPT.items() if key != "batch_size"}
    train("gpt", [text], **line, overrides=tiny, resume=True, stop=stop_after(2))
    monkeypatch.chdir(tmp_path)
    assert train("gpt", ["text.txt"], **line, overrides=tiny, resume=True).stopped is None


def test_another_kind_is_refused(text: str) -> None:
    train("gpt", [text], steps=2, name="a", overrides=TINY_GPT)
    with pytest.raises(UsageError, match="is a gpt, not a wavenet") as error:
        train("wavenet", name="a", resume=True)
    assert error.value.hint == "type `df train gpt --name a --resume`"


def test_a_run_keeps_its_data_when_the_sources_change(text: str) -> None:
    train("gpt", [text], steps=4, name="a", overrides=TINY_GPT, stop=stop_after(1))
    Path(text).write_text("something else entirely\n" * 100)
    other = train("gpt", [text], steps=1, name="b", overrides=TINY_GPT)
    assert Run.open(other.run).dataset["name"] == Run.open("a").dataset["name"] + "-2"
    assert train("gpt", steps=4, name="a", resume=True, overrides=TINY_GPT).steps == 4
    events: list[object] = []
    made = plan("gpt", init="a", on_event=events.append)
    assert made.data == (Run.open("a").dataset["name"],)
    assert made.dataset is not None
    made.dataset.close()
    train("gpt", [text], steps=4, name="c", overrides=TINY_GPT, stop=stop_after(1))
    remove_dataset(Run.open("c").dataset["name"])
    Path(text).write_text("something else again\n" * 100)
    with pytest.raises(DfError, match="has changed"):
        train("gpt", steps=4, name="c", resume=True, overrides=TINY_GPT)


def test_a_removed_dataset_is_prepared_again(text: str) -> None:
    train("gpt", [text], steps=4, name="a", overrides=TINY_GPT, stop=stop_after(2))
    remove_dataset(Run.open("a").info["dataset"]["name"])
    assert train("gpt", name="a", resume=True).steps == 4
    assert (
        Dataset.open(Run.open("a").info["dataset"]["name"]).fingerprint == Run.open("a").info["dataset"]["fingerprint"]
    )


def test_a_removed_dataset_with_a_name_is_prepared_again_as_it_was(tmp_path: Path, home: Path) -> None:
    lines = tmp_path / "names.txt"
    lines.write_text("".join(f"{a}{b}{c}\n" for a in "abcdefgh" for b in "aeiou" for c in "klmn"))
    (tmp_path / "val.txt").write_text("anna\nbob\n")
    prepare([str(lines)], name="names", lines=True, val=[str(tmp_path / "val.txt")], codec="bytes").close()
    train("gpt", ["names"], steps=2, name="a", overrides=TINY_GPT)
    remove_dataset("names")
    (home / "downloads").mkdir()  # a corpus of that name, as `df data get names` fetches it
    (home / "downloads" / "names.txt").write_bytes(b"abc\n" * 57_036 + b"\n")
    assert corpus_path("names") is not None

    with plan("gpt", init="a").dataset as dataset:  # type: ignore[union-attr]
        assert (dataset.lines, dataset.fingerprint) == (True, Run.open("a").dataset["fingerprint"])
    assert list_datasets() == []
    with run_dataset(Run.open("a")) as dataset:
        assert (dataset.name, dataset.fingerprint) == ("names", Run.open("a").dataset["fingerprint"])

    remove_dataset("names")
    lines.write_text("something else\n" * 100)
    with pytest.raises(DfError, match="the dataset names that run a was trained on is gone or has changed"):
        run_dataset(Run.open("a"))
    assert list_datasets() == []  # what was prepared in vain is not left behind


def test_a_record_of_another_shape_names_no_sources() -> None:
    for made in ("x", ["x"], {"sources": "x"}, {"sources": [1], "options": {}}, {"sources": ["x"], "options": []}):
        assert origin({"name": "a", "prepared": made, "sources": ["y"], "protocol": {}}) == ([], {})
    assert origin({"name": "a", "sources": ["y"], "protocol": {"lines": True}}) == (["y"], {"lines": True})


def test_of_piped_or_unknown_sources_nothing_else_is_prepared(
    text: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(Path(text).read_bytes())))
    train("gpt", ["-"], steps=2, name="piped", overrides=TINY_GPT)
    remove_dataset(Run.open("piped").dataset["name"])
    prepare([text], name="names").close()
    train("gpt", ["names"], steps=2, name="old", overrides=TINY_GPT)
    path = Run.open("old").path / "run.json"
    info = read_json(path)
    del info["dataset"]["prepared"]  # as an earlier version wrote it
    write_json(path, info)
    remove_dataset("names")
    for name in ("piped", "old"):
        with pytest.raises(DfError, match="is gone or has changed"):
            run_dataset(Run.open(name))
        with pytest.raises(UsageError, match="is gone"):
            plan("gpt", init=name)


def test_resume_falls_back_to_the_checkpoint_before_a_damaged_one(text: str) -> None:
    train("gpt", [text], steps=9, name="whole", overrides=TINY_GPT | EVERY)
    train("gpt", [text], steps=9, name="a", overrides=TINY_GPT | EVERY, stop=stop_after(5))
    run = Run.open("a")
    path = run.path / f"step-{run.steps()[-1]:08d}" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    events: list[object] = []
    assert train("gpt", name="a", resume=True, on_event=events.append).steps == 9
    assert any(isinstance(event, Note) and "passed over" in event.text for event in events)
    assert timeless(run) == timeless(Run.open("whole"))


def test_a_second_trainer_is_told_who_holds_the_run(text: str) -> None:
    train("gpt", [text], steps=4, name="a", overrides=TINY_GPT, stop=stop_after(1))
    with Run.open("a").lock(), pytest.raises(DfError, match="in use by process"):
        train("gpt", name="a", resume=True)


# --- what is refused leaves nothing behind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:77"}, "."),
        ({"device": "tpu"}, "tpu"),
        ({"preset": "gpt5"}, "gpt5"),
        ({"overrides": {"layrs": "3"}}, "layrs"),
        ({"overrides": {"layers": "0"}}, "layers"),
        ({"overrides": {"channels": "7"}}, "channels"),
        ({"overrides": {"lr": "nan"}}, "lr"),
        ({"overrides": {"steps": "3"}, "steps": 3}, "twice"),
        ({"steps": 0}, "--steps"),
        ({"steps": 3, "minutes": 1.0}, "exclude"),
        ({"minutes": float("nan")}, "--minutes"),
        ({"minutes": -1.0}, "--minutes"),
        ({"lr": 0.0}, "--lr"),
        ({"batch_size": 0}, "--batch-size"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**63}, "--seed"),
        ({"name": "../x"}, "name of a run"),
        ({"init": "nothing"}, "nothing"),
        ({"preset": "nano", "init": "a"}, "--init"),
        ({"preset": "nano", "data": []}, "df data get shakespeare|corpus `shakespeare`"),
        ({"data": ["no-such-file.txt"]}, "no-such-file"),
    ],
)
def test_what_is_asked_wrongly_leaves_nothing_behind(
    text: str, home: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train(
            "gpt", **{"data": [text], "steps": 2} | options if "minutes" not in options else {"data": [text]} | options
        )
    assert not home.exists() or not any(home.rglob("*.json"))


def test_a_taken_name_is_refused_before_data_is_prepared(text: str, names: str) -> None:
    train("gpt", [text], steps=1, name="a", overrides=TINY_GPT)
    before = len(list_datasets())
    with pytest.raises(UsageError, match="there is a run `a` already"):
        train("gpt", [names], steps=1, name="A", overrides=TINY_GPT)
    assert len(list_datasets()) == before


def test_names_count_up(text: str) -> None:
    runs = [train("gpt", [text], steps=1, overrides=TINY_GPT).run for _ in range(2)]
    assert runs == ["gpt-text-1", "gpt-text-2"]


def test_a_training_that_fails_before_its_first_checkpoint_leaves_no_run(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Trainer.backward
    monkeypatch.setattr(Trainer, "backward", lambda self, batch, count: loss(self, batch, count) * float("nan"))
    with pytest.raises(DfError, match="is not finite"):
        train("gpt", [text], steps=1, name="a", overrides=TINY_GPT)
    assert list_runs() == []


def test_a_training_that_diverges_later_keeps_its_last_checkpoint(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = Trainer.backward
    broken = lambda self, batch, count: loss(self, batch, count) * (float("inf") if self.state.step == 6 else 1)  # noqa: E731
    monkeypatch.setattr(Trainer, "backward", broken)
    with pytest.raises(DfError, match=r"the loss of step 7 is not finite.*checkpoint of step 6 is kept"):
        train("gpt", [text], steps=9, name="a", overrides=TINY_GPT | EVERY)
    assert Run.open("a").load("last").step == 6


def test_memory_that_runs_out_is_told_with_what_to_lower(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(self: Trainer, batch: object, count: int) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(Trainer, "backward", loss)
    with pytest.raises(DfError, match="not enough memory") as caught:
        train("gpt", [text], steps=1, name="a", overrides=TINY_GPT)
    assert "--batch-size 2 --set accumulate=2" in caught.value.hint
    assert list_runs() == []


def test_a_default_batch_that_does_not_fit_is_taken_in_parts(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"steps": 10, "overrides": {"compile": "off", "ngrams": "1", "context": "16"}}
    whole = plan("gpt", [text], **asked)
    for share, parts in ((2.0, 1), (0.9, 2)):
        free = int(share * whole.memory)
        monkeypatch.setattr(Device, "memory_bytes", lambda self, free=free: (free, 2**40))
        made = plan("gpt", [text], **asked)
        assert (made.recipe.accumulate, made.recipe.batch_size) == (parts, whole.recipe.batch_size // parts)
        assert ("accumulate" in {choice.what for choice in made.choices}) == (parts > 1)
    given = plan("gpt", [text], **asked, batch_size=whole.recipe.batch_size)
    assert given.recipe.accumulate == 1


def test_what_to_lower_is_of_the_core(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "memory_bytes", lambda self: (2**10, 2**10))
    for kind, preset, data, word in (
        ("gpt", None, [text], "channels"), ("wavenet", None, [], "window"), ("wavenet", "makemore", [text], "hidden"),
    ):  # fmt: skip
        made = plan(kind, data, preset=preset, steps=1)
        made = replace(made, recipe=replace(made.recipe, batch_size=1))
        assert f"`--set {word}=" in memory.advice(made)


def test_a_stop_before_the_first_step_leaves_nothing(text: str) -> None:
    result = train("gpt", [text], steps=3, name="a", overrides=TINY_GPT, stop=lambda: "interrupted")
    assert (result.stopped, result.steps) == ("interrupted", 0)
    assert list_runs() == []


def test_other_runtime_errors_stay_what_they_are(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(self: Trainer, batch: object, count: int) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(Trainer, "backward", loss)
    with pytest.raises(RuntimeError, match="a defect"):
        train("gpt", [text], steps=1, name="a", overrides=TINY_GPT)


def test_what_cannot_fit_is_refused_before_it_starts(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "memory_bytes", lambda self: (2**20, 2**20))
    with pytest.raises(DfError, match="of memory"):
        train("gpt", [text], steps=1, name="a", overrides={"layers": "8"})
    monkeypatch.undo()


def test_a_full_disk_is_noticed_before_the_start(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda path: 1000)
    with pytest.raises(DfError, match="checkpoints would take"):
        train("gpt", [text], steps=1, name="a", overrides=TINY_GPT)


# --- looking before


@pytest.mark.parametrize(
    ("kind", "name"), [("gpt", "gpt2-xl"), ("gpt", "nano"), ("wavenet", "sc09"), ("wavenet", "makemore")]
)
def test_show_needs_no_data_and_allocates_nothing(
    kind: str, name: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "build", None)
    made = plan(kind, preset=name)
    shown = json.loads(json.dumps(made.to_json()))
    assert shown["parameters"] == made.parameters
    assert shown["preset"] == name
    assert shown["steps"] == made.recipe.steps
    assert shown["source"]
    assert shown["run"] is None
    assert shown["memory_bytes"] > 4 * shown["parameters"]
    assert not home.exists()


def test_show_of_a_default_says_its_choices(text: str) -> None:
    made = plan("gpt", [text])
    assert made.recipe.minutes == 5.0
    assert {"device", "minutes", "size", "batch_size", "context"} <= {choice.what for choice in made.choices}
    assert list_runs() == []


def test_overrides_reach_the_preset() -> None:
    made = plan("gpt", preset="nano", steps=9, batch_size=3, lr=0.5, overrides={"layers": "2", "clip": "0"})
    assert (made.recipe.steps, made.recipe.batch_size, made.recipe.lr, made.recipe.clip) == (9, 3, 0.5, 0.0)
    assert made.config.layers == 2  # pyright: ignore
    assert plan("gpt", preset="nano", minutes=2).recipe.steps == 0


def test_a_window_beyond_the_context_is_refused() -> None:
    with pytest.raises(UsageError, match="window"):
        plan("gpt", preset="nano", overrides={"window": "257"})


# --- from other weights


def test_init_starts_from_the_best_weights_of_another_run(text: str, tmp_path: Path) -> None:
    first = train("gpt", [text], steps=30, name="a", lr=0.05, overrides=TINY_GPT)
    other = tmp_path / "other.txt"
    other.write_text("the cat sat on a mat. " * 100)
    second = train("gpt", [str(other)], steps=1, name="b", init="a", lr=1e-9, overrides={"adam_lr": "1e-9"})
    a, b = Run.open("a").load("best").model, Run.open("b").load("best").model
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)
    assert Run.open("b").info["init"] == "a"
    assert Run.open("b").info["codec"] == Run.open("a").info["codec"]
    assert first.parameters == second.parameters
    third = train("gpt", steps=1, init="a", name="c", overrides={"dropout": "0.3"})
    assert Run.open("c").info["dataset"]["name"] == Run.open("a").info["dataset"]["name"]
    assert third.val_loss is not None


def test_init_goes_on_with_the_lectures_wavenet(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join("abcdefghij"[i % 7 : i % 7 + 2 + i % 3] for i in range(200)) + "\n")
    small = {"hidden": "8", "embedding": "4"}
    first = train("wavenet", [str(names)], preset="makemore", steps=2, name="a", overrides=small)
    second = train("wavenet", steps=2, name="b", init="a")
    assert second.parameters == first.parameters
    recipe = Run.open("b").info["recipe"]
    assert (recipe["packing"], recipe["optimizer"], recipe["lr"]) == ("last", "sgd", 0.03)


def test_init_refuses_another_model(text: str) -> None:
    train("gpt", [text], steps=1, name="a", overrides=TINY_GPT)
    with pytest.raises(UsageError, match="layers cannot be changed"):
        train("gpt", [text], steps=1, init="a", overrides={"layers": "3"})
    with pytest.raises(UsageError, match="is a gpt") as error:
        train("wavenet", [text], steps=1, init="a")
    assert error.value.hint == "type `df train gpt --init a`"


def test_that_a_gpt_is_trained_on_sound_is_said_once(audio: str, text: str) -> None:
    def notes(kind: str, data: str) -> list[str]:
        made = plan(kind, [data])
        assert made.dataset is not None
        made.dataset.close()
        return [choice.reason for choice in made.choices if choice.what == "note"]

    assert notes("gpt", audio) == ["each token is a sample of the sound; `df train wavenet` is made for it"]
    assert notes("gpt", text) == notes("wavenet", audio) == []


def test_a_prepared_dataset_does_not_stand_for_the_corpus_of_a_preset(names: str) -> None:
    prepare([names], name="names", lines=True).close()
    with pytest.raises(UsageError, match="the corpus `names`, which is not here") as error:
        train("wavenet", preset="makemore")
    assert error.value.hint == f"fetch it with `df data get names`, or give the text of your dataset: `--data {names}`"
    with pytest.raises(UsageError, match="another split") as error:
        train("wavenet", ["names"], preset="makemore")
    assert error.value.hint == f"give its source instead of its name: {names}"
    made = plan("wavenet", [names], preset="makemore")  # works as it is typed
    assert made.dataset is not None
    made.dataset.close()


def test_a_character_the_other_run_never_saw_is_named(text: str, tmp_path: Path) -> None:
    train("gpt", [text], steps=1, name="a", overrides=TINY_GPT)
    other = tmp_path / "other.txt"
    other.write_text("the cat sat on a mat, Zoë. " * 100)
    with pytest.raises(DfError, match=r"[Zë,]"):
        train("gpt", [str(other)], steps=1, init="a")


def test_results_are_plain_data(text: str) -> None:
    from dataclasses import asdict

    result = train("gpt", [text], minutes=0.02, name="a", overrides=TINY_GPT)
    assert TrainResult(**json.loads(json.dumps(asdict(result)))) == result
    assert result.steps > 0
    assert result.train_seconds < 30


def test_what_a_death_behind_the_last_save_left_is_tidied_up(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def training() -> None:
        train("gpt", [text], name="r", steps=6, resume=True, overrides=TINY_GPT | {"checkpoint_every": "1"})

    def die(self: Run, newest: int) -> None:
        if newest == 6:
            raise SystemExit("killed")
        prune(self, newest)

    prune = Run.prune
    with monkeypatch.context() as killed:
        killed.setattr(Run, "prune", die)
        with pytest.raises(SystemExit):
            training()
    assert len(Run.open("r").steps()) > 2
    training()
    kept = Run.open("r").steps()
    assert kept[-2:] == [5, 6]
    assert len(kept) <= 3
    assert set(kept) == {5, 6, Run.open("r").resolve("best")}
