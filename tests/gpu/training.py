"""Parts that train: the line as typed, exact resume, the published presets, the default recipe, several processes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.gpu.common import Failed, Note, Where
from tests.shared import shared_data

TINY = {"context": "16", "layers": "1", "heads": "2", "channels": "32", "ngrams": "2"}


def line(where: Where, note: Note) -> None:
    """The user's line, interrupted after some seconds; the run that it leaves is sampled from."""
    import dfcli

    data, shakespeare = where.text()
    words = ["train", "gpt", *(["--data", Path(data[0]).name] if shakespeare else []), "--device", where.device]
    words += ["--set", "compile=off"] if where.quick else []  # kernels for a CPU are compiled for half a minute
    note(line="df " + " ".join(words))
    typed = [sys.executable, "-m", "dfcli", *words]
    began = time.perf_counter()
    process = subprocess.Popen(typed, cwd=where.work, stderr=subprocess.PIPE, text=True)
    runs = Path(os.environ["DFCLI_HOME"]) / "runs"
    while process.poll() is None and not (steps := logged(runs, 1)):
        time.sleep(0.1)
    if process.poll() is not None:
        raise Failed(f"the line ended with {process.returncode}: {(process.stderr or sys.stdin).read()[-500:]}")
    note(seconds_to_first_steps=round(time.perf_counter() - began, 1))
    time.sleep(1 if where.quick else 30)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    print(said, file=sys.stderr)
    note.check(process.returncode == 130, f"Ctrl-C gave exit code {process.returncode}")
    steps = logged(runs, 1)
    made = dfcli.sample_text(prompt="ROMEO:" if shakespeare else "", tokens=60, device=where.device, seed=1)
    measured = {step["step"]: step["val_loss"] for step in steps if step.get("val_loss") is not None}
    if measured:
        best = min(measured, key=lambda step: measured[step])
        note.check(made.checkpoint == best, f"sampled from step {made.checkpoint}, and step {best} was the best")
    else:  # then the last one is sampled from
        note.check(made.checkpoint >= steps[-1]["step"], "the last checkpoint is older than the last line of the log")
    last = steps[-1]
    note(
        steps=last["step"], checkpoint=made.checkpoint, train_loss=last["train_loss"],
        tokens_per_second=last["tokens_per_second"], sample=made.samples[0], engine=made.engine,
        says={"": f"{last['step']} steps, training loss {last['train_loss']:.3f}, "
                  f"{last['tokens_per_second']:,.0f} tokens/s"},
    )  # fmt: skip


def logged(runs: Path, least: int) -> list[dict[str, Any]]:
    """The lines of the only run's metrics.jsonl; none where there are fewer than `least`."""
    files = list(runs.glob("*/metrics.jsonl"))
    lines = [json.loads(text) for text in files[0].read_text().splitlines()[1:]] if files else []
    return lines if len(lines) >= least else []


class Halfway:
    """A `stop` that asks for an end before step `step`."""

    def __init__(self, step: int) -> None:
        self.left = step

    def __call__(self) -> str | None:
        self.left -= 1
        return "interrupted" if self.left < 0 else None


