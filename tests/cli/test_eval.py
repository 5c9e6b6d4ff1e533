from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.cli.conftest import TINY


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


def test_unknown_characters_are_left_out_and_counted(here, trained):
    known = "It was the age of times.\n" * 9
    (trained / "other.txt").write_text(known.replace("age", "%a%ge日"))
    (trained / "known.txt").write_text(known)
    shown = here("eval", "--run", "talk", "--data", trained / "other.txt", "--json")
    told = "27 of 252 characters are not scored, because the model does not know them: '%', '日'; "
    assert told in " ".join(shown.err.split())
    assert "--codec bytes" in shown.err
    result = json.loads(shown.out)
    plain = json.loads(here("eval", "--run", "talk", "--data", trained / "known.txt", "--json").out)
    assert (result["unknown_characters"], plain["unknown_characters"]) == (27, 0)
    assert (result["tokens"], result["loss"]) == (plain["tokens"], pytest.approx(plain["loss"]))


def test_a_limit_scores_the_first_tokens(here, trained):
    for run, data, stride in (("talk", trained / "talk.txt", 5), ("tune", trained / "tones", None)):
        words = ["eval", "--run", run, "--data", data, *(["--stride", stride] if stride else []), "--json"]
        whole = json.loads(here(*words).out)
        part = json.loads(here(*words, "--limit", 777).out)
        assert (part["tokens"], part["limit"], whole["limit"]) == (777, 777, None)
        assert "each of the first 777 targets" in part["protocol"]
        assert "first" not in whole["protocol"]
        beyond = json.loads(here(*words, "--limit", 10**9).out)
        assert _repeatable(beyond) == _repeatable(whole) | {"limit": 10**9}
    (trained / "begin.txt").write_text((trained / "talk.txt").read_text()[:778])
    alone = json.loads(here("eval", "--run", "talk", "--data", trained / "begin.txt", "--json").out)
    part = json.loads(here("eval", "--run", "talk", "--data", trained / "talk.txt", "--limit", 777, "--json").out)
    for key in ("tokens", "bits_per_byte", "loss"):
        assert part[key] == pytest.approx(alone[key])
    assert part["baselines"]["bigram"] == pytest.approx(alone["baselines"]["bigram"])
    assert here("eval", "--limit", 0).code == 2


def test_several_runs_stand_in_one_table(here, trained):
    words = [word for pair in TINY.items() for word in ("--set", "=".join(pair))]
    assert here("train", "gpt", "--data", trained / "talk.txt", "--steps", 3, "--name", "brief", *words).code == 0
    shown = here("eval", "--run", "talk", "--run", "brief")
    rows = [line.split()[0] for line in shown.out.split("\n\n")[0].splitlines()]
    assert sorted(rows) == ["MODEL", "bigram", "brief", "talk", "trigram", "uniform", "unigram"]  # the same data
    both = json.loads(here("eval", "--run", "talk", "--run", "brief", "--json").out)["runs"]
    assert [one["run"] for one in both] == ["talk", "brief"]
    assert _repeatable(both[0]) == _repeatable(json.loads(here("eval", "--run", "talk", "--json").out))
    mixed = here("eval", "--run", "talk", "--run", "call").out
    assert "bigram of talk" in mixed
    assert "bigram of call" in mixed


def test_what_a_model_of_sound_hears_is_told_in_ms(here):
    result = json.loads(here("eval", "--run", "tune", "--json").out)
    assert f"the newest {result['context']} samples ({result['context'] / 4:.0f} ms)" in result["protocol"]
