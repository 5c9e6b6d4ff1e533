"""`df runs`: list, show, rename, pack, remove, import and export trained runs."""

from __future__ import annotations

import dataclasses
import math
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfcli.cli import output
from dfcli.cli.figures import age, count, duration, size, sparkline
from dfcli.cli.layout import Command, Group
from dfcli.cli.options import Checkpoint, Json, Yes, confirmed
from dfcli.errors import DfError, UsageError
from dfcli.system.events import Note
from dfcli.system.words import counted

if TYPE_CHECKING:
    from dfcli.runs import Run

app = typer.Typer(cls=Group, no_args_is_help=True, help="List, show, rename, pack, import, export and remove runs.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="A run's name, folder or packed file.")]


@app.command("list", cls=Command)
def list_(json: Json = False) -> None:
    """List all runs: kind, data, state, steps, validation loss, age and size.

    Examples:
      df runs list
    """
    from dfcli.runs import list_runs

    with output.Listener() as listener:
        runs = sorted(list_runs(listener), key=lambda run: run.order)
    if json:
        output.write_json({"runs": [facts(run) for run in runs]})
        return
    if not runs:
        output.say("there are no runs yet; `df train gpt` makes one")
        return
    losses = {run.name: val_loss(run) for run in runs}
    rows = [
        (
            run.name,
            run.kind,
            run.info.get("dataset", {}).get("name", ""),
            state(run),
            count(run.steps()[-1]) if run.steps() else "-",
            losses[run.name],
            age(seconds_since(run)),
            size(run.size_bytes()),
        )
        for run in runs
    ]
    right = ("STEPS", "VAL LOSS", "AGE", "SIZE")
    output.table(("NAME", "KIND", "DATA", "STATE", "STEPS", "VAL LOSS", "AGE", "SIZE"), rows, right)
    if any(shown.startswith("~") for shown in losses.values()):
        output.say("~ over a part of the validation split, as measured during training", style="dim")


@app.command(cls=Command)
def show(name: Name, json: Json = False) -> None:
    """Show a run: its model, data, progress and losses.

    Examples:
      df runs show shakespeare
    """
    from dfcli.runs import Run

    run = Run.open(name)
    complete(run)
    rows = run.metrics()
    if json:
        output.write_json(facts(run) | {"info": run.info, "metrics": rows})
        return
    last = rows[-1] if rows else {}
    steps = run.steps()
    data = run.info.get("dataset", {})
    items: list[tuple[str, object]] = [
        ("run", run.name),
        ("path", run.path),
        ("kind", run.kind),
        ("preset", run.info.get("preset") or "none (default recipe)"),
        ("data", f"{data.get('name', '')}  {data.get('path', '')}"),
        ("codec", run.info["codec"].get("name", "")),
        ("seed", run.info.get("seed", "")),
        ("created", f"{str(run.info.get('created'))[:19].replace('T', ' ')} UTC  ({age(seconds_since(run))} ago)"),
        ("state", state(run)),
        ("checkpoints", ", ".join(count(step) for step in steps) or "none yet"),
        ("size", size(run.size_bytes())),
    ]
    if steps:
        shown = val_loss(run)
        part = " (over a part of the validation split)" if shown.startswith("~") else ""
        items.append(("best", f"step {count(run.resolve('best'))}, val loss {shown}{part}"))
    if last:
        items.append(
            ("last", f"step {count(last['step'])}, {counted(last['tokens'], 'token')}, {duration(last['seconds'])}")
        )
    if overfits(run):
        items.append(("overfitting", "the validation loss rose after the best step, while the training loss fell"))
    most = run.info.get("recipe", {}).get("eval_tokens") if measured_in_part(run) else None
    for key, title in (("train_loss", "train loss"), ("val_loss", "val loss")):
        course = [row[key] for row in rows if isinstance(row.get(key), float)]
        if course:
            line = sparkline(course, 48, output.unicode())
            over = f", each over at most {count(most)} tokens" if key == "val_loss" and most else ""
            items.append((title, f"{line}  {course[0]:.4f} -> {course[-1]:.4f}, lowest {min(course):.4f}{over}"))
    items.append(("core", named(run.info["core"]["config"])))
    items.append(("recipe", named(run.info.get("recipe", {}))))
    output.pairs(items)


@app.command(cls=Command)
def path(name: Name) -> None:
    """Print the folder of a run.

    Examples:
      cp -r "$(df runs path shakespeare)" /media/stick/
    """
    from dfcli.runs import Run

    output.write(f"{Run.open(name).path}\n")


@app.command(cls=Command)
def rename(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The run's name.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Its new name.")],
) -> None:
    """Give a run another name.

    Examples:
      df runs rename gpt-builtin-1 first
    """
    from dfcli import runs

    runs.rename(name, new)
    output.say(f"the run `{name}` is now called `{new}`")


@app.command(cls=Command)
def pack(
    name: Name,
    out: Annotated[str, typer.Option("-o", "--output", metavar="FILE", help="The .zip file or folder to write.")],
    checkpoint: Checkpoint = "best",
) -> None:
    """Pack a run into one file to give away: model, codec and figures, but not its data.

    `--run model.df.zip` then works in `df sample` and `df eval`, on any machine.
    Opening the file runs no code. It holds no paths of this machine.

    Examples:
      df runs pack shakespeare -o model.df.zip
      df sample gpt --run model.df.zip
    """
    from dfcli.generation.checks import sound_options
    from dfcli.runs import Run
    from dfcli.runs.pack import pack

    run = Run.open(name)
    figures = None
    with output.Listener() as listener, output.loading():
        from dfcli.evaluation.evaluate import evaluate

        if Path(out).exists():
            raise UsageError(f"{out} exists already", "choose another name, or remove it first")
        listener(Note("measuring the run, because its figures are packed too"))
        try:
            figures = dataclasses.asdict(evaluate(run, checkpoint=checkpoint, on_event=listener))
        except DfError as error:
            output.say(f"no figures are packed: {error.message}")
        written = pack(run, Path(out), which=checkpoint, figures=figures)
    total = sum(file.stat().st_size for file in written.rglob("*")) if written.is_dir() else written.stat().st_size
    output.say(f"packed `{run.name}` into {output.one_line(out)} ({size(total)})")
    options = f" {sound_options(run)}" if run.makes == "audio" else ""
    line = f"df sample {run.kind if options else 'gpt'} --run {shlex.quote(out)}{options}"
    output.say(f"next: {line}", style="cyan", fold=False)


@app.command(cls=Command)
def remove(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="The runs' names.")], yes: Yes = False
) -> None:
    """Remove runs and their checkpoints.

    Examples:
      df runs remove shakespeare
      df runs remove first second --yes
    """
    from dfcli import runs
    from dfcli.runs.run import folder_of

    there = {run.name for run in runs.list_runs()} if len(names) > 1 else {*names}
    for name in names:  # nothing is removed where one of the names is wrong
        folder_of(name)
        if name not in there:
            runs.Run.open(name)
    listed = ", ".join(f"`{name}`" for name in names)
    what = f"the run {listed} and all its checkpoints" if len(names) == 1 else f"the runs {listed}"
    if not confirmed(f"remove {what}", yes):
        output.say("nothing was removed")
        raise typer.Exit(1)
    for name in dict.fromkeys(names):
        runs.remove(name)
        output.say(f"removed the run `{name}`")


