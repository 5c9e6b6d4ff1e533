"""The dataset that a run was trained on, opened again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dfcli.codecs import Codec
from dfcli.data.dataset import Dataset, dataset_names, datasets_folder, remove_dataset, reopen
from dfcli.errors import DfError
from dfcli.ingest.options import Options
from dfcli.ingest.prepare import prepare
from dfcli.ingest.sources import STDIN
from dfcli.runs.run import Run
from dfcli.system.events import OnEvent, ignore
from dfcli.system.files import same_name


def run_dataset(run: Run, on_event: OnEvent = ignore) -> Dataset:
    """The dataset that `run` was trained on, prepared again from its sources where it was removed. Raises DfError where
    that gives other data, or cannot be done."""
    record = run.dataset
    if not record["name"]:
        raise DfError(f"run {run.name} was imported without the data it was trained on", "give text with `--data`")
    if (dataset := reopen(record)) is not None:
        return dataset
    data, protocol = origin(record)
    if data:
        before = dataset_names()
        # Else the data give the same codec again.
        own = run.info.get("init") or run.codec.name == "bpe" or protocol.get("codec", "") is None
        codec = run.codec if own else None
        name = record["name"] if same_name(datasets_folder(), record["name"]) is None else None
        dataset = prepare_for(data, protocol | {"name": name}, codec, on_event)
        if dataset.fingerprint == record["fingerprint"]:
            return dataset
        dataset.close()
        if dataset.name not in before:
            remove_dataset(dataset.name)
    raise DfError(
        f"the dataset {record['name']} that run {run.name} was trained on is gone or has changed",
        f"restore its sources; `df eval --run {run.name} --data` and a file scores other data, "
        f"and `df train {run.kind} --init {run.name}` starts a new run from its weights",
    )


def prepared_from(dataset: Dataset) -> dict[str, Any]:
    """What a run keeps of how its dataset was made: the paths, and the arguments of `prepare` that are not
    defaults. Empty for a dataset that does not say it. A name in `--data` may mean another dataset or corpus later."""
    if not (given := dataset.info["sources"].get("given")):
        return {}
    made, defaults = dataset.info["options"], Options().as_json()
    options = {name: made[name] for name in defaults if name in made and made[name] != defaults[name]}
    if isinstance(options.get("codec"), dict):  # the codec of the run
        options["codec"] = None
    sources, val, test = given
    splits = {name: items for name, items in (("val", val), ("test", test)) if items}
    return {"sources": sources, "options": options | splits}


def origin(record: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """The sources of the dataset in a run's `record`, and the arguments of `prepare` that make it of them. No sources
    where only the name of the dataset is known, and for standard input."""
    made = record.get("prepared") or {"sources": record.get("sources", []), "options": record.get("protocol", {})}
    data, options = (made.get("sources"), made.get("options")) if isinstance(made, dict) else (None, None)
    if not isinstance(data, list) or not isinstance(options, dict) or not all(isinstance(item, str) for item in data):
        return [], {}
    return ([], {}) if STDIN in data or data == [record.get("name")] else (data, options)


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
        known = ("sample_rate", "quantizer", "vocab_size", "bpe")
        options = {key: value for key, value in protocol.items() if key not in known}
        options["codec"] = codec
    sound = "audio" if kind == "wavenet" else None
    return prepare(list(data), **options, kind=sound, keep=keep, on_event=on_event)
