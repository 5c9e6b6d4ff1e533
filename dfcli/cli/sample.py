"""`df sample`: writes text to stdout while it is generated, or sound to a file."""

from __future__ import annotations

import os
import shlex
import stat
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, cast

import typer

from dfcli.cli import output
from dfcli.cli.figures import short
from dfcli.cli.layout import Command, Group
from dfcli.cli.options import Json, RunName, key_values, reading_stdin, with_options
from dfcli.cli.signals import INTERRUPTED, TERMINATED
from dfcli.errors import DfError, UsageError
from dfcli.generation.request import SoundRequest, TextRequest

if TYPE_CHECKING:
    from dfcli.generation.sample import SampleResult
    from dfcli.runs import Run

app = typer.Typer(cls=Group, no_args_is_help=True, help="Let a trained model write text or make sound.")

MAX_PROMPT = 16 << 20  # bytes; far more than any context, because a device or a pipe may be endless


@app.command(cls=Command)
@with_options(TextRequest)
def gpt(
    run: RunName = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="Text to continue; `-` is standard input.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", metavar="FILE", help="File to continue; `-` is standard input.")
    ] = None,
    *,
    json: Json = False,
    **options: Any,
) -> None:
    """Write text with a trained GPT, on stdout, while it is generated.

    `--prompt -` reads the prompt from a pipe. One final line break of a file or
    a pipe is dropped. A line of `---` stands between several samples, unless
    each sample is one line.

    Examples:
      df sample gpt
      df sample gpt --prompt "ROMEO:" --tokens 300 --temperature 0.8
      echo "To be" | df sample gpt --run shakespeare --prompt -
      df sample gpt --run names --num 20
    """
    from dfcli.runs import Run, newest

    with output.Listener() as listener:
        found = Run.open(run) if run else newest("text", listener)
        if found.codec.kind != "text":
            raise UsageError(f"the run `{found.name}` makes sound, not text", f"type `{_sound_line(found)}`")
        _write_text(found, _prompt(prompt, prompt_file), json, listener, **options)


@app.command(cls=Command)
@with_options(SoundRequest)
def wavenet(
    run: RunName = None,
    out: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="FILE", help="A .wav, .flac, .ogg or .mp3, or a folder; `-` is stdout."),
    ] = None,
    *,
    json: Json = False,
    **options: Any,
) -> None:
    """Make sound with a trained WaveNet, into a file that grows while it is generated.

    `--num 3 -o out.wav` writes out-01.wav, out-02.wav and out-03.wav. A wav grows
    while it is made. A file of another format appears when it is complete.

    A model of short labelled recordings ends a clip by itself. A vocoder's clip is
    as long as its --mel. For both, --seconds is a limit. A label that is left out
    is drawn at random.
    --prime needs --seconds, and every label of its recording.

    A WaveNet of text writes text on stdout, and needs neither --seconds nor -o.
    `df sample gpt --run NAME` takes a prompt for it.

    Examples:
      df sample wavenet --seconds 4 -o out.wav
      df sample wavenet --seconds 4 -o best.flac --num 8 --best 2
      df sample wavenet --seconds 10 -o - | ffplay -nodisp -autoexit -
      df sample wavenet --seconds 2 -o more.wav --prime clip.wav --keep-prime
      df sample wavenet --label speaker=george --label digit=7 -o seven.wav
      df sample wavenet --mel clip.wav -o again.wav
    """
    from dfcli.runs import Run, newest

    with output.Listener() as listener:
        found = Run.open(run) if run else newest("audio", listener)
        options["labels"] = key_values(options["labels"], "--label", "NAME=VALUE", "speaker=george")
        if found.codec.kind != "text":
            _write_sound(found, out, json, listener, **options)
            return
        if found.kind != "wavenet":
            raise UsageError(
                f"the run `{found.name}` is a {found.kind} that makes text",
                f"type `df sample gpt --run {_word(found)}`",
            )
        known = {f.name for f in fields(TextRequest)}
        for_sound = [f for f in fields(SoundRequest) if f.name not in known]
        if out or any(options[f.name] not in (None, f.default, {}) for f in for_sound):
            raise UsageError(
                f"the run `{found.name}` makes text: --seconds, -o, --prime, --label and --mel are for sound",
                f"type `df sample wavenet --run {_word(found)}`",
            )
        _write_text(found, "", json, listener, **{k: v for k, v in options.items() if k in known})


