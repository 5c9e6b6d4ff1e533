"""Which dataset the user means: one that is there, or one to be built from sources.

A dataset appears whole or not at all, and is used again while its sources and options stay the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dfcli.codecs import BPE, CODECS, Codec
from dfcli.data.dataset import Dataset, datasets_folder, find_dataset, open_folder
from dfcli.errors import UsageError
from dfcli.ingest.build import Build
from dfcli.ingest.options import Options
from dfcli.ingest.recordings import Recordings, note_odd
from dfcli.ingest.reuse import locked, place_for, recorded
from dfcli.ingest.sources import (
    STDIN,
    UNDECODED,
    Kind,
    Skipped,
    Source,
    discover,
    note_skipped,
    nothing_usable,
    refuse_missing,
    refuse_undecoded,
    shown,
)
from dfcli.ingest.texts import Texts
from dfcli.system.events import Choice, Note, OnEvent, ignore
from dfcli.system.files import Temporary, building, check_name, clean_debris, os_errors
from dfcli.system.words import counted

RULES = 2  # of how sources become ids; raised where the same sources and options give other ids than before


def prepare(
    sources: Sequence[str],
    *,
    name: str | None = None,
    val: Sequence[str] = (),
    test: Sequence[str] = (),
    kind: Kind | None = None,
    keep: bool = True,
    on_event: OnEvent = ignore,
    **options: Any,
) -> Dataset:
    """Prepare `sources` (paths of files and folders, names of fetched corpora, `-` for standard input), or open them if
    they are the name of a prepared dataset. What was prepared before from the same sources and options is used again.

    `val` and `test` are sources of their own for these splits. `options` are the fields of `options.Options`. `kind`
    "audio" makes a folder that holds any recordings a source of recordings. With `keep` False, a dataset that is not
    there yet is removed when it is closed.

    Raises DfError where a source cannot be used, UsageError where options make no sense.
    """
    chosen = Options(**options)
    chosen.check()
    _check_sources(sources, val, test, chosen)
    if chosen.tokenizer is not None:
        chosen = replace(chosen, codec=BPE.open(Path(chosen.tokenizer)), tokenizer=None)
    if len(items := [*sources, *val, *test]) == 1 and (found := find_dataset(items[0])) is not None:
        return _opened(found, items[0], chosen, on_event)
    if chosen.codec == "gpt2":
        chosen = replace(chosen, bpe=os.path.abspath(_gpt2_folder(chosen.bpe)))

    paths = [_paths(group) for group in (sources, val, test)]
    groups, skipped = _discover(paths)
    kind = _kind([source for group in groups for source in group], chosen, kind, on_event)
    groups = [_of_kind(group, kind, skipped) for group in groups]
    if not groups[0]:
        raise nothing_usable(skipped, chosen.purpose)
    build = (Texts if kind == "text" else Recordings)(groups, chosen, skipped, on_event)
    if chosen.whole:
        clean_debris(datasets_folder())
        return _temporary(build, "", "", [])

    given = [[path if path == STDIN else os.path.abspath(path) for path in group] for group in paths]
    key = _key(given, groups, chosen)
    named = None if name is None else check_name(name, "dataset")
    name = named or f"{_stem(sources)}-{key[:8]}"
    with locked(name, on_event):
        clean_debris(datasets_folder())
        folder, dataset = place_for(name, key, groups, chosen_name=named is not None, on_event=on_event)
        if dataset is not None:
            on_event(Note(f"using {dataset.name}, prepared before from the same sources"))
            note_skipped(dataset.info["skipped"], on_event)
            note_odd(dataset.info["facts"], on_event)
            return dataset
        if not keep:
            return _temporary(build, folder.name, key, given)
        with building(folder, replace=True) as temporary:
            build.run(temporary, folder.name, key, given)
        return open_folder(folder)


def check_sources(items: Sequence[str]) -> None:
    """Raise UsageError where one of `items` is no dataset, fetched corpus, file or folder. Reads none of them."""
    for path in _paths([item for item in items if find_dataset(item) is None]):
        if path != STDIN:
            refuse_missing(path)


def _check_sources(sources: Sequence[str], val: Sequence[str], test: Sequence[str], options: Options) -> None:
    """Raise UsageError for sources that do not go together."""
    if options.split_rule != "auto" and (val or test):
        raise UsageError(
            f"the split rule {options.split_rule} fixes what validates and tests", "leave out `--val` and `--test`"
        )
    if not sources:
        raise UsageError("there is nothing to prepare", "name a file or a folder")
    items = [*sources, *val, *test]
    for item in items:
        if len(items) > 1 and find_dataset(item) is not None:
            raise UsageError(
                f"the prepared dataset {shown(item)} cannot be joined with other sources",
                f"prepare them together from their files; `./{shown(item)}` means a path",
            )


# Which sources -------------------------------------------------------------------------------------------------------


def _paths(items: Sequence[str]) -> list[str]:
    """The name of a public corpus stands for the file that was fetched; everything else is a path. No shell expands
    the `~` of `--data=~/a.txt`."""
    from dfcli.ingest.download import corpus_path, known_corpora

    known = known_corpora()
    paths = []
    for item in items:
        path = corpus_path(item) if item in known else None
        if item in known and path is None and not os.path.lexists(item):
            raise UsageError(f"the corpus {item} is not fetched yet", f"fetch it with `df data get {item}`")
        if item.startswith("~") and not os.path.lexists(item):
            item = os.path.expanduser(item)
        paths.append(item if path is None else str(path))
    return paths


def _gpt2_folder(bpe: str | None) -> Path:
    """Where GPT-2's vocabulary lies: as named, as the environment says, or as fetched. Raises UsageError."""
    from dfcli.ingest.download import corpus_path

    named = bpe or os.environ.get("DFCLI_GPT2_BPE")
    folder = Path(named) if named else corpus_path("gpt2-bpe")
    if folder is None:
        raise UsageError(
            "GPT-2's vocabulary is not here yet",
            "fetch it with `df data get gpt2-bpe`; `df data prepare FILE --codec gpt2 --bpe FOLDER` takes a folder of "
            "`encoder.json` and `vocab.bpe`",
        )
    return folder


