"""The GPU's WaveNet kernel: run by Triton's interpreter where there is no GPU, and compiled for one all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dfcli.generation import engines
from tests.generation.engine import CUDA, NO_CUDA, gpu
from tests.kernels.test_wavenet_sample import build

triton = pytest.importorskip("triton", reason="PyTorch brings Triton on Linux only")
FOLDER = Path(__file__).parent


@pytest.mark.timeout(400)  # the interpreter takes a minute of a core
@pytest.mark.parametrize("interpret", ["1", "0"])
def test_kernel(interpret: str) -> None:
    if interpret == "0":
        gpu()
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / "interpreted_wavenet.py")]
    done = subprocess.run(
        line, env=os.environ | {"TRITON_INTERPRET": interpret}, cwd=FOLDER.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr


@pytest.mark.parametrize(
    ("M", "G", "R", "picks"),
    [(1, 3, 64, "sorts"), (16, 1, 64, ""), (1, 1, 64, "greedy"), (1, 3, 128, ""), (16, 1, 128, "")],
)
def test_it_compiles_for_a_gpu(
    M: int, G: int, R: int, picks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the interpreter lets pass and the compiler does not; it needs no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dfcli.kernels.cuda.wavenet import FLAGS, TILE, Chunk, Sizes, State, Weights, _samples

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kinds = {
        "weights": Weights(*["*fp32"] * 8, "*i32"), "state": State(*["*fp32"] * 7, "*i32"),
        "chunk": Chunk("*fp64", "*fp32", "*i32", "*i64"), "picking": "*fp32",
    } | dict.fromkeys(("batch", "n", "clock"), "i32") | dict.fromkeys(("c", "TILE", "FLAGS"), "constexpr")  # fmt: skip
    stages = 2 if R == 64 else 1
    sizes = Sizes(256, 100, L=3, taps=2, R=R, P=R, S=256, H=256, W=256, normed=True, M=M, G=G, stages=stages)
    sizes = sizes._replace(**{picks: True}) if picks else sizes
    source = ASTSource(_samples, kinds, {"c": sizes, "TILE": TILE, "FLAGS": FLAGS})
    code = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 8})
    # What one program may use on the smallest GPU from Ampere on; for many clips of wide layers, on an H100.
    assert code.metadata.shared <= (227 if R * M > 1024 else 99) * 1024
    assert "atom" in code.asm["ptx"] or G == 1


def test_where_it_does_not_run_the_plain_engine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        major, multi_processor_count = 7, 80

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    for core, part in ((build(), "too old"), (build(residual=200), "at most 128 residual channels")):
        engine, reason = engines.choose("wavenet", core, 1, CUDA)
        assert engine.name == "plain"
        assert part in reason
    monkeypatch.setattr(Properties, "major", 9)  # and then there is none
    core = build()
    engine, reason = engines.choose("wavenet", core, 1, NO_CUDA)
    assert engine.name == "plain"
    assert reason.startswith("the compiled engine does not work here (")