def _write_text(run: Run, prompt: str, json: bool, listener: output.Listener, **options: Any) -> None:
    from dfcli.generation.checks import check_text

    check_text(run, TextRequest(**options), prompt)
    with output.loading():
        from dfcli.generation.sample import sample_text

    lines = bool(run.info.get("dataset", {}).get("lines"))
    texts = Texts("" if lines else "---\n")
    output.say(f"run {run.name}", style="dim")
    result = sample_text(run, prompt, on_text=(lambda i, text: None) if json else texts, on_event=listener, **options)
    listener.close()
    if json:
        output.write_json(asdict(result))
    else:
        texts.finish(result.samples)
    _tell(result)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)


def _write_sound(run: Run, out: str | None, json: bool, listener: output.Listener, **options: Any) -> None:
    from dfcli.generation.checks import check_sound, condition_info

    request = SoundRequest(**options)
    known, prime, length = condition_info(run), request.prime, request.seconds
    if known.vocoder or (known.ends and prime is None):
        length = 1.0  # it is known without the option
    if length is None or out is None:
        wanted = (("--seconds (how much sound to make)", length), ("-o (where to write it)", out))
        missing = " and ".join(name for name, value in wanted if value is None)
        raise UsageError(f"{missing} must be given", f"for example `{_sound_line(run, request)}`")
    if out == "-" and json:
        raise UsageError("`-o -` and `--json` exclude each other", "both would write to stdout")
    if out == "-" and sys.stdout.isatty():
        raise UsageError("a terminal cannot play a wav", "pipe it to a player, or give a file: `-o out.wav`")
    target = cast(BinaryIO, output.Stdout()) if out == "-" else out
    check_sound(run, request, target)
    if prime is not None and Path(out).exists() and prime.exists() and Path(out).samefile(prime):
        raise UsageError(f"`-o {out}` would overwrite the recording to continue", "choose another name")
    with output.loading():
        from dfcli.generation.sample import AudioProgress, sample_audio

    begun: list[object] = []

    def show(event: object) -> None:
        if isinstance(event, AudioProgress):
            begun[:] = [event]
            of = " in all" if request.num > 1 else ""
            figures = f"{event.seconds:.1f} / {event.total:.1f} s{of}  {event.times_real_time:.2f} × real time"
            listener.bar("sound", event.seconds, event.total, figures)
        else:
            listener(event)

    output.say(f"run {run.name}", style="dim")
    try:
        result = sample_audio(run, out=target, on_event=show, **options)
    except SystemExit as end:
        listener.close()
        if end.code == TERMINATED and begun:
            output.say("stopped early; the finished part is kept")
        raise
    listener.close()
    if json:
        output.write_json(asdict(result))
    for i, path in enumerate(result.samples):
        nats = f" ({result.nats_per_sample[i]:.3f} nats a sample)" if result.nats_per_sample else ""
        labels = result.labels[i].items() if result.labels else ()
        told = f": {', '.join(f'{label} {name}' for label, name in labels)}" if labels else ""
        output.say(f"wrote {output.one_line(path)}{output.one_line(told)}{nats}")
    if result.leading_silence and max(result.leading_silence) >= 0.1:
        waits = ", ".join(f"{silent:.1f}" for silent in result.leading_silence)
        output.say(f"silent at first: {waits} s")
    _tell(result)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)


def _sound_line(run: Run, request: SoundRequest | None = None) -> str:
    from dfcli.generation.checks import sound_options

    return f"df sample wavenet --run {_word(run)} {sound_options(run, request)}"


