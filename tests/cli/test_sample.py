from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import wave
from pathlib import Path
from typing import Any

import pytest
import soundfile

import dfcli
from dfcli.cli import output
from dfcli.cli.sample import Texts


@pytest.fixture(autouse=True)
def _runs(trained: Path) -> None:
    """Every test here has the runs `talk`, `tune` and `call`."""


def test_the_prompt_comes_from_an_option_a_file_or_a_pipe(here, tmp_path):
    options = ["--tokens", 30, "--seed", 5]
    told = here("sample", "gpt", *options, "--prompt", "It was")
    assert told.code == 0, told.err
    assert told.out.startswith("It was")
    assert len(told.out) == len("It was") + 30 + (told.out[-2] != "\n")
    (tmp_path / "prompt.txt").write_bytes("\ufeffIt was\n".encode())  # an editor's
    assert here("sample", "gpt", *options, "--prompt-file", "prompt.txt").out == told.out
    assert here("sample", "gpt", *options, "--prompt", "-", stdin=b"It was\r\n").out == told.out
    assert here("sample", "gpt", *options, "--prompt-file", "-", stdin=b"It was").out == told.out
    assert here("sample", "gpt", *options, "--prompt", "It was", stdin=b"best").out == told.out
    both = here("sample", "gpt", "--prompt", "a", "--prompt-file", "prompt.txt")
    assert both.code == 2
    assert "exclude each other" in both.err
    missing = here("sample", "gpt", "--prompt-file", "none.txt")
    assert missing.code == 1
    assert 'hint: check the path, or give the prompt itself: `--prompt "It was"`' in missing.err
    (tmp_path / "latin.txt").write_bytes(b"gr\xf6\xdfe")
    assert "`iconv -f latin1 -t utf-8 latin.txt > utf-8.txt`" in here("sample", "gpt", "--prompt-file", "latin.txt").err
    broken = here("sample", "gpt", "--prompt", "-", stdin=b"It\xffwas")
    assert broken.code == 1
    assert "standard input is not UTF-8 text: see byte 2" in broken.err


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no /dev/zero here")
def test_a_prompt_without_end_is_not_read_to_it(here):
    shown = here("sample", "gpt", "--prompt-file", "/dev/zero")
    assert shown.code == 1
    assert "the prompt from /dev/zero has more than 16,777,216 bytes" in shown.err


@pytest.mark.parametrize("begun", [True, False])
def test_what_a_termination_leaves_is_said(here, trained, monkeypatch, capfd, begun: bool):
    from dfcli.generation import sample

    def terminated(*_: Any, on_event: Any, **__: Any) -> None:
        if begun:
            on_event(sample.AudioProgress(1.0, 200.0, 1.0))
        raise SystemExit(143)

    monkeypatch.setattr(sample, "sample_audio", terminated)
    with pytest.raises(SystemExit):
        here("sample", "wavenet", "--run", "tune", "--seconds", 200, "-o", "long.wav")
    assert ("stopped early; the finished part is kept" in capfd.readouterr().err) == begun


def test_text_as_json(here):
    shown = here("sample", "gpt", "--run", "talk", "--num", 2, "--tokens", 8, "--prompt", "It", "--seed", 3, "--json")
    result = json.loads(shown.out)
    assert (result["run"], result["seed"], len(result["samples"])) == ("talk", 3, 2)
    assert [len(text) for text in result["samples"]] == [10, 10]
    assert result["engine"]
    assert result["tokens_per_second"] == pytest.approx(16 / result["seconds"])
    same = json.loads(here("sample", "gpt", "--num", 2, "--tokens", 8, "--prompt", "It", "--seed", 3, "--json").out)
    assert same["samples"] == result["samples"]
    assert len({here("sample", "gpt", "--tokens", 40).out for _ in range(2)}) == 2  # a fresh seed each time


