"""The view of a training run on stderr: live on a terminal, one key=value line per interval elsewhere.

Training only sends events. A thread of Rich draws the newest state four times a second.
"""

from __future__ import annotations

import math
import sys
import textwrap
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from dfcli.cli import output
from dfcli.cli.figures import Course, age, count, duration, short, si, size, sparkline, usual
from dfcli.cli.signals import Stop
from dfcli.system import processes
from dfcli.system.events import Note, Progress
from dfcli.training.events import Finished, Overfitting, Sample, Saved, Started, Step

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live
    from rich.text import Text

    from dfcli.system.stats import Sampler, Stats

MOST_COUNTED = 20_000_000  # training tokens beyond which no baseline is counted beside the training
DAY = 86_400.0  # seconds
DOT = " · "  # between the parts of the title
LABEL = 7  # columns of the names of rows
WIDE = 80  # columns of a row from which on units are written out


class TrainView:
    """Shows the events of a training. A context manager, so that the cursor always comes back."""

    def __init__(self, stop: Stop, quiet: bool = False) -> None:
        self.stop = stop
        self.quiet = quiet
        self.listener = output.Listener(quiet)
        self.animated = not quiet and output.animated()
        self.title = ""
        self.peak: float | None = None
        self.step: Step | None = None
        self.losses = Course()
        self.val_losses = Course()
        self.val_loss: float | None = None
        self.best: float | None = None
        self.best_step = 0
        self.saved: Saved | None = None
        self.saved_at = 0.0
        self.sample: Sample | None = None
        self.progress: Progress | None = None
        self.overfitting = ""  # the step since which the model overfits
        self.unit = "token"  # what the model predicts: "sample" for audio
        self.baseline: tuple[str, float] | None = None  # the best of the simple models, and its nats
        self._size: tuple[int, int] | None = None  # of the terminal, when it was last drawn on
        self._sampler: Sampler | None = None
        self._live: Live | None = None
        self._days_told = False

    def __enter__(self) -> TrainView:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the last picture on the screen, and stop the threads."""
        self.listener.close()
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._sampler is not None:
            self._sampler.stop()
            self._sampler = None

    def __call__(self, event: object) -> None:
        if isinstance(event, Started):
            self._start(event)
        elif isinstance(event, Step):
            self._take(event)
        elif isinstance(event, Saved):
            self.saved, self.saved_at = event, time.monotonic()
        elif isinstance(event, Sample):
            self.sample = event
        elif isinstance(event, Overfitting):
            self.overfitting = count(event.best_step)
            text = f"overfitting: since step {self.overfitting} the validation loss rises while the training loss falls"
            self.listener(Note(text))
        elif isinstance(event, Finished):
            self.close()
        elif isinstance(event, Progress) and self._live is not None:
            self.progress = event if event.done != event.total else None
        else:
            self.listener(event)

    def _start(self, event: Started) -> None:
        from dfcli.system.stats import Sampler

        self.listener.close()
        plan = event.plan
        self.best = event.best
        self.best_step = event.step
        self.title = title(plan)
        self.unit = "sample" if plan.codec_name == "mulaw" else "token"
        if event.step:
            self._remember(event)
        if self.quiet:
            return
        peak = plan.device.peak_flops()
        self.peak = peak and peak * processes.count()
        self._sampler = Sampler(plan.device).start()
        if not self.animated:
            self.listener.line_due = time.monotonic()
            output.say(f"training {self.title}" + (f", from step {count(event.step)} on" if event.step else ""))
            return
        from rich.live import Live

        threading.Thread(target=self._count, args=(plan,), daemon=True).start()
        self._live = Live(console=output.stderr(), get_renderable=self.picture, refresh_per_second=4, auto_refresh=True)
        self.stop.announce = False  # the picture says it
        self._live.start()

    def _remember(self, event: Started) -> None:
        """The course of a resumed run so far."""
        from dfcli.errors import DfError
        from dfcli.runs.metrics import read
        from dfcli.runs.run import METRICS

        with suppress(DfError):
            for row in read(event.path / METRICS):
                if row.get("step", 0) <= event.step:
                    self.losses.add(row.get("train_loss", math.nan))
                    if (loss := row.get("val_loss")) is not None:
                        self.val_losses.add(loss)
                        self.val_loss = loss
                        if loss == self.best:
                            self.best_step = row["step"]

    def _count(self, plan: Any) -> None:
        """The best baseline, counted beside the training where that takes a moment only."""
        from dfcli.errors import DfError
        from dfcli.evaluation.baselines import baselines

        dataset = getattr(plan, "dataset", None)
        if dataset is None or not {"train", "val"} <= dataset.splits.keys():
            return
        if dataset.splits["train"].tokens_count <= MOST_COUNTED:
            with suppress(DfError, MemoryError, ValueError):  # ValueError: the training is over and its data closed
                found = baselines((dataset, "val"), (dataset, "train"), MOST_COUNTED)
                self.baseline = min(found.items(), key=lambda item: item[1])

    def _take(self, step: Step) -> None:
        self.step = step
        if self.peak:  # a step that is faster shows that the machine was busy when the peak was measured
            self.peak = max(self.peak, step.flops_per_second)
        self.progress = None
        self.losses.add(step.train_loss)
        if step.val_loss is not None:
            self.val_losses.add(step.val_loss)
            self.val_loss = step.val_loss
            if self.best is None or step.val_loss < self.best:
                self.best, self.best_step = step.val_loss, step.step
        self._tell_days(step)
        now = time.monotonic()
        if self._live is None and not self.quiet and (step.val_loss is not None or now >= self.listener.line_due):
            self.listener.line_due = now + output.LINE_SECONDS
            output.say(self.line(step))

    def _tell_days(self, step: Step) -> None:
        """Say once that the steps take longer than a day."""
        if self._days_told or step.steps is None or step.eta_seconds is None or step.eta_seconds < DAY:
            return
        self._days_told = True
        left = f"the {count(step.steps - step.step)} steps left take about {age(step.eta_seconds)}"
        self.listener(Note(f"at this rate {left}: `--minutes` or `--steps` sets another budget"))

    # ------------------------------------------------------------------------------------------ one line

    def line(self, step: Step) -> str:
        """The figures of a step as key=value, for logs."""
        of = f"/{step.steps}" if step.steps else ""
        figures: dict[str, object] = {"step": f"{step.step}{of}", "loss": f"{step.train_loss:.4f}"}
        if step.val_loss is not None:
            figures["val_loss"] = f"{step.val_loss:.4f}"
        figures |= {"lr": f"{step.lr:.2e}", "tokens_per_second": f"{step.tokens_per_second:.0f}"}
        figures["seconds"] = f"{step.seconds:.1f}"
        if step.eta_seconds is not None and step.fraction < 1:
            figures["eta_seconds"] = f"{step.eta_seconds:.0f}"
        if step.skipped:
            figures["skipped"] = step.skipped
        return " ".join(f"{key}={value}" for key, value in figures.items())

    # ----------------------------------------------------------------------------------------- the picture

    def picture(self) -> RenderableType:
        """The picture that the terminal shows now."""
        from rich.console import Group
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        console = output.stderr()
        self._clear_after_resize((console.width, console.height))
        outside = console.width - 2  # two columns stay free for the ^C that a terminal echoes
        width = outside - 4
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="dim", width=LABEL, no_wrap=True)
        rows.add_column(no_wrap=True, overflow="ellipsis")
        for name, text in self._rows(width - LABEL - 2):
            rows.add_row(name, text)
        parts: list[RenderableType] = [self._bar(width), Text(), rows]
        height = console.height - len(rows.rows) - 6
        if self.sample is not None and height >= 3:
            parts += [Text(), *self._sample_lines(width, min(7, height))]
        named = self.title.split(DOT)
        while len(named) > 1 and len(DOT.join(named)) > outside - 6:
            named.pop()
        title = Text(DOT.join(named), style="bold")
        title.truncate(outside - 6, overflow="ellipsis")  # a long name; Rich alone would make the panel wider
        return Panel(Group(*parts), title=title, title_align="left", width=outside, border_style="dim")

    def _clear_after_resize(self, now: tuple[int, int]) -> None:
        """A terminal that changes its width folds or cuts the last picture, so that it cannot be drawn over line by
        line: the screen is cleared instead."""
        before, self._size = self._size, now
        if before is not None and before != now and self._live is not None:
            stream = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
            with suppress(OSError):
                stream.write("\x1b[H\x1b[J")

    def _bar(self, width: int) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        step = self.step
        fraction = min(1.0, step.fraction) if step else 0.0
        where = Text("the first step", style="dim")
        if step:
            of = f" / {count(step.steps)}" if step.steps else ""
            clock = f"{duration(step.seconds)} so far"
            if step.eta_seconds is not None and fraction < 1:
                clock = f"{duration(step.eta_seconds)} left"
            parts = [(f"{fraction:.0%}", "bold"), (f"step {count(step.step)}{of}", ""), (clock, "cyan")]
            where = fit(parts, width - 10)
        grid = Table.grid(padding=(0, 2))
        grid.add_row(ProgressBar(total=1.0, completed=fraction, width=max(8, width - len(where) - 2)), where)
        return grid

    def _rows(self, width: int) -> list[tuple[str, Text]]:
        rows: list[tuple[str, Text]] = []
        step = self.step
        if step is not None:
            rows.append(("loss", self._loss(step.train_loss, self.losses, width, "cyan", ())))
        if self.val_loss is not None:
            best = () if self.best is None else ((f"best {self.best:.4f} at step {count(self.best_step)}", "dim"),)
            rows.append(("val", self._loss(self.val_loss, self.val_losses, width, "green", best)))
        if self.baseline is not None:
            name, nats = self.baseline
            unit = f"nats a {self.unit}" if width >= WIDE else ""
            parts = (f"{nats:.4f}", unit, _bits(nats), "counted on the training split, to compare with")
            rows.append((name, fit([(part, "dim") for part in parts], width)))
        if step is not None:
            flops = f"{si(step.flops_per_second)}FLOP/s"
            if self.peak:
                flops += f", {step.flops_per_second / self.peak:.0%} of peak"
            speed = f"{short(step.tokens_per_second)} {self.unit}s/s"
            rows.append(("speed", fit([(speed, ""), (flops, ""), (f"lr {step.lr:.2e}", "dim")], width)))
        sampler = self._sampler
        if sampler is not None:
            rows += machine_rows(sampler.latest, width)
        if self.saved is not None:
            text = f"step {count(self.saved.step)}, {ago(time.monotonic() - self.saved_at)} ago"
            rows.append(("saved", fit([(text, "")], width)))
        now = self._now()
        if now:
            rows.append(("now", now))
        return rows

    def _loss(self, nats: float, course: Course, width: int, style: str, more: tuple[tuple[str, str], ...]) -> Text:
        """A loss in nats and bits, its course in what is left of `width`, and `more` where there is room."""
        unit = f"nats a {self.unit}" if width >= WIDE else ""
        text = fit([(f"{nats:.4f}", f"bold {style}"), (unit, "dim"), (_bits(nats), "")], width)
        extra = fit(list(more), width - len(text) - 14)
        space = width - len(text) - 2 - (len(extra) + 2 if extra else 0)
        if space >= 5:
            line = sparkline(course.values, min(space, 120), output.unicode(), self._top(course))
            text.append(f"  {line}", style=style)
        return text.append("  ").append(extra) if extra else text

    def _top(self, course: Course) -> float | None:
        """Where a sparkline ends: at the baseline once the model is better, else where its usual values end."""
        if self.baseline is not None and course.values and min(course.values) < self.baseline[1]:
            return self.baseline[1]
        return usual(course.values)

    def _now(self) -> Text | None:
        from rich.text import Text

        if self.stop.exit_code:
            return Text(self.stop.notice, style="bold yellow")
        step, progress = self.step, self.progress  # copies, because training continues while this is drawn
        if progress is not None:
            share = f" {progress.done / progress.total:.0%}" if progress.total else ""
            return Text(output.one_line(progress.what) + share, style="dim")
        if self.overfitting:
            return Text(f"overfitting since step {self.overfitting}", style="yellow")
        if step is not None and step.skipped:
            return Text(f"skipped batches, whose loss was not finite: {step.skipped}", style="yellow")
        return None

    def _sample_lines(self, width: int, height: int) -> list[Text]:
        from rich.text import Text

        assert self.sample is not None
        text = whole_words(output.printable(self.sample.text).expandtabs(4).strip("\n"))
        lines = [part for line in text.split("\n") for part in (textwrap.wrap(line, width) or [""])]
        return [
            Text(f"a sample at step {count(self.sample.step)}", style="dim"),
            *(Text(line, style="italic", no_wrap=True, overflow="ellipsis") for line in lines[: height - 1]),
        ]


def fit(parts: list[tuple[str, str]], width: int) -> Text:
    """As many of `parts` (text, style) as fit into `width` columns, from the first on: none is cut in its middle."""
    from rich.text import Text

    text = Text()
    for part, style in parts:
        if part and len(text) + 3 * bool(text) + len(part) <= width:
            text.append("   " if text else "").append(part, style=style)
    return text


def whole_words(text: str) -> str:
    """`text` without the part of a word that it ends in, where it is long enough to have been cut there."""
    cut = max(text.rfind(" "), text.rfind("\n"))
    return f"{text[:cut]} ..." if cut >= 60 and text[-1].isalnum() else text


def _bits(nats: float) -> str:
    return f"{nats / math.log(2):.3f} bits"


def title(plan: Any) -> str:
    """Run, data, size and device in a line."""
    return DOT.join(
        output.one_line(part)
        for part in (plan.name, plan.dataset_name, f"{short(plan.parameters)} parameters", plan.device.name)
        if part
    )


def ago(seconds: float) -> str:
    """A short time: "12 s", then "3:05"."""
    return f"{seconds:.0f} s" if seconds < 60 else duration(seconds)


def machine_rows(stats: Stats, width: int) -> list[tuple[str, Text]]:
    """The rows on GPU, CPU and memory, without unknown figures."""
    s = stats
    gpu = (
        "" if s.gpu_percent is None else f"{s.gpu_percent:.0f}% busy",
        "" if s.gpu_memory_used is None or s.gpu_memory_total is None
        else f"{size(s.gpu_memory_used)} of {size(s.gpu_memory_total)}",
        "" if s.gpu_temperature is None else f"{s.gpu_temperature:.0f} °C",
        "" if s.gpu_power_watts is None else f"{s.gpu_power_watts:.0f} W",
    )  # fmt: skip
    cpu = (
        "" if s.cpu_percent is None else f"{s.cpu_percent:.0f}% busy",
        "" if s.memory_used is None or s.memory_total is None
        else f"{size(s.memory_used)} of {size(s.memory_total)} memory used",
        "" if s.process_memory is None else f"{size(s.process_memory)} by this run",
    )  # fmt: skip
    found = {"gpu": gpu, "cpu": cpu}
    return [(name, fit([(part, "") for part in parts], width)) for name, parts in found.items() if any(parts)]
