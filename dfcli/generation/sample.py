"""Text and sound from a run: load the model, feed it the prompt, and turn the ids it picks into text or sound
while they are generated.

Several clips advance together as one batch. Clip i draws its chances from (seed, i) alone, so that it is
the same however many are asked for (up to the last bits of float32 sums, which depend on the size of a
batch).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from dfcli.codecs import MuLaw, TextCodec
from dfcli.generation.audio import AudioClip, Output, Prime
from dfcli.generation.checks import check_sound, check_text
from dfcli.generation.conditions import Plan, planned
from dfcli.generation.generator import Generator, Model, chosen, load
from dfcli.generation.likelihood import mean_nats
from dfcli.generation.request import SoundRequest, TextRequest
from dfcli.generation.text import TextClip
from dfcli.runs.run import Run
from dfcli.system import limits
from dfcli.system.device import resolve
from dfcli.system.events import Choice, Note, OnEvent, ignore

TOKENS = 500  # of a text, where the caller does not say
TEXT_CHUNK = 0.05  # seconds of work between two outputs
AUDIO_CHUNK = 0.25  # seconds of work, and of sound, between two outputs
CLIPS_A_CPU = 3  # of the paper's shape one CPU of an EPYC makes 15,900 samples/s, an H200 5,000 for each clip


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


Chunks = Iterable[tuple[range, NDArray[np.int64]]]  # clips, and further ids of each [clips, n]


def sample_text(
    run: Run | str | Path | None = None,
    prompt: str = "",
    *,
    on_text: Callable[[int, str], None] = lambda number, piece: None,
    on_event: OnEvent = ignore,
    **options: Any,
) -> SampleResult:
    """Continues `prompt` with the model of a run; the newest that makes text, if `run` is None.

    The `options` are the fields of `generation.request.TextRequest`: `tokens`, `stop`, `num`, `temperature`, `top_k`,
    `top_p`, `min_p`, `seed`, `device`, `engine`, `checkpoint`.

    A model of lines writes one line, of at most `tokens` ids (500 by default); any other writes `tokens`
    ids. Both end before the text `stop`, if it comes. Without a prompt a text begins at the model's
    boundary; where there is none, after a line break, else after the first character of the vocabulary.
    `on_text(number, piece)` gets the pieces of each sample as they are made, the prompt first. A `seed` of
    None draws one, which the result names.
    Raises UsageError for options out of range and for a run of audio, DfError for a prompt that the codec
    cannot express.
    """
    request = TextRequest(**options)
    run = chosen(run, "text", on_event)
    check_text(run, request, prompt)
    step, model = load(run, request.checkpoint, request.device)
    codec = cast(TextCodec, model.codec)
    _note_top_k(request.top_k, codec.vocab_size, on_event)
    if model.lines:
        prompt = prompt.removesuffix("\n")
    opening = _text_opening(model, prompt, on_event)
    end = model.boundary if model.lines else None
    generator = Generator(model, request.num, request.engine, on_event)
    clips: list[TextClip] = []
    made = 0

    def feed(group: range, ids: NDArray[np.int64]) -> None:
        nonlocal made
        if len(clips) == group.start:
            clips.extend(TextClip(i, codec, prompt, end, request.stop, on_text) for i in group)
        made += sum(clip.feed(row) for clip, row in zip(clips[group.start :], ids.tolist(), strict=True))

    began = time.perf_counter()
    interrupted = _interrupted(
        generator.generate(
            opening, request.tokens or TOKENS, request, request.seed, seconds=TEXT_CHUNK,
            done=lambda group: all(clip.done for clip in clips[group.start :]),
        ),
        feed,
    )  # fmt: skip
    took = time.perf_counter() - began
    samples = [clip.finish() for clip in clips]
    return SampleResult(
        run.name, step, request.seed, generator.engine.name, samples, made, took, made / took, interrupted
    )


def sample_audio(
    run: Run | str | Path | None = None,
    seconds: float | None = None,
    out: str | Path | BinaryIO = "out.wav",
    *,
    on_event: OnEvent = ignore,
    **options: Any,
) -> SampleResult:
    """Writes sound by the model of a run (the newest that makes sound, if `run` is None), 16 bit, mono: `seconds` of
    it, 4 by default.

    The other `options` are the fields of `generation.request.SoundRequest`: `num`, `best`, `normalize`, `labels`,
    `mel`, `prime`, `keep_prime`, `temperature`, `top_k`, `top_p`, `min_p`, `seed`, `device`, `engine`, `checkpoint`.

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
    request = SoundRequest(seconds=seconds, **options)
    run = chosen(run, "audio", on_event)
    output = check_sound(run, request, out)
    step, model = load(run, request.checkpoint, _device(request, on_event))
    codec = cast(MuLaw, model.codec)
    _note_top_k(request.top_k, codec.vocab_size, on_event)
    output.name(run.name, request.seed)
    prime = None if request.prime is None else Prime(request.prime, codec, run.dataset["normalize"], model.context)
    plan = planned(run, codec, request, prime, on_event)
    opening = model.opening(np.empty(0) if prime is None else prime.newest)
    kept = prime if request.keep_prime else None
    output.check_room(plan.samples, kept.samples if kept else 0, codec.sample_rate)
    generator = Generator(model, request.num, request.engine, on_event)
    sound = _Sound(output, codec, plan, kept, request.best is not None, on_event)
    try:
        interrupted = _interrupted(
            generator.generate(
                opening, max(plan.samples), request, request.seed, seconds=AUDIO_CHUNK, conditions=plan.at,
                done=sound.done, longest=max(1, int(AUDIO_CHUNK * codec.sample_rate)),
            ),
            sound.feed,
        )  # fmt: skip
    finally:
        sound.close()
    took, clips = time.perf_counter() - sound.began, sound.clips
    made, rate = sum(clip.samples for clip in clips), codec.sample_rate
    order, nats = list(range(len(clips))), None
    if request.best is not None:
        nats = [mean_nats(model, opening, np.concatenate(clip.ids)) for clip in clips]
        order = sorted(order, key=nats.__getitem__)[: request.best]
    output.finish(order, rate)
    return SampleResult(
        run=run.name,
        checkpoint=step,
        seed=request.seed,
        engine=generator.engine.name,
        samples=[str(path) for path in (output.paths or [])[: len(order)]],
        tokens=made,
        seconds=took,
        tokens_per_second=made / took,
        interrupted=interrupted,
        sample_rate=rate,
        audio_seconds=made / rate,
        times_real_time=made / rate / took,
        leading_silence=None if prime is not None else [clips[i].silent / rate for i in order],
        labels=plan.labels,
        nats_per_sample=nats and [nats[i] for i in order],
    )


