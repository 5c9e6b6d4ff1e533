"""Generated hostile input: text, documents, audio, labels, checkpoints, packed runs, datasets and options.

    python -m tests.reliability.fuzz 10000
    python -m tests.reliability.fuzz --only audio:1234     (one case again, in this process, with its traceback)

Every case must end well or in one of the program's own errors, a sentence: no other exception, no signal (decoders
and all else run in forked processes), at most `SECONDS`, at most `MEMORY` more than before, nothing half-made left
behind. Where a file of the program's own was changed without its checksum, loading may not give anything else than
what was written.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import random
import resource
import select
import shutil
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from dfcli.cli import app, output
from dfcli.codecs import TextCodec
from dfcli.data.batches import Batches
from dfcli.data.dataset import Dataset, datasets_folder, list_datasets
from dfcli.errors import DfError
from dfcli.generation.sample import sample_audio, sample_text
from dfcli.ingest.prepare import prepare
from dfcli.runs.pack import pack
from dfcli.runs.run import Run, list_runs
from dfcli.system import files
from tests.reliability import material
from tests.reliability.warm import Child

SECONDS = 30.0  # a case; on a busy machine as many of the processor's
MEMORY = 256 << 20  # bytes of resident memory that a case may add
ADDRESSES = 4 << 30  # bytes of address space that it may add
BATCH = 100  # cases of a process

Dice = random.Random

NUMBERS = ["-1", "0", "1", "-0", "0.5", "1e9", "1e400", "nan", "inf", "-inf", "2**64", "18446744073709551616", "9" * 50]
WORDS = ["", " ", "x", "../x", "/", ".", "..", "-", "--", "con", "a" * 300, "\x1b[2J", "a\nb", "é", "\u202e", "[bold]"]
WORDS += ["\ud800", "%s", "{0}", "~", "$HOME", "a/b", "a\\b", "*", "None", "True"]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 256, 257, 2**31, 2**32, 2**63, 2**64, 10**9, 10**30, -(10**30), 0.5, 1.0,
    1e308, -0.0, "", "x", "1", "\x1b[2J", "../../x", "a" * 10_000, [], [1], [0], [-1], [2**40] * 3, [[]], {}, {"a": 1},
    list(range(1000)), "gpt", "wavenet", "chars", "mulaw", "bytes", "gpt2", "text", "audio",
]  # fmt: skip


# Changes -------------------------------------------------------------------------------------------------------------


def changed(data: bytes, dice: Dice) -> bytes:
    """`data` with one to four changes such as disks, editors and attackers make."""
    data = bytearray(data)
    for _ in range(dice.choice([1, 1, 1, 2, 4])):
        size = len(data)
        early = dice.randrange(min(size, 128)) if size and dice.random() < 0.6 else dice.randrange(size + 1)
        match dice.randrange(10):
            case 0 | 1 if size:
                data[min(early, size - 1)] ^= 1 << dice.randrange(8)
            case 2 if size:
                data[min(early, size - 1)] = dice.choice([0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)])
            case 3 | 4:
                form = dice.choice(["<H", "<I", ">H", ">I", "<Q"])
                most = 1 << 8 * struct.calcsize(form)
                value = dice.choice([0, 1, most - 1, most // 2, most // 2 - 1, dice.randrange(most)])
                part = struct.pack(form, value)
                data[early : early + len(part)] = part
            case 5:
                del data[early:]
            case 6:
                del data[early : early + dice.randint(1, 64)]
            case 7:
                data[early:early] = dice.randbytes(dice.randint(1, 64))
            case 8:
                data[early:early] = data[: dice.randrange(size + 1)]
            case 9:
                data[early : early + 64] = bytes(len(data[early : early + 64]))
    return bytes(data)


def changed_json(value: Any, dice: Dice) -> Any:
    """A JSON value with something in it replaced, removed, renamed or added."""
    if isinstance(value, dict) and value and dice.random() < 0.85:
        key = dice.choice(list(value))
        if (kind := dice.random()) < 0.8:
            return value | {key: changed_json(value[key], dice)}
        rest = {other: item for other, item in value.items() if other != key}
        return rest if kind < 0.9 else rest | {dice.choice(WORDS[:-10]) or "k": value[key]}
    if isinstance(value, list) and value and dice.random() < 0.7:
        place = dice.randrange(len(value))
        return [*value[:place], changed_json(value[place], dice), *value[place + 1 :]]
    return dice.choice(VALUES)


def change_sealed(path: Path, dice: Dice) -> None:
    """Change one of the program's JSON files, and give it the right checksum again."""
    try:
        obj = changed_json(json.loads(path.read_bytes()), dice)
        path.write_bytes(files.json_bytes(obj))
    except (ValueError, AttributeError):  # no object any more
        path.write_bytes(json.dumps(str(obj)).encode())


