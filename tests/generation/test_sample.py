"""Samples from runs on disk: what is made, what is written, what is said, and what a wrong request leaves behind."""

from __future__ import annotations

import gc
import io
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from dfcli.codecs import Chars, MuLaw
from dfcli.cores import CharWaveNet, CharWaveNetConfig
from dfcli.cores.protocols import Engine, Picking
from dfcli.errors import DfError, UsageError
from dfcli.generation import audio as audio_module
from dfcli.generation import generator, sample
from dfcli.generation.plain import Plain
from dfcli.generation.request import SoundRequest
from dfcli.generation.sample import AudioProgress, SampleResult, sample_audio, sample_text
from dfcli.generation.sampling import Dice
from dfcli.generation.wav import HEADER, pcm
from dfcli.system.events import Choice, Note
from tests.generation.engine import cpu, picking, start
from tests.generation.runs import RATE, gpt_run, save, wavenet_run


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fast engines here: they have tests of their own."""
    monkeypatch.setattr("dfcli.generation.engines._kernel", lambda core, device: None)


def text(**options: Any) -> SampleResult:
    return sample_text(**{"device": "cpu", "seed": 5, "tokens": 30} | options)


def audio(out: Any, seconds: float = 0.5, **options: Any) -> SampleResult:
    return sample_audio(**{"seconds": seconds, "out": out, "device": "cpu", "seed": 5} | options)


# Text ---------------------------------------------------------------------------------------------------------------


def test_it_is_what_the_engine_makes() -> None:
    run = gpt_run()
    core, _ = run.build()
    engine = start(Plain(core, cpu()), [[1, 2, 3]])
    ids = engine.generate(Dice(5, [0]).draw(30), picking(0.7, 3))
    result = text(run=run, prompt="abc", temperature=0.7, top_k=3)
    assert result.samples == ["abc" + Chars("\nabc").decode(ids[0])]
    assert (result.run, result.checkpoint, result.seed, result.engine) == ("gpt", 1, 5, "plain")
    assert (result.tokens, result.interrupted, result.sample_rate) == (30, False, None)
    assert result.tokens_per_second == result.tokens / result.seconds > 0
    assert list(asdict(result))[:5] == ["run", "checkpoint", "seed", "engine", "samples"]


def test_a_wrong_seed_is_told_before_anything_is_loaded() -> None:
    for sample_any in (sample_text, sample_audio):
        with pytest.raises(UsageError, match="the seed must be from 0"):
            sample_any("absent", seed=-1)


def test_seeds() -> None:
    run = gpt_run()
    first = text(run=run)
    assert text(run="gpt").samples == first.samples == text(run=run.path).samples
    assert text(run=run, seed=6).samples != first.samples
    drawn = text(run=run, seed=None)
    assert drawn.seed != text(run=run, seed=None).seed
    assert text(run=run, seed=drawn.seed).samples == drawn.samples


def test_a_sample_does_not_depend_on_how_many_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    run = gpt_run()
    five = text(run=run, num=5).samples
    assert len(set(five)) == 5
    assert text(run=run, num=2).samples == five[:2]
    monkeypatch.setitem(generator.AT_ONCE, "cpu", 2)
    assert text(run=run, num=5).samples == five


def test_pieces_come_as_they_are_made() -> None:
    told: dict[int, str] = {}
    result = text(run=gpt_run(), prompt="ab", num=3, on_text=lambda i, piece: told.update({i: told.get(i, "") + piece}))
    assert [told[i] for i in range(3)] == result.samples


def test_how_a_text_begins() -> None:
    def begun(run: Any, **options: Any) -> tuple[str, list[Any]]:
        events: list[Any] = []
        made = text(run=run, temperature=0, on_event=events.append, **options).samples[0]
        return made, [event for event in events if not (isinstance(event, Choice) and event.what == "engine")]

    made, events = begun(gpt_run("newline"))
    assert events == [Choice("prompt", "'\\n'", "no prompt was given, so generation starts after it")]
    assert "\n" + made == begun("newline", prompt="\n")[0]
    made, events = begun(gpt_run("letters", "abc"))
    assert events[0].value == "'a'"
    assert "a" + made == begun("letters", prompt="a")[0]
    # a model with a boundary begins there: nothing is chosen, and a prompt stands behind it
    assert begun(gpt_run("boundary", "abc", boundary=0))[1] == []
    assert begun("newline", prompt="abc" * 6)[1] == [Note("the prompt has 18 ids; the model sees the last 16")]


def test_a_prompt_stands_behind_the_boundary() -> None:
    run = gpt_run("boundary", "abc", boundary=0, lead=2)
    without = gpt_run("without", "abc")
    assert text(run=run, prompt="bc").samples[0] == text(run=without, prompt="aabc").samples[0].removeprefix("aa")


def test_lines() -> None:
    run = gpt_run("lines", boundary=0, lines=True)
    result = text(run=run, num=40, tokens=200, prompt="ab\n")
    assert all(line.startswith("ab") and "\n" not in line for line in result.samples)
    assert len({len(line) for line in result.samples}) > 5
    made = sum(len(line) - 2 + 1 for line in result.samples if len(line) < 202)  # each ended by its boundary
    assert result.tokens == made + sum(len(line) - 2 for line in result.samples if len(line) == 202)
    assert {len(line) for line in text(run=run, num=40, tokens=3).samples} <= {0, 1, 2, 3}
    with pytest.raises(UsageError, match="several lines"):
        text(run=run, prompt="a\nb")


def test_makemore_wavenet_writes_lines() -> None:
    run = save("names", CharWaveNet(CharWaveNetConfig(4)), Chars("\nabc"), boundary=0, lines=True, lead=8)
    result = text(run=run, num=20)
    assert len({len(line) for line in result.samples}) > 3
    assert not any("\n" in line for line in result.samples)


def test_stop() -> None:
    run = gpt_run()
    whole = text(run=run, prompt="a", tokens=60).samples[0]
    stop = whole[20:23]
    result = text(run=run, prompt="a", tokens=60, stop=stop)
    assert result.samples[0] == "a" + whole[1:].split(stop)[0]
    assert result.tokens < 60
    with pytest.raises(UsageError, match="empty"):
        text(run=run, stop="")


def test_ctrl_c_keeps_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    run = gpt_run()
    whole = text(run=run, tokens=600).samples[0]
    told: list[str] = []

    def on_text(number: int, piece: str) -> None:
        told.append(piece)
        if len(told) == 12:
            raise KeyboardInterrupt

    result = text(run=run, tokens=600, on_text=on_text)
    assert result.interrupted
    assert 12 <= len(result.samples[0]) < 600
    assert whole.startswith(result.samples[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tokens": 0}, UsageError, "number of tokens"), ({"num": 0}, UsageError, "number of samples"),
        ({"num": 10**30}, UsageError, "number of samples"),
        ({"temperature": -1}, UsageError, "temperature"),
        ({"seed": -1}, UsageError, "seed"), ({"engine": "fast"}, UsageError, "no fast engine"),
        ({"device": "abacus"}, UsageError, "abacus"), ({"checkpoint": 7}, UsageError, "7"),
        ({"prompt": "a?"}, DfError, r"'\?'"),
    ],
)  # fmt: skip
def test_wrong_requests(options: dict[str, Any], error: type[DfError], message: str) -> None:
    told: list[str] = []
    gpt_run()
    with pytest.raises(error, match=message):
        text(on_text=lambda number, piece: told.append(piece), **options)
    assert not told


def test_the_newest_run_of_the_kind_is_used_and_named() -> None:
    gpt_run("old")
    gpt_run("new")
    wavenet_run("sound")
    events: list[Any] = []
    assert text(run=None, on_event=events.append).run == "new"
    assert Note("the newest run that makes text is new") in events
    with pytest.raises(UsageError, match="makes sound, not text"):
        text(run="sound")


# Sound --------------------------------------------------------------------------------------------------------------


def read(path: Path | str | io.BytesIO) -> np.ndarray:
    samples, rate = soundfile.read(path, dtype="int16")
    assert rate == RATE
    assert samples.ndim == 1
    return samples


def test_sound_is_what_the_engine_makes(tmp_path: Path) -> None:
    run = wavenet_run()
    core, _ = run.build()
    engine = start(Plain(core, cpu()), [[128]])
    ids = engine.generate(Dice(5, [0]).draw(500), picking(0.9))[0]
    result = audio(tmp_path / "out.wav", run=run, temperature=0.9)
    assert np.array_equal(read(tmp_path / "out.wav"), pcm(MuLaw(RATE).decode(ids)))
    assert result.samples == [str(tmp_path / "out.wav")]
    assert (result.tokens, result.sample_rate, result.audio_seconds) == (500, RATE, 0.5)
    assert result.times_real_time == pytest.approx(0.5 / result.seconds)
    loud = np.abs(MuLaw(RATE).decode(ids)) > 0.01
    assert result.leading_silence == [loud.argmax() / RATE]


@pytest.mark.parametrize(("seconds", "samples"), [(0.001, 1), (0.0126, 13), (1.5, 1500)])
def test_length_is_exact(seconds: float, samples: int, tmp_path: Path) -> None:
    audio(tmp_path / "out.wav", seconds, run=wavenet_run())
    assert len(read(tmp_path / "out.wav")) == samples


def test_several_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = wavenet_run()
    audio(tmp_path / "one.wav", run=run)
    result = audio(tmp_path / "out.wav", run=run, num=3)
    assert result.samples == [str(tmp_path / f"out-0{i}.wav") for i in (1, 2, 3)]
    clips = [read(path) for path in result.samples]
    assert np.array_equal(clips[0], read(tmp_path / "one.wav"))
    assert not np.array_equal(clips[0], clips[1])
    assert result.audio_seconds == 1.5
    monkeypatch.setitem(generator.AT_ONCE, "cpu", 2)
    again = audio(tmp_path / "again.wav", run=run, num=3)
    assert all(np.array_equal(read(path), clip) for path, clip in zip(again.samples, clips, strict=True))


def test_a_stream_gets_the_same_sound(tmp_path: Path) -> None:
    run, stream = wavenet_run(), io.BytesIO()
    audio(tmp_path / "out.wav", run=run)
    result = audio(stream, run=run)
    assert np.array_equal(read(io.BytesIO(stream.getvalue())), read(tmp_path / "out.wav"))
    assert result.samples == []
    assert not stream.closed
    with pytest.raises(UsageError, match="only one clip"):
        audio(io.BytesIO(), run=run, num=2)


def tone(path: Path, rate: int = RATE, seconds: float = 0.3) -> Path:
    t = np.arange(int(rate * seconds)) / rate
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * 50 * t), rate)
    return path


def test_a_prime_is_continued(tmp_path: Path) -> None:
    run, out = wavenet_run(), tmp_path / "out.wav"
    prime = tone(tmp_path / "prime.flac")
    result = audio(out, run=run, prime=prime)
    continuation = read(out)
    assert len(continuation) == 500
    assert result.leading_silence is None

    codec = MuLaw(RATE)
    heard = codec.encode(soundfile.read(prime, dtype="float32")[0])
    core, _ = run.build()
    # All of it: what the model does not see makes no difference.
    engine = start(Plain(core, cpu()), [[128, *heard]])
    ids = engine.generate(Dice(5, [0]).draw(500), picking())[0]
    assert np.array_equal(continuation, pcm(codec.decode(ids)))

    audio(out, run=run, prime=prime, keep_prime=True)
    assert np.array_equal(read(out), np.concatenate([pcm(codec.decode(heard)), continuation]))


@pytest.mark.parametrize("kind", ["flac", "ogg", "mp3"])
def test_other_formats_hold_the_same_sound(kind: str, tmp_path: Path) -> None:
    run = wavenet_run()
    if kind == "mp3":
        with pytest.raises(UsageError, match="MP3 cannot hold sound of 1,000 Hz"):
            audio(tmp_path / "out.mp3", run=run)
        assert list(tmp_path.glob("*.mp3")) == []
        return
    audio(tmp_path / "out.wav", run=run, num=2)
    result = audio(tmp_path / f"out.{kind}", run=run, num=2)
    assert [Path(path).name for path in result.samples] == [f"out-01.{kind}", f"out-02.{kind}"]
    for number in (1, 2):
        wav, other = read(tmp_path / f"out-0{number}.wav"), soundfile.read(tmp_path / f"out-0{number}.{kind}")[0]
        assert len(other) == len(wav)
        if kind == "flac":
            assert np.array_equal(np.rint(other * 32768), wav)
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} == {
        ".wav",
        f".{kind}",
    }  # nothing is left over


def test_a_folder_gets_files_named_by_run_and_seed(tmp_path: Path) -> None:
    run = wavenet_run()
    result = audio(f"{tmp_path}/clips/", run=run, num=2)
    assert [str(Path(path).relative_to(tmp_path)) for path in result.samples] == [
        "clips/wavenet-5-01.wav",
        "clips/wavenet-5-02.wav",
    ]
    assert Path(audio(tmp_path / "clips", run=run).samples[0]).name == "wavenet-5.wav"


def test_the_most_likely_clips_are_kept(tmp_path: Path) -> None:
    run = wavenet_run()
    audio(tmp_path / "all.wav", run=run, num=5)
    result = audio(tmp_path / "out.wav", run=run, num=5, best=2)
    codec, (core, _) = MuLaw(RATE), run.build()
    cross_entropy = torch.nn.functional.cross_entropy
    nats = []
    for number in range(1, 6):
        ids = np.array([128, *codec.encode(read(tmp_path / f"all-0{number}.wav").astype(np.float32) / 32767)])
        logits = core(torch.from_numpy(ids[None, :-1].astype(np.int64)))[0]
        nats.append(float(cross_entropy(logits, torch.from_numpy(ids[1:].astype(np.int64))).detach()))
    order = np.argsort(nats)[:2]
    assert result.nats_per_sample == pytest.approx([nats[i] for i in order], rel=1e-4)
    for place, i in enumerate(order, 1):
        assert np.array_equal(read(tmp_path / f"out-0{place}.wav"), read(tmp_path / f"all-0{i + 1}.wav"))
    assert len(result.samples) == 2


def test_clips_come_to_the_usual_level_on_request(tmp_path: Path) -> None:
    run = wavenet_run()
    audio(tmp_path / "out.wav", run=run, temperature=0.3)
    audio(tmp_path / "loud.wav", run=run, temperature=0.3, normalize="peak")
    plain, loud = read(tmp_path / "out.wav") / 32767, read(tmp_path / "loud.wav") / 32767
    assert np.abs(loud).max() == pytest.approx(0.89, abs=1e-4)
    assert np.allclose(loud, plain * 0.89 / np.abs(plain).max(), atol=1e-4)


@pytest.mark.parametrize("normalize", ["peak", "minmax"])
def test_a_kept_prime_has_its_own_level(normalize: str, tmp_path: Path) -> None:
    run = wavenet_run(normalize=normalize)
    quiet = tmp_path / "quiet.wav"
    soundfile.write(quiet, soundfile.read(tone(tmp_path / "p.wav"))[0] / 38 + 0.01, RATE, subtype="FLOAT")
    audio(tmp_path / "out.wav", run=run, prime=quiet, keep_prime=True)
    kept, made = np.split(read(tmp_path / "out.wav") / 32767, [300])
    assert np.abs(kept - soundfile.read(quiet)[0]).max() < 0.001
    audio(tmp_path / "out.wav", run=run, prime=quiet)  # alone it is as loud as the model makes it
    loud = read(tmp_path / "out.wav") / 32767
    assert np.corrcoef(made, loud)[0, 1] > 0.99
    assert np.ptp(loud) / np.ptp(made) == pytest.approx(2 / np.ptp(kept) if normalize == "minmax" else 43, rel=0.05)


def test_a_prime_of_another_rate_is_resampled(tmp_path: Path) -> None:
    result = audio(tmp_path / "out.wav", run=wavenet_run(), prime=tone(tmp_path / "p.wav", 8000), keep_prime=True)
    samples = read(result.samples[0])
    assert len(samples) == 300 + 500
    assert np.abs(samples[20:280]).max() == pytest.approx(0.5 * 32767, rel=0.1)


def test_primes_that_cannot_be_used(tmp_path: Path) -> None:
    run, out = wavenet_run(), tmp_path / "out.wav"
    with pytest.raises(DfError, match=r"no recording .*missing"):
        audio(out, run=run, prime=tmp_path / "missing.wav")
    with pytest.raises(UsageError, match="no prime to keep"):
        audio(out, run=run, keep_prime=True)
    prime = tone(tmp_path / "p.wav")
    with pytest.raises(UsageError, match="both the prime and the output"):
        audio(prime, run=run, prime=prime, keep_prime=True)
    assert len(read(prime)) == 300
    audio(prime, run=run, prime=prime)  # it is read before it is replaced
    assert len(read(prime)) == 500
    assert not out.exists()


def stopping(monkeypatch: pytest.MonkeyPatch, after: int, action: Callable[[], None]) -> None:
    """Makes every engine do `action` before it makes its chunk number `after`, in chunks of 50 ids."""
    generate, chunks = Plain.generate, []

    def counted(self: Engine, uniforms: np.ndarray, picking: Picking, condition: None) -> np.ndarray:
        chunks.append(1)
        if len(chunks) == after:
            action()
        return generate(self, uniforms, picking)  # type: ignore[arg-type]

    monkeypatch.setattr(Plain, "generate", counted)
    monkeypatch.setattr(sample, "AUDIO_CHUNK", 0.05)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("after", [2, 5, 9])
def test_ctrl_c_keeps_the_sound(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = wavenet_run()
    audio(tmp_path / "whole.wav", run=run, num=2)
    stopping(monkeypatch, after, interrupt)
    result = audio(tmp_path / "out.wav", run=run, num=2)
    assert result.interrupted
    clips = [read(path) for path in result.samples]
    assert sum(map(len, clips)) == result.tokens == result.audio_seconds * RATE  # type: ignore[operator]
    for i, clip in enumerate(clips):
        assert 0 < len(clip) < 500
        assert np.array_equal(clip, read(tmp_path / f"whole-0{i + 1}.wav")[: len(clip)])


def test_ctrl_c_before_the_first_sample_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopping(monkeypatch, 1, interrupt)
    out = tmp_path / "out.wav"
    out.write_bytes(b"mine")
    result = audio(out, run=wavenet_run())
    assert (result.interrupted, result.samples, result.tokens) == (True, [], 0)
    assert out.read_bytes() == b"mine"


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(DfError, match="could not write"):
        audio(tmp_path / ("a" * 300), 1, run=wavenet_run())


def test_the_file_is_a_wav_all_along(tmp_path: Path) -> None:
    out, lengths = tmp_path / "out.wav", []

    def look(event: object) -> None:
        if isinstance(event, AudioProgress):
            data = out.read_bytes()
            assert len(data) == HEADER + 2 * len(read(io.BytesIO(data)))
            assert event.total == 1
            assert len(read(out)) == round(event.seconds * RATE)
            lengths.append(event.seconds)

    audio(out, 1, run=wavenet_run(), on_event=look)
    assert lengths == sorted(lengths)
    assert lengths[-1] == 1
    assert max(np.diff(lengths)) <= sample.AUDIO_CHUNK


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seconds": 0}, UsageError, "one sample"), ({"seconds": float("nan")}, UsageError, "one sample"),
        ({"seconds": float("inf")}, UsageError, "one sample"), ({"seconds": -1}, UsageError, "one sample"),
        ({"seconds": 1e9}, UsageError, "at most"), ({"num": 0}, UsageError, "number of samples"),
        ({"num": 10**30}, UsageError, "number of samples"),
        ({"top_p": 7}, UsageError, "top-p"),
        ({"seed": 2**63}, UsageError, "seed"), ({"engine": "fast"}, UsageError, "no fast engine"),
        ({"out": "out.mid"}, UsageError, "no format of sound"),
        ({"best": 2}, UsageError, "--best must be from 1 to"),
        ({"out": "missing/out.wav"}, UsageError, "no folder missing"),
        ({"out": "folder.wav"}, UsageError, "not a file"), ({"run": "text"}, UsageError, "makes text, not sound"),
    ],
)  # fmt: skip
def test_wrong_requests_leave_nothing(
    options: dict[str, Any], error: type[DfError], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wavenet_run()
    gpt_run("text")
    work = tmp_path / "work"
    (work / "folder.wav").mkdir(parents=True)
    monkeypatch.chdir(work)
    with pytest.raises(error, match=message):
        audio(**dict[str, Any](out="out.wav", run="wavenet") | options)
    assert [path.name for path in work.iterdir()] == ["folder.wav"]


def test_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio_module, "free_bytes", lambda path: 1999)
    with pytest.raises(DfError, match="no room for 1 s of sound"):
        audio(tmp_path / "out.wav", 1, run=wavenet_run())
    assert not (tmp_path / "out.wav").exists()


def test_memory_does_not_grow_with_the_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour at the rate of these tests, by an engine that costs nothing."""

    def noise(self: Engine, uniforms: np.ndarray, picking: Picking, condition: None) -> np.ndarray:
        return (uniforms * 256).astype(np.int64)

    monkeypatch.setattr(Plain, "generate", noise)
    monkeypatch.setattr(sample, "AUDIO_CHUNK", 5)
    run = wavenet_run()
    peaks = []
    audio(tmp_path / "out.wav", 20, run=run)  # what is imported at the first use
    for seconds in (20, 3600):
        gc.collect()
        tracemalloc.start()
        audio(tmp_path / "out.wav", seconds, run=run)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert len(read(tmp_path / "out.wav")) == 3600 * RATE
    assert peaks[1] < peaks[0] + 2**22  # its samples alone would be 7 MB


def test_a_few_clips_are_made_by_the_cpu_of_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = ["cuda"]
    monkeypatch.setattr(sample, "resolve", lambda _: SimpleNamespace(kind=kind[0]))
    monkeypatch.setattr(sample.limits, "cpus", lambda: 2)
    told: list[Any] = []

    def device(**options: Any) -> str:
        return sample._device(SoundRequest(**options), told.append)

    assert device(num=6) == "cpu"
    assert [(event.what, event.value) for event in told] == [("device", "CPU")]
    assert (device(num=7), device(num=1, device="cuda")) == ("auto", "cuda")
    kind[0] = "cpu"
    assert device(num=1) == "auto"
    assert len(told) == 1
