"""Clips of conditioned models: labels asked for and drawn, clips that end, mel spectrograms, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from dfcli.cores import Condition
from dfcli.data import mel
from dfcli.data.conditions import Conditioning, Progress
from dfcli.errors import UsageError
from dfcli.generation import generator
from dfcli.generation.request import Filters
from dfcli.generation.sample import SampleResult, sample_audio
from dfcli.generation.sampling import Dice, pick
from dfcli.ingest.audio import Recording
from dfcli.runs.run import Run
from dfcli.system.events import Note
from tests.generation.runs import RATE, conditioned_run, wavenet_run

NAMES = {"digit": ["one", "two"], "speaker": ["ann", "bob", "cyd"]}
PROGRESS = Progress(10, RATE, {"": [200, 300], "0,1": [150], "1,1": [260]})


def audio(out: Path, **options: Any) -> SampleResult:
    return sample_audio(**{"out": out, "device": "cpu", "seed": 5, "engine": "plain"} | options)


def by_forward(run: Run, condition: Condition, ids: list[int], samples: int) -> np.ndarray:
    """Samples behind ids by the core's own forward pass over everything, again for each."""
    core: Any = run.build()[0]
    first, chances = len(ids), Dice(5, [0]).draw(samples)[0]
    for j in range(samples):
        told = condition._replace(index=condition.index[:, : len(ids)])
        with torch.inference_mode():
            logits = core(torch.tensor([ids]), condition=told)[:, -1].numpy()
        ids = [*ids, int(pick(logits, Filters().picking(), chances[j : j + 1])[0])]
    return np.array(ids[first:])


def ids_of(run: Run, path: str | Path) -> np.ndarray:
    codec: Any = run.codec
    samples, rate = soundfile.read(path, dtype="int16")
    assert rate == RATE
    return codec.encode(samples.astype(np.float32) / 32767)


def test_labels_and_progress_are_those_of_training(tmp_path: Path) -> None:
    """Sample s of a clip uses row s // hop: the position before the sample has it."""
    run = conditioned_run(Conditioning(NAMES, "rule", PROGRESS))
    result = audio(tmp_path / "a.wav", run=run, labels={"digit": "two", "speaker": "bob"})
    assert result.audio_seconds == 0.26
    assert result.labels == [{"digit": "two", "speaker": "bob"}]
    rows = Conditioning(NAMES, "rule", PROGRESS).of_labels([1, 1], 260)
    condition = Condition(*rows, torch.arange(260)[None] // 10)
    assert np.array_equal(ids_of(run, result.samples[0]), by_forward(run, condition, [128], 260))


def test_clips_end_by_themselves_and_labels_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, notes = conditioned_run(Conditioning(NAMES, "rule", PROGRESS)), []
    options: dict[str, Any] = {"run": run, "labels": {"speaker": "bob"}, "num": 6, "on_event": notes.append}
    result = audio(tmp_path / "a.wav", **options)
    digits = [row["digit"] for row in result.labels or []]
    assert set(digits) == {"one", "two"}
    lengths = [soundfile.info(path).frames for path in result.samples]
    assert lengths == [{"one": 150, "two": 260}[digit] for digit in digits]
    said = [note.text for note in notes if isinstance(note, Note)]
    assert said == [f"digit: {', '.join(digits)}, drawn from 2 names; `--label digit=one` chooses one"]
    monkeypatch.setattr(generator, "AT_ONCE", {"cpu": 2})  # a clip does not depend on how many others are made
    again = audio(tmp_path / "b.wav", **options)
    for one, other in zip(result.samples, again.samples, strict=True):
        assert Path(one).read_bytes() == Path(other).read_bytes()
    assert soundfile.info(audio(tmp_path / "c.wav", **options | {"num": 1, "seconds": 0.1}).samples[0]).frames == 100


@pytest.mark.parametrize("progress", [None, PROGRESS])
def test_labels_and_a_prime(progress: Progress | None, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "prime.wav", 0.3 * np.sin(np.arange(77)), RATE)
    told = Conditioning(NAMES, "rule", progress)
    run, chosen = conditioned_run(told), {"digit": "one", "speaker": "cyd"}
    made = audio(tmp_path / "o.wav", run=run, labels=chosen, prime=tmp_path / "prime.wav", seconds=0.03)
    heard = next(Recording(tmp_path / "prime.wav").stream(RATE))
    opening: list[int] = [128, *run.codec.encode(heard).tolist()]  # pyright: ignore[reportAttributeAccessIssue]
    index = torch.arange(107) // told.hop if told.hop else torch.zeros(107, dtype=torch.int64)
    expected = by_forward(run, Condition(*told.of_labels([0, 2], 107), index[None]), opening, 30)
    assert np.array_equal(ids_of(run, made.samples[0]), expected)


def test_a_vocoder_makes_a_clip_again(tmp_path: Path) -> None:
    told = Conditioning({}, mel=mel.settings(RATE))
    run, notes = conditioned_run(told), []
    soundfile.write(tmp_path / "clip.wav", 0.5 * np.sin(np.arange(460) / 5), 2 * RATE)
    result = audio(tmp_path / "out.wav", run=run, mel=tmp_path / "clip.wav", on_event=notes.append)
    assert soundfile.info(result.samples[0]).frames == 230
    said = [note.text for note in notes if isinstance(note, Note)]
    assert said == ["clip.wav was resampled from 2,000 to 1,000 Hz"]
    codec: Any = run.codec
    heard = codec.encode(np.concatenate(list(Recording(tmp_path / "clip.wav").stream(RATE))))
    condition = Condition(*told.of_sound(codec, heard), torch.arange(230)[None] // told.hop)
    assert np.array_equal(ids_of(run, result.samples[0])[:60], by_forward(run, condition, [128], 60))


def test_what_is_refused(tmp_path: Path) -> None:
    clip, out = tmp_path / "clip.wav", tmp_path / "out.wav"
    soundfile.write(clip, np.zeros(50), RATE)
    labelled = conditioned_run(Conditioning(NAMES, "rule"), "labelled")
    vocoder = conditioned_run(Conditioning({}, mel=mel.settings(RATE)), "vocoder")
    cases: list[tuple[Run, dict[str, Any], str]] = [
        (labelled, {"labels": {"digit": "nine"}}, "knows no digit 'nine'"),
        (labelled, {"labels": {"word": "one"}}, "no label 'word'"),
        (labelled, {"mel": clip}, "no vocoder"),
        (labelled, {"prime": clip, "labels": {"digit": "one"}}, "--prime needs the label speaker"),
        (wavenet_run(), {"labels": {"digit": "one"}}, "without labels"),
        (vocoder, {}, "is a vocoder"),
        (vocoder, {"mel": clip, "prime": clip}, "exclude"),
        (vocoder, {"mel": clip, "labels": {"digit": "one"}}, "without labels"),
    ]
    for run, options, says in cases:
        with pytest.raises(UsageError, match=says):
            audio(out, run=run, **options)
        assert not out.exists()
    with pytest.raises(UsageError) as error:
        audio(out, run=labelled, labels={"speaker": "dan"})
    assert "ann, bob, cyd" in str(error.value.hint)
