"""Small data and small trainings for the long tests."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import soundfile

OFTEN = ["log_every=1", "eval_every=3", "checkpoint_every=2"]
SELDOM = ["log_every=1000", "eval_every=1000", "checkpoint_every=1000"]
GPT = ["layers=1", "heads=2", "channels=16", "context=16", "dropout=0.1"]
# The next two are trained by compiled functions.
COMPILED_GPT = ["layers=1", "heads=2", "channels=32", "context=16", "dropout=0"]
WAVENET = ["dilations=1,2,4", "cycles=1", "residual=16", "skip=16", "head=4", "window=32"]


def data(folder: Path) -> None:
    """Writes text.txt, names.txt and the recordings of sound/."""
    randomly = random.Random(0)
    (folder / "sound").mkdir(parents=True)
    words = ["the ", "cat ", "sat.\n", "on ", "a mat "]
    (folder / "text.txt").write_text("".join(randomly.choices(words, k=900)))
    names = ("".join(randomly.choices("abcde", k=randomly.randint(3, 7))) for _ in range(200))
    (folder / "names.txt").write_text("\n".join(names) + "\n")
    for i in range(5):
        soundfile.write(folder / "sound" / f"{i}.wav", 0.5 * np.sin(np.arange(400) * (0.1 + 0.05 * i)), 8000)


def trainings(folder: Path, steps: int, pace: list[str] = OFTEN) -> dict[str, list[str]]:
    """The words after `df` of a training of each kind, without `--name`. `pace`: how often it saves and the like."""

    def line(kind: str, source: str, *settings: str, more: tuple[str, ...] = ()) -> list[str]:
        words = ["train", kind, "--data", str(folder / source), "--steps", str(steps), "--seed", "3", "--quiet", *more]
        return [
            *words,
            *(word for setting in (*settings, *pace, "eval_tokens=200") for word in ("--set", setting)),
        ]

    return {
        "gpt, muon": line("gpt", "text.txt", *COMPILED_GPT, "optimizer=muon", "batch_size=4"),
        "gpt, adamw, accumulated": line("gpt", "text.txt", *GPT, "optimizer=adamw", "batch_size=2", "accumulate=2"),
        "gpt of lines, sgd": line("gpt", "names.txt", *GPT, "optimizer=sgd", more=("--preset", "makemore")),
        "wavenet, adamw": line("wavenet", "sound", *WAVENET, "optimizer=adamw", "batch_size=2"),
        "wavenet, sgd": line("wavenet", "sound", *WAVENET, "optimizer=sgd", "momentum=0.9", "batch_size=2"),
        "wavenet with labels": line("wavenet", "sound", *WAVENET, "batch_size=2", more=("--label", r"(?P<tone>\d)")),
        "vocoder": line("wavenet", "sound", *WAVENET, "batch_size=2", more=("--condition", "mel")),
        "character wavenet": line("wavenet", "names.txt", "hidden=8", "embedding=4", more=("--preset", "makemore")),
    }