def test_several_texts_are_divided(here):
    shown = here("sample", "gpt", "--num", 3, "--tokens", 6, "--prompt", "It", "--seed", 1)
    texts = json.loads(here("sample", "gpt", "--num", 3, "--tokens", 6, "--prompt", "It", "--seed", 1, "--json").out)
    ended = [text if text.endswith("\n") else text + "\n" for text in texts["samples"]]
    assert shown.out == "---\n".join(ended)
    assert here("sample", "wavenet", "--run", "call", "--num", 5).out.count("\n") == 5


def test_empty_samples_count(capfd):
    texts = Texts(divider="")
    for i, piece in ((0, "An"), (1, "B"), (0, "na\n"), (1, "o\n")):
        texts(i, piece)
    texts.finish(["Anna\n", "Bo\n", "", "Carl"])
    assert capfd.readouterr().out == "Anna\nBo\n\nCarl\n"


def test_the_newest_run_is_used_and_named(here):
    shown = here("sample", "gpt", "--tokens", 1, "--json")
    assert json.loads(shown.out)["run"] == "talk"
    assert "run talk" in shown.err
    dfcli.runs.remove("talk")
    assert json.loads(here("sample", "gpt", "--json").out)["run"] == "call"  # a WaveNet of text
    shown = here("sample", "wavenet", "--seconds", 0.1, "-o", "x.wav", "--json")
    assert json.loads(shown.out)["run"] == "tune"


def test_an_unknown_character_is_named(here):
    shown = here("sample", "gpt", "--prompt", "It % was")
    assert shown.code == 1
    assert "%" in shown.err
    assert "U+0025" in shown.err


