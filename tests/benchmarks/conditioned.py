"""Conditioned WaveNets and finer sound: what labels, mel spectrograms and more levels are worth.

    python -m tests.benchmarks.conditioned labels  --data fsdd/ [--minutes 5] [--levels 256]
    python -m tests.benchmarks.conditioned heard   --data fsdd/ [--minutes 20] [--levels 256] [--clips 2]
    python -m tests.benchmarks.conditioned vocoder --data fsdd/ [--minutes 10] [--clips 10] [--left-out SPEAKER]
    python -m tests.benchmarks.conditioned levels  --data fsdd/ [--minutes 5] [--levels 1024]

`--data` is a folder of recordings that are called DIGIT_SPEAKER_INDEX.wav, as the Free Spoken Digit Dataset's are. The
indices 0 to 4 of each digit and speaker are held out, as that corpus defines its test. Every model is the default
recipe, trained as `df train` does. `--cpu-minutes` instead of `--minutes` is one CPU's time, on one thread.

labels   bits per sample of the held-out recordings: with their labels, with the labels of others, and of a model
         without labels that was trained for the same time
heard    a small network learns speaker and digit from the real recordings. Its accuracy on held-out real ones and on
         generated clips of each digit and speaker
vocoder  bits per sample with and without a mel spectrogram; spectral distances of resynthesised held-out clips beside
         their floors. With a speaker left out of training, the bits and distances of that speaker's recordings
levels   bits per 16-bit sample at 256 levels and more, each trained for the same time
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import chdir
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfcli.codecs import MuLaw
from dfcli.data import mel
from dfcli.data.dataset import Dataset
from dfcli.evaluation import measures
from dfcli.evaluation.evaluate import evaluate
from dfcli.evaluation.sweep import sweep
from dfcli.generation.sample import sample_audio
from dfcli.ingest.prepare import prepare
from dfcli.runs.run import Run
from dfcli.system.device import resolve
from tests.benchmarks import common

RULE = r"(?P<digit>\d)_(?P<speaker>[a-z]+)_"
HELD_OUT = re.compile(r"\d+_\w+_[0-4]\.wav")
FRAMES = 80  # of a recording that the listener hears: one second
EPOCHS = 15


def recordings(folder: Path, speaker: str = "") -> tuple[list[str], list[str]]:
    """The recordings to learn from and those held out, by the corpus's rule; with a `speaker`, all of that one are."""
    every = sorted(folder.rglob("*.wav"))
    held = [bool(HELD_OUT.fullmatch(p.name)) if not speaker else f"_{speaker}_" in p.name for p in every]
    return [str(p) for p, out in zip(every, held, strict=True) if not out], [
        str(p) for p, out in zip(every, held, strict=True) if out
    ]


def dataset(folder: Path, name: str, speaker: str = "", levels: int = 256) -> Dataset:
    """The recordings as a dataset."""
    train, held = recordings(folder, speaker)
    return prepare(train, val=held, label=RULE, levels=levels, name=name)


def trained(data: Dataset, given: Any, condition: str) -> tuple[str, dict[str, Any]]:
    """The run's name, and what its training and evaluation found."""
    run, figures = common.trained(
        "wavenet", data.name, given.minutes, cpu_time=given.cpu_minutes is not None, condition=condition
    )
    found = evaluate(run)
    kept = ("steps", "tokens_seen", "tokens_per_second", "parameters", "core")
    return run, {
        "bits_per_sample": found.bits_per_sample,
        "bits_per_16bit_sample": found.bits_per_16bit_sample,
        **{key: figures[key] for key in kept},
    }


def shuffled(run: str, data: Dataset) -> float:
    """Bits per sample with each recording's labels taken from another recording."""
    core, _ = Run.open(run).build("best")
    part, told = data.splits["val"], Run.open(run).conditioning
    order = np.random.default_rng(0).permutation(part.documents)
    part.__dict__["labels"] = part.labels[order]
    try:
        return sweep(core, data, "val", resolve("cpu"), conditioning=told).mean / math.log(2)
    finally:
        del part.__dict__["labels"]


