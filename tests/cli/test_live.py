"""The live view, seen as a terminal shows it (pyte), and as a log gets it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import pytest

from dfcli.cli.live import TrainView, whole_words
from dfcli.cli.signals import Stop
from dfcli.system.events import Progress
from dfcli.training.events import Sample, Step

pyte = pytest.importorskip("pyte")
pexpect = pytest.importorskip("pexpect")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")

WORK = r"""
import sys, time
from pathlib import Path
from types import SimpleNamespace
from dfcli.cli.app import run
from dfcli.cli import app
from dfcli.cli.live import TrainView, whole_words
from dfcli.cli.signals import Stop
from dfcli.system.events import Choice, Note, Progress
from dfcli.training.events import Sample, Saved, Started, Step

device = SimpleNamespace(kind="cpu", name="CPU, 2 threads", peak_flops=lambda: 100e9)
plan = SimpleNamespace(name="play\x1b[2J", dataset_name="data-1", parameters=803456, device=device, codec_name="chars")

def work(words):
    stop = Stop()
    with TrainView(stop, quiet="quiet" in words) as view, stop:
        view(Note("prepared data-1"))
        view(Choice("layers", "4", "fits the time"))
        begun = Path(words[words.index("resumed") + 1]) if "resumed" in words else None
        view(Started(plan, begun or Path("."), 500 if begun else 0, 2.5 if begun else None))
        for i in range(1, 41):
            view(Step(i * 50, 2000, i / 40, i * 1000, i * 0.5, 4 - i * 0.05, 1e-3, 12345.0, 61e9,
                      4.1 - i * 0.05 if i % 10 == 0 else None, 20 - i * 0.5, 2 if "skipped" in words else 0))
            if i == 20 and "narrow" in words:
                time.sleep(1.5)
            if i == 20:
                view(Saved(1000, Path("step-00001000"), True))
                view(Sample(1000, "To be,\x1b[31m or\nnot \u202eto be"))
            if i == 30 and "fail" in words:
                raise ValueError("seven")
            if i == 35:
                view(Progress("validation", 3, 4, "tokens"))
                if "wait" in words:
                    for _ in range(1000):
                        time.sleep(0.02)
                        if stop() and "stubborn" not in words:
                            time.sleep(0.6)
                            return stop.exit_code
            time.sleep(0.01)
    return 0

app._command = work
sys.exit(run(sys.argv[1:]))
"""


class Terminal:
    """A child on a pseudo-terminal, and the screen it draws."""

    def __init__(self, *words: str, rows: int = 30, columns: int = 100, **environment: str) -> None:
        self.screen = pyte.Screen(columns, rows)
        self.stream = pyte.ByteStream(self.screen)
        self.raw = b""
        env = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
        env |= {"TERM": "xterm-256color", **environment}
        command = ["-c", WORK, *words]
        self.child = pexpect.spawn(sys.executable, command, dimensions=(rows, columns), env=env, timeout=20)

    def read(self, until: str = "", seconds: float = 20) -> str:
        """Feed the screen until it shows `until` in a whole picture, or the child has ended; what it shows. A picture
        comes in several reads: it is whole when each panel is closed and no more arrives for a moment."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                data = self.child.read_nonblocking(65536, timeout=0.03)
            except pexpect.TIMEOUT:
                if until and until in self.text and self.text.count("╭") == self.text.count("╰"):
                    break
                continue
            except pexpect.EOF:
                break
            self.raw += data
            self.stream.feed(data)
        return self.text

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display)

    def end(self) -> int:
        self.read()
        self.child.close()
        return self.child.exitstatus if self.child.exitstatus is not None else -self.child.signalstatus


def test_the_picture_and_its_figures():
    terminal = Terminal("wait")
    shown = terminal.read(until="validation 75%")
    for part in (
        "prepared data-1", "layers", "fits the time", "play\\x1b[2J · data-1 · 803k parameters · CPU, 2 threads",
        "88%", "step 1,750 / 2,000", "0:02 left", "2.2500", "2.6000", "best 2.6000 at step 1,500", "█", "▁",
        "12.3k tokens/s", "61.0 GFLOP/s, 61% of peak", "lr 1.00e-03", "step 1,000, ", " ago",
        "a sample at step 1,000", "To be,\\x1b[31m or", "not \\u202eto be", "validation 75%",
    ):  # fmt: skip
        assert part in shown, part
    assert re.search(r"cpu .*\d+% busy .* of .* memory used", terminal.read(until="% busy"))
    terminal.child.kill(15)
    assert terminal.end() == 143
    assert not terminal.screen.cursor.hidden


