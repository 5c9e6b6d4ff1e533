"""The pictures of the README, made from real sessions. Needs matplotlib, pexpect and pyte.

python tests/pictures/make.py session [MINUTES [TEXT]]    in a data home of its own, which is removed
    .pictures/train.svg     the live view of `df train gpt`, as a terminal of 100 columns shows it
    .pictures/eval.svg      the table of `df eval`
    .pictures/loss.svg      the losses of that training, beside its best baseline

python tests/pictures/make.py voices RUN                  a WaveNet with the labels digit and speaker
    .pictures/voices.png    spectrograms of clips that it generates: two digits, each of two speakers
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pexpect
import pyte
from rich.console import Console
from rich.text import Text

import dfcli

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / ".pictures"
COLUMNS = 100
PROGRAM = [sys.executable, "-m", "dfcli"]


def main(minutes: float = 1.0, text: str = "") -> None:
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {"DFCLI_HOME": home, "PYTHONPATH": str(ROOT), "COLORTERM": "truecolor"}
        data = ["--data", "shakespeare.txt"] if text else []
        if data:
            (Path(home) / "shakespeare.txt").write_bytes(Path(text).read_bytes())
        os.chdir(home)
        line = ["train", "gpt", *data, "--minutes", f"{minutes:g}", "--name", "shakespeare" if data else "built-in"]
        save(session(line, until=60.0), "train.svg", "df " + " ".join(line))
        save(session(["eval"]), "eval.svg", "df eval")
        loss_curve(Path(home))


def session(words: list[str], until: float | None = None) -> pyte.Screen:
    """The screen of a command in a terminal: when `until` percent are done, or at its end."""
    screen = pyte.Screen(COLUMNS, 34)
    stream = pyte.ByteStream(screen)
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment |= {"TERM": "xterm-256color"}
    child = pexpect.spawn(PROGRAM[0], [*PROGRAM[1:], *words], dimensions=(34, COLUMNS), env=environment, timeout=30)
    shown = None
    while True:
        try:
            data = child.read_nonblocking(1 << 16, timeout=1)
        except pexpect.TIMEOUT:
            continue
        except pexpect.EOF:
            break
        # pyte knows no faint text: it is shown in grey
        stream.feed(re.sub(rb"\x1b\[2(;|m)", lambda found: b"\x1b[90" + found[1], data))
        if until is not None and shown is None and complete(screen, until):
            shown = text_of(screen)
    child.close()
    if child.exitstatus:
        raise SystemExit(f"df {' '.join(words)} ended with {child.exitstatus}")
    screen.shown = shown or text_of(screen)  # type: ignore[attr-defined]
    return screen


def complete(screen: pyte.Screen, percent: float) -> bool:
    """Whether a whole picture stands on the screen, of a training that has come so far."""
    text = "\n".join(screen.display)
    done = re.search(r"(\d+)%  step", text)
    return done is not None and float(done[1]) >= percent and "╰" in text and "a sample at" in text


def text_of(screen: pyte.Screen) -> Text:
    """What a screen shows, with its colours, from the first line of the view on."""
    text = Text()
    lines = [line.rstrip() for line in screen.display]
    last = max((i for i, line in enumerate(lines) if line), default=0)
    first = next((i for i, line in enumerate(lines) if line.startswith("╭")), 0)
    for y in range(first, last + 1):
        for x in range(len(lines[y])):
            char = screen.buffer[y][x]
            colour = {"brown": "yellow", "brightblack": "bright_black"}.get(char.fg, char.fg)
            colour = f"#{colour}" if re.fullmatch("[0-9a-f]{6}", colour) else colour
            style = " ".join(filter(None, ("bold" * char.bold, "italic" * char.italics, colour)))
            text.append(char.data, style=style if style != "default" else "")
        text.append("\n")
    return text


def save(screen: pyte.Screen, name: str, title: str) -> None:
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(screen.shown, end="", soft_wrap=True)  # type: ignore[attr-defined]
    svg = console.export_svg(title=title, unique_id=name.partition(".")[0])
    # The fonts of Rich's template are fetched from elsewhere; the reader's own fixed-width font does as well.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    (PICTURES / name).write_text(svg, encoding="utf-8")


def loss_curve(home: Path) -> None:
    import matplotlib.pyplot as plt

    run = next((home / "runs").iterdir())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[1:]]
    evaluation = subprocess.run([*PROGRAM, "eval", "--json"], check=True, capture_output=True, text=True)
    baselines = json.loads(evaluation.stdout)["baselines"]
    best = min(baselines, key=lambda name: baselines[name]["loss"])
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for key, label, marker in (("train_loss", "training", ""), ("val_loss", "validation", "o")):
        points = [(row["seconds"], row[key] / math.log(2)) for row in rows if row.get(key) is not None]
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=3, linewidth=1.2, label=label)
    bits = baselines[best]["loss"] / math.log(2)
    axes.axhline(bits, color="grey", linestyle=":", label=f"{best} baseline, {bits:.2f} bits")
    axes.set(xlabel="seconds of training", ylabel="bits a character")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURES / "loss.svg", metadata={"Date": None})


def voices(run: str) -> None:
    import matplotlib.pyplot as plt
    import soundfile

    speakers = dfcli.Run.open(run).conditioning.names["speaker"]  # type: ignore[union-attr]
    figure, rows = plt.subplots(2, 2, figsize=(7, 3.6), sharex=True, sharey=True, layout="constrained")
    for axes, speaker in zip(rows, (speakers[0], speakers[2]), strict=True):
        for cell, digit in zip(axes, ("3", "7"), strict=True):
            with tempfile.TemporaryDirectory() as folder:
                dfcli.sample_audio(
                    run, None, Path(folder) / "clip.wav", seed=1, labels={"digit": digit, "speaker": speaker}
                )
                samples, rate = soundfile.read(Path(folder) / "clip.wav")
            cell.specgram(samples + 1e-6, NFFT=256, noverlap=224, Fs=rate, vmin=-120, vmax=-20)
            cell.set_title(f"{speaker} says {digit}", fontsize=9)
    figure.supxlabel("seconds", fontsize=9)
    figure.supylabel("Hz", fontsize=9)
    figure.savefig(PICTURES / "voices.png", dpi=110)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["session", *rest]:
            main(*(float(word) if i == 0 else word for i, word in enumerate(rest)))  # type: ignore[arg-type]
        case ["voices", run]:
            voices(run)
        case _:
            raise SystemExit(__doc__)
