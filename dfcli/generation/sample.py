"""Text and sound from a run: load the model, feed it the prompt, and turn the ids it picks into text or sound
while they are generated.

Several clips advance together as one batch. Clip i draws its chances from (seed, i) alone, so that it is
the same however many are asked for (up to the last bits of float32 sums, which depend on the size of a
batch).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from dfcli.codecs import MuLaw, TextCodec
from dfcli.errors import UsageError
from dfcli.generation.audio import AudioClip, Output, Prime
from dfcli.generation.conditions import Wanted, planned
from dfcli.generation.generator import Generator, Model, load
from dfcli.generation.likelihood import mean_nats
from dfcli.generation.sampling import Filters, chosen_seed
from dfcli.generation.text import TextClip
from dfcli.runs.run import Run
from dfcli.system.events import Choice, Note, OnEvent, ignore

TOKENS = 500  # of a text, where the caller does not say
MOST_CLIPS = 100_000  # of one call
TEXT_CHUNK = 0.05  # seconds of work between two outputs
AUDIO_CHUNK = 0.25  # seconds of work, and of sound, between two outputs


@dataclass(frozen=True)
class SampleResult:
    """The result of a call. `samples` are the texts, with their prompt, or the paths of the sound files (none for a
    stream)."""

    run: str
    checkpoint: int  # its step
    seed: int
    engine: str
    samples: list[str]
    tokens: int  # ids made, of all samples together
    seconds: float  # that took, the reading of the prompt included
    tokens_per_second: float
    interrupted: bool  # by Ctrl-C; what was made until then is kept
    sample_rate: int | None = None  # in Hz; this and the following for audio only
    audio_seconds: float | None = None  # made, of all clips together
    times_real_time: float | None = None
    leading_silence: list[float] | None = None  # seconds before each clip's first sound; without a prime
    labels: list[dict[str, str]] | None = None  # of each clip, for a model with labels
    nats_per_sample: list[float] | None = None  # of each clip that `best` chose, as the model finds it


@dataclass(frozen=True)
class AudioProgress:
    """How much sound there is, in seconds, of all clips together."""

    seconds: float
    total: float
    times_real_time: float


def sample_text(
    run: Run | str | Path | None = None,
    prompt: str = "",
    *,
    tokens: int | None = None,
    stop: str | None = None,
    num: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    device: str = "auto",
    engine: str = "auto",
    checkpoint: str | int = "best",
    on_text: Callable[[int, str], None] = lambda number, piece: None,
    on_event: OnEvent = ignore,
) -> SampleResult:
    """Continues `prompt` with the model of a run; the newest that makes text, if `run` is None.

    A model of lines writes one line, of at most `tokens` ids (500 by default); any other writes `tokens`
    ids. Both end before the text `stop`, if it comes. Without a prompt a text begins at the model's
    boundary; where there is none, after a line break, else after the first character of the vocabulary.
    `on_text(number, piece)` gets the pieces of each sample as they are made, the prompt first. A `seed` of
    None draws one, which the result names.
    Raises UsageError for options out of range and for a run of audio, DfError for a prompt that the codec
    cannot express.
    """
    filters = Filters(temperature, top_k, top_p, min_p)
    seed = chosen_seed(seed)
    if not 1 <= num <= MOST_CLIPS:
        raise UsageError(f"the number of samples must be from 1 to {MOST_CLIPS:,}, not {num}")
    tokens = TOKENS if tokens is None else tokens
    if tokens < 1:
        raise UsageError(f"the number of tokens must be at least 1, not {tokens}")
    if stop == "":
        raise UsageError("the stop text is empty", "leave it out to stop at no text")
    run, step, model = load(run, "text", checkpoint, device, on_event)
    codec = model.codec
    if not isinstance(codec, TextCodec):
        raise UsageError(f"run {run.name} makes sound, not text", "use `df sample wavenet -o out.wav`")
    _note_top_k(top_k, codec.vocab_size, on_event)
    if model.lines:
        prompt = prompt.removesuffix("\n")
        if "\n" in prompt:
            raise UsageError("the prompt has several lines, and this model writes single lines")
    opening = _text_opening(model, prompt, on_event)

    generator = Generator(model, num, engine, on_event)

    clips: list[TextClip] = []
    made, interrupted = 0, False
    began = time.perf_counter()

    def done(group: range) -> bool:
        return all(clip.done for clip in clips[group.start :])

    try:
        for group, ids in generator.generate(opening, tokens, filters, seed, seconds=TEXT_CHUNK, done=done):
            if len(clips) == group.start:
                clips += [_text_clip(model, prompt, stop, i, on_text) for i in group]
            made += sum(clip.feed(row) for clip, row in zip(clips[group.start :], ids.tolist(), strict=True))
    except KeyboardInterrupt:
        interrupted = True
    took = time.perf_counter() - began
    samples = [clip.finish() for clip in clips]
    return SampleResult(run.name, step, seed, generator.engine.name, samples, made, took, made / took, interrupted)


def sample_audio(
    run: Run | str | Path | None = None,
    seconds: float | None = None,
    out: str | Path | BinaryIO = "out.wav",
    *,
    num: int = 1,
    best: int | None = None,
    normalize: str = "none",
    labels: Mapping[str, str] | None = None,
    mel: str | Path | None = None,
    prime: str | Path | None = None,
    keep_prime: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    device: str = "auto",
    engine: str = "auto",
    checkpoint: str | int = "best",
    on_event: OnEvent = ignore,
) -> SampleResult:
    """Writes sound by the model of a run (the newest that makes sound, if `run` is None), 16 bit, mono: `seconds` of
    it, 4 by default.

    `out` is a path that ends in .wav, .flac, .ogg or .mp3; for `num` clips the paths are out-01.wav, out-02.wav, ... A
    wav is replaced when the first samples are ready, grows while more are made, and is valid all along; the other
    formats appear when they are whole. A folder gets files named by run and seed. Or `out` is a binary stream, for one
    clip of wav. `best` writes so many of the clips, those that the model finds most likely first; `normalize` "peak"
    brings each clip to -1 dB. With either, clips are held in memory until they are whole. `labels` chooses names for a
    model with labels, such as {"speaker": "george"}; each clip draws those that are left out. A model of short
    recordings ends a clip by itself; `mel` is a recording whose sound a vocoder makes again from its mel spectrogram.
    For both, `seconds` is a limit. `prime` is a recording, of any rate, that the model continues; the output holds the
    continuation, or both with `keep_prime`. Without it a clip begins at the model's boundary, which is silence: the
    result says how long that lasts. A `seed` of None draws one, which the result names. Ctrl-C ends early and keeps
    what was made. Memory does not depend on `seconds`. Tells AudioProgress. Raises UsageError for options out of range,
    unknown labels and a run of text, DfError where the output cannot be written.
    """
    filters = Filters(temperature, top_k, top_p, min_p)
    seed = chosen_seed(seed)
    if not 1 <= num <= MOST_CLIPS:
        raise UsageError(f"the number of samples must be from 1 to {MOST_CLIPS:,}, not {num}")
    if prime is None and keep_prime:
        raise UsageError("there is no prime to keep", "give one with `--prime clip.wav`")
    if normalize not in ("none", "peak"):
        raise UsageError(f"there is no normalisation {normalize!r} of clips", "known: none, peak")
    kept_file = Path(prime) if prime is not None and keep_prime else None
    output = Output(out, num, kept_file, best, normalize == "peak")
    run, step, model = load(run, "audio", checkpoint, device, on_event)
    codec = model.codec
    if not isinstance(codec, MuLaw):
        raise UsageError(f"run {run.name} makes text, not sound", "use `df sample gpt`")
    if best is not None and run.conditioning is not None:
        raise UsageError(f"--best cannot rank clips of `{run.name}`, whose model takes conditions", "leave it out")
    _note_top_k(top_k, codec.vocab_size, on_event)
    output.name(run.name, seed)
    limit = _limit(seconds, codec.sample_rate)
    recording = None if prime is None else Prime(Path(prime), codec, run.dataset["normalize"], model.context)
    wanted = Wanted(num, labels or {}, None if mel is None else Path(mel), recording, limit, seed)
    plan = planned(run, codec, wanted, on_event)
    kept, level = 0, (1.0, 0.0)
    if recording and keep_prime:
        kept, level = recording.samples, (recording.gain, recording.shift)
    output.check_room(plan.samples, kept, codec.sample_rate)
    opening = model.opening(np.empty(0) if recording is None else recording.newest)
    generator = Generator(model, num, engine, on_event)

    began = time.perf_counter()
    clips: list[AudioClip] = []
    interrupted = False
    try:
        for group, ids in generator.generate(
            opening, max(plan.samples), filters, seed, seconds=AUDIO_CHUNK,
            longest=max(1, int(AUDIO_CHUNK * codec.sample_rate)), told=plan.at,
            done=lambda group: all(clip.done for clip in clips[group.start :]),
        ):  # fmt: skip
            if len(clips) == group.start:  # the first samples are ready: now there is something to write
                for i in group:
                    wav = output.open(i, codec.sample_rate)
                    clips.append(AudioClip(wav, codec, plan.samples[i], kept, *level))
                    if recording and keep_prime:
                        recording.copy(wav)
            for clip, row in zip(clips[group.start :], ids, strict=True):
                clip.feed(row)
                clip.ids += [row] if best is not None else []
            on_event(_progress(clips, plan.samples, codec.sample_rate, began))
    except KeyboardInterrupt:
        interrupted = True
    finally:
        for clip in clips:
            clip.close()
    took = time.perf_counter() - began
    made, rate = sum(clip.samples for clip in clips), codec.sample_rate
    order = list(range(len(clips)))
    nats = [mean_nats(model, opening, np.concatenate(clip.ids)) for clip in clips] if best is not None else []
    if best is not None:
        order = sorted(order, key=lambda i: nats[i])[:best]
    output.finish(order, rate)
    return SampleResult(
        run=run.name,
        checkpoint=step,
        seed=seed,
        engine=generator.engine.name,
        samples=[str(path) for path in (output.paths or [])[: len(order)]],
        tokens=made,
        seconds=took,
        tokens_per_second=made / took,
        interrupted=interrupted,
        sample_rate=rate,
        audio_seconds=made / rate,
        times_real_time=made / rate / took,
        leading_silence=None if recording is not None else [clips[i].silent / rate for i in order],
        labels=plan.labels,
        nats_per_sample=None if best is None else [nats[i] for i in order],
    )


def _limit(seconds: float | None, rate: int) -> int | None:
    """Samples. Raises UsageError where that is less than one."""
    if seconds is None:
        return None
    samples = round(seconds * rate) if math.isfinite(seconds) else 0
    if samples < 1:
        raise UsageError(f"the length must be at least one sample of {rate:,} Hz, not {seconds} seconds")
    return samples


def _progress(clips: list[AudioClip], samples: list[int], rate: int, began: float) -> AudioProgress:
    heard = sum(clip.samples for clip in clips) / rate
    return AudioProgress(heard, sum(samples) / rate, heard / (time.perf_counter() - began))


def _note_top_k(top_k: int | None, vocab_size: int, on_event: OnEvent) -> None:
    if top_k is not None and top_k > vocab_size:
        on_event(Note(f"top-k {top_k:,} keeps every token: the model has {vocab_size:,}"))


def _text_opening(model: Model, prompt: str, on_event: OnEvent) -> NDArray[np.int64]:
    """The ids that a text model reads first. Without a boundary and a prompt this is a newline, so that there is a
    token to continue."""
    codec = cast(TextCodec, model.codec)
    ids = codec.encode(prompt)
    if not prompt and model.boundary is None:
        newline = codec.id_of_newline
        ids = np.array([0 if newline is None else newline])
        on_event(Choice("prompt", repr(codec.decode(ids)), "no prompt was given, so generation starts after it"))
    if len(ids) > model.context:
        on_event(Note(f"the prompt has {len(ids):,} ids; the model sees the last {model.context:,}"))
    return model.opening(ids)


def _text_clip(
    model: Model, prompt: str, stop: str | None, number: int, on_text: Callable[[int, str], None]
) -> TextClip:
    end = model.boundary if model.lines else None
    return TextClip(number, cast(TextCodec, model.codec), prompt, end, stop, on_text)