def test_interrupt_says_so_at_once_and_restores_the_cursor():
    terminal = Terminal("wait")
    terminal.read(until="validation 75%")
    assert terminal.screen.cursor.hidden
    terminal.child.sendintr()
    assert "stopping: this step is finished and saved first" in terminal.read(until="stopping")
    assert terminal.end() == 130
    assert not terminal.screen.cursor.hidden


def test_a_second_interrupt_ends_at_once_and_restores_the_cursor():
    terminal = Terminal("wait", "stubborn")
    terminal.read(until="validation 75%")
    terminal.child.sendintr()
    terminal.read(until="stopping")
    terminal.child.sendintr()
    assert terminal.end() == 130
    assert not terminal.screen.cursor.hidden


def test_a_failure_restores_the_cursor_and_keeps_the_picture():
    terminal = Terminal("fail")
    assert terminal.end() == 1
    assert "an unexpected ValueError: seven" in terminal.text
    assert "tokens/s" in terminal.text
    assert not terminal.screen.cursor.hidden


@pytest.mark.parametrize(("rows", "columns"), [(10, 60), (24, 40), (60, 200)])
def test_the_picture_fits_any_terminal(rows: int, columns: int):
    terminal = Terminal("skipped", rows=rows, columns=columns)
    assert terminal.end() == 0
    assert "loss" in terminal.text
    assert terminal.text.count("╭") <= 1  # drawn over itself, not below itself


def test_figures_are_whole_at_every_width():
    for columns in (60, 80, 120, 200):
        terminal = Terminal("wait", rows=30, columns=columns)
        terminal.read(until="validation 75%")
        shown = terminal.read(until="% busy")
        box = next(line for line in shown.splitlines() if line.startswith("╭"))
        assert len(box) == columns - 2  # as wide as the terminal
        assert "2.2500" in shown
        assert "3.246 bits" in shown
        assert ("nats a token" in shown) == (columns >= 86)
        assert ("best 2.6000 at step 1,500" in shown) == (columns >= 80)
        assert "…" not in shown.split("loss")[1].split("a sample")[0]
        terminal.child.kill(15)
        terminal.end()


def test_a_resize_leaves_one_picture():
    terminal = Terminal("narrow", "wait", columns=120)
    terminal.read(until="step 950")
    terminal.child.setwinsize(30, 60)
    terminal.screen.resize(30, 60)
    terminal.read(until="validation 75%")
    shown = terminal.read(until="% busy")
    assert (shown.count("╭"), shown.count("╰")) == (1, 1)
    terminal.child.kill(15)
    terminal.end()


def test_a_resumed_run_keeps_its_course_and_its_best(tmp_path):
    from dfcli.runs.metrics import HEADER, append

    (tmp_path / "metrics.jsonl").write_bytes(HEADER)
    for step, loss in ((100, 5.0), (200, 4.5), (300, 2.5), (500, 4.2), (600, 1.0)):
        append(tmp_path / "metrics.jsonl", {"step": step, "train_loss": loss, "val_loss": loss})
    terminal = Terminal("wait", "resumed", str(tmp_path))
    shown = terminal.read(until="validation 75%")
    assert "best 2.5000 at step 300" in shown  # what came after the step it resumes from was given up
    line = next(line for line in shown.splitlines() if "│ val" in line)
    assert len(re.findall("[▁▂▃▄▅▆▇█]", line)) == 4 + 3
    terminal.child.kill(15)
    terminal.end()


def test_a_preview_ends_with_a_whole_word_and_is_folded_between_words(capsys: pytest.CaptureFixture[str]):
    text = "Shall I compare thee to a summer's day? Thou art more lovely and more temp"
    assert whole_words(text) == text.removesuffix(" temp") + " ..."
    assert whole_words("Thou art") == "Thou art"
    with TrainView(Stop()) as view:
        view.sample = Sample(1, text)
        lines = [line.plain for line in view._sample_lines(30, 7)]
    assert " ".join(lines[1:]) == whole_words(text)
    assert max(map(len, lines[1:])) <= 30