def _discover(paths: list[list[str]]) -> tuple[list[list[Source]], list[Skipped]]:
    """Sources of train, val and test. What is named for testing or validation is taken out of the rest."""
    found = [discover(group) for group in paths]
    skipped = [file for _, left_out in found for file in left_out]
    groups = [sources for sources, _ in found]
    taken: dict[str, str] = {}  # by real path
    for k, what in ((2, "testing"), (1, "validation"), (0, "training")):
        if not taken and not k:
            break
        real = {source: os.path.realpath(source.identity) for source in groups[k]}
        skipped += [Skipped(source.name, f"used for {taken[path]}") for source, path in real.items() if path in taken]
        groups[k] = [source for source, path in real.items() if path not in taken]
        taken |= {real[source]: what for source in groups[k]}
    return groups, skipped


def _kind(sources: list[Source], options: Options, wanted: str | None, on_event: OnEvent) -> Kind:
    """Text or audio: as the codec says, else what was named, else what is `wanted` if it is there, else what most of
    the usable files are."""
    for source in sources:
        if source.given:
            refuse_undecoded(source, wanted)
    given = {source.kind for source in sources if source.given}
    kind: Kind
    if options.codec is not None:
        codec = options.codec if isinstance(options.codec, Codec) else CODECS[options.codec]
        kind = codec.kind
        if kind == "text" and "audio" in given:
            name = next(source.name for source in sources if source.given and source.kind == "audio")
            raise UsageError(
                f"{name} is audio, and the codec {codec.name} is for text", "give text; sound takes the codec mulaw"
            )
    elif len(given) == 2:
        raise UsageError("the sources are text and audio", "give one of the two, or say which with `--codec`")
    elif given:
        (kind,) = given
    else:
        counts = {"audio": sum(source.kind == "audio" for source in sources)}
        counts["text"] = 0
        if counts["audio"]:
            counts["text"] = sum(source.looks_like_text() for source in sources if source.kind == "text")
        kind = (
            "audio" if counts["audio"] >= max(1, counts["text"]) or (wanted == "audio" and counts["audio"]) else "text"
        )
        if all(counts.values()):
            beside = counts["text" if kind == "audio" else "audio"]
            reason = f"{counted(counts[kind], 'file')} beside {beside:,} of the other kind"
            on_event(
                Choice("kind of data", kind, f"a WaveNet looks for sound first; {reason}" if wanted == kind else reason)
            )
    options.refuse_for(kind)
    return kind


