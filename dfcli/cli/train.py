"""`df train`: plan, train with a live view, and say what to type next."""

from __future__ import annotations

import dataclasses
import math
import shlex
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dfcli.cli import output
from dfcli.cli.figures import count, duration, short, size
from dfcli.cli.options import Json, key_values, mention_stdin, with_options
from dfcli.cli.runs import named
from dfcli.cli.signals import INTERRUPTED, TERMINATED, Stop
from dfcli.system import processes
from dfcli.system.words import counted, span
from dfcli.training.request import Request, about_corpus

if TYPE_CHECKING:
    from dfcli.training.plan import Plan
    from dfcli.training.result import TrainResult


@with_options(Request)
def train(
    context: typer.Context,
    kind: Annotated[
        Literal["gpt", "wavenet"],
        typer.Argument(
            metavar="KIND", case_sensitive=False, help="What to train: a GPT on text, a WaveNet on audio or text."
        ),
    ],
    *,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", metavar="", help="Only errors on stderr.")] = False,
    json: Json = False,
    **options: Any,
) -> None:
    """Train a GPT or a WaveNet, and keep the run.

    Without a preset, a recipe is chosen for the data, the device and the time,
    and each choice is shown with its reason. Ctrl-C saves and says how to resume.
    Repeat a command with --resume until the training is finished.

    Examples:
      df train gpt --minutes 1
      df train gpt --data shakespeare.txt --device cuda
      df train gpt --preset nano-cpu --name nano --resume
      df train wavenet --data recordings/ --minutes 30
      df train wavenet --data recordings/ --label folder
      df train gpt --data notes/ --set layers=6 --set dropout=0.2 --show
    """
    overrides = key_values(options.pop("overrides"), "--set", "key=value", "layers=4")
    request = Request(kind, overrides=overrides, **options)
    if processes.rank():  # the first process tells
        quiet, json = True, False
    mention_stdin(list(request.data))
    if request.show:
        _show(request, json, quiet)
    else:
        _train(request, json, quiet, context.find_root().obj["arguments"])


def _show(request: Request, json: bool, quiet: bool) -> None:
    with output.loading():
        from dfcli.training.train import plan

    with output.Listener(quiet) as listener:
        made = plan(request, on_event=listener)
    if json:
        output.write_json(made.to_json())
        return
    _, memory = made.device.memory_bytes()
    of = f", more than the {size(memory)} there are" if made.memory > memory else ""
    entry = made.entry
    output.pairs(
        [
            ("model", f"{made.core}, {count(made.parameters)} parameters"),
            ("codec", made.codec_name),
            ("context", span(made.config.context, made.sample_rate)),
            ("FLOPs per token", f"{count(made.flops_per_token)} forward"),
            ("memory", f"about {size(made.memory)}{of}"),
            ("export", made.export[1]),
            ("seed", made.seed),
            *([("source", entry["source"]), ("published", entry["published"])] if entry else []),
            *([("published on", "{}: {}".format(*about_corpus(entry["corpus"])))] if "corpus" in entry else []),
        ]
    )
    output.write("\n")
    output.table(("CHOICE", "VALUE", "REASON"), [(c.what, c.value, c.reason) for c in made.choices])
    output.write("\nEvery value that `--set` changes:\n\n")
    output.pairs(
        [(what, named(dataclasses.asdict(of))) for what, of in (("core", made.config), ("recipe", made.recipe))]
    )


def _train(request: Request, json: bool, quiet: bool, line: list[str]) -> None:
    stop = Stop(announce=not quiet)
    plan: Plan | None = None
    kept = False  # whether there is a checkpoint to go on from

    with ExitStack() as stack:
        try:
            with output.loading():
                from dfcli.cli.live import TrainView
                from dfcli.training.events import Closing, Saved, Started
                from dfcli.training.train import train

            view = stack.enter_context(TrainView(stop, quiet))

            def on_event(event: object) -> None:
                nonlocal plan, kept
                if isinstance(event, Started):  # until here Ctrl-C ends the program at once; now there is a run to save
                    plan, kept = event.plan, event.step > 0
                    stack.enter_context(stop)
                elif isinstance(event, Saved):
                    kept = True
                elif isinstance(event, Closing):
                    stop.saved = True
                    if plan is None:  # the run was finished before
                        stack.enter_context(stop)
                view(event)

            result = train(request, previews=view.animated, on_event=on_event, stop=stop)
        except (KeyboardInterrupt, SystemExit):
            stack.close()
            if plan is not None and kept and not stop.saved:
                _tell_resume(line, plan)
            elif not quiet and not stop.saved:  # its notice has said all
                before = "first step: nothing to save" if plan is None else "first checkpoint: nothing is kept"
                output.say(f"stopped before the {before}")
            raise
    if json:
        output.write_json(dataclasses.asdict(result))
    if result.stopped and not result.steps:
        if not quiet:
            output.say("stopped before the first step: nothing to save")
    elif not quiet:
        _tell(result, request.kind)
    if result.stopped and result.steps and plan is not None:
        _tell_resume(line, plan)
    if reason := result.stopped or (None if result.closed else stop()):
        raise typer.Exit({"interrupted": INTERRUPTED, "terminated": TERMINATED}[reason])


def _tell(result: TrainResult, kind: str) -> None:
    """Where the run is, its figures, and what to type next."""
    from dfcli.generation.checks import sound_options
    from dfcli.runs import Run

    trained = Run.open(result.run)
    sound = trained.makes == "audio"
    unit = "sample" if sound else "token"
    seen = f"{counted(result.steps, 'step')}, {short(result.tokens_seen)} {unit}s in {duration(result.train_seconds)}"
    output.say(f"{result.run}: {seen} ({short(result.tokens_per_second)} {unit}s/s)", style="bold")
    if result.val_loss is not None:
        bits = result.val_loss / math.log(2)
        at = "" if result.best_step is None else f" (step {count(result.best_step)})"
        whole = result.stopped is None and result.closed
        over = "over the whole split" if whole else "as measured during training"
        output.say(f"validation loss {result.val_loss:.4f} nats a {unit}, {bits:.3f} bits, {over}{at}")
    output.say(f"kept in {output.one_line(result.path)}", fold=False)
    if result.stopped is None:
        run = shlex.quote(result.run)
        sample = f"wavenet --run {run} {sound_options(trained)}" if sound else f"{kind} --run {run}"
        split = " --split train" if result.val_loss is None else ""  # there is nothing else to score
        output.say(f"next: df sample {sample}\n      df eval --run {run}{split}", style="cyan", fold=False)


def _tell_resume(line: list[str], plan: Plan) -> None:
    """The exact line that resumes the run."""
    if processes.rank():
        return
    start = ["torchrun", "--nproc-per-node", str(processes.local_count()), "-m", "dfcli"]
    words = [*(start if processes.count() > 1 else ["df"]), *line]
    if not any(word == "--name" or word.startswith("--name=") for word in words):
        words += ["--name", str(plan.name)]
    if "--resume" not in words:
        words.append("--resume")
    output.say(f"to go on: {shlex.join(words)}", style="cyan", fold=False)
