from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dfcli
from dfcli.cli.live import title
from dfcli.training.events import Started

TINY = []
for pair in ("layers=1", "heads=2", "channels=16", "context=16", "compile=off"):
    TINY += ["--set", pair]
TINY += ["--batch-size", "4"]
LINE = ["train", "gpt", "--data", "talk.txt", *TINY]


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    (tmp_path / "talk.txt").write_text("It was the best of times, it was the worst of times.\n" * 60)
    return tmp_path / "talk.txt"


def test_json_and_its_figures(here, talk):
    shown = here(*LINE, "--steps", 10, "--name", "a", "--json")
    assert shown.code == 0, shown.err
    result = json.loads(shown.out)
    assert {
        "run",
        "preset",
        "steps",
        "tokens_seen",
        "train_seconds",
        "tokens_per_second",
        "val_loss",
        "parameters",
    } <= set(result)
    assert (result["run"], result["preset"], result["steps"]) == ("a", None, 10)
    assert result["tokens_seen"] == 10 * 4 * 16
    assert result["tokens_per_second"] == pytest.approx(result["tokens_seen"] / result["train_seconds"])
    core, _ = dfcli.Run.open("a").build()
    assert result["parameters"] == sum(p.numel() for p in core.parameters())
    measured = json.loads(here("eval", "--run", "a", "--json").out)
    assert measured["loss"] == pytest.approx(result["val_loss"], abs=1e-6)
    assert measured["checkpoint"] == result["best_step"]


def test_what_a_log_shows(here, talk):
    shown = here(*LINE, "--steps", 6, "--name", "a")
    assert shown.code == 0
    assert shown.out == ""
    assert "\x1b" not in shown.err
    assert "device " in shown.err  # a choice, with its reason
    assert "step=6/6 " in shown.err
    loss = json.loads(here(*LINE, "--steps", 6, "--name", "a", "--resume", "--json").out)["val_loss"]
    assert (
        f"validation loss {loss:.4f} nats a token, {loss / math.log(2):.3f} bits, over the whole split (step "
        in shown.err
    )
    assert f"kept in {dfcli.Run.open('a').path}" in shown.err
    assert "next: df sample gpt --run a\n      df eval --run a" in shown.err


def test_without_validation_the_next_line_scores_what_there_is(here, talk):
    assert here("data", "prepare", "talk.txt", "--val-fraction", 0, "--name", "all").code == 0
    shown = here("train", "gpt", "--data", "all", *TINY, "--steps", 2, "--name", "a")
    assert "df eval --run a --split train\n" in shown.err
    assert here("eval", "--run", "a", "--split", "train").code == 0


def test_quiet_is_silent(here, talk):
    shown = here(*LINE, "--steps", 2, "--quiet")
    assert (shown.code, shown.out, shown.err) == (0, "", "")


def test_a_name_that_is_taken_and_a_finished_run(here, trained):
    taken = here("train", "gpt", "--data", trained / "talk.txt", *TINY, "--name", "talk", "--steps", 12)
    assert taken.code == 2
    assert "--resume" in taken.err
    again = here("train", "gpt", *TINY, "--name", "talk", "--steps", 12, "--resume")
    assert again.code == 0
    assert "is finished already" in again.err
    other = here("train", "gpt", *TINY, "--name", "talk", "--steps", 13, "--resume")
    assert other.code == 2
    assert "--steps" in other.err


def test_resume_says_that_it_starts_a_run(here, talk):
    first = here(*LINE, "--steps", 2, "--resume")
    assert first.code == 0, first.err
    assert "there is no gpt run to resume: one is started\n" in first.err
    made = here(*LINE, "--steps", 2, "--resume", "--name", "nano")
    assert made.code == 0, made.err
    assert "there is no run `nano` to resume: it is started\n" in made.err
    typed = here(*LINE, "--steps", 2, "--resume", "--name", "nanoo")
    assert "there is no run `nanoo` to resume (but a run `nano`): it is started\n" in typed.err
    again = here(*LINE, "--steps", 2, "--resume", "--name", "nano")
    assert "to resume" not in again.err


def test_the_title_of_a_resumed_run_names_its_data(talk):
    titles = []

    def note(event: object) -> None:
        if isinstance(event, Started):
            titles.append(title(event.plan))

    options = {"steps": 4, "name": "a", "overrides": {pair.split("=")[0]: pair.split("=")[1] for pair in TINY[1:-2:2]}}
    asked = iter([None, None, "interrupted"])
    dfcli.train("gpt", [str(talk)], **options, on_event=note, stop=lambda: next(asked))
    dfcli.train("gpt", [str(talk)], **options, on_event=note, resume=True)
    assert titles[0] == titles[1]
    assert f" · {dfcli.Run.open('a').dataset['name']} · " in titles[1]


