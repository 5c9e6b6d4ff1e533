"""What of a request can be checked before PyTorch and the model are loaded, which takes seconds: all that follows from
run.json, from the headers of the named recordings, and from where the result is to be written."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from dfcli.codecs import MuLaw, TextCodec
from dfcli.errors import DfError, UsageError
from dfcli.generation.audio import Output
from dfcli.generation.outputs import check_format
from dfcli.generation.request import SoundRequest, TextRequest
from dfcli.ingest.audio import Recording
from dfcli.ingest.containers import EXTENSIONS, unusable
from dfcli.ingest.reopen import origin
from dfcli.ingest.sources import refuse_missing
from dfcli.runs.run import Run
from dfcli.system.words import closest

SHOWN = 12  # names of labels in a message


class ConditionInfo(NamedTuple):
    """What run.json says of the conditions of a model. `Run.conditioning` has the rest, and checks it."""

    labels: dict[str, list[str]]
    vocoder: bool
    ends: bool  # whether the model knows how long a clip is


def condition_info(run: Run) -> ConditionInfo:
    values = run.info.get("conditioning")
    values = values if isinstance(values, dict) else {}
    labels = values.get("labels")
    labels = {str(label): [*map(str, names)] for label, names in labels.items()} if isinstance(labels, dict) else {}
    return ConditionInfo(labels, bool(values.get("mel")), bool(values.get("progress")))


def check_text(run: Run, request: TextRequest, prompt: str) -> None:
    """Raises UsageError for a run of audio, a checkpoint that is not there and a prompt of several lines for a model of
    lines, DfError for a prompt that the codec cannot express."""
    if run.makes != "text":
        raise UsageError(f"the run `{run.name}` makes sound, not text", "use `df sample wavenet`")
    run.resolve(request.checkpoint)
    cast(TextCodec, run.codec).encode(prompt)
    if run.dataset["lines"] and "\n" in prompt.removesuffix("\n"):
        raise UsageError("the prompt has several lines, and this model writes single lines")


def check_sound(run: Run, request: SoundRequest, out: str | Path | BinaryIO) -> Output:
    """Where the clips will be written. Raises UsageError for a run of text, for conditions that its model does not take
    or lacks, for labels that it does not know and for an `out` that cannot be; DfError for a recording that cannot be
    read."""
    codec = run.codec
    if not isinstance(codec, MuLaw):
        raise UsageError(f"the run `{run.name}` makes text, not sound", "use `df sample gpt`")
    run.resolve(request.checkpoint)
    request.limit(codec.sample_rate)
    known = condition_info(run)
    if request.labels and not known.labels:
        raise UsageError(f"the run `{run.name}` was trained without labels", "leave out `--label`")
    check_labels(known.labels, request.labels)
    if request.mel is not None and not known.vocoder:
        raise UsageError(f"the run `{run.name}` is no vocoder: it takes no mel spectrogram", "leave out `--mel`")
    if request.mel is not None and request.prime is not None:
        raise UsageError("--mel and --prime exclude each other: a mel spectrogram is of the whole clip")
    if request.mel is None and known.vocoder:
        raise UsageError(
            f"the run `{run.name}` is a vocoder: it needs the recording that it makes again",
            f"name the recording: `--mel {shlex.quote(a_recording(run))}`",
        )
    if request.prime is not None:
        _check_primed(run, known.labels, request)
    if request.best is not None and (known.labels or known.vocoder):
        raise UsageError(f"--best cannot rank clips of `{run.name}`, whose model takes conditions", "leave it out")
    kept = request.prime if request.keep_prime else None
    output = Output(out, request.num, kept, request.best, request.normalize == "peak")
    if output.paths:
        check_format(output.paths[0], codec.sample_rate)
    for path, what in ((request.mel, "the recording of --mel"), (request.prime, "the prime")):
        if path is not None:
            refuse_missing(str(path), "recording")
            try:
                Recording(path)
            except DfError as error:
                raise unusable(f"{what} {path}", str(path), error) from None
    return output


def a_recording(run: Run) -> str:
    """A recording that the run was trained on, for an example."""
    for source in origin(run.info.get("dataset", {}))[0]:
        if os.path.isfile(source):
            return source
        for place, folders, names in os.walk(source):
            folders.sort()
            if found := sorted(name for name in names if name.lower().endswith(EXTENSIONS)):
                return os.path.join(place, found[0])
    return "clip.wav"


def sound_options(run: Run, request: SoundRequest | None = None) -> str:
    """The options of `df sample wavenet` that suit the conditions of a run, beside those of a request."""
    known = condition_info(run)
    if known.vocoder:
        return f"--mel {shlex.quote(a_recording(run))} -o again.wav"
    labels = {label: names[0] for label, names in known.labels.items()} | dict(request.labels if request else {})
    words = [f"--label {shlex.quote(f'{label}={name}')}" for label, name in labels.items()]
    prime = request and request.prime
    if prime is not None:
        words.append(f"--prime {shlex.quote(str(prime))}")
    return " ".join([*words, *(["--seconds 4"] if prime or not known.ends else []), "-o out.wav"])


def check_labels(names: dict[str, list[str]], wanted: Mapping[str, str]) -> None:
    """Raises UsageError where a label or a name is wanted that there is not."""
    for label, name in wanted.items():
        if label not in names:
            raise UsageError(f"the model has no label {label!a}", closest(label, names, "its labels are"))
        if name not in names[label]:
            raise UsageError(f"the model knows no {label} {name!a}", closest(name, names[label]))


def _check_primed(run: Run, names: dict[str, list[str]], request: SoundRequest) -> None:
    """A label that is drawn would contradict the recording that is continued, most of the time."""
    missing = [label for label, known in names.items() if label not in request.labels and len(known) > 1]
    if missing:
        raise UsageError(
            f"--prime needs the label {missing[0]} of the recording, because a drawn one may contradict it",
            f"for example `df sample wavenet --run {run.name} {sound_options(run, request)}`",
        )
