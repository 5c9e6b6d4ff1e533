"""Byte pairs or characters: bits per byte on the Python standard library's sources, after the same time of one CPU.

    python -m tests.benchmarks.byte_pairs [--cpu-minutes 5] [--models bpe bytes ...]

The corpus is every module of the standard library, as files. The codecs share its splits, because files are dealt out
by their characters. Each model is the default recipe, trained on one thread for `--cpu-minutes` of that processor's
time, with and without n-gram tables, and judged on the whole validation split.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tests.benchmarks import common

MODELS: dict[str, tuple[str, dict[str, str]]] = {
    "bpe": ("bpe", {}),
    "bpe with tables": ("bpe", {"ngrams": "6"}),
    "bytes": ("bytes", {}),
    "chars": ("chars", {}),
}


def corpus(folder: Path, most: float) -> int:
    """Copy the standard library's sources, at most `most` bytes of them; gives their bytes."""
    root, size = Path(sysconfig.get_path("stdlib")), 0
    for path in common.library():
        target = folder / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        size += path.stat().st_size
        if size >= most:
            break
    return size


def measure(folder: Path, codec: str, overrides: dict[str, str], minutes: float) -> dict[str, Any]:
    """Train a model and judge it on the validation split."""
    from dfcli.evaluation.evaluate import evaluate
    from dfcli.runs.run import Run
    from dfcli.training.train import train

    result = train(
        "gpt", [str(folder)], codec=codec, overrides=overrides, minutes=minutes, seed=0, device="cpu",
        clock=time.process_time,
    )  # fmt: skip
    found, run = evaluate(result.run, device="cpu"), Run.open(result.run)
    assert found.bits_per_byte is not None
    return {
        "bits_per_byte": found.bits_per_byte,
        "val_tokens": found.tokens,
        "val_bytes": round(found.tokens * found.bits_per_token / found.bits_per_byte),
        "vocab_size": run.codec.vocab_size,
        "processor_seconds": result.train_seconds,
        "steps": result.steps,
        "best_step": result.best_step,
        "tokens_seen": result.tokens_seen,
        "parameters": result.parameters,
        "core": run.info["core"]["config"],
    }


def main(words: Sequence[str] | None = None) -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--cpu-minutes", type=float, default=5.0, help="of each training")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--megabytes", type=float, default=float("inf"), help="of the corpus at most")
    given = parser.parse_args(words)
    os.environ["OMP_NUM_THREADS"] = "1"
    with common.home() as home:
        folder = home / "library"
        size = corpus(folder, given.megabytes * 1e6)
        found = {}
        for name in given.models:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                found[name] = process.submit(measure, folder, *MODELS[name], given.cpu_minutes).result()
            print(f"{name}: {found[name]['bits_per_byte']:.4f} bits per byte", flush=True)
    lowest = min(found, key=lambda name: found[name]["bits_per_byte"])
    print(f"lowest: {lowest}")
    common.report(
        {
            "benchmark": "byte_pairs",
            "cpu_minutes": given.cpu_minutes,
            "corpus_megabytes": size / 1e6,
            "models": found,
            "lowest": lowest,
        }
    )


if __name__ == "__main__":
    main()
