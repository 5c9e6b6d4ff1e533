from __future__ import annotations

import json
import math
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _runs(trained: Path) -> None:
    """Every test here has the runs `talk`, `tune` and `call`."""


def test_text_as_json(here):
    result = json.loads(here("eval", "--run", "talk", "--json").out)
    assert (result["run"], result["split"], result["context"], result["stride"]) == ("talk", "val", 16, 16)
    bits = result["loss"] / math.log(2)
    for key in ("bits_per_token", "bits_per_byte", "bits_per_character"):  # ASCII by characters: one byte each
        assert result[key] == pytest.approx(bits)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["bits_per_sample"] is None
    assert {"uniform", "unigram", "bigram"} <= set(result["baselines"])
    assert result["tokens"] > 0
    assert result == {**result, **_repeatable(json.loads(here("eval", "--run", "talk", "--json").out))}


def _repeatable(result: dict) -> dict:
    return {key: value for key, value in result.items() if key not in ("seconds", "tokens_per_second")}


def test_sound_as_json(here):
    result = json.loads(here("eval", "--run", "tune", "--json").out)
    assert result["bits_per_sample"] == pytest.approx(result["loss"] / math.log(2))
    assert result["bits_per_byte"] is None


def test_the_table(here):
    result = json.loads(here("eval", "--run", "talk", "--json").out)
    shown = here("eval", "--run", "talk")
    assert shown.code == 0
    header, *rows = shown.out.split("\n\n")[0].splitlines()
    assert header.split() == ["MODEL", "NATS/TOKEN", "BITS/BYTE", "PERPLEXITY"]  # what says the same is shown once
    found = {row.split()[0]: row.split()[1:] for row in rows}
    assert set(found) == {"talk", *result["baselines"]}
    assert found["talk"] == [f"{result['loss']:.4f}", f"{result['bits_per_byte']:.4f}", f"{result['perplexity']:.4g}"]
    losses = [float(row.split()[1]) for row in rows]
    assert losses == sorted(losses)
    assert result["protocol"] in shown.out
    assert "split val" in shown.out


def test_other_data_splits_and_strides(here, trained):
    (trained / "other.txt").write_text("It was the age of times.\n" * 9)
    other = json.loads(here("eval", "--run", "talk", "--data", trained / "other.txt", "--json").out)
    assert (other["split"], other["tokens"]) == ("all", 25 * 9 - 1)
    assert other["dataset"] == str(trained / "other.txt")
    train = json.loads(here("eval", "--run", "talk", "--split", "train", "--json").out)
    assert train["split"] == "train"
    assert json.loads(here("eval", "--run", "talk", "--stride", 1, "--json").out)["stride"] == 1
    assert json.loads(here("eval", "--json").out)["run"] == "tune"  # the newest of any kind


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--split", "none"], 2), (["--split", "test"], 2), (["--stride", "0"], 2), (["--stride", "17"], 2),
        (["--data", "none.txt"], 2), (["--run", "none"], 2), (["--checkpoint", "3.5"], 2), (["--device", "x"], 2),
    ],
)  # fmt: skip
def test_what_is_asked_wrongly(here, words: list[str], code: int):
    shown = here("eval", *(["--run", "talk"] if "--run" not in words else []), *words)
    assert shown.code == code, shown.err
    assert shown.out == ""


def test_sound_for_a_model_of_text_is_refused_by_what_eval_has(here, trained):
    shown = here("eval", "--run", "talk", "--data", trained / "tones" / "tone-0.wav")
    assert (shown.code, "--codec" in shown.err, "give text" in shown.err) == (2, False, True)


def test_data_that_the_codec_cannot_express(here, trained):
    (trained / "other.txt").write_text("50 %")
    shown = here("eval", "--run", "talk", "--data", trained / "other.txt")
    assert shown.code == 1
    assert "U+00" in shown.err