def facts(run: Run) -> dict[str, Any]:
    """The facts of a run for `--json`."""
    steps = run.steps()
    shown = val_loss(run)
    return {
        "run": run.name,
        "path": str(run.path),
        "kind": run.kind,
        "makes": run.makes,
        "dataset": run.info.get("dataset", {}).get("name"),
        "state": state(run),
        "steps": steps[-1] if steps else None,
        "checkpoints": steps,
        "val_loss": None if shown == "-" else float(shown.removeprefix("~")),
        "val_loss_over_whole_split": not shown.startswith("~"),
        "overfitting": overfits(run),
        "created": run.info.get("created"),
        "size_bytes": run.size_bytes(),
    }


@app.command("import", cls=Command)
def import_(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="config.json, safetensors files and a tokenizer.")],
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="What to call the run; as the folder by default.")
    ] = None,
) -> None:
    """Make a run from a Hugging Face folder: GPT-2, or an Apertus folder that df exported.

    It can be sampled, measured and trained on like any other run.

    Examples:
      df runs import gpt2/
      df sample gpt --run gpt2 --prompt "Once upon a time"
      df train gpt --init gpt2 --data shakespeare.txt
    """
    with output.loading():
        from dfcli.runs.huggingface import import_folder

    run = import_folder(folder, name)
    output.say(f"run {run.name}: {count(run.info['parameters'])} parameters, {counted(run.codec.vocab_size, 'id')}")
    output.say(f"next: df sample gpt --run {run.name}", style="bold")


