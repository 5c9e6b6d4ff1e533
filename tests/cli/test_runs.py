from __future__ import annotations

import json
import os
import sys

import pytest

import dfcli
from tests.cli.conftest import TINY


def test_none_yet(here):
    shown = here("runs", "list")
    assert (shown.code, shown.out) == (0, "")
    assert "df train gpt" in shown.err


def test_list(here, trained):
    shown = here("runs", "list")
    header, *rows = shown.out.splitlines()
    assert header.split() == ["NAME", "KIND", "DATA", "STATE", "STEPS", "VAL", "LOSS", "AGE", "SIZE"]
    assert [row.split()[:2] for row in rows] == [["call", "wavenet"], ["talk", "gpt"], ["tune", "wavenet"]]
    run = dfcli.Run.open("talk")
    best = run.state(run.resolve("best"))["val_loss"]
    assert rows[1].split()[3:6] == ["finished", "12", f"{best:.4f}"]


def test_the_loss_is_that_of_the_whole_split_or_marked(here, trained):
    words = [
        "--set",
        "context=16",
        "--set",
        "channels=16",
        "--set",
        "layers=1",
        "--set",
        "heads=2",
        "--set",
        "eval_tokens=32",
    ]
    line = ["train", "gpt", "--data", trained / "talk.txt", "--steps", 3, "--name", "part", *words, "--json"]
    whole = f"{json.loads(here(*line).out)['val_loss']:.4f}"
    part = f"~{dfcli.Run.open('part').state(3)['val_loss']:.4f}"
    assert part != f"~{whole}"

    def shown() -> tuple[str, str]:
        listed = next(row.split()[5] for row in here("runs", "list").out.splitlines() if row.startswith("part"))
        return listed, here("runs", "show", "part").out

    listed, told = shown()
    assert (listed, f"step 3, val loss {whole}\n" in told) == (whole, True)
    assert ", each over at most 32 tokens\n" in told
    assert "finished" in told
    (trained / "home" / "runs" / "part" / "result.json").unlink()  # as of one that is not finished
    listed, told = shown()
    assert (listed, f"val loss {part} (over a part of the validation split)\n" in told) == (part, True)
    listed = here("runs", "list")
    assert "~ over a part of the validation split" in listed.err
    assert "stopped" in next(row for row in listed.out.splitlines() if row.startswith("part"))
    with dfcli.Run.open("part").lock():
        assert "training" in here("runs", "show", "part").out


def test_a_damaged_run_is_said_and_the_others_are_listed(here, trained):
    (trained / "home" / "runs" / "talk" / "run.json").write_text("{")
    shown = here("runs", "list")
    assert shown.code == 0
    assert "talk" in shown.err
    assert [row.split()[0] for row in shown.out.splitlines()] == ["NAME", "call", "tune"]
    assert here("runs", "show", "talk").code == 1
    step = next((trained / "home" / "runs" / "tune").glob("step-*"))
    for state in step.parent.glob("step-*/state.json"):
        state.write_text("{")
    assert here("runs", "list").code == 0
    assert here("runs", "show", "tune").code == 0


def test_show_and_path(here, trained):
    shown = here("runs", "show", "talk")
    assert shown.code == 0
    rows = dict(line.split(maxsplit=1) for line in shown.out.splitlines())
    assert rows["kind"] == "gpt"
    assert "channels=16" in rows["core"]
    assert "steps=12" in rows["recipe"]
    losses = [row["train_loss"] for row in dfcli.Run.open("talk").metrics()]
    assert f"lowest {min(losses):.4f}" in shown.out
    assert "█" in shown.out
    path = here("runs", "path", "talk").out
    assert path == f"{trained / 'home' / 'runs' / 'talk'}\n"
    again = here("runs", "show", path.strip()).out
    assert again.split(" ago)")[1] == shown.out.split(" ago)")[1]  # a second may have passed
    assert again.splitlines()[:3] == shown.out.splitlines()[:3]


def test_remove(here, trained):
    shown = here("runs", "remove", "tune")  # nobody sits there to be asked
    assert (shown.code, "repeat it with `--yes`" in shown.err) == (2, True)
    assert here("runs", "remove", "tune", "--yes").code == 0
    assert not (trained / "home" / "runs" / "tune").exists()
    assert here("runs", "remove", "tune", "--yes").code == 2
    assert here("runs", "remove", "talk", "--yes").code == 0
    assert [run.name for run in dfcli.list_runs()] == ["call"]