def resume(where: Where, note: Note) -> None:
    """A training that is stopped halfway and resumed, and one that is not: the same bits?"""
    import torch

    import dfcli

    data, _ = where.text()
    steps, cases = 12 if where.quick else 60, {"gpt": {"dropout": "0.1", "ngram_dropout": "0.2"}, "wavenet": {}}
    says = {}
    for kind, more in cases.items():
        if kind == "gpt":
            small = TINY if where.quick else {"context": "256", "layers": "6", "ngrams": "4"}
        else:
            small = {"residual": "16", "cycles": "1"} if where.quick else {"residual": "64"}
        options: dict[str, Any] = {
            "steps": steps, "device": where.device, "seed": 3,
            "overrides": small | more | ({} if where.on_gpu else {"compile": "off"}),
        }  # fmt: skip
        dfcli.train(kind, data, name=f"{kind}-whole", **options)
        dfcli.train(kind, data, name=f"{kind}-halves", stop=Halfway(steps // 2), **options)
        result = dfcli.train(kind, data, name=f"{kind}-halves", resume=True, **options)
        whole, halves = (dfcli.Run.open(f"{kind}-{name}").load("last").model for name in ("whole", "halves"))
        apart = max(float((halves[name] - tensor).abs().max()) for name, tensor in whole.items())
        same = all(torch.equal(halves[name], tensor) for name, tensor in whole.items())
        note(**{kind: {"equal": same, "largest_difference": apart, "steps": result.steps}})
        note.check(same, f"{kind}: resumed weights differ by up to {apart:.2g}")
        says[kind] = f"{kind} {'equal' if same else 'unequal'} after {steps} steps"
        note(says=says)


def nano(where: Where, note: Note) -> None:
    preset(where, note, "nano", 1.4697)


def lecture(where: Where, note: Note) -> None:
    preset(where, note, "lecture", 1.48)


def preset(where: Where, note: Note, name: str, published: float) -> None:
    """A published model in full. Each evaluation is noted, so that a training that is cut off still says something."""
    import dfcli
    from dfcli.training.events import Step

    data, shakespeare = where.text()
    losses: dict[int, float] = {}

    def on_event(event: object) -> None:
        if isinstance(event, Step) and event.val_loss is not None:
            losses[event.step] = event.val_loss
            best = min(losses.values())
            text = f"best validation loss {best:.4f} in {max(losses)} steps, {event.tokens_per_second:,.0f} tokens/s"
            note(losses=losses, best=best, tokens_per_second=event.tokens_per_second, says={"": text})

    options: dict[str, Any] = {"preset": name, "device": where.device, "on_event": on_event}
    if where.quick:
        options |= {"steps": 2, "batch_size": 2, "overrides": {"eval_tokens": "512", "eval_every": "1"}}
    result = dfcli.train("gpt", data, **options)
    note(val_loss=result.val_loss, train_seconds=result.train_seconds, published=published)
    if shakespeare and not where.quick and result.val_loss is not None:
        note.check(result.val_loss <= published + 0.01, f"validation loss {result.val_loss:.4f}, published {published}")
    note.check(result.val_loss is not None and math.isfinite(result.val_loss), "there is no finite validation loss")


def default(where: Where, note: Note) -> None:
    """What a user gets without any option."""
    import dfcli

    data, _ = where.text()
    small: dict[str, Any] = {"overrides": TINY | {"eval_tokens": "2000", "compile": "off"}} if where.quick else {}
    result = dfcli.train("gpt", data, minutes=0.05 if where.quick else 1, device=where.device, **small)
    assert result.val_loss is not None
    spent, limit = result.train_seconds, 3 if where.quick else 60
    note.check(spent < 1.1 * limit + 1, f"it took {spent:.1f} s")
    note(
        val_loss=result.val_loss, parameters=result.parameters, train_seconds=spent, steps=result.steps,
        tokens_per_second=result.tokens_per_second,
        says={"": f"validation loss {result.val_loss:.4f} with {result.parameters / 1e6:.1f}M parameters in "
                  f"{spent:.0f} s, {result.tokens_per_second:,.0f} tokens/s"},
    )  # fmt: skip


def sound(where: Where, note: Note) -> None:
    """A WaveNet by default, told who speaks and what where fsdd is at hand: trained, heard, scored."""
    import dfcli

    folder = shared_data()
    spoken = folder and not where.quick and (folder / "fsdd").is_dir()
    options: dict[str, Any] = {"device": where.device, "minutes": 0.05 if where.quick else 0.7}
    if where.quick:
        options["overrides"] = {"cycles": "1", "residual": "16", "eval_tokens": "2000", "compile": "off"}
    if spoken:
        options |= {"data": [str(folder / "fsdd")], "label": r"(?P<digit>\d)_(?P<speaker>[a-z]+)_"}
    result = dfcli.train("wavenet", **options)
    made = dfcli.sample_audio(out=where.work / "out.wav", seconds=2, seed=1, device=where.device)
    scored = dfcli.evaluate(device=where.device, limit=None if where.on_gpu else 4000)
    bits = scored.bits_per_sample
    assert bits is not None
    note.check(bits < 10, f"{bits} bits per sample, where guessing costs 10")
    note(
        val_loss=result.val_loss, steps=result.steps, parameters=result.parameters, engine=made.engine,
        samples_per_second=made.tokens_per_second, bits=bits,
        says={"": f"{'fsdd, labels' if spoken else 'built-in sound'}: {bits:.3f} bits per sample with "
                  f"{result.parameters / 1e6:.1f}M parameters in {result.train_seconds:.0f} s, "
                  f"{result.tokens_per_second:,.0f} samples/s; {made.engine} {made.tokens_per_second:,.0f} samples/s"},
    )  # fmt: skip


def processes(where: Where, note: Note) -> None:
    """The same training by one process and by several: their losses agree."""
    import torch

    import dfcli

    data, _ = where.text()
    count = torch.cuda.device_count() if where.on_gpu else 2
    if count < 2 or where.device == "mps":
        note(says={"": "one GPU: several processes are not measured"})
        return
    steps = 8 if where.quick else 100
    settings = (TINY if where.quick else {"layers": "6", "channels": "384", "heads": "6"}) | {
        "dropout": "0", "ngram_dropout": "0",
    } | ({} if where.on_gpu else {"compile": "off"})  # fmt: skip
    words = ["--steps", str(steps), "--batch-size", str(8 * count), "--device", where.device, "--name", "several"]
    words += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    words += ["--data", data[0]] if data else []
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    subprocess.run([*torchrun, "-m", "dfcli", "train", "gpt", *words], check=True)
    several = dfcli.train("gpt", resume=True, name="several", device=where.device)  # finished: its result
    one = dfcli.train("gpt", data, steps=steps, batch_size=8 * count, device=where.device, overrides=settings)
    assert several.val_loss is not None
    assert one.val_loss is not None
    apart = abs(several.val_loss - one.val_loss)
    note.check(apart < (2e-2 if where.on_gpu else 1e-3), f"validation losses differ by {apart:.2g}")
    speedup = several.tokens_per_second / one.tokens_per_second
    note(
        processes=count, val_losses=[one.val_loss, several.val_loss], speedup=speedup,
        says={"": f"validation loss with {count} processes {several.val_loss:.4f}, with one {one.val_loss:.4f}; "
                  f"{speedup:.2f} times as fast"},
    )  # fmt: skip
