"""`df eval`: what a model's predictions are worth, beside baselines on the same tokens."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Annotated

import typer

from dfcli.cli import output
from dfcli.cli.figures import count, short
from dfcli.cli.options import Checkpoint, Device, Json, RunName

if TYPE_CHECKING:
    from dfcli.evaluation.evaluate import Evaluation

UNITS = {
    "loss": "NATS/TOKEN",
    "bits_per_byte": "BITS/BYTE",
    "bits_per_sample": "BITS/SAMPLE",
    "bits_per_character": "BITS/CHARACTER",
    "bits_per_token": "BITS/TOKEN",
}


def evaluate(
    run: RunName = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="NAME|PATH", help="Other data than the run's own; files are scored whole."),
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", metavar="SPLIT", help="val, test or train; val by default.")
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride", metavar="N", help="Of a GPT's windows; the context by default. Smaller: more context."
        ),
    ] = None,
    checkpoint: Checkpoint = "best",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure a run: loss, perplexity and bits, beside baselines on the same tokens.

    Every position is scored once, deterministically; how is said below the table.

    Examples:
      df eval
      df eval --run shakespeare --split train
      df eval --run shakespeare --data other.txt --stride 32 --json
    """
    from dfcli.ingest.prepare import check_sources
    from dfcli.runs import Run, newest

    with output.Listener() as listener:
        chosen = Run.open(run) if run else newest(on_event=listener)
        check_sources(data or [])
        output.say(f"run {chosen.name}", style="dim")
        with output.loading():
            from dfcli.evaluation.evaluate import evaluate

        found = evaluate(
            chosen, data or [], split=split, stride=stride, checkpoint=checkpoint, device=device, on_event=listener
        )
    if json:
        output.write_json(dataclasses.asdict(found))
    else:
        _print(found)


def _print(found: Evaluation) -> None:
    model = dataclasses.asdict(found)
    figures = {found.run: model} | found.baselines
    units: list[str] = []
    for unit in UNITS:  # those that apply; one that says the same as another, as with a byte a token, once
        known = model[unit] is not None
        if known and not any(all(f[unit] == f[other] for f in figures.values()) for other in units):
            units.append(unit)
    rows = [
        [name, *(f"{values[unit]:.4f}" for unit in units), f"{math.exp(min(values['loss'], 700)):.4g}"]
        for name, values in sorted(figures.items(), key=lambda item: item[1]["loss"])
    ]
    columns = ["MODEL", *(UNITS[unit] for unit in units), "PERPLEXITY"]
    output.table(columns, rows, right=columns[1:])
    output.write("\n")
    output.paragraph(f"dataset {found.dataset}, split {found.split}, checkpoint of step {count(found.checkpoint)}")
    output.paragraph(found.protocol)
    output.say(f"{short(found.tokens_per_second)} tokens/s", style="dim")