def _of_kind(group: list[Source], kind: Kind, skipped: list[Skipped]) -> list[Source]:
    """Files that were named are tried even if they do not look like it."""
    for source in group:
        if source.kind != kind and not source.given:
            skipped.append(Skipped(source.name, UNDECODED if source.kind == "media" else f"not {kind}"))
    return [source for source in group if source.kind == kind or source.given]


def _key(places: list[list[str]], groups: list[list[Source]], options: Options) -> str:
    """What identifies a dataset: its options and where its sources are (of standard input, what it held)."""
    piped = [source.sha256() for group in groups for source in group if source.path is None]
    return hashlib.sha256(json.dumps([RULES, places, piped, options.given()], sort_keys=True).encode()).hexdigest()


def _stem(items: Sequence[str]) -> str:
    """The readable part of a name: of the file or folder, or of the folder that holds them all."""
    places = ["stdin" if item == STDIN else os.path.abspath(item) for item in items]
    try:
        stem = Path(os.path.commonpath(places)).stem
    except ValueError:  # they have nothing in common
        stem = Path(places[0]).stem
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-")[:60] or "data"


# Using again ---------------------------------------------------------------------------------------------------------


def _opened(folder: Path, item: str, options: Options, on_event: OnEvent) -> Dataset:
    """The dataset that `item` names. Raises UsageError if it was made otherwise than is asked now."""
    dataset = open_folder(folder)
    codec, made = dataset.info["codec"], dataset.info["options"]
    asked = options.codec.to_json() if isinstance(options.codec, Codec) else options.codec
    conflicts = {
        "codec": asked not in (None, codec["name"], codec),
        "vocabulary size": options.vocab_size not in (None, made.get("vocab_size")),
        "quantizer": options.quantizer not in ("torchaudio", codec.get("quantizer")),
        "sample rate": options.sample_rate not in (None, codec.get("sample_rate")),
        "normalisation": options.normalize not in ("none", made["normalize"]),
        "split": options.split_rule not in ("auto", made["split_rule"]),
        "kind of document": (options.lines and not dataset.lines)
        or (options.separator or options.field) not in (None, made.get("separator") or made.get("field")),
        "number of levels": options.levels not in (None, codec.get("levels", 256)),
        "label": options.labelling is not None and options.labelling.rule != made.get("label"),
    }
    for what, conflict in conflicts.items():
        if conflict:
            dataset.close()
            raise UsageError(
                f"the dataset {dataset.name} was prepared with another {what} than is asked for",
                _instead(dataset, item),
            )
    on_event(Note(f"using the prepared dataset {dataset.name}"))
    return dataset


def _instead(dataset: Dataset, item: str) -> str:
    """What to give instead of `item`, which is the name or folder of a dataset that was made otherwise."""
    if item == dataset.name and os.path.lexists(item):
        return f"`./{shown(item)}` means the file or folder of that name"
    sources = recorded(dataset)
    if len(sources) == 1 and sources[0][1] != STDIN:
        return f"give its source instead of its name: {shown(sources[0][1])}"
    return "give its sources instead of its name"


def _temporary(build: Build, name: str, key: str, given: list[list[str]]) -> Dataset:
    """A dataset that is removed when it is closed, or as debris if this process is killed."""
    folder = Temporary(datasets_folder() / ".whole")
    try:
        with os_errors("write", folder.path):
            info = build.run(folder.path, name or folder.path.name, key, given)
            return Dataset(folder.path, info, discard=folder.discard)
    except BaseException:
        folder.discard()
        raise
