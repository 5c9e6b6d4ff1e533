"""Without `kernels/` the product works, only slower."""

from __future__ import annotations

import subprocess
import sys
import wave
from pathlib import Path

import numpy as np

BLOCKED = """
import sys
from importlib.abc import MetaPathFinder

class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[:2] == ["dfcli", "kernels"] or name.split(".")[0] in ("numba", "llvmlite", "triton"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""

PRODUCT = """
from pathlib import Path
from dfcli.evaluation.evaluate import evaluate
from dfcli.generation.sample import sample_audio, sample_text
from dfcli.system.events import Choice
from dfcli.training.train import train

events = []
small = {"context": "16", "layers": "1", "heads": "1", "channels": "16"}
train("gpt", ["words.txt"], name="text", steps=4, batch_size=2, overrides=small, on_event=events.append)
small = {"dilations": "1,2", "cycles": "1", "residual": "16", "skip": "16", "head": "16", "window": "64"}
train("wavenet", ["noise.wav"], name="sound", steps=3, batch_size=1, overrides=small, on_event=events.append)
reasons = [event.reason for event in events if isinstance(event, Choice) and event.what == "backend"]
assert len(reasons) == 2, reasons
assert all("cannot be imported (ModuleNotFoundError" in reason for reason in reasons), reasons
assert sample_text("text", "a", tokens=20, seed=1).engine == "plain"
assert sample_audio("sound", 0.01, "out.wav", seed=1).engine == "plain"
assert Path("out.wav").stat().st_size > 44
assert evaluate("text").loss > 0
print("done")
"""


def test_the_product_works_without_kernels(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "noise.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(np.random.default_rng(0).integers(-9000, 9000, 8000).astype("<i2").tobytes())
    (tmp_path / "words.txt").write_text("".join(f"word {n} and {n * n}\n" for n in range(400)))
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + PRODUCT], cwd=tmp_path, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "done"