def labels(given: Any) -> dict[str, Any]:
    with dataset(given.data, "digits", levels=given.levels) as data:
        run, told = trained(data, given, "labels")
        others = shuffled(run, data)
        _, alone = trained(data, given, "none")
    return {
        "with_labels": told,
        "with_shuffled_labels": others,
        "without_labels": alone,
        "below_shuffled": others - told["bits_per_sample"],
        "below_without": alone["bits_per_sample"] - told["bits_per_sample"],
    }


# A listener ----------------------------------------------------------------------------------------------------------


class Listener(nn.Module):
    """Log-mel frames [B, 1, FRAMES, 40] -> scores of each digit and of each speaker."""

    def __init__(self, digits: int, speakers: int) -> None:
        super().__init__()
        widths = (1, 32, 64, 96)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
                for a, b in pairwise(widths)
            ),
            nn.Flatten(),
            nn.Dropout(0.4),
        )
        features = widths[-1] * (FRAMES // 8) * (40 // 8)
        self.digit, self.speaker = nn.Linear(features, digits), nn.Linear(features, speakers)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        found = self.layers(frames)
        return self.digit(found), self.speaker(found)


def heard_frames(samples: np.ndarray) -> Tensor:
    """What the listener hears of a sound float32 [n] at 8 kHz: its first second, [1, FRAMES, 40]."""
    frames = mel.settings(8000).of(samples)[:FRAMES]
    return F.pad(frames, (0, 0, 0, FRAMES - len(frames)), value=math.log10(mel.FLOOR))[None] / 2 + 1.5


def listener(data: Dataset) -> tuple[Listener, dict[str, float]]:
    """A network that learned from the training recordings, and its accuracy on the held-out ones."""
    codec = data.codec
    assert isinstance(codec, MuLaw)
    frames, answers = {}, {}
    for name in ("train", "val"):
        part = data.splits[name]
        sounds = (codec.decode(part.document(k)[1:]) for k in range(part.documents))
        frames[name] = torch.stack([heard_frames(sound) for sound in sounds])
        answers[name] = torch.from_numpy(part.labels.astype(np.int64))
    torch.manual_seed(0)
    net = Listener(*(len(names) for names in data.labels.values()))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
    count, batch = len(frames["train"]), 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=EPOCHS * -(-count // batch))
    for _ in range(EPOCHS):
        for rows in torch.randperm(count).split(batch):
            shift = int(torch.randint(-8, 9, ()))
            x = torch.roll(frames["train"][rows], shift, dims=2) + 0.3 * torch.randn(len(rows), 1, 1, 1)
            digit, speaker = net(x)
            answer = answers["train"][rows]
            loss = F.cross_entropy(digit, answer[:, 0]) + F.cross_entropy(speaker, answer[:, 1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval(), accuracy(net, frames["val"], answers["val"])


@torch.no_grad()
def accuracy(net: Listener, frames: Tensor, answers: Tensor) -> dict[str, float]:
    """The shares that the listener hears rightly."""
    net.eval()
    digit, speaker = net(frames)
    return {
        "digit": float((digit.argmax(-1) == answers[:, 0]).float().mean()),
        "speaker": float((speaker.argmax(-1) == answers[:, 1]).float().mean()),
        "clips": len(frames),
    }


def heard(given: Any) -> dict[str, Any]:
    with dataset(given.data, "digits", levels=given.levels) as data:
        net, real = listener(data)
        run, figures = trained(data, given, "labels")
        generated = {str(t): listened(net, data, run, given.clips, t) for t in (1.0, 0.9, 0.8)}
    return {"held_out_recordings": real, "generated_by_temperature": generated, **figures}


def listened(net: Listener, data: Dataset, run: str, clips: int, temperature: float) -> dict[str, float]:
    """What the listener hears in clips of every digit and speaker."""
    frames, answers = [], []
    for d, digit in enumerate(data.labels["digit"]):
        for s, speaker in enumerate(data.labels["speaker"]):
            made = sample_audio(
                run, 1.0, Path(f"{digit}_{speaker}.wav"), num=clips, seed=0, temperature=temperature,
                labels={"digit": digit, "speaker": speaker},
            )  # fmt: skip
            for path in made.samples:
                frames.append(heard_frames(soundfile.read(path, dtype="float32")[0]))
                answers.append([d, s])
                Path(path).unlink()
    return accuracy(net, torch.stack(frames), torch.tensor(answers))


# A vocoder -----------------------------------------------------------------------------------------------------------


def vocoder(given: Any) -> dict[str, Any]:
    with dataset(given.data, "digits", given.left_out, given.levels) as data:
        run, told = trained(data, given, "mel")
        # At random: every n-th recording could be of one speaker.
        clips = np.random.default_rng(0).permutation(recordings(given.data, given.left_out)[1]).tolist()
        found = resynthesised(run, clips[: given.clips])
        figures = {"left_out": given.left_out or None, "mel": told, "distances": found}
        if not given.left_out:
            _, alone = trained(data, given, "none")
            figures |= {"without": alone, "bits_below": alone["bits_per_sample"] - told["bits_per_sample"]}
    return figures


def resynthesised(run: str, clips: Sequence[str]) -> dict[str, dict[str, float]]:
    """Distances (LSD in dB, multi-resolution STFT) from recordings, and the floors."""
    codec, told = Run.open(run).codec, Run.open(run).conditioning
    assert isinstance(codec, MuLaw)
    assert told is not None
    assert told.mel is not None
    real = [soundfile.read(clip, dtype="float32")[0] for clip in clips]
    kept = [codec.decode(codec.encode(sound)) for sound in real]
    pairs = {"mu-law round trip": kept, "Griffin-Lim": [measures.griffin_lim(told.mel, sound) for sound in kept]}
    for temperature in (1.0, 0.8, 0.6):
        made = []
        for clip in clips:
            path = sample_audio(run, None, "out.wav", mel=clip, seed=0, temperature=temperature).samples[0]
            made.append(soundfile.read(path, dtype="float32")[0])
        pairs[f"WaveNet at {temperature}"] = made
    pairs["another recording"] = real[1:] + real[:1]
    return {name: measures.mean(map(measures.distances, real, others))._asdict() for name, others in pairs.items()}


def levels(given: Any) -> dict[str, Any]:
    found = {}
    for count in sorted({256, given.levels}):
        with dataset(given.data, f"digits-{count}", levels=count) as data:
            _, figures = trained(data, given, "none")
            found[str(count)] = figures | data.info["fidelity"]["val"]
    return found


ROWS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "labels": labels,
    "heard": heard,
    "vocoder": vocoder,
    "levels": levels,
}
MINUTES = {"labels": 5.0, "heard": 20.0, "vocoder": 10.0, "levels": 5.0}


def main(words: Sequence[str] | None = None) -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--data", required=True, type=Path, help="a folder of recordings DIGIT_SPEAKER_INDEX.wav")
    parser.add_argument("--minutes", type=float, help="of each training")
    parser.add_argument("--cpu-minutes", type=float, help="the same in one CPU's time, for a machine that is shared")
    parser.add_argument("--clips", type=int, default=10, help="of each digit and speaker; of held-out recordings")
    parser.add_argument("--left-out", default="", metavar="SPEAKER", help="a speaker that the vocoder does not learn")
    parser.add_argument("--levels", type=int, help="of mu-law: 256; in the row `levels` 1024, compared with 256")
    given = parser.parse_args(words)
    given.minutes = given.cpu_minutes or given.minutes or MINUTES[given.row]
    if given.cpu_minutes:
        os.environ["OMP_NUM_THREADS"] = "1"
    given.levels = given.levels or (1024 if given.row == "levels" else 256)
    given.data = given.data.resolve()
    resolve("cpu")
    with common.home() as folder, chdir(folder):
        figures = ROWS[given.row](given)
    common.report(
        {
            "benchmark": f"conditioned {given.row}",
            "minutes": given.minutes,
            "of_cpu_time": bool(given.cpu_minutes),
            **figures,
        }
    )


if __name__ == "__main__":
    main()
