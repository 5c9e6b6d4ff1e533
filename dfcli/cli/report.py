"""`df report`: one HTML page about runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dfcli.cli import output
from dfcli.cli.figures import size
from dfcli.cli.options import Device
from dfcli.errors import UsageError
from dfcli.system.options import check_device


def report(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="RUN...", help="Runs' names or folders; the newest by default.")
    ] = None,
    out: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="The page to write; an existing one is replaced.")
    ] = Path("report.html"),
    device: Device = "auto",
) -> None:
    """Write one HTML page about runs: figures, the loss curve, samples.

    The page needs no other file and no network. It holds sound and spectrograms
    of a WaveNet, and text of a GPT.

    Examples:
      df report
      df report small large -o report.html
    """
    from dfcli.runs import Run, newest

    check_device(device)
    if not out.parent.is_dir():
        raise UsageError(f"there is no folder {out.parent}", f"make it first: `mkdir -p {out.parent}`")
    if out.is_dir():
        raise UsageError(f"{out} is a folder", f"name a file: `-o {out / 'report.html'}`")
    with output.Listener() as listener:
        runs = [Run.open(name) for name in dict.fromkeys(names)] if names else [newest(on_event=listener)]
        with output.loading():
            from dfcli.report.page import write

        written = write(runs, out, device=device, on_event=listener)
    output.say(f"wrote {output.one_line(out)} ({size(written)})")
