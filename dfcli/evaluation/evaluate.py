"""How good a run's model is: its loss over a split or over other data, in every unit, beside baselines."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from dfcli.codecs import Codec, MuLaw, TextCodec
from dfcli.cores import GPTConfig
from dfcli.data.dataset import Dataset
from dfcli.errors import CorruptError, DfError, UsageError
from dfcli.evaluation.baselines import baselines, count_targets
from dfcli.evaluation.request import Request, choice_of
from dfcli.evaluation.sweep import Loss, sweep
from dfcli.evaluation.vocoder import measured
from dfcli.ingest.documents import holds_records
from dfcli.ingest.prepare import prepare
from dfcli.ingest.reopen import run_dataset
from dfcli.runs.pack import FIGURES
from dfcli.runs.run import Run, newest
from dfcli.system.device import Device, resolve
from dfcli.system.events import Note, OnEvent, ignore
from dfcli.system.files import DAMAGED, read_json
from dfcli.system.words import counted, span

WHOLE = "all"  # the one split of data that is given to be scored whole
UNITS = ("bits_per_token", "bits_per_byte", "bits_per_character", "bits_per_sample", "bits_per_16bit_sample")


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation. Figures that do not apply are None."""

    run: str
    checkpoint: int  # its step
    dataset: str  # its name, or the files that were given
    split: str
    tokens: int  # scored
    context: int  # ids the model sees at most
    stride: int  # 1 where every target is seen with the whole context
    limit: int | None  # only so many targets from the start of the split were scored
    unknown_characters: int  # of the data, left out because the codec lacks them
    loss: float  # nats per token
    perplexity: float
    bits_per_token: float
    bits_per_byte: float | None  # of the text's UTF-8; text only
    bits_per_character: float | None
    bits_per_sample: float | None  # audio only
    bits_per_16bit_sample: float | None  # with the bits of the 16-bit values that each level stands for; audio only
    quantization_snr: float | None  # dB, of the recordings through the codec; where the dataset says it
    flac_bits_per_sample: float | None  # of the same recordings at 16 bits; where the dataset says it
    measures: dict[str, dict[str, float]] | None  # distances of resynthesised clips and the floors, where asked for
    baselines: dict[str, dict[str, float]]  # name -> loss and bits, in the units above
    protocol: str  # how it was measured, in a sentence
    seconds: float  # of the model's sweep
    tokens_per_second: float


def evaluate(
    run: Run | str | Path | None = None, data: Sequence[str] = (), *, on_event: OnEvent = ignore, **options: Any
) -> Evaluation:
    """Scores every target of a split once, deterministically; the newest run, if `run` is None. The other `options` are
    the fields of `evaluation.request.Request`: `split`, `stride`, `limit`, `measures`, `checkpoint`, `device`.

    Without `data` it is a split ("val" by default) of the dataset that the run was trained on. `data` may
    name another dataset, prepared with the same codec, or files and folders, which are scored whole as the
    split "all"; documents inside them are told apart as in the run's own data. `stride` is for GPTs,
    from 1 to the context (the default): a smaller one gives each target
    more context and takes longer. `limit` scores only that many tokens from the start of the split. Characters of
    `data` that the codec lacks are left out and counted. `measures`: also make recordings again from their mel
    spectrograms, and compare.
    Raises UsageError for options out of range, DfError if the run's data is gone or has changed, or cannot
    be expressed in its codec, CorruptError for damaged files.
    """
    request = Request(data=tuple(data or ()), **options)
    where = resolve(request.device)
    if run is None:
        run = newest()
        on_event(Note(f"the newest run is {run.name}"))
    elif not isinstance(run, Run):
        run = Run.open(run)
    if request.plain and (packed := _packed(run, request.split, on_event)):
        return packed
    with _dataset(run, request.data, on_event) as dataset:
        return _evaluation(run, dataset, _split(dataset, request.split), request, where, on_event)