def _word(run: Run) -> str:
    """The value of `--run` that finds the run: its name, or its folder if it lies elsewhere."""
    from dfcli.runs.run import runs_home

    return shlex.quote(run.name if run.path.parent == runs_home() else str(run.path))


def _tell(result: SampleResult) -> None:
    figures = [f"{short(result.tokens_per_second)} tokens/s"]
    if result.audio_seconds is not None and result.times_real_time is not None:
        of = " in all" if len(result.samples) > 1 else ""
        figures = [
            f"{result.audio_seconds:.1f} s of sound{of} at {result.sample_rate:,} Hz",
            f"made {result.times_real_time:.2f} times as fast as it plays",
        ]
    figures += [f"{result.engine} engine", f"seed {result.seed}"]
    if result.interrupted:
        figures.insert(0, "stopped early; the finished part is kept")
    output.say(" · ".join(figures), style="dim")


class Texts:
    """Writes samples to stdout: the first while it is generated, then the others, with `divider` between them."""

    def __init__(self, divider: str) -> None:
        self.divider = divider
        self.show = output.printable if sys.stdout.isatty() else str  # a file gets the model's text as it is

    def __call__(self, i: int, text: str) -> None:
        if i == 0:
            output.write(self.show(text))

    def finish(self, samples: list[str]) -> None:
        """Write the rest of `samples`. Each ends with a line break."""
        for i, text in enumerate(samples):
            rest = "" if text.endswith("\n") else "\n"
            output.write(rest if i == 0 else self.divider + self.show(text) + rest)


def _prompt(text: str | None, file: Path | None) -> str:
    """The prompt, from the one place where it is given; empty where it is not.

    Standard input is read only where `-` asks for it: inside `while read`, it is the loop's list.
    """
    if text is not None and file is not None:
        raise UsageError("`--prompt` and `--prompt-file` exclude each other", "give one of them")
    if text is None and file is None:
        if _stdin_has_data():
            output.say("standard input is not read; `--prompt -` takes the prompt from it", style="dim")
        return ""
    if text is not None and text != "-":
        return text
    if file is not None and str(file) != "-":
        try:
            with file.open("rb") as stream:
                return _decode(stream, str(file))
        except OSError as error:
            hint = 'check the path, or give the prompt itself: `--prompt "It was"`'
            raise DfError(f"could not read {file}: {error.strerror}", hint) from None
    if sys.stdin is None:
        raise UsageError("standard input is closed", 'give the prompt with `--prompt "It was"`')
    with reading_stdin("the prompt"):
        try:
            return _decode(sys.stdin.buffer, "standard input")
        except OSError as error:
            raise DfError(f"could not read standard input: {os.strerror(error.errno or 0)}") from None


def _stdin_has_data() -> bool:
    """Whether a pipe or a file on standard input has something that could be meant as the prompt."""
    try:
        number = sys.stdin.fileno()
        if stat.S_ISREG(mode := os.fstat(number).st_mode):
            return os.lseek(number, 0, os.SEEK_CUR) < os.fstat(number).st_size
        if not stat.S_ISFIFO(mode) or os.name == "nt":
            return False
        import fcntl
        import termios

        waiting = fcntl.ioctl(number, termios.FIONREAD, b"\0" * 4)
        return int.from_bytes(waiting, sys.byteorder) > 0
    except (AttributeError, OSError, ValueError):  # there is no standard input
        return False


def _decode(stream: BinaryIO, source: str) -> str:
    """UTF-8 text without the byte order mark and the one final line break that editors and `echo` add."""
    data = stream.read(MAX_PROMPT + 1)
    if len(data) > MAX_PROMPT:
        raise DfError(
            f"the prompt from {source} has more than {MAX_PROMPT:,} bytes",
            "give its last part: no model has so long a context",
        )
    try:
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        name = "FILE" if source == "standard input" else shlex.quote(source)
        hint = f"convert it, for example from Latin-1: `iconv -f latin1 -t utf-8 {name} > utf-8.txt`"
        raise DfError(f"{source} is not UTF-8 text: see byte {error.start:,}", hint) from None