# Cases: each returns None, or raises what is told. DfError is how they should fail. ----------------------------------


def text_case(folder: Path, dice: Dice) -> None:
    """Prepare hostile text; what is prepared from one file decodes to what is in it."""
    pieces = [
        b"the cat sat on the mat.\n", "Zoë 漢字 🎵 ".encode(), b"\xef\xbb\xbf", b"\0", b"\xff\xfe", b"\xc0\x80",
        b"\xed\xa0\x80",
        b"\r\n", b"\r", b"\n\n\n", "\u2028\u2029\x85\x0b\x0c".encode(), b"\x1b[2J", b"<|endoftext|>", b" " * 50, b"a",
        "e\u0301\u202e".encode(), b"\xf4\x90\x80\x80", b"\xf0\x9f\x8e",
    ]  # fmt: skip
    sound = [piece for piece in pieces if _decodes(piece) and b"\0" not in piece]

    def content() -> bytes:
        match dice.randrange(8):
            case 0 if dice.random() < 0.5:
                return dice.choice([b"", b"a", b"\n", b"\n" * 1000, b"a\n", "é".encode(), b"\xef\xbb\xbf"])
            case 1 if dice.random() < 0.5:
                return dice.randbytes(dice.randint(1, 3000))
            case 2:
                return dice.choice(pieces if dice.random() < 0.3 else sound) * dice.randint(1, 40_000)
            case 3:
                return changed(pieces[0] * 100, dice)
            case 4:
                return "".join(chr(dice.choice([dice.randrange(128), dice.randrange(0xD800), dice.randrange(0xE000, 0x110000)])) for _ in range(dice.randint(1, 500))).encode()  # fmt: skip # noqa: E501
            case 5:
                return b"".join(dice.choices(pieces, k=dice.randint(1, 200)))
            case _:
                return b"".join(dice.choices(sound, k=dice.randint(1, 500)))

    name = dice.choice(
        [
            "a.txt",
            "a",
            "b.md",
            "c.py",
            "a.wav",
            "é.txt",
            "a\nb.txt",
            "\x1b[2J.txt",
            "[bold].txt",
            ".a",
            "-a.txt",
            "a" * 200,
        ]
    )
    only = dice.random() < 0.6
    if only:
        source = folder / name
        data = content()
        source.write_bytes(data)
    else:
        source = folder / "d"
        for i in range(dice.randint(0, 5)):
            place = source / dice.choice(["", "e", ".hidden"])
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i}{name}").write_bytes(content())
        source.mkdir(exist_ok=True)
        if dice.random() < 0.2:
            (source / "loop").symlink_to(source)
        if dice.random() < 0.2:
            (source / "nowhere").symlink_to("itself")
        if dice.random() < 0.2:
            os.mkfifo(source / "fifo")
        if dice.random() < 0.1:
            source = source / dice.choice(["fifo", "loop", "nowhere", "missing"])
    plain = dice.random() < 0.6
    fractions = [0.1] if plain else [0.1, 0.1, 0.1, 0.0, 0.5, 0.9, 1.0, -0.1, float("nan"), float("inf"), 1e-9]
    options = {
        "codec": dice.choice(
            [None, None, "chars", "bytes"] if plain else [None, "chars", "bytes", "mulaw", "gpt2", "x"]
        ),
        "lines": dice.random() < 0.3,
        "val_fraction": dice.choice(fractions),
        "test_fraction": dice.choice([0.0, 0.0, *fractions]),
        "name": None if plain else dice.choice([None, "n", "m", *WORDS]),
        "split_rule": "auto" if plain else dice.choice(["auto", "auto", "makemore", "makemore-transformer", "x"]),
    }
    with prepare([str(source)], **options) as dataset:
        for split in dataset.splits.values():
            Batches(split, batch_size=2, window=8, seed=0, boundary=dataset.boundary, lines=dataset.lines).at(3)
        if only and not options["lines"]:
            assert isinstance(dataset.codec, TextCodec)
            ids = [dataset.splits[key].read(0, dataset.splits[key].tokens_count) for key in ("train", "val", "test") if key in dataset.splits]  # fmt: skip # noqa: E501
            made, text = dataset.codec.decode(np.concatenate(ids)), data.decode("utf-8-sig")
            text = text.replace("\r\n", "\n").replace("\r", "\n")  # every line ends as in LF files
            short = len(text) < 30 and text.startswith(made)  # a part of one character has nothing to predict: left out
            assert made == text or short, "text was changed"


