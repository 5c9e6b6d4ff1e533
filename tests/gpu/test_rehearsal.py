"""The script for GPUs, rehearsed on a CPU with tiny models, so that it works where a GPU is lent for ten minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
