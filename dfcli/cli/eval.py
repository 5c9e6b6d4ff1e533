"""`df eval`: how good a model's predictions are, beside baselines on the same tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfcli.cli import output
from dfcli.cli.figures import count, short
from dfcli.cli.options import Json, with_options
from dfcli.errors import UsageError
from dfcli.evaluation.request import Request

if TYPE_CHECKING:
    from dfcli.evaluation.evaluate import Evaluation
    from dfcli.runs import Run

UNITS = {
    "loss": "NATS/TOKEN",
    "bits_per_byte": "BITS/BYTE",
    "bits_per_sample": "BITS/SAMPLE",
    "bits_per_16bit_sample": "BITS/16-BIT SAMPLE",
    "bits_per_character": "BITS/CHARACTER",
    "bits_per_token": "BITS/TOKEN",
}


@with_options(Request)
def evaluate(
    run: Annotated[
        list[str] | None,
        typer.Option("--run", metavar="NAME", help="A run's name, folder or packed file; repeat it to compare."),
    ] = None,
    *,
    choices: Annotated[
        Path | None,
        typer.Option(
            "--choices",
            metavar="FILE",
            help="Score multiple-choice items instead: JSONL with ctx, endings and label, in HellaSwag's format.",
        ),
    ] = None,
    json: Json = False,
    **options: Any,
) -> None:
    """Measure a run: loss, perplexity and bits, beside baselines on the same tokens.

    Every token is scored once (with --limit, the first N), always in the same
    way. The line below the table says how.

    Examples:
      df eval
      df eval --run shakespeare --split train --limit 100000
      df eval --run small --run large
      df eval --run shakespeare --data other.txt --stride 32 --json
      df eval --run shakespeare --choices hellaswag_val.jsonl
    """
    from dfcli.ingest.prepare import check_sources
    from dfcli.runs import Run, newest

    with output.Listener() as listener:
        chosen = [Run.open(name) for name in run] if run else [newest(on_event=listener)]
        request = Request(**options)
        for each in chosen:
            request.check(each)
        check_sources(request.data)
        if choices is not None:
            checkpoint, device = options.pop("checkpoint"), options.pop("device")
            if any(options.values()):
                raise UsageError("`--choices` is a measurement of its own", "leave out the options of the loss")
            _choices(chosen, choices, checkpoint, device, json, listener)
            return
        found: list[Evaluation] = []
        for each in chosen:
            output.say(f"run {each.name}", style="dim")
            with output.loading():
                from dfcli.evaluation.evaluate import evaluate

            found.append(evaluate(each, **options, on_event=listener))
    if json:
        _write_json(found)
    else:
        _print(found)


def _write_json(found: Sequence[Any]) -> None:
    objects = [dataclasses.asdict(one) for one in found]
    output.write_json(objects[0] if len(objects) == 1 else {"runs": objects})


def _choices(
    chosen: list[Run], file: Path, checkpoint: str, device: str, json: bool, listener: output.Listener
) -> None:
    with output.loading():
        from dfcli.evaluation.choices import score_choices

    found = [score_choices(run, file, checkpoint=checkpoint, device=device, on_event=listener) for run in chosen]
    listener.close()
    if json:
        _write_json(found)
        return
    rows = [[one.run, f"{one.accuracy_by_sum:.4f}", f"{one.accuracy_by_mean:.4f}"] for one in found]
    rows.append(["chance", *[f"{found[0].chance:.4f}"] * 2])
    output.table(("MODEL", "RIGHT BY SUM", "RIGHT BY MEAN"), rows, right=("RIGHT BY SUM", "RIGHT BY MEAN"))
    output.write("\n")
    output.paragraph(
        f"{count(found[0].items)} items of {file}: the share for which the right ending is the most likely one, by the "
        "sum of its tokens' log-likelihoods, and by their mean"
    )


def _print(found: list[Evaluation]) -> None:
    """One table: the models, and each baseline once where it is the same for all of them."""
    figures: dict[str, dict[str, Any]] = {}
    for one in found:
        figures[one.run] = dataclasses.asdict(one)
    for one in found:
        for name, values in one.baselines.items():
            shared = all(other.baselines.get(name) == values for other in found)
            figures[name if shared else f"{name} of {one.run}"] = values
    units: list[str] = []
    for unit in UNITS:  # a column for each unit that applies, but not two columns of the same figures
        known = all(figure.get(unit) is not None for figure in figures.values())
        if known and not any(all(f[unit] == f[other] for f in figures.values()) for other in units):
            units.append(unit)
    sizes = [unit for unit in ("bits_per_byte", "bits_per_16bit_sample", "bits_per_sample", "loss") if unit in units]
    rows = [
        [name, *(f"{values[unit]:.4f}" for unit in units), f"{_perplexity(values['loss']):.4g}"]
        for name, values in sorted(figures.items(), key=lambda item: item[1][sizes[0] if len(found) > 1 else "loss"])
    ]
    columns = ["MODEL", *(UNITS[unit] for unit in units), "PERPLEXITY"]
    output.table(columns, rows, right=columns[1:])
    output.write("\n")
    for one in found:
        whose = f"{one.run}: " if len(found) > 1 else ""
        output.paragraph(f"{whose}dataset {one.dataset}, split {one.split}, checkpoint of step {count(one.checkpoint)}")
        if one is found[-1] or one.protocol != found[-1].protocol:
            output.paragraph(one.protocol)
        if one.quantization_snr is not None and one.flac_bits_per_sample is not None:
            snr, flac = f"{one.quantization_snr:.1f} dB", f"{one.flac_bits_per_sample:.2f} bits"
            output.paragraph(
                f"{whose}quantisation alone has a signal-to-noise ratio of {snr}; "
                f"FLAC stores these recordings in {flac} a 16-bit sample"
            )
        _print_measures(one)
        output.say(f"{whose}{short(one.tokens_per_second)} tokens/s", style="dim")


def _print_measures(one: Evaluation) -> None:
    """Spectral distances, the smallest first."""
    if one.measures is None:
        return
    rows = [
        (one.run if name == "model" else name, f"{d['log_spectral']:.2f} dB", f"{d['multi_resolution']:.3f}")
        for name, d in sorted(one.measures.items(), key=lambda item: item[1]["log_spectral"])
    ]
    output.write("\n")
    output.table(("SOUND", "LOG-SPECTRAL DISTANCE", "MULTI-RESOLUTION STFT"), rows, right=("LOG-SPECTRAL DISTANCE",))
    output.write("\n")


def _perplexity(loss: float) -> float:
    import math

    return math.exp(loss) if loss < 700 else math.inf