def _decodes(data: bytes) -> bool:
    try:
        return bool(data.decode())
    except UnicodeDecodeError:
        return False


def document_case(folder: Path, dice: Dice) -> None:
    """Prepare hostile records and separators; what is prepared of one sound file is what stands in it."""
    texts: list[Any] = ["one two", "é\u202e漢", 'a "quoted", one', "line\nline", "<|endoftext|>", " " * 300, "", None]
    odd = [5, ["x"], "\0", {"a": 1}]
    rows: list[Any] = [{"id": str(k), "text": dice.choice(texts)} for k in range(dice.randint(2, 60))]
    if dice.random() < 0.2:
        rows[-1]["text"] = dice.choice(odd)
    if dice.random() < 0.2:
        rows[0][dice.choice(WORDS[:-10])] = rows[0].pop("text")
    if dice.random() < 0.1:
        rows.insert(0, dice.choice(VALUES))
    name = dice.choice(["a.jsonl", "a.csv", "a.tsv", "a.json", "a.jsonl.gz", "a.parquet", "a.txt"])
    if name in ("a.csv", "a.tsv"):
        comma = "\t" if name == "a.tsv" else dice.choice([",", ";"])
        lines = (comma.join(map(str, row.values())) if isinstance(row, dict) else "" for row in rows)
        data = "\n".join([f"id{comma}text", *lines]).encode("utf-8", "replace")
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    data = gzip.compress(data) if name.endswith(".gz") else data
    if damaged := dice.random() < 0.3:
        data = changed(data, dice)
    (folder / name).write_bytes(data)
    separator = dice.choice(["\n", "e", " ", "te"] if dice.random() < 0.7 else ["<|endoftext|>", "ee", "\n\n", *WORDS])
    by_field = dice.random() < 0.6
    options = {"field": dice.choice(["text"] * 6 + ["id", *WORDS[:4]])} if by_field else {"separator": separator}
    if dice.random() < 0.1:
        options = {"field": "text", "separator": separator}
    with prepare([str(folder / name)], codec=dice.choice(["chars", "bytes"]), **options) as dataset:
        codec = dataset.codec
        assert isinstance(codec, TextCodec)
        skip = dataset.boundary is not None
        made = [codec.decode(split.document(k)[skip:]) for split in dataset.splits.values() for k in range(split.documents)]  # fmt: skip # noqa: E501
        if not (damaged or by_field) and len(options) == 1 and name != "a.jsonl.gz":
            parts = data.decode().split(separator)
            assert sorted(made) == sorted(part for part in parts if len(part) > 1), "documents were changed"


def label_case(folder: Path, dice: Dice) -> None:
    """Prepare recordings with hostile names and patterns; each gets a label of its own path."""
    patterns = ["folder", r"(?P<d>\d)\.", r"(?P<who>[a-z]*)_(?P<d>\d)", r"(?P<a>.*)", r"(?P<a>[^_]*)_"]
    if dice.random() < 0.3:
        patterns = ["(", "(?P<a>", "(?P<a>)", "(a+)+$", "(?P<a>x)|(?P<b>y)", *WORDS]
    tone = 0.5 * np.sin(np.arange(300) * 0.1)
    for k in range(dice.randint(1, 12)):
        place = folder / dice.choice(["low", "high", "é", "a\nb", "[bold]", "\x1b[2J", "a" * 100])
        place = folder if dice.random() < 0.02 else place
        place.mkdir(exist_ok=True)
        name = dice.choice(["ann", "bob", "", "é", "\u202e"])
        soundfile.write(place / f"{name}_{k % 10}.wav", tone * (1 - k / 20), 8000)
    with prepare([str(folder)], label=dice.choice(patterns), val_fraction=dice.choice([0.0, 0.1, 0.5])) as dataset:
        assert dataset.labels
        for split in dataset.splits.values():
            assert split.labels.shape == (split.documents, len(dataset.labels))
            for row in split.labels:
                assert all(0 <= row[i] < len(names) for i, names in enumerate(dataset.labels.values()))


