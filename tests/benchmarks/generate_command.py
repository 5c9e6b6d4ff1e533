"""Generation on a CPU through the command itself: what `df sample --json` says, start-up excluded.

    python -m tests.benchmarks.generate_command

Prints JSON. The models have the published shapes and are trained for one step, as speed does not depend on the weights.
- `wavenet`: samples/s of one clip of the `paper` preset with each engine, the writing of the wav included.
- `gpt`: tokens/s of 5,000 tokens by the `nano-cpu` preset's model (0.8M), by `--json`, and as text streams into a file
  and to a terminal (POSIX only), where the figure is the last line's of stderr. Each is the best of `ROUNDS`, in turns.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

from tests.benchmarks import common

ROUNDS = 3
TEXT = "It was the best of times, it was the worst of times.\n" * 200


def df(*words: object, out: int | IO[Any] | None = subprocess.PIPE) -> tuple[str, str]:
    """stdout and stderr of `df ... --device cpu` in a process of its own. SystemExit with its messages if it fails."""
    line = [sys.executable, "-m", "dfcli", *(str(word) for word in words), "--device", "cpu"]
    done = subprocess.run(line, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout or "", done.stderr


def said(stderr: str) -> float:
    """tokens/s in the last line for people."""
    number, unit = re.findall(r"([\d.]+)([kM]?) tokens/s", stderr)[-1]
    return float(number) * {"": 1, "k": 1e3, "M": 1e6}[unit]


def to_terminal(*words: object) -> float:
    """tokens/s of a command whose stdout is a terminal, which takes all that comes."""
    import pty  # not on Windows

    terminal, its_end = pty.openpty()

    def take() -> None:
        while True:
            try:
                if not os.read(terminal, 65536):
                    return
            except OSError:  # Linux's way of telling that the other end is closed
                return

    reader = threading.Thread(target=take)
    reader.start()
    try:
        _, stderr = df(*words, out=its_end)
    finally:
        os.close(its_end)
        reader.join()
        os.close(terminal)
    return said(stderr)


def wavenet(folder: Path) -> dict[str, Any]:
    settings = ("--set", "window=256", "--set", "eval_tokens=256")
    df("train", "wavenet", "--preset", "paper", "--name", "paper", "--steps", 1, "--batch-size", 1, *settings)
    found: dict[str, Any] = {}
    for _ in range(ROUNDS):
        for engine, seconds in {"plain": 0.1, "fast": 2, "auto": 2}.items():
            words = ("--run", "paper", "--seconds", seconds, "-o", folder / "out.wav", "--engine", engine, "--json")
            told = json.loads(df("sample", "wavenet", *words)[0])
            figures = found.setdefault(engine, {"engine": told["engine"], "samples_per_second": 0})
            figures["samples_per_second"] = max(figures["samples_per_second"], round(told["tokens_per_second"]))
    return found


def gpt(folder: Path) -> dict[str, float]:
    (folder / "text.txt").write_text(TEXT)
    words = ("--data", folder / "text.txt", "--steps", 1, "--set", "eval_tokens=256")
    df("train", "gpt", "--preset", "nano-cpu", "--name", "nano-cpu", *words)
    line = ("sample", "gpt", "--run", "nano-cpu", "--tokens", 5000)
    found = {"json": 0.0, "file": 0.0}
    for _ in range(ROUNDS):
        found["json"] = max(found["json"], json.loads(df(*line, "--json")[0])["tokens_per_second"])
        with (folder / "out.txt").open("w") as file:
            found["file"] = max(found["file"], said(df(*line, out=file)[1]))
        if os.name == "posix":
            found["terminal"] = max(found.get("terminal", 0.0), to_terminal(*line))
    return {way: round(rate) for way, rate in found.items()}


def main() -> None:
    common.arguments(__doc__).parse_args()
    with common.home(), tempfile.TemporaryDirectory() as folder:
        common.report({"wavenet": wavenet(Path(folder)), "gpt_tokens_per_second": gpt(Path(folder))})


if __name__ == "__main__":
    main()