def test_the_course_is_scaled_to_what_matters():
    view = TrainView(Stop())
    for loss in (9.0, 5.0, 4.0, 3.0, 2.9, 2.8, 2.7, 2.6, 2.5, 2.4, 2.3, 2.2):
        view.losses.add(loss)
    view.baseline = ("bigram", 3.0)
    text = view._loss(2.2, view.losses, 60, "cyan", ()).plain
    assert text.startswith("2.2000   3.174 bits  ████▇▆▅▅▄▃▂▁") or text.startswith("2.2000   3.174 bits  ████▇▆▅▄▄▃▂▁")
    view.baseline = None
    assert view._loss(2.2, view.losses, 60, "cyan", ()).plain.count("█") >= 2
    view.unit = "sample"
    assert "nats a sample" in view._loss(2.2, view.losses, 90, "cyan", ()).plain


def test_no_color_means_none():
    terminal = Terminal(NO_COLOR="1")
    assert terminal.end() == 0
    colours = re.findall(rb"\x1b\[[0-9;]*m", terminal.raw)
    assert not any(re.search(rb"\b(3[0-7]|9[0-7]|38;|48;)", colour) for colour in colours)
    assert "step 2,000 / 2,000" in terminal.text


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TTY_INTERACTIVE": "0"}])
def test_a_terminal_that_cannot_animate_gets_lines(environment: dict[str, str]):
    terminal = Terminal(**environment)
    assert terminal.end() == 0
    assert b"\x1b[?25l" not in terminal.raw
    assert b"\x1b[1A" not in terminal.raw
    assert "step=2000/2000" in terminal.text.replace("\n", "")


def piped(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WORK, *words], capture_output=True, text=True, timeout=60, check=False)


def test_a_log_gets_plain_lines():
    done = piped()
    assert done.returncode == 0
    assert done.stdout == ""
    assert "\x1b" not in done.stderr
    assert "\r" not in done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == "prepared data-1"
    steps = [dict(pair.split("=") for pair in line.split()) for line in lines if line.startswith("step=")]
    assert [line["step"] for line in steps] == ["50/2000", "500/2000", "1000/2000", "1500/2000", "2000/2000"]
    assert steps[-1] == {
        "step": "2000/2000", "loss": "2.0000", "val_loss": "2.1000", "lr": "1.00e-03", "tokens_per_second": "12345",
        "seconds": "20.0",
    }  # fmt: skip


def test_steps_and_other_work_share_the_lines_of_a_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with TrainView(Stop()) as view:
        now += 11
        for done in range(30):
            view(Step(done, 30, done / 30, done, float(done), 4.0, 1e-3, 10.0, 1e9, None, None, 0))
            now += 0.5
            if done % 5 == 2:  # an evaluation in between
                view(Progress("evaluation", 100, 1000, "tokens"))
                view(Progress("evaluation", 1000, 1000, "tokens"))
        lines = [line.split()[0] for line in capsys.readouterr().err.splitlines()]
        assert lines == ["step=0/30", "step=20/30"]
        for done in range(100, 1000, 100):  # what takes its time is told
            view(Progress("evaluation", done, 1000, "tokens"))
            now += 3
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["evaluation"] * 2


def test_more_than_a_day_is_said_once(capsys: pytest.CaptureFixture[str]):
    with TrainView(Stop()) as view:
        for done, left in ((1, None), (2, 86_399.0), (3, 158.5 * 86_400), (4, 158.5 * 86_400)):
            view(Step(done, 100_003, 0.0, done, 100.0 * done, 4.0, 1e-3, 10.0, 1e9, None, left, 0))
    said = "at this rate the 100,000 steps left take about 158 days: `--minutes` or `--steps` sets another budget\n"
    assert capsys.readouterr().err.count(said) == 1
    with TrainView(Stop()) as view:  # a time is what was asked for
        view(Step(3, None, 0.0, 3, 300.0, 4.0, 1e-3, 10.0, 1e9, None, 158.5 * 86_400, 0))
    assert "days" not in capsys.readouterr().err


def test_a_step_faster_than_the_measured_peak_corrects_it():
    with TrainView(Stop()) as view:
        view.peak = 50e9  # measured while something else ran
        for done, rate in ((1, 61e9), (2, 30.5e9)):
            view(Step(done, 2, done / 2, done, float(done), 4.0, 1e-3, 10.0, rate, 3.0, None, 0))
            speed = dict(view._rows(100))["speed"].plain
            assert f"{1 / done:.0%} of peak" in speed


def test_quiet_says_nothing():
    done = piped("quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_log_whose_reader_is_gone_does_not_end_the_work():
    script = f"exec 3>&1; ( '{sys.executable}' -c \"$0\" 2>&1 >/dev/null; echo ended $? >&3 ) | true"
    done = subprocess.run(["bash", "-c", script, WORK], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "ended 0\n"
