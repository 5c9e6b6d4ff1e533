"""One self-contained HTML page about runs: figures beside baselines, the loss curve, and samples.

It loads nothing from anywhere: charts are SVG, sound and spectrograms are data URIs. What models and files say is
escaped.
"""

from __future__ import annotations

import base64
import html
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from dfcli.errors import DfError
from dfcli.evaluation.evaluate import Evaluation, evaluate
from dfcli.generation.checks import a_recording, condition_info
from dfcli.generation.sample import sample_audio, sample_text
from dfcli.report.drawing import chart, spectrogram
from dfcli.runs.run import Run
from dfcli.system.events import Note, OnEvent, ignore
from dfcli.system.files import write_atomic
from dfcli.system.words import counted, size

TEXTS, TOKENS = 3, 400  # samples of a text model, and how long they are
CLIPS, SECONDS = 2, 3.0  # of a sound model
SEED = 0
UNITS = {
    "loss": "nats a token", "bits_per_byte": "bits a byte", "bits_per_character": "bits a character",
    "bits_per_sample": "bits a sample", "perplexity": "perplexity",
}  # fmt: skip
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } td, th { padding: .2rem 1rem .2rem 0; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums } tr.own { font-weight: bold }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f5; padding: .7rem }
svg { width: 100%; height: auto; font-size: 12px } .grid { stroke: #ddd } svg text { fill: currentColor }
img { width: 100%; image-rendering: auto } audio { width: 100% } td.v { overflow-wrap: anywhere }
"""


def write(runs: Sequence[Run], out: Path, *, device: str = "auto", on_event: OnEvent = ignore) -> int:
    """Write the page about `runs` to `out`, whole or not at all. Returns its bytes. Measures each run on its validation
    split and samples from it. Raises DfError where the page cannot be written; what a run lacks is said in the page."""
    title = "Runs " + ", ".join(run.name for run in runs) if len(runs) > 1 else f"Run {runs[0].name}"
    sections = [_section(run, device, on_event) for run in runs]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>{''.join(sections)}</body></html>\n"
    )
    data = page.encode("utf-8", "replace")
    write_atomic(out, data)
    return len(data)


def _section(run: Run, device: str, on_event: OnEvent) -> str:
    """What the page says of one run."""
    on_event(Note(f"run {run.name}: measuring and sampling"))
    info, parts = run.info, [f"<h2>{html.escape(run.name)}</h2>"]
    steps = run.steps()
    parts.append(_table([
        ("model", f"{info['core']['name']}, {info.get('parameters', 0):,} parameters"),
        ("preset", info.get("preset") or "none (default recipe)"),
        ("data", info.get("dataset", {}).get("name") or "unknown"),
        ("codec", info["codec"].get("name", "")),
        ("device", info.get("device", "")),
        ("created", str(info.get("created", ""))[:16].replace("T", " ") + " UTC"),
        ("checkpoints", ", ".join(f"{step:,}" for step in steps) or "none yet"),
        ("size", size(run.size_bytes())),
    ]))  # fmt: skip
    parts += _part("Figures", lambda: _figures(evaluate(run, device=device, on_event=on_event)))
    parts += _part("Loss curve", lambda: _course(run))
    parts += _part("Samples", lambda: _samples(run, device, on_event))
    values = [(info["core"]["name"], info["core"]["config"]), ("recipe", info.get("recipe", {}))]
    listed = _table((name, "  ".join(f"{k}={v}" for k, v in fields.items())) for name, fields in values)
    parts.append(f"<details><summary>All values</summary>{listed}</details>")
    return "".join(parts)


def _part(title: str, make: Any) -> list[str]:
    """A heading and what `make` gives, or the reason why there is nothing."""
    try:
        body = make()
    except DfError as error:
        body = f"<p>{html.escape(error.message)}</p>"
    return [f"<h3>{title}</h3>", body]


def _table(items: Iterable[tuple[str, object]]) -> str:
    cells = ((html.escape(name), html.escape(str(value))) for name, value in items)
    rows = "".join(f'<tr><th>{name}</th><td class="v">{value}</td></tr>' for name, value in cells)
    return f"<table>{rows}</table>"


def _figures(found: Evaluation) -> str:
    """The model beside the baselines, the lowest loss first."""
    own = {unit: getattr(found, unit) for unit in UNITS}
    figures = {found.run: own, **{name: {"perplexity": np.exp(v["loss"]), **v} for name, v in found.baselines.items()}}
    units = [unit for unit in UNITS if all(values.get(unit) is not None for values in figures.values())]
    rows = [f"<tr><th></th>{''.join(f'<th>{UNITS[unit]}</th>' for unit in units)}</tr>"]
    for name, values in sorted(figures.items(), key=lambda item: item[1]["loss"]):
        cells = "".join(f'<td class="n">{values[unit]:.4f}</td>' for unit in units)
        rows.append(f"<tr{' class=own' * (values is own)}><th>{html.escape(name)}</th>{cells}</tr>")
    protocol = f"{counted(found.tokens, 'token')} of the split {found.split}: {found.protocol}"
    return f"<table>{''.join(rows)}</table><p>{html.escape(protocol)}</p>"


def _course(run: Run) -> str:
    rows = run.metrics()
    series = {
        name: [(row["step"], row[key]) for row in rows if isinstance(row.get(key), float)]
        for name, key in (("training loss", "train_loss"), ("validation loss", "val_loss"))
    }
    drawn = chart(series, "step", "nats a token")
    return drawn or "<p>This run has no history.</p>"


def _samples(run: Run, device: str, on_event: OnEvent) -> str:
    if run.makes == "text":
        made = sample_text(run, num=TEXTS, tokens=TOKENS, seed=SEED, device=device, on_event=on_event)
        return "".join(f"<pre>{html.escape(text)}</pre>" for text in made.samples)
    options: dict[str, Any] = {"num": CLIPS, "seed": SEED, "device": device, "seconds": SECONDS}
    if condition_info(run).vocoder:
        options["mel"] = Path(a_recording(run))
    with tempfile.TemporaryDirectory() as folder:
        result = sample_audio(run, out=Path(folder) / "clip.wav", on_event=on_event, **options)
        parts = []
        for path, labels in zip(result.samples, result.labels or [{}] * CLIPS, strict=True):
            samples: Any
            samples, _ = soundfile.read(path, dtype="float32")
            named = ", ".join(f"{label} {name}" for label, name in labels.items())
            parts.append(f"<p>{html.escape(named)}</p>" if named else "")
            parts.append(f'<audio controls src="{_uri("audio/wav", Path(path).read_bytes())}"></audio>')
            parts.append(f'<img alt="spectrogram" src="{_uri("image/png", spectrogram(samples))}">')
    return "".join(parts)


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
