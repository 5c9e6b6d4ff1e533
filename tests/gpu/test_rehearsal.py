"""The script for GPUs, rehearsed on a CPU with tiny models, so that it works where a GPU is lent for ten minutes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.gpu.main import PARTS

RUN = Path(__file__).parent / "run"


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory, and needs bash")
@pytest.mark.timeout(600)
def test_every_part_runs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = ["bash", str(RUN), str(out), "--device", "cpu", "--quick"]
    done = subprocess.run(line, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + (out / "log.txt").read_text()[-5000:]
    results = json.loads((out / "results.json").read_text())
    assert list(results) == list(PARTS)
    assert done.stdout.endswith((out / "summary.md").read_text() + "\n")


@pytest.mark.skipif(sys.platform != "linux", reason="needs bash")
@pytest.mark.timeout(200)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_script_leaves_no_process_and_its_figures(number: int, code: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = ["bash", str(RUN), str(out), "--device", "cpu", "--quick", "--only", "processes"]
    environment = os.environ | {"PYTHON": sys.executable, "TMPDIR": str(tmp_path)}
    script = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    below: list[psutil.Process] = []
    while len(below) < 4:  # the part, torchrun, and its two processes, which have sessions of their own
        time.sleep(0.1)
        below = psutil.Process(script.pid).children(recursive=True)
    script.send_signal(number)
    script.communicate()
    assert script.returncode == code
    assert psutil.wait_procs(below, timeout=5)[1] == []
    assert json.loads((out / "results.json").read_text())["processes"]["status"] == "interrupted"
    assert "interrupted" in (out / "summary.md").read_text()
    assert not list(tmp_path.glob("dfcli-gpu-*"))