def _evaluation(
    run: Run, dataset: Dataset, split: str, request: Request, where: Device, on_event: OnEvent
) -> Evaluation:
    core, loaded = run.build(request.checkpoint, where.torch_device)
    config: Any = core.config
    stride, limit = request.stride, request.limit
    if stride is not None and not isinstance(config, GPTConfig):
        seen = counted(config.context, "id")
        on_event(Note(f"the stride changes nothing: this model sees {seen} at every position"))
        stride = None
    began = time.perf_counter()
    conditions = run.conditioning
    loss = sweep(core, dataset, split, where, stride=stride, first=limit, conditioning=conditions, on_event=on_event)
    seconds = time.perf_counter() - began
    if not math.isfinite(loss.nats):
        hint = f"try an earlier checkpoint: `df eval --run {run.name} --checkpoint STEP`"
        raise DfError(f"the loss of run {run.name} is not finite", hint)
    closing = (split, stride, limit, request.checkpoint) == ("val", None, None, "best")
    if closing and not request.data and not run.info.get("init"):  # which would have to be compared with its start
        with suppress(DfError):  # a run that cannot be written is evaluated all the same
            run.set_closing_loss(loss.mean)
    with _counted(run, dataset, on_event) as train:
        others = baselines((dataset, split), train, limit, on_event)
    measures = None
    if request.measures:
        distances = measured(run, core, dataset, split, where, on_event)
        measures = {name: distance._asdict() for name, distance in distances.items()}
    sizes = _sizes(run.codec, dataset, split, loss.tokens, limit)
    inside = _bits_inside_levels(run.codec, dataset, split, limit)
    units: dict[str, Any] = dict.fromkeys(UNITS)
    # These are of the whole split, and cannot stand beside a loss of a part.
    fidelity = {} if loss.limited else dataset.info.get("fidelity", {}).get(split, {})
    return Evaluation(
        run=run.name,
        checkpoint=loaded.step,
        dataset=", ".join(request.data) or dataset.name,
        split=split,
        tokens=loss.tokens,
        context=loss.context,
        stride=loss.stride,
        limit=limit,
        unknown_characters=dataset.info["facts"].get("unknown_characters", 0),
        loss=loss.mean,
        perplexity=math.exp(loss.mean) if loss.mean < 700 else math.inf,  # e^709 is the largest float
        quantization_snr=fidelity.get("snr"),
        flac_bits_per_sample=fidelity.get("flac_bits_per_sample"),
        measures=measures,
        baselines={name: {"loss": nats, **_bits(nats, sizes, inside)} for name, nats in others.items()},
        protocol=_protocol(loss, dataset, split, others),
        seconds=seconds,
        tokens_per_second=loss.tokens / seconds,
        **units | _bits(loss.mean, sizes, inside),
    )


def _packed(run: Run, split: str | None, on_event: OnEvent) -> Evaluation | None:
    """The figures that a packed run carries, where the data that it was trained on is not here."""
    path = run.path / FIGURES
    if not path.is_file():
        return None
    try:
        run_dataset(run).close()
        return None
    except DfError:
        found = read_json(path)
    known = {field.name: found[field.name] for field in fields(Evaluation) if field.name in found}
    try:
        stored = Evaluation(**known)
    except TypeError:
        raise CorruptError(f"{path} does not hold the figures of an evaluation", DAMAGED) from None
    if split not in (None, stored.split):
        raise UsageError(f"the packed run {run.name} holds figures of the split {stored.split} only", "give `--data`")
    on_event(Note(f"the data is not in the packed run {run.name}: these figures were measured when it was packed"))
    return replace(stored, run=run.name)


@contextmanager
def _dataset(run: Run, data: Sequence[str], on_event: OnEvent) -> Iterator[Dataset]:
    """The dataset to score: `data`, or the one that the run was trained on."""
    if not data:
        with run_dataset(run, on_event) as dataset:
            yield dataset
        return
    record = run.dataset
    documents = {
        "lines": record["lines"],
        "separator": record.get("separator"),
        "field": record.get("field") if any(holds_records(item) for item in data) else None,
        "label": None if run.conditioning is None else run.conditioning.rule,
    }
    others = {"codec": run.codec, "lead": record["lead"], "normalize": record["normalize"], "whole": True}
    try:
        dataset = prepare(list(data), **documents, **others, on_event=on_event)
    except DfError as error:
        given = next((f"`{name}` {value!r}" for name, value in documents.items() if f"`--{name}" in error.hint), "")
        if not given:
            raise
        # `df eval` has no such option
        raise type(error)(error.message, f"the data are read as those of run {run.name} were, by {given}") from error
    with dataset:
        yield dataset