def packed_case(folder: Path, dice: Dice) -> None:
    """Open packed runs that were changed; nothing is written outside, and a sound one samples as before."""
    name = dice.choice(["talk", "tune", "call"])
    packed = pack(Run.open(name), folder / "model.df.zip")
    if dice.random() < 0.5:
        packed.write_bytes(changed(packed.read_bytes(), dice))
    else:  # a sound zip with other members
        with zipfile.ZipFile(packed) as archive:
            members = {member: archive.read(member) for member in archive.namelist()}
        chosen = dice.choice(list(members))
        match dice.randrange(4):
            case 0:
                members[dice.choice(["../x", "/tmp/x", "a/b/c", *WORDS[:-10]]) or "x"] = b"x"
            case 1:
                members[chosen] = changed(members[chosen], dice)
            case 2:
                del members[chosen]
            case _:
                members[chosen] = b"\0" * 10_000_000
        with zipfile.ZipFile(packed, "w", dice.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
            for member, data in members.items():
                archive.writestr(member, data)
    before = {path.name for path in folder.iterdir()} | {path.name for path in folder.parent.iterdir()}
    try:
        run = Run.open(packed)
        if run.makes == "text":
            sample_text(run, tokens=3, seed=1, engine="plain", device="cpu")
        else:
            sample_audio(run, 0.001, folder / "o.wav", seed=1, engine="plain", device="cpu")
    finally:
        after = {path.name for path in folder.iterdir()} | {path.name for path in folder.parent.iterdir()}
        assert after - before <= {"o.wav"}, "something was written outside"
        for path in (files.data_home() / "runs").glob(".tmp-.packed*"):
            shutil.rmtree(path)


RECORDINGS: list[bytes] = []


def recordings() -> list[bytes]:
    """A short tone in every encoding that libsndfile writes, also those that are refused."""
    if not RECORDINGS:
        tone = 0.5 * np.sin(np.arange(900) * 0.1)
        for container in ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3", "AIFF", "AU"):
            for subtype in soundfile.available_subtypes(container):
                for channels in (1, 2, 8) if container in ("WAV", "FLAC", "OGG", "MP3") else (1,):
                    file = io.BytesIO()
                    try:
                        sound = np.repeat(tone[:, None], channels, axis=1)
                        soundfile.write(file, sound, 8000, subtype, format=container)
                    except (soundfile.LibsndfileError, ValueError, TypeError):
                        continue
                    RECORDINGS.append(file.getvalue())
    return RECORDINGS


def audio_case(folder: Path, dice: Dice) -> None:
    """Prepare damaged and lying recordings."""
    source = folder / dice.choice(["a.wav", "a.flac", "a.ogg", "a.mp3", "a.txt", "a", "\x1b\n.wav"])
    for i in range(dice.choice([1, 1, 1, 2, 3])):
        data = dice.choice(recordings())
        if dice.random() < 0.1:
            data = data[: dice.randrange(64)] + dice.choice(recordings())
        if dice.random() < 0.9:
            data = changed(data, dice)
        source.with_name(f"{i}{source.name}").write_bytes(data)
    named = [str(path) for path in sorted(folder.iterdir())]
    plain = dice.random() < 0.7
    options = {
        "codec": "mulaw" if plain else dice.choice([None, "mulaw", "chars"]),
        "sample_rate": dice.choice(
            [None, 8000, 100, 11025, 48000, 384_000, *([] if plain else [0, -1, 1, 10**9, 2**40])]
        ),
        "normalize": dice.choice(["none", "none", "peak", "minmax", *([] if plain else ["x"])]),
        "val_fraction": dice.choice([0.1, 0.1, 0.5, 0.0]),
    }
    with prepare(named if dice.random() < 0.7 else [str(folder)], **options) as dataset:
        for split in dataset.splits.values():
            assert split.tokens_count > 0
            Batches(split, batch_size=2, window=8, seed=0, boundary=dataset.boundary, lead=dataset.lead).at(3)


def checkpoint_case(folder: Path, dice: Dice) -> None:
    """Load a run some of whose files were changed, with its checksums right or wrong."""
    name = dice.choice(["talk", "tune", "call"])
    shutil.copytree(files.data_home() / "runs" / name, folder / "run")
    run_folder = folder / "run"
    sealed = dice.random() < 0.6
    step = max(run_folder.glob("step-*"))
    paths = [path for path in run_folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    for _ in range(dice.choice([1, 1, 2])):
        if not sealed:
            path = dice.choice(paths)
            path.write_bytes(dice.choice([b"", b"\x80\x04N.", b"PK\3\4"]) if dice.random() < 0.1 else changed(path.read_bytes(), dice))  # fmt: skip # noqa: E501
        elif dice.random() < 0.75:
            change_sealed(
                dice.choice([run_folder / "run.json"] * 4 + [step / "state.json", run_folder / "result.json"]), dice
            )
        else:
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # no state or header any more
                change_tensors(step, dice)

    def use() -> tuple[Any, ...]:
        run = Run.open(folder / "run")
        saved = run.load("last", optimizer=True)
        core, _ = run.build("last")
        if run.codec.kind == "text":
            kind = {"tokens": 3, "seed": 1, "engine": "plain", "device": "cpu"}
            made: Any = sample_text(run, **kind).samples
        else:
            sample_audio(run, 0.001, folder / "o.wav", seed=1, engine="plain", device="cpu")
            made = (folder / "o.wav").read_bytes()
        del core
        return saved, made

    if dice.random() < 0.15:
        shutil.copytree(run_folder, files.data_home() / "runs" / "fuzzed")
        commands = (["list"], ["show", "fuzzed"])
        for words in (*(["runs", *words] for words in commands), ["train", "gpt", "--name", "fuzzed", "--resume"]):
            code, said = command(words)
            assert code in (0, 1, 2), f"{words}: {code}\n{said}"
            assert "error: an unexpected" not in said, said
            assert words[1] != "list" or code == 0, said
    with contextlib.suppress(DfError):
        rows = Run.open(run_folder).metrics()
        whole = Run.open(name).metrics()
        assert sealed or rows == whole[: len(rows)], "a damaged history was read otherwise"
    saved, made = use()
    if not sealed:
        for path in paths:
            shutil.copy(files.data_home() / "runs" / name / path.relative_to(run_folder), path)
        right, expected = use()
        assert made == expected, "a damaged run sampled otherwise"
        for part in ("model", "optimizer"):
            a, b = getattr(saved, part), getattr(right, part)
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a), "damaged weights were loaded"


def change_tensors(step: Path, dice: Dice) -> None:
    """Change a file of tensors and put its new hash into state.json."""
    import hashlib

    name = dice.choice(["model.safetensors", "optimizer.safetensors"])
    data = (step / name).read_bytes()
    if dice.random() < 0.7:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        text = json.dumps(changed_json(header, dice)).encode()
        if dice.random() < 0.2:
            text = changed(text, dice)
        length = dice.choice([0, 2**63, 2**32, len(data)]) if dice.random() < 0.1 else len(text)
        data = length.to_bytes(8, "little") + text + data[8 + int.from_bytes(data[:8], "little") :]
    else:
        data = changed(data, dice)
    (step / name).write_bytes(data)
    state = json.loads((step / "state.json").read_bytes())
    state["files"][name]["sha256"] = hashlib.sha256(data).hexdigest()
    (step / "state.json").write_bytes(files.json_bytes(state))


def dataset_case(folder: Path, dice: Dice) -> None:
    """Read a prepared dataset some of whose files were changed, with its checksums right or wrong."""
    home = datasets_folder()
    source = dice.choice(sorted(path for path in home.iterdir() if (path / "dataset.json").is_file()))
    copy = home / "fuzzed" if dice.random() < 0.5 else folder / "data"
    shutil.copytree(source, copy)
    sealed = dice.random() < 0.5
    if sealed:
        change_sealed(copy / "dataset.json", dice)
    else:
        path = dice.choice(sorted(path for path in copy.rglob("*") if path.is_file()))
        path.write_bytes(changed(path.read_bytes(), dice))

    if dice.random() < 0.2:
        for words in (["list"], ["show", str(copy)]):
            code, said = command(["data", *words])
            assert code in (0, 1, 2), f"{words}: {code}\n{said}"
            assert "error: an unexpected" not in said, said

    def use(place: Path) -> list[Any]:
        with Dataset.open(place) as dataset:
            found: list[Any] = [dataset.codec.to_json(), dataset.boundary, dataset.lead]
            for key, split in sorted(dataset.splits.items()):
                ids = split.read(0, split.tokens_count)
                found += [key, ids.tobytes(), split.offsets.tolist()]
                shape: dict[str, Any] = {"boundary": dataset.boundary, "lines": dataset.lines, "lead": dataset.lead}
                found.append(Batches(split, batch_size=2, window=8, seed=0, **shape).at(1).ids.tolist())
                if isinstance(dataset.codec, TextCodec):
                    dataset.codec.decode(ids)
            return found

    found = use(copy)
    assert sealed or found == use(source), "a damaged dataset was read otherwise"


def option_case(folder: Path, dice: Dice) -> None:
    """Whole commands with hostile options."""
    anything = lambda: dice.choice([*NUMBERS, *WORDS])  # noqa: E731
    # Large numbers that are right but take long are no case here.
    short = lambda right: dice.choice([right, right, *(n for n in NUMBERS if not n.isdigit() or len(n) < 3), *WORDS])  # noqa: E731
    sampling = [
        ("--temperature", lambda: dice.choice(["0", "1e-9", "1e9", "0.5", anything()])),
        ("--top-k", anything), ("--top-p", anything), ("--min-p", anything), ("--seed", anything),
        ("--checkpoint", lambda: dice.choice(["best", "last", "12", anything()])),
        ("--device", lambda: dice.choice(["cpu", "cuda", "cuda:9", "mps", anything()])),
    ]  # fmt: skip
    settings = [
        "layers",
        "heads",
        "channels",
        "context",
        "dropout",
        "lr",
        "steps",
        "minutes",
        "betas",
        "dilations",
        "window",
    ]
    settings += [
        "optimizer",
        "schedule",
        "batch_size",
        "clip",
        "compile",
        "kernel",
        "residual",
        "position",
        "bias",
        "vocab_size",
    ]
    text = str(files.data_home().parent / "talk.txt")
    match dice.randrange(8):
        case 0 | 1:
            words = ["sample", "gpt", "--run", dice.choice(["talk"] * 9 + [anything()]), "--tokens", short("3")]
            table = [
                *sampling,
                ("--num", lambda: dice.choice(["2", anything()])),
                ("--stop", anything),
                ("--prompt", anything),
            ]
            words += ["--engine", "plain"]
        case 2:
            where = dice.choice([str(folder / "o.wav")] * 6 + [str(folder / "no" / "o.wav"), str(folder), "/dev/full", "o.txt", anything()])  # fmt: skip # noqa: E501
            words = [
                "sample",
                "wavenet",
                "--run",
                "tune",
                "--seconds",
                dice.choice(["0.001"] * 3 + [anything()]),
                "-o",
                where,
            ]
            table = [*sampling, ("--num", anything), ("--prime", lambda: dice.choice([text, anything()]))]
            words += ["--engine", "plain"]
        case 3:
            words = ["eval", "--run", dice.choice(["talk", "tune", "call"])]
            table = [("--split", anything), ("--stride", anything), *sampling[-2:], ("--data", lambda: dice.choice([text, anything()]))]  # fmt: skip # noqa: E501
        case 4:
            words = ["data", "prepare", dice.choice([text, text, anything()])]
            table = [
                ("--name", anything), ("--codec", anything), ("--bpe", anything), ("--sample-rate", anything),
                ("--val-fraction", anything), ("--test-fraction", anything), ("--val", anything), ("--test", anything),
                ("--lines", None), ("--normalize", anything),
            ]  # fmt: skip
        case 5:
            words = [*dice.choice([["data", "show"], ["data", "remove"], ["runs", "show"], ["runs", "path"], ["runs", "remove"], [anything()], ["data", anything()]]), anything()]  # fmt: skip # noqa: E501
            table = [("--json", None), ("-x", None), (anything(), None)]
        case _:
            words = ["train", dice.choice(["gpt", "wavenet"]), "--data", dice.choice([text, text, anything()])]
            real = dice.random() < 0.2
            words += ["--steps", "1", "--set", "layers=1", "--set", "channels=8", "--quiet"] if real else ["--show"]
            numbers = [("--batch-size", lambda: "2" if real else anything()), ("--seed", anything), ("--lr", anything)]
            names = [
                ("--preset", anything),
                ("--name", anything),
                ("--init", lambda: dice.choice(["talk", anything()])),
            ]
            table = [*numbers, *names, ("--set", lambda: f"{dice.choice(settings)}={anything()}")]
            table += [] if real else [("--steps", anything), ("--minutes", anything), sampling[-1]]
    for option, value in dice.sample(table, k=min(len(table), dice.choice([0, 1, 1, 2, 3]))):
        words += [option] if value is None else [option, value()]
    words = [word.replace("\0", "") for word in words]
    before = snapshot()
    os.chdir(folder)
    code, said = command(words)
    where = f"df {words}: {code}\n{said[-2000:]}"
    assert code in (0, 1, 2), where
    assert "Traceback" not in said, where
    assert "error: an unexpected" not in said, where
    assert code == 0 or "error" in said, where
    assert output.printable(said) == said or words[:2] == ["sample", "gpt"], where
    after = snapshot()
    for what, there in before.items():
        assert there <= after[what], f"{there - after[what]} is gone after {where}"
    assert code == 0 or before == after or words[0] == "train", where
    if code:
        raise DfError("refused")


def command(words: list[str]) -> tuple[int, str]:
    """The exit code of a command in this child, and what it printed."""
    os.ftruncate(1, 0)
    os.lseek(1, 0, os.SEEK_SET)
    try:
        code = app.run(words)
    except SystemExit as ended:  # as `main` would let it through
        code = int(ended.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    return code, os.pread(1, 1 << 20, 0).decode("utf-8", "replace")


def snapshot() -> dict[str, set[str]]:
    home = files.data_home()
    folders = (home.parent, home, home / "runs", home / "datasets")
    return {str(folder): {name for name in os.listdir(folder) if not name.startswith(".lock")} for folder in folders}


CASES: dict[str, tuple[Callable[[Path, Dice], None], float]] = {
    "text": (text_case, 0.2),
    "document": (document_case, 0.1),
    "audio": (audio_case, 0.25),
    "label": (label_case, 0.05),
    "checkpoint": (checkpoint_case, 0.2),
    "packed": (packed_case, 0.05),
    "dataset": (dataset_case, 0.1),
    "option": (option_case, 0.05),
}


# Running them --------------------------------------------------------------------------------------------------------


def make(folder: Path) -> None:
    """The runs talk, tune and call, and their datasets, in folder/home."""
    material.data(folder)
    shutil.copy(folder / "text.txt", folder / "talk.txt")
    lines = material.trainings(folder, 12)
    for name, training in (("talk", "gpt, muon"), ("tune", "wavenet, adamw"), ("call", "character wavenet")):
        child = Child(lambda words=[*lines[training], "--name", name]: app.run(words), folder / "log", folder / "home")
        assert child.wait() == 0, child.said()


def one(family: str, number: int, seed: int) -> str:
    """Run one case in this process; "done" or "refused"."""
    case, _ = CASES[family]
    here = Path(tempfile.mkdtemp(prefix="case"))
    told = "done"
    try:
        case(here, Dice(f"{seed}:{family}:{number}"))
    except DfError as error:
        told = "refused" if error.message.strip() else "an error without a sentence"
    finally:
        shutil.rmtree(here, ignore_errors=True)
        for path in datasets_folder().glob(".tmp-*"):
            raise AssertionError(f"{path} was left behind")
    return told


def work(family: str, numbers: range, seed: int, pipe: int) -> int:
    """Run cases in a child, and tell of each by a line. Ends early where memory has grown."""
    os.fsync = lambda descriptor: None  # what is durable is not asked here
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, used + ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    kept = {dataset.name for dataset in list_datasets()} | {run.name for run in list_runs()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in numbers:
        try:
            told = one(family, number, seed)
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10
        if grown > MEMORY:
            told = f"memory grew by {grown >> 20} MiB, then {told}"
        line = json.dumps([number, told[:3000], grown]) + "\n"
        while line:
            line = line[os.write(pipe, line[:4000].encode()) :]
        for folder in (datasets_folder(), datasets_folder().with_name("runs")):
            for path in folder.iterdir():
                if path.name not in kept and not path.name.startswith("."):
                    shutil.rmtree(path, ignore_errors=True)
        if grown > MEMORY // 2:  # the next cases would have less room
            return 0
    return 0


def fuzz(folder: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Run `count` cases of all kinds; the figures, with every defect found."""
    make(folder)
    recordings()
    outcomes: dict[str, Counter[str]] = {family: Counter() for family in CASES}
    defects: list[dict[str, Any]] = []
    most, slowest = 0, 0.0
    temporary = folder / "cases"
    temporary.mkdir()
    tempfile.tempdir = str(temporary)
    for family, (_, share) in CASES.items():
        total, number = max(1, round(count * share)), 0
        while number < total:
            reader, writer = os.pipe()
            numbers = range(number, min(total, number + BATCH))
            child = Child(lambda numbers=numbers, writer=writer, family=family: work(family, numbers, seed, writer),
                          folder / "said", folder / "home")  # fmt: skip
            os.close(writer)
            began, used, pending = time.monotonic(), 0.0, b""
            while True:
                while not (ready := select.select([reader], [], [], 1.0)[0]) and not child.hangs(SECONDS, began, used):
                    pass
                data = os.read(reader, 1 << 16) if ready else b""
                pending += data
                *whole, pending = pending.split(b"\n")
                for line in whole:
                    number, told, grown = json.loads(line)
                    number += 1
                    most, slowest = max(most, grown), max(slowest, time.monotonic() - began)
                    began, used = time.monotonic(), child.seconds()
                    outcomes[family][told if told in ("done", "refused") else "defect"] += 1
                    if told not in ("done", "refused"):
                        defects.append({"case": f"{family}:{number - 1}", "what": told})
                if not ready:
                    child.kill()
                if not data:
                    break
            os.close(reader)
            status = child.wait(3600)  # it was watched by its cases
            if status:  # the case that it was at
                what = "it hung" if not ready else f"the process ended with status {status}\n{child.said()[-1500:]}"
                outcomes[family]["defect"] += 1
                defects.append({"case": f"{family}:{number}", "what": what})
                number += 1
            print(f"\r{family} {number}, {len(defects)} defects ", end="", file=sys.stderr, flush=True)
    tempfile.tempdir = None
    print(file=sys.stderr)
    return {
        "cases": sum(counts.total() for counts in outcomes.values()),
        "outcomes": {family: dict(counts) for family, counts in outcomes.items()},
        "largest_growth_of_memory_in_a_process_mib": most >> 20,
        "bound_of_memory_mib": MEMORY >> 20,
        "slowest_case_seconds": round(slowest, 2),
        "bound_of_seconds": SECONDS,
        "defects": defects,
    }


def again(case: str, seed: int) -> None:
    """Run one case with its traceback."""
    family, _, number = case.partition(":")
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        os.environ["DFCLI_HOME"] = str(Path(folder) / "home")

        def run() -> int:
            here = Path(tempfile.mkdtemp(dir=folder))
            CASES[family][0](here, Dice(f"{seed}:{family}:{number}"))
            return 0

        child = Child(run, Path(folder) / "said")
        print(child.wait(), child.said())


if __name__ == "__main__":
    from tests.reliability.warm import main

    if len(sys.argv) > 2 and sys.argv[1] == "--only":
        again(sys.argv[2], int((sys.argv[3:] or [0])[0]))
    else:
        main(fuzz, 10_000, __doc__ or "")
