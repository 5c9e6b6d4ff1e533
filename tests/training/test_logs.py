"""The logs of other programs hold the figures of metrics.jsonl."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import dfcli
from dfcli.errors import UsageError
from dfcli.training import logs

TINY = {"layers": "1", "heads": "1", "channels": "8", "context": "8", "ngrams": "1", "compile": "off", "log_every": "2"}


def trained(tmp_path: Path, log: str, **options: Any) -> dict[str, dict[int, float]]:
    (tmp_path / "t.txt").write_text("It was the best of times.\n" * 40)
    options = {"steps": 6, "device": "cpu", "name": "run", "overrides": TINY, "log": log} | options
    dfcli.train("gpt", [str(tmp_path / "t.txt")], **options)
    rows = dfcli.Run.open("run").metrics()
    keys = ("train_loss", "val_loss", "lr")
    return {key: {row["step"]: row[key] for row in rows if row.get(key) is not None} for key in keys}


def test_tensorboard_has_the_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = trained(tmp_path, "tensorboard")
    found = EventAccumulator(str(dfcli.Run.open("run").path / "tensorboard"))
    found.Reload()
    for key, values in expected.items():
        logged = {event.step: event.value for event in found.Scalars(key)}
        assert logged == {**logged, **{step: pytest.approx(value) for step, value in values.items()}}, key


def test_wandb_gets_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: dict[int, dict[str, float]] = {}
    began: list[dict[str, Any]] = []
    ended: list[bool] = []
    made = SimpleNamespace(log=lambda figures, step: logged.update({step: figures}), finish=lambda: ended.append(True))
    init = lambda **options: began.append(options) or made  # noqa: E731
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(logs, "find_spec", lambda name: True)
    for step, value in trained(tmp_path, "wandb")["train_loss"].items():
        assert logged[step]["train_loss"] == value
    assert ended == [True]
    assert (began[0]["name"], began[0]["project"]) == ("run", "dfcli")


def test_a_log_that_is_not_there_is_refused_before_anything_is_made(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(logs, "find_spec", lambda name: None)
    for name, message in (("wandb", "takes a package that is not installed"), ("tensorbord", "no log `tensorbord`")):
        with pytest.raises(UsageError, match=message):
            trained(tmp_path, name)
    assert dfcli.list_runs() == []