def test_a_preset_without_its_corpus_says_how_to_get_it(here, home):
    names = here("train", "wavenet", "--preset", "makemore")
    assert (names.code, "`df data get names`" in names.err) == (2, True)
    digits = here("train", "wavenet", "--preset", "sc09")
    assert digits.code == 2
    for part in ("Speech Commands v0.02", "speech_commands_v0.02.tar.gz", "unpack", "`--data FOLDER`"):
        assert part in digits.err
    assert not home.exists()


def test_a_preset_without_a_corpus_says_what_it_takes(here):
    small = ["--batch-size", 1, "--set", "window=512", "--set", "dilations=1,2", "--set", "eval_tokens=512"]
    shown = here("train", "wavenet", "--preset", "paper", "--steps", 1, *small)
    assert shown.code == 0, shown.err
    reason = " ".join(shown.err.split())
    assert "melodies made by this project no --data was given, and the preset names no corpus" in reason


def test_the_next_line_makes_sound_of_a_model_of_sound(here):
    small = ["--set", "dilations=1,2", "--set", "cycles=1", "--set", "eval_tokens=512", "--steps", 1, "--name", "tune"]
    for resume in ([], ["--resume"]):  # which finds it finished
        shown = here("train", "wavenet", *small, *resume)
        assert "next: df sample wavenet --run tune --seconds 4 -o out.wav\n" in shown.err


def test_what_does_not_fit_is_said_once(here, talk):
    shown = here("train", "gpt", "--data", "talk.txt", "--steps", 2, "--batch-size", 999_999, "--set", "compile=off")
    assert shown.code == 1
    assert shown.err.count("of memory") == 1
    assert shown.err.count("learns about the same") == 1


def test_show_trains_nothing(here, talk, home):
    shown = here(*LINE, "--steps", 10, "--show")
    assert shown.code == 0
    for part in ("channels=16", "parameters", "FLOPs per token", "memory", "CHOICE", "REASON", "device"):
        assert part in shown.out
    result = json.loads(here(*LINE, "--steps", 10, "--show", "--json").out)
    assert {"preset", "steps", "parameters"} <= set(result)
    assert "more than the" not in shown.out
    shown = here(
        "train", "gpt", "--data", "talk.txt", "--steps", 2, "--batch-size", 999_999, "--set", "compile=off", "--show"
    )
    assert "of memory" not in shown.err
    assert "more than the" in shown.out
    assert not (home / "runs").exists()


def test_show_of_a_preset_needs_no_data(here, home):
    shown = here("train", "gpt", "--preset", "gpt2", "--show", "--json")
    assert shown.code == 0, shown.err
    assert json.loads(shown.out)["parameters"] == 124_439_808
    assert not home.exists()


def test_show_of_a_preset_names_its_corpus_and_what_differs_from_it(here):
    shown = " ".join(here("train", "gpt", "--preset", "nano", "--show").out.split())
    assert "the corpus `shakespeare`: fetch it with `df data get shakespeare`" in shown
    assert "not the published" not in shown
    shown = here("train", "gpt", "--preset", "gpt2", "--set", "layers=2", "--minutes", 3, "--show").out
    assert "with layers=2, minutes=3.0: not the published model\n" in shown
    shown = here("train", "gpt", "--preset", "nano", "--set", "layers=6", "--lr", 0.5, "--show").out
    assert "with lr=0.5: not the published recipe\n" in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_is_one_sentence_and_leaves_nothing_behind(here, talk, home):
    shown = here("train", "gpt", "--data", "talk.txt", "--device", "cuda")
    assert shown.code == 2
    assert shown.err == "error: no CUDA device was found\n\nhint: use `--device auto` to take what this machine has\n"
    assert not home.exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--steps", "0"], ["--steps", "-1"], ["--steps", "1e9"], ["--minutes", "0"], ["--minutes", "nan"],
        ["--minutes", "-inf"], ["--lr", "nan"], ["--lr", "-1"], ["--lr", "0"], ["--batch-size", "0"],
        ["--batch-size", "9" * 30], ["--seed", "-1"], ["--seed", "9" * 30], ["--device", "quantum"], ["--name", "../x"],
        ["--name", "a\x1b"], ["--preset", "none"], ["--init", "none"], ["--set", "none=1"], ["--set", "layers=x"],
        ["--set", "dropout=nan"], ["--set", "layers=-1"], ["--steps", "1", "--minutes", "1"], ["--data", "none.txt"],
        ["--set", "channels=999999999999"],
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_before_anything_is_made(here, talk, home, words: list[str]):
    shown = here("train", "gpt", *([] if "--data" in words else ["--data", "talk.txt"]), *words)
    assert shown.code == 2, shown.err
    assert shown.err.startswith("error: ")
    assert len(shown.err.splitlines()[0]) > 10
    assert "unexpected" not in shown.err
    assert "\x1b" not in shown.err
    assert not (home / "runs").exists()


