"""Sound that is cut off by a signal, at several points: what is there is a wav of the length that was said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.generation.runs import RATE, wavenet_run
from tests.generation.test_wav import length

# Makes sound without an end in a process of its own for each signal and moment, and prints what became of it.
PROGRAM = """
import json, os, signal, sys, time
from dfcli.cli.signals import exit_on_termination
from dfcli.generation import engines, sample

engines._kernel = lambda core, device: None  # nothing is to be compiled
run, folder = sys.argv[1:]
for name in ("SIGINT", "SIGTERM", "SIGKILL"):
    for moment in (0, 0.01, 0.3):
        out = f"{folder}/{name}-{moment}.wav"
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            exit_on_termination()
            code = 0
            try:
                result = sample.sample_audio(run, 3600, out, device="cpu", seed=1)
                os.write(writer, str(result.tokens).encode())
            except SystemExit as end:
                code = end.code
            finally:
                os._exit(code)
        os.close(writer)
        while not os.path.exists(out):
            time.sleep(0.0002)
        time.sleep(moment)
        os.kill(child, getattr(signal, name))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([name, out, code, os.read(reader, 100).decode()]), flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals as on POSIX")
def test_a_cut_off_wav_is_whole(tmp_path: Path) -> None:
    run = wavenet_run()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(run.path), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 9
    for name, out, code, said in rows:
        assert code == {"SIGINT": 0, "SIGTERM": 143, "SIGKILL": -9}[name]
        made = length(Path(out))
        assert made < 3600 * RATE
        if name == "SIGINT":
            assert made - int(said) in (0, int(made == 1))  # the first sample is there before it is counted
    assert max(length(Path(out)) for _, out, _, _ in rows) > 10
