"""Which dataset the user means: one that is there, or one to be built from sources.

A dataset appears whole or not at all, and is used again while its sources and options stay the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dfcli.codecs import BPE, CODECS, Codec
from dfcli.codecs.boundary import MAX_LEAD
from dfcli.codecs.bpe import check_vocab_size
from dfcli.codecs.mulaw import LEVELS
from dfcli.data.dataset import (
    FORMAT,
    Busy,
    Dataset,
    datasets_folder,
    find_dataset,
    open_folder,
    preparation_lock,
)
from dfcli.errors import CorruptError, DfError, UsageError
from dfcli.ingest.audio import NORMALIZE
from dfcli.ingest.build import SOURCES, Build, Options
from dfcli.ingest.labels import Labelling
from dfcli.ingest.recordings import Recordings
from dfcli.ingest.sources import (
    STDIN,
    Kind,
    Skipped,
    Source,
    discover,
    note_skipped,
    nothing_usable,
    refuse_missing,
    shown,
)
from dfcli.ingest.splits import check_fractions
from dfcli.ingest.texts import Texts
from dfcli.system.events import Choice, Note, OnEvent, ignore
from dfcli.system.files import building, check_name, clean_debris, os_errors, reading, same_name

SPLIT_RULES = ("auto", "makemore", "makemore-transformer")
SETTLED = 2 * 10**9  # ns after which a change surely shows in a file's times (FAT counts in 2 s)


def prepare(
    sources: Sequence[str],
    *,
    name: str | None = None,
    codec: str | Codec | None = None,
    bpe: str | None = None,
    vocab_size: int | None = None,
    tokenizer: str | None = None,
    lines: bool = False,
    sample_rate: int | None = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.0,
    val: Sequence[str] = (),
    test: Sequence[str] = (),
    normalize: str = "none",
    quantizer: str = "torchaudio",
    levels: int | None = None,
    label: str | Labelling | None = None,
    split_rule: str = "auto",
    lead: int = 1,
    whole: bool = False,
    on_event: OnEvent = ignore,
) -> Dataset:
    """Prepare `sources` (paths of files and folders, names of fetched corpora, `-`), or open them if they
    are the name of a prepared dataset. What was prepared before from the same sources and options is used
    again.

    codec        "chars", "bytes", "gpt2" (its files in the folder `bpe`), "bpe" (trained on the training split: to
                 `vocab_size` ids, or as many as suit its size), "mulaw", or a Codec, which is taken as it is; None:
                 chars for text, mulaw for audio
    tokenizer    a tokenizer.json whose encoding is used (codec "bpe")
    lines        each line that is not blank is a document
    val, test    sources of their own for these splits; otherwise they are `val_fraction` and `test_fraction` of the
                 data: the last parts of one text or recording, whole documents otherwise
    normalize    "none", "peak" or "minmax", for each recording
    quantizer    of mulaw, see `codecs.MuLaw`
    levels       of mulaw; 256 if it is None
    label        how a recording's path says its labels, see `labels.Labelling`; None: there are none
    split_rule   "auto", or "makemore" and "makemore-transformer" for the published splits of lines
    lead         recorded: how many boundary ids stand before a document's first id when it is read
    whole        everything becomes one split `all` of a nameless dataset that is removed when it is closed

    Raises DfError where a source cannot be used, UsageError where options make no sense.
    """
    if tokenizer is not None:
        codec = _given_tokenizer(tokenizer, codec, vocab_size)
    options = Options(
        codec=codec,
        bpe=None,
        lines=lines,
        sample_rate=sample_rate,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        normalize=normalize,
        quantizer=quantizer,
        split_rule=split_rule,
        lead=lead,
        whole=whole,
        levels=levels,
        label=Labelling(label) if isinstance(label, str) else label,
        vocab_size=vocab_size,
    )
    _check(options)
    if bpe is not None and codec != "gpt2":
        raise UsageError("`--bpe` is for the gpt2 codec", "add `--codec gpt2`, or leave it out")
    if split_rule != "auto" and (val or test):
        raise UsageError(
            f"the split rule {split_rule} fixes what validates and tests", "leave out `--val` and `--test`"
        )
    if not sources:
        raise UsageError("there is nothing to prepare", "name a file or a folder")
    items = [*sources, *val, *test]
    for item in items:
        if (found := find_dataset(item)) is not None:
            if len(items) > 1:
                raise UsageError(
                    f"the prepared dataset {shown(item)} cannot be joined with other sources",
                    f"prepare them together from their files; `./{shown(item)}` means a path",
                )
            return _opened(found, item, options, on_event)

    if codec == "gpt2":
        options = replace(options, bpe=os.path.abspath(_gpt2_folder(bpe)))
    paths = [_paths(group) for group in (sources, val, test)]
    groups, skipped = _discover(paths)
    kind = _kind([source for group in groups for source in group], options, on_event)
    groups = [_of_kind(group, kind, skipped) for group in groups]
    if not groups[0]:
        raise nothing_usable(skipped)
    build = (Texts if kind == "text" else Recordings)(groups, options, skipped, on_event)
    if whole:
        clean_debris(datasets_folder())
        return _temporary(build)

    key = _key(paths, groups, options)
    name = check_name(name or f"{_stem(sources)}-{key[:8]}", "dataset")
    folder = datasets_folder() / name
    with _locked(name, on_event):
        clean_debris(folder.parent)
        if (other := same_name(folder.parent, name)) not in (None, name):
            raise UsageError(f"{name!r} differs only by case from the dataset {other!r}", "choose another name")
        if folder.exists() and (dataset := _reused(folder, key, groups, on_event)) is not None:
            return dataset
        with building(folder, replace=True) as temporary:
            build.run(temporary, name, key)
        return open_folder(folder)


def check_sources(items: Sequence[str]) -> None:
    """Raise UsageError where one of `items` is no dataset, fetched corpus, file or folder. Reads none of them."""
    for path in _paths([item for item in items if find_dataset(item) is None]):
        if path != STDIN:
            refuse_missing(path)


def _given_tokenizer(file: str, codec: str | Codec | None, vocab_size: int | None) -> BPE:
    """The encoding of `--tokenizer FILE`. Raises UsageError where other options contradict it."""
    if codec not in (None, "bpe"):
        raise UsageError("`--tokenizer` is for the bpe codec", "leave out `--codec`, or make it `--codec bpe`")
    if vocab_size is not None:
        raise UsageError("`--tokenizer` fixes the vocabulary", "leave out `--vocab-size`")
    return BPE.open(Path(file))


def _check(options: Options) -> None:
    """Raises UsageError for values that are unknown, out of range or contradict each other."""
    for value, known, what in (
        (options.codec if isinstance(options.codec, str) else "bytes", CODECS, "codec"),
        (options.normalize, NORMALIZE, "normalisation"),
        (options.split_rule, SPLIT_RULES, "split rule"),
        (options.levels or 256, LEVELS, "number of levels"),
    ):
        if value not in known:
            raise UsageError(f"there is no {what} {value!r}", f"known: {', '.join(map(str, known))}")
    if options.vocab_size is not None:
        if options.codec != "bpe":
            raise UsageError("`--vocab-size` is for the bpe codec", "add `--codec bpe`, or leave it out")
        check_vocab_size(options.vocab_size)
    if options.split_rule != "auto" and not options.lines:
        raise UsageError(f"the split rule {options.split_rule} is one of lines", "add `--lines`")
    if not 1 <= options.lead <= MAX_LEAD:
        raise UsageError(f"a lead of {options.lead} is not from 1 to {MAX_LEAD:,} boundaries before a document")
    check_fractions(options.val_fraction, options.test_fraction)


# Which sources -------------------------------------------------------------------------------------------------------


def _paths(items: Sequence[str]) -> list[str]:
    """The name of a public corpus stands for the file that was fetched; everything else is a path."""
    from dfcli.ingest.download import corpus_path, known_corpora

    known = known_corpora()
    paths = []
    for item in items:
        path = corpus_path(item) if item in known else None
        if item in known and path is None and not os.path.lexists(item):
            raise UsageError(f"the corpus {item} is not fetched yet", f"fetch it with `df data get {item}`")
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
            "fetch it with `df data get gpt2-bpe`, or name the folder of `encoder.json` and `vocab.bpe` with `--bpe`",
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


def _kind(sources: list[Source], options: Options, on_event: OnEvent) -> Kind:
    """Text or audio: as the codec says, else what was named, else what most of the bytes are."""
    given = {source.kind for source in sources if source.given}
    sizes = {kind: sum(source.size for source in sources if source.kind == kind) for kind in ("text", "audio")}
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
        kind = "audio" if sizes["audio"] > sizes["text"] else "text"
        if all(sizes.values()):
            reason = f"{sizes['audio']:,} bytes of audio files beside {sizes['text']:,} bytes of others"
            on_event(Choice("kind of data", kind, reason))
    wrong = {
        "--lines": options.lines and kind == "audio",
        "--sample-rate": options.sample_rate is not None and kind == "text",
        "--normalize": options.normalize != "none" and kind == "text",
        "--levels": options.levels is not None and kind == "text",
        "--label": options.label is not None and kind == "text",
    }
    for option, is_wrong in wrong.items():
        if is_wrong:
            raise UsageError(f"`{option}` makes no sense for {kind}", "leave it out")
    return kind


def _of_kind(group: list[Source], kind: Kind, skipped: list[Skipped]) -> list[Source]:
    """Files that were named are tried even if they do not look like it."""
    skipped += [Skipped(source.name, f"not {kind}") for source in group if source.kind != kind and not source.given]
    return [source for source in group if source.kind == kind or source.given]


def _key(paths: list[list[str]], groups: list[list[Source]], options: Options) -> str:
    """What identifies a dataset: its options and where its sources are (of standard input, what it held)."""
    places = [[path if path == STDIN else os.path.abspath(path) for path in group] for group in paths]
    piped = [source.sha256() for group in groups for source in group if source.path is None]
    return hashlib.sha256(json.dumps([FORMAT, places, piped, options.as_json()], sort_keys=True).encode()).hexdigest()


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
        "kind of document": options.lines and not dataset.lines,
        "number of levels": options.levels not in (None, codec.get("levels", 256)),
        "label": options.label is not None and options.label.rule != made.get("label"),
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
    sources = _recorded(dataset)
    if len(sources) == 1 and sources[0][1] != STDIN:
        return f"give its source instead of its name: {shown(sources[0][1])}"
    return "give its sources instead of its name"


def _reused(folder: Path, key: str, groups: list[list[Source]], on_event: OnEvent) -> Dataset | None:
    """The dataset in `folder` if it is what would be built now. Raises UsageError if it is another."""
    try:
        dataset = open_folder(folder)
    except CorruptError as error:
        on_event(Note(f"{error.message}: preparing it again"))
        return None
    if dataset.info.get("key") != key:
        dataset.close()
        raise UsageError(
            f"there is a dataset {folder.name} of other sources or options already",
            f"choose another name, or `df data remove {folder.name}` first",
        )
    if not _unchanged(dataset, groups):
        dataset.close()
        on_event(Note(f"the sources of {folder.name} have changed: preparing it again"))
        return None
    on_event(Note(f"using {folder.name}, prepared before from the same sources"))
    note_skipped(dataset.info["skipped"], on_event)
    return dataset


def _unchanged(dataset: Dataset, groups: list[list[Source]]) -> bool:
    """Whether the sources are those that the dataset was made from: by what the file system says of them,
    else by their contents. Times are not trusted when the file was read within their resolution."""
    before = _recorded(dataset)
    now = [(k, source) for k, group in enumerate(groups) for source in group]
    if [(k, identity) for k, identity, *_ in before] != [(k, source.identity) for k, source in now]:
        return False
    for (_, _, was, read_at, sha256), (_, source) in zip(before, now, strict=True):
        stamp = source.stamp()
        settled = stamp is not None and max(stamp.mtime_ns, stamp.ctime_ns) < read_at - SETTLED
        if settled and stamp is not None and was == list(stamp):
            continue
        try:
            if sha256 is None or source.sha256() != sha256:
                return False
        except DfError:
            return False
    return True


def _recorded(dataset: Dataset) -> list[Any]:
    """What each source of a dataset was when it was read: label, identity, stamp, time, SHA-256. Empty where that is
    lost or damaged."""
    try:
        with reading(dataset.path / SOURCES) as file:
            data = file.read()
    except DfError:
        return []
    if hashlib.sha256(data).hexdigest() != dataset.info["sources"]["sha256"]:
        return []
    return [json.loads(line) for line in data.splitlines()]


@contextmanager
def _locked(name: str, on_event: OnEvent) -> Iterator[None]:
    """Two preparations of one name: the second waits, and then finds what the first has made."""
    try:
        lock = preparation_lock(name, wait=0)
        lock.__enter__()
    except Busy as error:
        on_event(Note(f"{error.message}: waiting"))
        lock = preparation_lock(name)
        lock.__enter__()
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


class _GivenUp(Exception):
    pass


def _temporary(build: Build) -> Dataset:
    """A dataset in a folder that is being built and never finished: so it is removed when it is given up,
    or as debris if this process is killed."""
    folder = building(datasets_folder() / ".whole")
    path = folder.__enter__()

    def discard() -> None:
        folder.__exit__(_GivenUp, _GivenUp(), None)

    try:
        with os_errors("write", path):
            return Dataset(path, build.run(path, path.name, ""), discard=discard)
    except BaseException:
        discard()
        raise
