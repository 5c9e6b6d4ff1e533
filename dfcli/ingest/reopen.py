"""The dataset that a run was trained on, opened again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dfcli.codecs import Codec
from dfcli.data.dataset import Dataset, reopen
from dfcli.errors import DfError
from dfcli.ingest.prepare import prepare
from dfcli.runs.run import Run
from dfcli.system.events import OnEvent, ignore


def run_dataset(run: Run, on_event: OnEvent = ignore) -> Dataset:
    """The dataset that `run` was trained on, prepared again from its sources where it was removed. Raises DfError where
    that gives other data, or cannot be done."""
    record = run.dataset
    if not record["name"]:
        raise DfError(f"run {run.name} was imported without the data it was trained on", "give text with `--data`")
    if (dataset := reopen(record)) is not None:
        return dataset
    if record.get("sources") and "protocol" in record:
        # Else the data give the same codec again, and the same name.
        codec = run.codec if run.info.get("init") or run.codec.name == "bpe" else None
        dataset = prepare_for(record["sources"], record["protocol"], codec, on_event)
        if dataset.fingerprint == record["fingerprint"]:
            return dataset
        dataset.close()
    raise DfError(
        f"the dataset {record['name']} that run {run.name} was trained on is gone or has changed",
        f"restore its sources; `df eval --run {run.name} --data` and a file scores other data, "
        f"and `df train {run.kind} --init {run.name}` starts a new run from its weights",
    )


def prepare_for(
    data: Sequence[str],
    protocol: dict[str, Any],
    codec: Codec | None,
    on_event: OnEvent,
    kind: str = "",
    keep: bool = True,
) -> Dataset:
    """`data` prepared by a preset's protocol, or in the ids of an earlier run's `codec`. The sources of a "wavenet" are
    looked through for sound first. Where `keep` is false the dataset is removed when it is closed."""
    options: dict[str, Any] = dict(protocol)
    if codec is not None:  # it knows these itself
        options = {key: value for key, value in protocol.items() if key not in ("sample_rate", "quantizer")}
        options["codec"] = codec
    sound = "audio" if kind == "wavenet" else None
    return prepare(list(data), **options, kind=sound, keep=keep, on_event=on_event)
