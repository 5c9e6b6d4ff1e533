"""The line that was probably meant, where a command got words that it has no place for.

A word is judged by what it is: the name of a run, of a dataset or of a preset, a file, a sound file, a number, or else
text. Imports neither torch nor numpy.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dfcli.errors import DfError

SOUND = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".m4a")
# The option that takes each kind of word, by command. A command that is not here takes no such words.
OPTIONS = {
    "train": {
        "sound": "--data", "file": "--data", "dataset": "--data", "preset": "--preset", "run": "--init",
        "number": "--minutes", "text": "--data",
    },
    "sample gpt": {
        "run": "--run", "file": "--prompt-file", "number": "--tokens", "dataset": "--prompt", "preset": "--prompt",
        "text": "--prompt",
    },
    "sample wavenet": {"run": "--run", "sound": "-o", "number": "--seconds", "text": "--run"},
    "eval": {
        "run": "--run", "dataset": "--data", "sound": "--data", "file": "--data", "split": "--split", "text": "--run",
    },
}  # fmt: skip
UNITS = {
    "ms": 1e-3,
    "s": 1.0,
    "sec": 1.0,
    "second": 1.0,
    "m": 60.0,
    "min": 60.0,
    "minute": 60.0,
    "h": 3600.0,
    "hour": 3600.0,
}
PREFIXES = {"k": 1e3, "khz": 1e3, "hz": 1.0, "m": 1e6, "": 1.0}
SYNONYMS = {"delete": "remove", "del": "remove", "rm": "remove", "ls": "list", "info": "show", "cat": "show"}
SHOWN = 4  # files that are named one by one; more are named by their folder


def kind_of(word: str) -> str:
    """What `word` is: run, dataset, preset, sound, file, split, number or text."""
    if _is_run(word):
        return "run"
    if _is_dataset(word):
        return "dataset"
    if os.path.lexists(word):
        return "sound" if _is_sound(word) else "file"
    if word.lower().endswith(SOUND):
        return "sound"
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", word):
        return "number"
    if word in ("val", "test", "train"):
        return "split"
    return "preset" if _preset_kind(word) else "text"


def line(program: str, command: str, words: Sequence[str], extra: Sequence[str], given: dict[str, Any]) -> str:
    """`program command words` with the words `extra`, for which it has no place, given by options; "" where there is
    no guess. `given` are the options that were understood."""
    options = OPTIONS.get(command)
    if options is None:
        return ""
    kept = list(words)
    at = kept.index("--label") + 1 if "--label" in kept else len(kept)
    if len(extra) == 1 and kept[at + 1 : at + 2] == list(extra) and "=" not in kept[at]:  # a space instead of a "="
        return shlex.join([program, *command.split(), *kept[:at], f"{kept[at]}={extra[0]}", *kept[at + 2 :]])
    for word in reversed(extra):
        kept.pop(len(kept) - 1 - kept[::-1].index(word))
    kinds = [kind_of(word) for word in extra]
    if command == "train" and all(kind in ("sound", "file", "text") for kind in kinds):
        kept = _with_data(kept, [*(given.get("data") or ()), *extra])
        return shlex.join([program, command, *kept])
    if command == "sample gpt" and set(kinds) == {"text"}:
        if given.get("prompt") is not None:  # a prompt of several words that was not quoted
            return shlex.join([program, *command.split(), *_replaced(kept, "--prompt", [given["prompt"], *extra])])
        return shlex.join([program, *command.split(), *kept, "--prompt", " ".join(extra)])
    for word, kind in zip(extra, kinds, strict=True):
        option = options.get(kind, options["text"])
        if kind == "sound" and command == "sample wavenet" and given.get("out") is not None:
            option = "--prime"
        kept += [option, word]
    if command == "sample wavenet":
        kept += [] if given.get("seconds") is not None or "--seconds" in kept else ["--seconds", "4"]
        kept += [] if given.get("out") is not None or "-o" in kept else ["-o", "out.wav"]
    return shlex.join([program, *command.split(), *kept])


def command_line(program: str, group: str, words: Sequence[str]) -> str:
    """The line that was probably meant by `program group words`, whose first word is no command of the group."""
    word, rest = words[0], list(words[1:])
    if group in ("runs", "data") and (same := SYNONYMS.get(word.lower())):
        return shlex.join([program, group, same, *rest])
    kind = kind_of(word)
    if group == "sample":
        command = "wavenet" if kind == "sound" or (kind == "run" and _makes_sound(word)) else "gpt"
        return line(program, f"sample {command}", [*rest, word], [word], {})
    if group == "train" and word.lower() == "charwavenet":  # a core; its preset is the only way to it
        return shlex.join(
            [program, "train", "wavenet", *([] if "--preset" in rest else ["--preset", "makemore"]), *rest]
        )
    if group == "train":  # its KIND is what stands there
        if kind == "text" and (close := get_close_matches(word.lower(), ["gpt", "wavenet"], 1)):
            return shlex.join([program, "train", *close, *rest])
        model = _preset_kind(word) or ("wavenet" if kind == "sound" or _holds_sound(word) else "gpt")
        return line(program, "train", [model, *rest, word], [word], {})
    if group == "runs" and word.lower() in ("compare", "diff", "eval") and rest and all(map(_is_run, rest)):
        return shlex.join([program, "eval", *(part for run in rest for part in ("--run", run))])
    if group == "runs":
        return shlex.join([program, group, "show", word]) if kind == "run" else ""
    if group == "data":
        action = {"dataset": "show", "file": "prepare", "sound": "prepare"}.get(kind)
        action = "get" if word in ("shakespeare", "names", "gpt2-bpe") else action
        return shlex.join([program, group, action, word]) if action else ""
    if group == "" and kind == "run":
        return command_line(program, "sample", words)
    if group == "" and os.path.isfile(word):
        return command_line(program, "train", words)
    return ""


def number(option: str, text: str, whole: bool) -> str:
    """The number that was probably meant by `text` as the value of `option`; "" where there is no guess."""
    text = text.strip().lower()
    if option == "--seconds" and (clock := re.fullmatch(r"(?:([0-9]+):)?([0-9]+):([0-5][0-9])", text)):
        return str(int(clock[1] or 0) * 3600 + int(clock[2]) * 60 + int(clock[3]))
    if re.match(r"[0-9]+,(?![0-9]{3}(?![0-9]))", text):
        text = text.replace(",", ".", 1)  # a decimal comma
    match = re.fullmatch(r"([0-9][0-9,_]*(?:\.[0-9]+)?(?:e[0-9]+)?) *([a-z]*)", text)
    if match is None:
        return ""
    value, unit = float(match[1].replace(",", "").replace("_", "")), match[2]
    seconds = {"--minutes": 60.0, "--seconds": 1.0}.get(option)
    if seconds and unit:
        scale = UNITS.get(unit, UNITS.get(unit.removesuffix("s")))
        factor = None if scale is None else scale / seconds
    else:
        factor = PREFIXES.get(unit)
    if factor is None or (whole and value * factor % 1):
        return ""
    return f"{round(value * factor)}" if value * factor % 1 == 0 else f"{value * factor:g}"


def _with_data(words: list[str], files: list[str]) -> list[str]:
    """`words` with `--data` for each of `files`; for many of one folder, for the folder."""
    parents = {os.path.dirname(file) for file in files}
    if len(files) > SHOWN and len(parents) == 1 and "" not in parents:
        return [*_without(words, "--data"), "--data", f"{parents.pop()}/"]
    return [*_without(words, "--data"), *(word for file in files for word in ("--data", file))]


def _replaced(words: list[str], option: str, parts: list[str]) -> list[str]:
    return [*_without(words, option), option, " ".join(parts)]


def _without(words: list[str], option: str) -> list[str]:
    """`words` without an option that takes a value, wherever it stands."""
    kept: list[str] = []
    skip = False
    for word in words:
        if not skip and word != option and not word.startswith(f"{option}="):
            kept.append(word)
        skip = word == option and not skip
    return kept


def _is_run(word: str) -> bool:
    from dfcli.runs import Run

    try:
        Run.open(word)
    except (DfError, OSError, ValueError):
        return False
    return True


def _makes_sound(run: str) -> bool:
    from dfcli.runs import Run

    return Run.open(run).makes == "audio"


def _is_dataset(word: str) -> bool:
    from dfcli.ingest.download import corpus_path, known_corpora

    home = Path(os.path.abspath(word)) if os.sep in word else _datasets() / word
    return (home / "dataset.json").is_file() or (word in known_corpora() and corpus_path(word) is not None)


def _datasets() -> Path:
    from dfcli.system.files import data_home

    return data_home() / "datasets"


def _preset_kind(word: str) -> str:
    """The kind of model that `word` is a preset of, or ""."""
    from dfcli.training.presets import PRESETS

    return next((kind for kind, presets in PRESETS.items() if word in presets), "")


def _is_sound(word: str) -> bool:
    return word.lower().endswith(SOUND) or _holds_sound(word)


def _holds_sound(word: str) -> bool:
    """Whether a folder holds sound files at its top."""
    try:
        return any(name.lower().endswith(SOUND) for name in os.listdir(word))
    except OSError:
        return False