@app.command("export", cls=Command)
def export_(
    name: Name,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to make; it must not exist.")],
    checkpoint: Checkpoint = "best",
) -> None:
    """Write a GPT and its tokenizer as a folder that Hugging Face's transformers opens.

    The logits there equal those here, and a text begins there as it does here.
    What no architecture of transformers can hold is refused, with the --set that
    avoids it; df train --show tells beforehand.

    Examples:
      df runs export shakespeare hf/
    """
    from dfcli.runs import Run

    run = Run.open(name)
    with output.loading():
        from dfcli.runs.export import export

    made = export(run, folder, checkpoint)
    output.say(f"{made.folder}: {made.architecture}, step {count(made.checkpoint)}, {size(made.size)}")


def complete(run: Run) -> None:
    """Measure the closing figure of a finished run whose training was stopped before it had it. A note says why, where
    that cannot be done."""
    if run.result is None or run.result.get("closed", True):
        return
    with output.Listener() as listener:
        with output.loading():
            from dfcli.training.train import finish, unmeasured
        try:
            finish(run, on_event=listener)
        except DfError as error:
            listener(unmeasured(error))


def state(run: Run) -> str:
    """Whether a run is finished, in training, stopped before its budget was used, or imported."""
    from dfcli.runs.lock import holder
    from dfcli.runs.run import RESULT

    if (run.path / RESULT).exists():
        return "finished"
    if "imported" in run.info:
        return "imported"
    return "training" if holder(run.path) else "stopped"


def val_loss(run: Run) -> str:
    """The validation loss of the best checkpoint: over the whole split, as a finished training measures it, else as it
    was during training, with a ~ where that was over a part of it."""
    try:
        if run.result is not None and run.result.get("closed", True):
            return loss(run.result.get("val_loss"))
        shown = loss(run.state(run.resolve("best")).get("val_loss"))
    except DfError:  # there is no checkpoint, or it is damaged
        return "-"
    return f"~{shown}" if shown != "-" and measured_in_part(run) else shown


def measured_in_part(run: Run) -> bool:
    """Whether the validation losses of a training are over a part of the split. Runs of version 0.1 do not say how long
    the split is."""
    most = run.info.get("recipe", {}).get("eval_tokens")
    length = run.info.get("dataset", {}).get("splits", {}).get("val")
    return bool(most) and (not isinstance(length, int) or length > most)


def overfits(run: Run) -> bool:
    """Whether a finished training found that its model overfits."""
    try:
        return run.result is not None and run.result.get("overfitting") is True
    except DfError:  # the result is damaged
        return False


def loss(value: object) -> str:
    """A loss for a table."""
    return f"{value:.4f}" if isinstance(value, float) and math.isfinite(value) else "-"


def seconds_since(run: Run) -> float:
    """Seconds since the run was created; 0 if run.json does not say when."""
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(str(run.info.get("created")))).total_seconds()
    except (ValueError, TypeError):
        return 0.0


def named(values: dict[str, Any]) -> str:
    """`{"layers": 4}` -> "layers=4"."""
    return "  ".join(f"{key}={value}" for key, value in values.items())