@pytest.mark.parametrize(
    "words",
    [
        ["--temperature", "nan"], ["--temperature", "-1"], ["--temperature", "inf"], ["--top-k", "0"], ["--top-p", "0"],
        ["--top-p", "1.5"], ["--min-p", "-0.1"], ["--min-p", "nan"], ["--tokens", "0"], ["--num", "0"], ["--num", "-3"],
        ["--seed", "-1"], ["--seed", "9" * 30], ["--stop", ""], ["--engine", "warp"], ["--device", "quantum"],
        ["--checkpoint", "next"], ["--checkpoint", "7"], ["--run", "none"], ["--run", "tune"], ["--run", "../talk"],
        ["--run", "a\x00b"],
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(here, words: list[str]):
    shown = here("sample", "gpt", "--prompt", "It", *words)
    assert shown.code == 2, shown.err
    assert shown.out == ""
    assert "unexpected" not in shown.err


def test_a_top_k_beyond_the_vocabulary_keeps_every_token(here):
    words = ["sample", "gpt", "--prompt", "It", "--tokens", 30, "--seed", 2]
    shown = here(*words, "--top-k", 200)
    assert (shown.code, shown.out) == (0, here(*words).out)
    assert re.search(r"^top-k 200 keeps every token: the model has \d+$", shown.err, re.MULTILINE)


def test_temperature_0_is_greedy(here):
    greedy = [
        here("sample", "gpt", "--prompt", "It", "--temperature", 0, "--tokens", 9, "--seed", n).out for n in (1, 2)
    ]
    assert greedy[0] == greedy[1]


def test_sound_is_a_wav_of_exactly_that_length(here, tmp_path):
    shown = here("sample", "wavenet", "--run", "tune", "--seconds", 0.5, "-o", "out.wav", "--seed", 1, "--json")
    assert shown.code == 0, shown.err
    result = json.loads(shown.out)
    assert result["samples"] == ["out.wav"]
    data, rate = soundfile.read(tmp_path / "out.wav")
    assert (rate, len(data), data.ndim) == (4000, 2000, 1)
    assert result["times_real_time"] == pytest.approx(0.5 / result["seconds"])
    assert "wrote out.wav" in shown.err
    assert "times as fast as it plays" in shown.err


def test_several_clips_and_a_prime(here, tmp_path, trained):
    shown = here("sample", "wavenet", "--run", "tune", "--seconds", 0.1, "-o", "out.wav", "--num", 2)
    assert shown.code == 0, shown.err
    assert {path.name for path in tmp_path.glob("*.wav")} == {"out-01.wav", "out-02.wav"}
    clip = trained / "tones" / "tone-0.wav"
    for keep, frames in ((False, 400), (True, 4400)):
        words = ["--prime", clip, *(["--keep-prime"] if keep else [])]
        assert here("sample", "wavenet", "--run", "tune", "--seconds", 0.1, "-o", "more.wav", *words).code == 0
        assert soundfile.info(tmp_path / "more.wav").frames == frames


def test_a_prime_is_not_overwritten(here, tmp_path, trained):
    (tmp_path / "clip.wav").write_bytes((trained / "tones" / "tone-0.wav").read_bytes())
    before = (tmp_path / "clip.wav").read_bytes()
    words = ["--seconds", 0.1, "--prime", "clip.wav", "-o", tmp_path / "." / "clip.wav"]
    shown = here("sample", "wavenet", "--run", "tune", *words)
    assert shown.code == 2
    assert "overwrite" in shown.err
    assert (tmp_path / "clip.wav").read_bytes() == before


def test_sound_needs_a_length_and_a_place(here):
    for words in ([], ["--seconds", "1"], ["-o", "x.wav"]):
        shown = here("sample", "wavenet", "--run", "tune", *words)
        assert shown.code == 2
        assert "must be given" in shown.err
        assert "df sample wavenet --run tune --seconds 4 -o out.wav" in shown.err
    for seconds, out in (("nan", "x.wav"), ("0", "x.wav"), ("-1", "x.wav"), ("1e30", "x.wav"), ("1", "none/x.wav")):
        shown = here("sample", "wavenet", "--run", "tune", "--seconds", seconds, "-o", out)
        assert shown.code == 2, shown.err
        assert "error: " in shown.err


def test_a_run_of_sound_is_refused_for_text_with_a_line_that_works(here, tmp_path):
    shown = here("sample", "gpt", "--run", "tune")
    assert shown.code == 2
    line = re.search(r"type `df (.*)`", shown.err)
    assert line is not None, shown.err
    assert here(*line[1].split()).code == 0
    assert (tmp_path / "out.wav").exists()
    assert "-o (where to write it) must be given" in here("sample", "wavenet", "--run", "tune", "--seconds", 1).err


def test_a_gpt_is_refused_for_a_wavenet_with_a_line_that_works(here, trained, tmp_path):
    away = (trained / "home" / "runs" / "talk").rename(tmp_path / "my talk")
    shutil.copytree(away, trained / "home" / "runs" / "talk")
    for run in ("talk", away):
        for words in ([], ["--seconds", 1, "-o", "x.wav"]):
            shown = here("sample", "wavenet", "--run", run, *words)
            assert shown.code == 2
            assert shown.out == ""
            assert "is a gpt that makes text" in shown.err
            line = re.search(r"type `df (.*)`", " ".join(shown.err.split()))
            assert line is not None, shown.err
            assert here(*shlex.split(line[1]), "--tokens", 3).code == 0


def test_a_wavenet_of_text_takes_a_prompt_as_other_text_does(here):
    assert here("sample", "gpt", "--run", "call", "--prompt", "ann").out.startswith("ann")


def test_a_wavenet_of_text_needs_neither(here):
    shown = here("sample", "wavenet", "--run", "call", "--num", 2, "--json")
    assert shown.code == 0, shown.err
    assert len(json.loads(shown.out)["samples"]) == 2
    shown = here("sample", "wavenet", "--run", "call", "-o", "x.wav")
    assert shown.code == 2
    assert "makes text" in shown.err


def test_wav_on_stdout():
    command = [sys.executable, "-m", "dfcli", "sample", "wavenet", "--run", "tune", "--seconds", "0.25", "-o", "-"]
    done = subprocess.run(command, capture_output=True, check=True, timeout=100)
    data, rate = soundfile.read(io.BytesIO(done.stdout))
    assert (rate, len(data)) == (4000, 1000)
    refused = subprocess.run([*command, "--json"], capture_output=True, check=False, timeout=100)
    assert refused.returncode == 2
    assert refused.stdout == b""
    if os.name != "nt":  # a player that is closed early
        early = subprocess.run(
            ["bash", "-c", '"$@" --seconds 30 | head -c 1000 | wc -c', "bash", *command],
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert early.stdout.strip() == "1000"
        assert "error" not in early.stderr
        assert "Traceback" not in early.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows does not tell whether a file is appended to")
def test_a_wav_on_stdout_that_is_a_file_has_its_true_length(tmp_path):
    command = [sys.executable, "-m", "dfcli", "sample", "wavenet", "--run", "tune", "--seconds", "0.25", "-o", "-"]
    for mode, known in (("wb", True), ("ab", False)):
        with open(tmp_path / mode, mode) as file:
            subprocess.run(command, stdout=file, stderr=subprocess.PIPE, check=True, timeout=100)
        with wave.open(str(tmp_path / mode), "rb") as found:
            assert (found.getnframes() == 1000) == known


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_behind_stdout_is_told():
    command = [sys.executable, "-m", "dfcli", "sample", "wavenet", "--run", "tune", "--seconds", "0.25", "-o", "-"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=100)
    assert done.returncode == 1
    assert done.stderr.endswith("error: could not write to standard output: No space left on device\n")


def test_an_open_pipe_is_not_waited_for_in_silence():
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "dfcli", "sample", "gpt", "--tokens", "2", "--engine", "plain"]
    command += ["--prompt", "-"]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stderr is not None
        assert process.stdin is not None
        assert "reading the prompt from standard input" in process.stderr.readline()
        process.stdin.write("It")
        out, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    assert out.startswith("It")


@pytest.mark.skipif(os.name == "nt", reason="a shell as on POSIX")
@pytest.mark.parametrize("source", ["done < list.txt", "done"])
def test_a_loop_keeps_its_list(tmp_path, source: str):
    (tmp_path / "list.txt").write_text("talk\ncall\n")
    loop = f"while read r; do '{sys.executable}' -m dfcli sample gpt --run $r --tokens 1 >/dev/null; {source}"
    loop = loop if "<" in source else f"cat list.txt | {loop}"
    done = subprocess.run(["bash", "-c", loop], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=100)
    assert re.findall(r"^run (\w+)", done.stderr, re.MULTILINE) == ["talk", "call"]
    told = "standard input is not read; `--prompt -` takes the prompt from it"
    assert done.stderr.count(told) == 1  # the last call finds nothing left


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_generated_controls_cannot_drive_the_terminal(tmp_path):
    """A model of bytes that has learned nothing but escape sequences."""
    pexpect = pytest.importorskip("pexpect")
    (tmp_path / "escape.bin.txt").write_bytes(b"\x1b[2J\x07" * 400)
    dataset = dfcli.prepare([str(tmp_path / "escape.bin.txt")], name="escape", codec="bytes")
    dataset.close()
    tiny = {"layers": "1", "heads": "1", "channels": "8", "context": "8", "compile": "off"}
    dfcli.train("gpt", ["escape"], name="escape", steps=60, batch_size=8, overrides=tiny)
    words = ["-m", "dfcli", "sample", "gpt", "--run", "escape", "--tokens", "200", "--seed", "1"]
    words += ["--engine", "plain"]
    piped = subprocess.run(
        [sys.executable, *words], stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=100
    )
    assert b"\x1b" in piped.stdout  # a file gets the text as it is
    child = pexpect.spawn(sys.executable, words, env={**os.environ, "TERM": "dumb"}, timeout=100)
    shown = child.read()
    assert b"\\x1b" in shown
    assert b"\x1b" not in shown
    assert b"\x07" not in shown


@pytest.mark.skipif(os.name == "nt", reason="signals as on POSIX")
def test_interrupted_sound_is_kept(tmp_path):
    import signal

    command = [
        sys.executable,
        "-m",
        "dfcli",
        "sample",
        "wavenet",
        "--run",
        "tune",
        "--seconds",
        "20000",
        "-o",
        "out.wav",
    ]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out.wav").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped early; the finished part is kept" in err
    assert 0 < soundfile.info(tmp_path / "out.wav").frames < 20000 * 4000


def test_the_most_likely_clips_in_another_format(here, tmp_path):
    words = ["sample", "wavenet", "--seconds", 0.1, "--seed", 4, "--num", 4, "--best", 2, "--normalize", "peak"]
    shown = here(*words, "-o", "out.flac")
    assert shown.code == 0, shown.err
    assert {path.name for path in tmp_path.glob("out*")} == {"out-01.flac", "out-02.flac"}
    nats = [float(found) for found in re.findall(r"wrote out-0\d.flac \((\d\.\d+) nats a sample\)", shown.err)]
    assert nats == sorted(nats)
    assert len(nats) == 2
    assert here(*words, "-o", "clips/").code == 0
    assert {path.name for path in (tmp_path / "clips").iterdir()} == {"tune-4-01.wav", "tune-4-02.wav"}


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("gpt --prompt %", "the alphabet lacks '%'", "it has"),
        ("gpt --checkpoint 7", "has no checkpoint `7`", "there are best, last"),
        ("gpt --run tlak", "there is no run `tlak`", "did you mean `talk`?"),
        ("gpt --device coda", "`coda` is no device", "did you mean `cuda`?"),
        ("wavenet --run tune --seconds 1 -o x.wav --label a=b", "was trained without labels", "leave out `--label`"),
        (
            "wavenet --run tune --seconds 1 -o x.wav --prime tume.wav",
            "no recording tume.wav",
            "mean `tune.wav`?",
        ),
        ("wavenet --run tune --seconds 1 -o x.wav --prime notes.txt", "notes.txt cannot be used", "give a recording"),
        ("wavenet --run tune --seconds 1 -o x.wav --mel tune.wav", "is no vocoder", "leave out `--mel`"),
        ("wavenet --run tune --seconds 1 -o x.mp4", "x.mp4 ends in no format", ".flac"),
        ("wavenet --run tune --seconds 1 -o x.wav --best 2", "--best must be from 1", "--num 8"),
    ],
)
def test_everything_but_the_model_is_checked_before_torch_is_loaded(
    here, tmp_path, monkeypatch, line: str, message: str, hint: str
):
    (tmp_path / "notes.txt").write_text("no sound at all")
    (tmp_path / "tune.wav").write_bytes(b"")
    monkeypatch.setattr(output, "loading", lambda: pytest.fail("PyTorch would be loaded"))
    shown = here("sample", *line.split())
    assert shown.code in (1, 2)
    assert message in shown.err
    assert hint in shown.err


def test_eval_checks_before_torch_is_loaded(here, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "loading", lambda: pytest.fail("PyTorch would be loaded"))
    (tmp_path / "book.txt").write_text("It was")
    for line, message, hint in (
        ("--split vall", "there is no split `vall`", "did you mean `val`?"),
        (
            "--run talk --split test",
            "the data of the run `talk` has no split `test`",
            "`--split train` or `--split val`",
        ),
        ("--run talk --measures", "`talk` is no vocoder", "leave it out"),
        ("--run talk --data bok.txt", "no file, folder or dataset bok.txt", "did you mean `book.txt`?"),
        ("--run talk --checkpoint 7", "no checkpoint `7`", "there are best, last"),
    ):
        shown = here("eval", *line.split())
        assert shown.code == 2
        assert message in shown.err
        assert hint in shown.err