@contextmanager
def _counted(run: Run, dataset: Dataset, on_event: OnEvent) -> Iterator[tuple[Dataset, str] | None]:
    """The train split that baselines count on: the run's own, or None if that cannot be had, which is
    said."""
    if dataset.fingerprint == run.dataset["fingerprint"] and "train" in dataset.splits:
        yield dataset, "train"
        return
    try:
        own = run_dataset(run, on_event)
    except DfError as error:
        on_event(Note(f"only the uniform baseline is known: {error.message}"))
        yield None
        return
    with own:
        yield own, "train"


def _split(dataset: Dataset, split: str | None) -> str:
    """The split to score. Raises UsageError if there is none of that name."""
    if WHOLE in dataset.splits:
        if split not in (None, WHOLE):
            raise UsageError("files are scored whole, not by split", "leave out `--split`")
        return WHOLE
    split = split or "val"
    if split not in dataset.splits:
        raise UsageError(f"dataset {dataset.name} has no split {split!r}", choice_of(dataset.splits))
    return split


def _sizes(codec: Codec, dataset: Dataset, split: str, tokens: int, limit: int | None) -> dict[str, int]:
    """How many of each unit the scored targets stand for."""
    sizes = {"bits_per_token": tokens}
    if isinstance(codec, MuLaw):
        sizes["bits_per_sample"] = tokens
    elif isinstance(codec, TextCodec):
        counts = count_targets(dataset, split, limit)
        sizes["bits_per_byte"] = int(np.dot(counts, codec.byte_lengths))
        sizes["bits_per_character"] = int(np.dot(counts, codec.character_lengths))
    return sizes


def _bits_inside_levels(codec: Codec, dataset: Dataset, split: str, limit: int | None) -> float | None:
    """The mean over the scored samples of log2 of the number of 16-bit values that the sample's level stands for. With
    the bits per sample it is the length of a code for 16-bit sound, whatever the number of levels. None for text."""
    if not isinstance(codec, MuLaw):
        return None
    counts = count_targets(dataset, split, limit)
    return float(np.dot(counts, np.log2(np.maximum(codec.values_of_16_bits, 1))) / counts.sum())


def _bits(nats_per_token: float, sizes: dict[str, int], inside: float | None) -> dict[str, float]:
    """The loss in bits of each unit; `inside` are the bits of a 16-bit sample that its level leaves open."""
    bits = nats_per_token * sizes["bits_per_token"] / math.log(2)
    found = {unit: bits / size for unit, size in sizes.items() if size}
    return found if inside is None else found | {"bits_per_16bit_sample": found["bits_per_sample"] + inside}


def _protocol(loss: Loss, dataset: Dataset, split: str, others: dict[str, float]) -> str:
    """How the figures were measured, in a sentence's words."""
    documents = dataset.splits[split].documents
    unit = "line" if dataset.lines else "recording" if dataset.kind == "audio" else "text"
    ids = span(loss.context, dataset.codec.sample_rate)
    where = f"one {unit}" if documents == 1 else f"{documents:,} {unit}s"
    if loss.stride == 1:
        seen = f"seeing the newest {ids} of its {unit} (fewer at its start)"
    elif loss.stride == loss.context:
        seen = f"in windows of {ids} that do not overlap, from the start of its {unit}"
    else:
        least = loss.context - loss.stride + 1
        seen = f"seeing the newest {least:,} to {ids} of its {unit} (fewer at its start)"
    counts = "; n-grams are counted on the train split, with add-one smoothing" if len(others) > 1 else ""
    every = "each of the" if loss.tokens > 1 else "the"
    if loss.limited:
        every += " first"
    return f"{every} {counted(loss.tokens, 'target')} in {where} is scored once, {seen}{counts}"
