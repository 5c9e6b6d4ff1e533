"""Multiple choice, against an independent computation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dfcli.codecs import BPE, MuLaw
from dfcli.errors import DfError, UsageError
from dfcli.evaluation.choices import score_choices
from tests.runs.test_export import TEXT, make_run

ITEMS = [
    {
        "ind": 24, "activity_label": "Cats", "ctx": "the cat sat on the mat",
        "endings": ["it ran", "dogs", "and then the cat ran", "!"], "label": 2,
    },
    {"ctx": "12 dogs don't", "endings": ["sat", "ran on the mat; 12 dogs ran"], "label": "1"},
    {"ctx": "naïve 😀 " * 30, "endings": ["end", "the end", "Then"], "label": 0},
]  # fmt: skip


def write(folder: Path, items: list[Any]) -> Path:
    path = folder / "items.jsonl"
    path.write_text("\n".join(json.dumps(item) for item in items) + "\n\n", "utf-8")
    return path


def test_likelihoods_token_by_token(tmp_path: Path) -> None:
    run = make_run(BPE.train([TEXT], 300), data={"boundary": 299})
    core, _ = run.build()
    right = [0, 0]
    for item in ITEMS:
        sums, means = [], []
        for ending in item["endings"]:
            context = [299, *run.codec.encode(item["ctx"]).tolist()]
            tokens = run.codec.encode(" " + ending).tolist()
            total = 0.0
            for k, token in enumerate(tokens):
                # The window of the whole item: its newest 65 ids, of which the last is a target only.
                kept = (context + tokens)[-65:]
                read = kept[: len(kept) - len(tokens) + k]
                with torch.no_grad():
                    total += core(torch.tensor([read]))[0, -1].log_softmax(0)[token].item()
            sums.append(total)
            means.append(total / len(tokens))
        for k, scores in enumerate((sums, means)):
            right[k] += scores.index(max(scores)) == int(item["label"])
    found = score_choices(run, write(tmp_path, ITEMS), device="cpu")
    assert (found.items, found.chance) == (3, pytest.approx((1 / 4 + 1 / 2 + 1 / 3) / 3))
    assert (found.accuracy_by_sum, found.accuracy_by_mean) == (right[0] / 3, right[1] / 3)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"ctx": "a", "endings": ["b", "c"]}, "line 2 of .* lacks 'label'"),
        ({"ctx": "a", "endings": ["b", "c"], "label": 2}, "line 2 .*label must name one of"),
        ({"ctx": "a", "endings": ["b"], "label": 0}, "line 2 .*label must name one of"),
        ({"ctx": "a", "endings": "bc", "label": 0}, "line 2 .*endings a list"),
        ({"ctx": "a", "endings": ["b", "c " * 200], "label": 0}, "line 2 .*more tokens than the context of 64"),
        ([1], "line 2 of .* is not an item"),
    ],
)
def test_a_line_that_is_no_item_is_named(tmp_path: Path, item: Any, message: str) -> None:
    run = make_run(BPE.train([TEXT], 300))
    with pytest.raises(DfError, match=message):
        score_choices(run, write(tmp_path, [ITEMS[0], item]), device="cpu")


def test_files_and_runs_that_do_not_fit(tmp_path: Path) -> None:
    run = make_run(BPE.train([TEXT], 300))
    with pytest.raises(UsageError, match="there is no file"):
        score_choices(run, tmp_path / "none.jsonl")
    with pytest.raises(DfError, match="holds no items"):
        score_choices(run, write(tmp_path, []))
    with pytest.raises(UsageError, match="makes sound"):
        score_choices(make_run(MuLaw(8000), "sound"), tmp_path / "none.jsonl")  # pyright: ignore[reportArgumentType]
