"""Every `df` line of the README runs as typed; only the time it takes is cut down."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dfcli.cli import app
from tests.runs.test_huggingface import make

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
QUICK = ["--steps", "2", "--set", "eval_every=2", "--set", "eval_tokens=200", "--set", "context=32"]
QUICK_SOUND = ["--steps", "2", "--set", "eval_every=2", "--set", "eval_tokens=200", "--set", "cycles=1"]


def lines() -> list[list[str]]:
    """The words of every `df` command in the README's shell blocks, in order, without comments and pipes."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    commands = [part.strip() for block in blocks for line in block.splitlines() for part in line.split("&&")]
    words = [shlex.split(command.split("|")[0], comments=True) for command in commands]
    return [word[1:] for word in words if word[:1] == ["df"]]


def quick(words: list[str]) -> list[str]:
    """The same command with a budget of two steps, or a tenth of a second of sound."""
    if words[0] == "train":
        if "--minutes" in words:
            at = words.index("--minutes")
            words = words[:at] + words[at + 2 :]
        own = 2 if "--init" in words else None  # the model of --init keeps its own context
        return [*words, *(QUICK[:own] if words[1] == "gpt" else QUICK_SOUND)]
    if "--seconds" in words:
        at = words.index("--seconds") + 1
        words = [*words[:at], "0.1", *words[at + 1 :]]
    return [*words, "--engine", "plain"] if words[:2] == ["sample", "wavenet"] else words


def test_the_readme_has_the_three_lines() -> None:
    assert "df train gpt --data shakespeare.txt --device cuda" in README
    assert ["sample", "wavenet", "--seconds", "4", "-o", "out.wav"] in lines()
    assert ["eval"] in lines()


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_every_line_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing").touch()
    monkeypatch.setattr("sys.stdin", (tmp_path / "nothing").open(encoding="utf-8"))
    random = np.random.default_rng(0)
    for name in ("shakespeare.txt", "book.txt", "another-book.txt"):
        words = random.choice(["thou", "art", "a", "villain", "and", "king"], 3000)
        (tmp_path / name).write_text(" ".join(words) + "\nIt was. ROMEO:\n")
    (tmp_path / "names.txt").write_text("\n".join("".join(random.choice(list("aeioulmn"), 5)) for _ in range(300)))
    records = [json.dumps({"text": " ".join(random.choice(["king", "and", "queen"], 20))}) for _ in range(60)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(records))
    (tmp_path / "recordings").mkdir()
    for i in range(4):
        wave = 0.3 * np.sin(np.arange(8000) * 0.05 * (i + 1))
        soundfile.write(tmp_path / "recordings" / f"{i}.wav", wave, 8000)
    (tmp_path / "digits").mkdir()
    for i, name in enumerate(("7_george", "7_theo", "3_george", "3_theo")):
        for take in range(3):
            wave = 0.3 * np.sin(np.arange(2000 + 100 * take) * 0.03 * (i + 2))
            soundfile.write(tmp_path / "digits" / f"{name}_{take}.wav", wave, 8000)
    make(tmp_path / "gpt2")
    soundfile.write(tmp_path / "start.wav", 0.3 * np.sin(np.arange(4000) * 0.05), 8000)
    ran = 0
    for words in lines():
        if words[:2] == ["data", "get"] or "cuda" in words:  # needs a network, or a GPU
            continue
        code = app.run(quick(words))
        assert code == 0, (words, capfd.readouterr().err[-2000:])
        ran += 1
    assert ran >= 15
    assert soundfile.info(tmp_path / "out.wav").frames > 0