def _device(request: SoundRequest, on_event: OnEvent) -> str:
    """The device that is asked for; of "auto" on a machine with a CUDA GPU, the CPU for a few clips."""
    if request.device != "auto" or request.num > CLIPS_A_CPU * limits.cpus() or resolve("auto").kind != "cuda":
        return request.device
    on_event(Choice("device", "CPU", "makes a few clips faster than a GPU; `--device cuda` takes the GPU"))
    return "cpu"


class _Sound:
    """The clips of one call: each opens its file when its first ids come, behind the prime `kept` if that is given.
    `scored`: the clips keep their ids."""

    def __init__(
        self, output: Output, codec: MuLaw, plan: Plan, kept: Prime | None, scored: bool, on_event: OnEvent
    ) -> None:
        self.clips: list[AudioClip] = []
        self.began = time.perf_counter()
        self._output, self._codec, self._plan, self._kept = output, codec, plan, kept
        self._scored, self._on_event = scored, on_event

    def feed(self, group: range, ids: NDArray[np.int64]) -> None:
        if len(self.clips) == group.start:
            for i in group:
                self._open(i)
        for clip, row in zip(self.clips[group.start :], ids, strict=True):
            clip.feed(row)
            clip.ids += [row] if self._scored else []
        rate = self._codec.sample_rate
        heard = sum(clip.samples for clip in self.clips) / rate
        speed = heard / (time.perf_counter() - self.began)
        self._on_event(AudioProgress(heard, sum(self._plan.samples) / rate, speed))

    def _open(self, number: int) -> None:
        kept, samples = self._kept, self._plan.samples[number]
        wav = self._output.open(number, self._codec.sample_rate)
        if kept is None:
            self.clips.append(AudioClip(wav, self._codec, samples))
        else:
            self.clips.append(AudioClip(wav, self._codec, samples, kept.samples, kept.gain, kept.shift))
            kept.copy(wav)

    def done(self, group: range) -> bool:
        return all(clip.done for clip in self.clips[group.start :])

    def close(self) -> None:
        for clip in self.clips:
            clip.close()


def _interrupted(chunks: Chunks, feed: Callable[[range, NDArray[np.int64]], None]) -> bool:
    """Feed every chunk. Returns whether Ctrl-C ended that."""
    try:
        for group, ids in chunks:
            feed(group, ids)
    except KeyboardInterrupt:
        return True
    return False


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