def start(tmp_path: Path, *words: str) -> subprocess.Popen[str]:
    """A training in a process of its own that has begun its steps."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dfcli", *LINE, *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step="):
            return process
    raise AssertionError("it did not start")


@pytest.mark.skipif(os.name == "nt", reason="signals as on POSIX")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_a_signal_saves_and_the_line_it_gives_goes_on(here, talk, number: int, code: int):
    process = start(talk.parent, "--steps", "600", "--json")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    result = json.loads(out)
    run = dfcli.Run.open(result["run"])
    assert run.steps()[-1] == result["steps"] < 600
    line = re.search(r"^to go on: df (.*)$", err, re.MULTILINE)
    assert line is not None, err
    words = shlex.split(line[1])
    assert words == [*LINE, "--steps", "600", "--json", "--name", run.name, "--resume"]
    if number == signal.SIGINT:  # they differ in nothing else
        more = here(*words)
        assert more.code == 0, more.err
        assert json.loads(more.out)["steps"] == 600


@pytest.mark.skipif(os.name == "nt", reason="signals as on POSIX")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_before_the_first_step_says_that_nothing_is_saved(talk, home, number: int, code: int):
    program = (
        "import os, sys; from dfcli.system import device;"
        f"device.resolve = lambda name: os.kill(os.getpid(), {number});"
        "from dfcli.cli.app import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, *LINE, "--steps", "9"]
    done = subprocess.run(command, cwd=talk.parent, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.endswith("stopped before the first step: nothing to save\n")
    assert not (home / "runs").exists()


@pytest.mark.skipif(os.name == "nt", reason="signals as on POSIX")
def test_a_second_interrupt_stops_at_once(talk):
    process = start(talk.parent, "--steps", "1000000", "--set", "checkpoint_every=5", "--name", "a")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err


SLOW = """
import sys, time
from dfcli.training import train
whole = train.sweep
def slowly(*things, on_event, **options):
    print("closing", file=sys.stderr, flush=True)
    return whole(*things, **options, on_event=lambda event: (time.sleep(0.5), on_event(event)))
train.sweep = slowly
from dfcli.cli.app import main
main(sys.argv[1:])
"""
"""Trains with a closing evaluation that takes half a second for every 8,192 tokens."""


@pytest.mark.skipif(os.name == "nt", reason="signals as on POSIX")
def test_a_signal_in_the_closing_evaluation_stops_at_once_and_the_next_command_measures(here, tmp_path):
    (tmp_path / "talk.txt").write_text("It was the best of times, it was the worst of times.\n" * 10_000)
    cut = ["--steps", "4", "--name", "a", "--set", "eval_tokens=64"]
    for words in ([*LINE, *cut], [*LINE, *cut, "--resume"]):  # the second one finds it finished
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW, *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert process.stderr is not None
        assert "closing\n" in process.stderr
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert "stopping: the run is finished and saved; `df runs show` measures the whole validation split\n" in err
        assert "as measured during training" in err
        assert "to go on" not in err
    assert "~" in here("runs", "list").out
    shown = here("runs", "show", "a")
    assert shown.code == 0, shown.err
    loss = (dfcli.Run.open("a").result or {})["val_loss"]
    assert f", val loss {loss:.4f}\n" in shown.out
    assert "~" not in here("runs", "list").out


def test_two_trainings_without_a_name_take_different_ones(talk, home):
    lines = [
        subprocess.Popen(
            [sys.executable, "-m", "dfcli", *LINE, "--steps", "3", "--json"], cwd=talk.parent,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]  # fmt: skip
    ended = [process.communicate(timeout=90) for process in lines]
    assert [process.returncode for process in lines] == [0, 0], ended
    assert {json.loads(out)["run"] for out, _ in ended} == {"gpt-talk-1", "gpt-talk-2"}
    assert [run.name for run in dfcli.list_runs()] == ["gpt-talk-1", "gpt-talk-2"]


def test_the_built_in_corpus_needs_nothing(here):
    shown = here("train", "gpt", "--steps", 1, *TINY)
    assert shown.code == 0, shown.err
    assert "standard library" in shown.err
    assert ": 1 step, " in shown.err