def test_several_runs_are_removed_or_none(here, trained):
    shown = here("runs", "remove", "tune", "none", "--yes")
    assert (shown.code, "there is no run `none`" in shown.err) == (2, True)
    assert here("runs", "remove", "tune", "talk", "--yes").code == 0
    assert [run.name for run in dfcli.list_runs()] == ["call"]


def test_rename(here, trained):
    before = here("eval", "--run", "talk", "--json")
    assert here("runs", "rename", "talk", "TUNE").code == 2  # taken, but for case
    taken = here("runs", "rename", "talk", "tune")
    assert "there is a run `tune` already" in taken.err
    assert "hint: choose another name\n" in taken.err  # not the options of `df train`
    assert "`--resume`, or choose another `--name`" in here("train", "gpt", "--name", "talk").err
    assert here("runs", "rename", "talk", "../x").code == 2
    with dfcli.Run.open("talk").lock():
        assert here("runs", "rename", "talk", "chat").code == 1
    assert here("runs", "rename", "talk", "chat").code == 0
    after = here("eval", "--run", "chat", "--json")
    assert json.loads(after.out)["loss"] == json.loads(before.out)["loss"]
    assert "finished" in here("runs", "show", "chat").out
    assert here("runs", "path", "talk").code == 2


def test_lists_and_shows_as_json(here, trained):
    runs = json.loads(here("runs", "list", "--json").out)["runs"]
    assert [run["run"] for run in runs] == ["call", "talk", "tune"]
    shown = json.loads(here("runs", "show", "talk", "--json").out)
    assert {key: shown[key] for key in runs[1]} == runs[1]
    assert (shown["state"], shown["makes"], shown["steps"]) == ("finished", "text", 12)
    assert shown["metrics"] == dfcli.Run.open("talk").metrics()
    data = json.loads(here("data", "list", "--json").out)["datasets"]
    assert len(data) == 3
    name = dfcli.Run.open("talk").dataset["name"]
    assert json.loads(here("data", "show", name, "--json").out)["tokens"] == next(
        each["tokens"] for each in data if each["dataset"] == name
    )


def test_a_split_that_was_measured_whole_is_not_marked(here, trained):
    words = [word for pair in TINY.items() for word in ("--set", "=".join(pair))]
    shown = here("train", "gpt", "--data", trained / "talk.txt", "--steps", 2, "--name", "a", *words)
    assert shown.code == 0, shown.err
    (trained / "home" / "runs" / "a" / "result.json").unlink()  # as of one that is not finished
    assert "~" not in here("runs", "list").out
    assert json.loads(here("runs", "show", "a", "--json").out)["val_loss_over_whole_split"]


def test_overfitting_is_told(here, trained):
    from dfcli.system.files import read_json, write_json

    path = trained / "home" / "runs" / "talk" / "result.json"
    assert "\noverfitting" not in here("runs", "show", "talk").out
    write_json(path, read_json(path) | {"overfitting": True})
    assert "\noverfitting  the validation loss rose" in here("runs", "show", "talk").out
    assert json.loads(here("runs", "show", "talk", "--json").out)["overfitting"]


def test_removing_data_names_the_runs_that_need_it(here, trained):
    name = dfcli.Run.open("talk").dataset["name"]
    assert here("data", "remove", name).code == 2  # nobody sits there to be asked
    removed = here("data", "remove", name, "--yes")
    assert removed.code == 0
    assert f"removed the dataset `{name}`, which `df eval` needs for `talk`" in removed.err


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("n", 1), ("", 1), ("\x04", 1)])
def test_a_person_is_asked(trained, answer: str, code: int):
    pexpect = pytest.importorskip("pexpect")
    for what, name, folder in (("runs", "tune", "runs/tune"), ("data", None, "datasets")):
        name = name or next(dataset.name for dataset in dfcli.list_datasets() if dataset.name.startswith("talk"))
        child = pexpect.spawn(sys.executable, ["-m", "dfcli", what, "remove", name], timeout=60)
        child.expect("remove the .*y/N")
        child.send(answer if answer == "\x04" else answer + "\n")
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == code
        place = trained / "home" / (folder if what == "runs" else f"datasets/{name}")
        assert place.exists() == (code != 0)


def test_a_report_of_the_newest_run(here, trained, tmp_path):
    shown = here("report", "-o", "r.html", "--device", "cpu")
    assert shown.code == 0
    assert "wrote r.html" in shown.err
    page = (tmp_path / "r.html").read_text()
    assert "<h2>" in page
    assert "bigram" in page
    assert "<svg" in page
    assert here("report", "tlak").code == 2
    assert "`mkdir -p no`" in here("report", "-o", "no/r.html").err
