"""Run one row of the replication table through the public command and print it as JSON.

    python -m tests.replications.replicate nano-cpu --data shakespeare.txt [--device cuda] [--out results/]

Each row trains its preset, evaluates on the published protocol and on the full split, and states both beside the
published figure. `--data` takes the published corpus as a file or folder; without it, what `df data get` fetched. With
`--out` the JSON is also written to a file there; `python -m tests.replications.table` makes README's table of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """What is published, and the lines that repeat it."""

    model: str
    published: str
    train: list[str]  # after `df train`
    splits: tuple[str, ...] = ("val",)  # scored whole by `df eval`
    protocol: Callable[[str, str], dict[str, float]] | None = None  # (run, device) -> figures of the published protocol
    note: str = ""
    corpus: str = "shakespeare"
    environment: dict[str, str] = field(default_factory=dict)


def random_batches(count: int, batch_size: int) -> Callable[[str, str], dict[str, float]]:
    """nanoGPT's and the lecture's estimate: the mean loss of `count` random batches of the validation split."""

    def figures(name: str, device: str) -> dict[str, float]:
        import torch
        import torch.nn.functional as F

        import dfcli
        from dfcli.data.batches import Batches

        run = dfcli.Run.open(name)
        core, _ = run.build("best", device)
        dataset = dfcli.Dataset.open(run.info["dataset"]["path"])
        batches = Batches(dataset.splits["val"], batch_size=batch_size, window=core.context, seed=1337)
        losses = []
        with torch.inference_mode():
            for i in range(count):
                batch = batches.at(i)
                logits = core(batch.ids.to(device))
                losses.append(F.cross_entropy(logits.flatten(0, 1), batch.targets.to(device).flatten()).item())
        return {f"val_loss_{count}_random_batches": sum(losses) / count}

    return figures


def names_in_fifties(name: str, device: str) -> dict[str, float]:
    """makemore.py's evaluate(): the mean over batches of 50 names of each batch's mean loss."""
    import torch
    import torch.nn.functional as F

    import dfcli

    run = dfcli.Run.open(name)
    core, _ = run.build("best", device)
    split = dfcli.Dataset.open(run.info["dataset"]["path"]).splits["test"]
    boundary = run.info["dataset"]["boundary"]
    names = [split.document(k).tolist() for k in range(len(split.offsets) - 1)]
    losses = []
    with torch.inference_mode():
        for start in range(0, len(names), 50):
            rows = names[start : start + 50]
            width = max(map(len, rows))
            ids = torch.tensor([row + [boundary] * (width - len(row)) for row in rows], device=device)
            targets = torch.tensor([[*row[1:], boundary] + [-100] * (width - len(row)) for row in rows], device=device)
            losses.append(F.cross_entropy(core(ids).flatten(0, 1), targets.flatten()).item())
    return {"test_loss_batches_of_50": sum(losses) / len(losses)}


ROWS: dict[str, Row] = {
    "wavenet-makemore": Row(
        "WaveNet of makemore, part 5",
        "76,579 parameters; train 1.769, val 1.9936",
        ["wavenet", "--preset", "makemore"],
        ("train", "val", "test"),
        corpus="names",
    ),
    "gpt-makemore": Row(
        "Transformer of makemore",
        "test about 1.92 (1,000 names)",
        ["gpt", "--preset", "makemore"],
        ("test",),
        names_in_fifties,
        note="with minGPT's dropout of 0.1; without it, as in makemore.py today, 1.962 (`--set dropout=0`)",
        corpus="names",
    ),
    "nano-cpu": Row(
        "nanoGPT, laptop configuration",
        "val 1.88 (20 random batches)",
        ["gpt", "--preset", "nano-cpu"],
        protocol=random_batches(20, 12),
    ),
    "nano": Row(
        "nanoGPT, GPU configuration",
        "val 1.4697 (best of evaluations on 200 random batches)",
        ["gpt", "--preset", "nano"],
        protocol=random_batches(200, 64),
    ),
    "lecture": Row(
        "GPT of the video lecture", "val about 1.48", ["gpt", "--preset", "lecture"], protocol=random_batches(200, 64)
    ),
    "gpt2": Row(
        "GPT-2 124M",
        "124,439,808 parameters",
        ["gpt", "--preset", "gpt2", "--steps", "1", "--batch-size", "1", "--set", "accumulate=1"]
        + ["--set", "eval_tokens=1024"],
        (),
        note="one training step on one window of 1,024, from 100 kB of text: that it trains, not how well",
    ),
    "wavenet-paper": Row(
        "WaveNet, van den Oord et al. 2016",
        "receptive field 3,070 samples; no likelihood published",
        ["wavenet", "--preset", "paper", "--minutes", "2", "--batch-size", "1", "--set", "window=8192"]
        + ["--set", "eval_tokens=65536"],
        note="2 minutes on 200 spoken digits, resampled to 16 kHz: that it trains, not how well",
        corpus="fsdd",
    ),
    "wavenet-sc09": Row(
        "WaveNet baseline of SC09",
        "4,244,480 parameters; 1.925 bits a sample on SC09 after up to 200 epochs",
        ["wavenet", "--preset", "sc09", "--minutes", "2", "--batch-size", "1"],
        note="2 minutes on 200 spoken digits instead of 200 epochs of SC09: that it trains, not how well",
        corpus="fsdd",
    ),
}


def df(*arguments: str, **environment: str) -> dict[str, Any]:
    """Run the command line with --json and give its answer; its progress goes to our stderr."""
    command = [sys.executable, "-m", "dfcli", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout)


def machine(device: str) -> str:
    """The processor or GPU that the figures are from."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{name}, {os.cpu_count()} cores"


def replicate(name: str, data: str | None, device: str, run: str | None = None) -> dict[str, Any]:
    """Train the row's model and score it. A `run` that this line began is resumed, and only scored if it has ended."""
    row = ROWS[name]
    if run is None:
        run = f"replicate-{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        source = ["--data", data] if data else []
        trained = df("train", *row.train, "--name", run, "--device", device, *source, **row.environment)
    else:
        trained = df("train", row.train[0], "--name", run, "--device", device, "--resume", **row.environment)
    figures: dict[str, float] = {}
    for split in row.splits:
        scored = df("eval", "--run", run, "--split", split, "--device", device)
        figures[f"{split}_loss"] = scored["loss"]
        if scored["bits_per_sample"] is not None:
            figures[f"{split}_bits_per_sample"] = scored["bits_per_sample"]
        if "bigram" in scored["baselines"]:
            figures[f"{split}_bigram_loss"] = scored["baselines"]["bigram"]["loss"]
    if row.protocol:
        figures |= row.protocol(run, device)
    import torch

    return {
        "row": name,
        "model": row.model,
        "published": row.published,
        "ours": figures,
        "parameters": trained["parameters"],
        "steps": trained["steps"],
        "train_seconds": trained["train_seconds"],
        "command": " ".join(["df train", *row.train, *(["--data", row.corpus] if data else [])]),
        "note": row.note,
        "machine": machine(device),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--data", help="the corpus as a file or folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--run", help="a run that this row's line began: resume it, and score it")
    parser.add_argument("--out", type=Path, help="also write the JSON to a file in this folder")
    arguments = parser.parse_args()
    result = replicate(arguments.row, arguments.data, arguments.device, arguments.run)
    text = json.dumps(result, indent=2)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"{arguments.row}.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
