"""Multiple-choice items scored by likelihood: which ending of a text does the model find most likely?

An item is a line of a JSONL file in HellaSwag's published format (Zellers et al. 2019, arXiv 1905.07830): `ctx`, the
list `endings`, and `label`, the number of the right one from 0. Each ending follows the context after a blank. It is
scored by the sum of its tokens' log-likelihoods, and by that sum divided by the number of its tokens, which does not
favour short endings (both as in karpathy/build-nanogpt, hellaswag.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from dfcli import cores
from dfcli.codecs import TextCodec
from dfcli.data.batches import IGNORED
from dfcli.errors import DfError, UsageError
from dfcli.runs.run import Run
from dfcli.system.device import Device, resolve
from dfcli.system.events import OnEvent, Progress, ignore
from dfcli.system.files import os_errors

MAX_LINE = 1 << 20  # characters of an item
MOST_ENDINGS = 100


class Item(NamedTuple):
    """One question: which of `endings` goes on with `context`? `label` counts from 0."""

    context: str
    endings: list[str]
    label: int


@dataclass(frozen=True)
class Choices:
    """What a model chose. The shares are of items answered rightly, from 0 to 1."""

    run: str
    checkpoint: int  # its step
    file: str
    items: int
    accuracy_by_sum: float  # the ending whose tokens' log-likelihoods have the largest sum
    accuracy_by_mean: float  # the largest mean
    chance: float  # of a guess
    seconds: float


def score_choices(
    run: Run, file: Path, *, checkpoint: str | int = "best", device: str = "auto", on_event: OnEvent = ignore
) -> Choices:
    """Let the model of `run` choose an ending for each item of `file`.

    Raises DfError naming the line that is no item, or whose text the codec lacks; UsageError for a run of audio; errors
    of a checkpoint as of `Run.build`.
    """
    where, codec = resolve(device), run.codec
    if not isinstance(codec, TextCodec):
        raise UsageError(f"run {run.name} makes sound: it cannot choose between texts")
    core, saved = run.build(checkpoint, where.torch_device)
    data = run.dataset
    lead = [] if data["boundary"] is None else [data["boundary"]] * data["lead"]
    began = time.perf_counter()
    items = by_sum = by_mean = 0
    chance = 0.0
    with torch.inference_mode(), where.autocast():
        for number, item in _items(file):
            try:
                sums, lengths = _likelihoods(core, codec, lead, item, where)
            except DfError as error:
                raise DfError(f"line {number} of {file}: {error.message}", error.hint) from None
            by_sum += int(np.argmax(sums)) == item.label
            by_mean += int(np.argmax(sums / lengths)) == item.label
            chance += 1 / len(item.endings)
            items += 1
            if items % 100 == 0:
                on_event(Progress("choices", items, None, "items"))
    if not items:
        raise DfError(f"{file} holds no items", "give a JSONL file with ctx, endings and label on each line")
    on_event(Progress("choices", items, items, "items"))
    seconds = time.perf_counter() - began
    return Choices(
        run.name, saved.step, str(file), items, by_sum / items, by_mean / items, chance / items, seconds
    )  # fmt: skip


def _likelihoods(
    core: cores.Core, codec: TextCodec, lead: list[int], item: Item, device: Device
) -> tuple[np.ndarray, np.ndarray]:
    """Summed log-likelihoods of the endings in nats, float64 [E], and how many tokens each has, [E]."""
    before = [*lead, *codec.encode(item.context).tolist()]
    endings = [codec.encode(f" {ending}").tolist() for ending in item.endings]
    if not before:
        raise DfError("its context is empty, so the first token of an ending has nothing before it")
    limit = core.context if isinstance(core.config, cores.GPTConfig) else len(before) + max(map(len, endings))
    if max(map(len, endings)) > limit:
        raise DfError(f"an ending has more tokens than the context of {limit:,}")
    rows = [[*before, *ending][-limit - 1 :] for ending in endings]
    longest = max(map(len, rows)) - 1
    ids, targets = np.zeros((len(rows), longest), np.int64), np.full((len(rows), longest), IGNORED)
    for k, (row, ending) in enumerate(zip(rows, endings, strict=True)):
        ids[k, : len(row) - 1] = row[:-1]
        targets[k, len(row) - 1 - len(ending) : len(row) - 1] = ending
    logits = core(torch.from_numpy(ids).to(device.torch_device)).float()
    wanted = torch.from_numpy(targets).to(device.torch_device)
    losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none")
    sums = -losses.view(wanted.shape).double().sum(1).cpu().numpy()
    return sums, np.array([len(ending) for ending in endings])


def _items(file: Path) -> Iterator[tuple[int, Item]]:
    """The items of a file and their lines' numbers, one at a time."""
    with os_errors("read", file):
        if not file.is_file():
            raise UsageError(f"there is no file {file}", "give a JSONL file with ctx, endings and label on each line")
        with file.open(encoding="utf-8-sig", errors="replace") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE + 1), ""), 1):
                if line.strip():
                    yield number, _item(line, f"line {number} of {file}")


def _item(line: str, place: str) -> Item:
    hint = 'an item is {"ctx": "...", "endings": ["...", "..."], "label": 0}'
    try:
        if len(line) > MAX_LINE:
            raise ValueError(f"it has more than {MAX_LINE:,} characters")
        found: Any = json.loads(line)
        context, endings, label = found["ctx"], found["endings"], int(found["label"])
        if (
            not isinstance(context, str)
            or not isinstance(endings, list)
            or not all(isinstance(e, str) for e in endings)
        ):
            raise ValueError("ctx must be a text, and endings a list of texts")
        if not 2 <= len(endings) <= MOST_ENDINGS or not 0 <= label < len(endings):
            raise ValueError(f"label must name one of 2 to {MOST_ENDINGS} endings")
    except KeyError as error:
        raise DfError(f"{place} lacks {error}", hint) from None
    except (ValueError, TypeError, RecursionError) as error:
        raise DfError(f"{place} is not an item: {error}", hint) from None
    return Item(context, endings, label)
