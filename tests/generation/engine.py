"""What the tests of engines share: the devices they are built for, and how a sequence is begun."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dfcli.cores.protocols import Picking
from dfcli.generation.request import Filters
from dfcli.system.device import Device

CUDA = Device(torch.device("cuda"), "cuda", "GPU", "bfloat16", "", 1)
NO_CUDA = Device(torch.device("cpu"), "cuda", "", "float32", "", 1)  # is said to be a GPU, and fails as one


def gpu() -> Device:
    """A GPU; the calling test skips where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return CUDA


def cpu(threads: int = 1) -> Device:
    return Device(torch.device("cpu"), "cpu", "CPU", "float32", "", threads)


def start(engine: Any, opening: list[list[int]]) -> Any:
    """The engine, with as many sequences as there are openings, each read."""
    engine.start(len(opening))
    engine.prefill(np.array(opening, np.int64))
    return engine


def picking(*values: Any) -> Picking:
    """`Filters` as an engine takes them."""
    return Filters(*values).picking()
