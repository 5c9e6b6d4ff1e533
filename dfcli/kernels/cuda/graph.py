"""A function of tensors on an NVIDIA GPU as one CUDA graph: its hundreds of kernels are launched together. A small
model's training step is otherwise as slow as Python launches kernels, about 10 µs each; see `training/backend.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Replayed:
    """`function`, whose kernels are recorded for arguments like `example` (None stays None) and then replayed. What it
    returns lies in the same memory after every call, and so does all that it keeps meanwhile.

    The random numbers of a replay are those of the generator at that time. Raises what PyTorch raises where the
    function cannot be recorded, for instance where it waits for the GPU."""

    def __init__(self, function: Callable[..., list[Tensor]], example: Sequence[Tensor | None]) -> None:
        self._inputs = [None if x is None else x.clone() for x in example]
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            function(*self._inputs)  # what libraries set up at their first use must not be recorded
        current.wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = function(*self._inputs)

    def fits(self, arguments: Sequence[Tensor | None]) -> bool:
        """Whether the arguments have the shapes that were recorded."""
        return [_shape(x) for x in arguments] == [_shape(x) for x in self._inputs]

    def __call__(self, arguments: Sequence[Tensor | None]) -> list[Tensor]:
        for mine, given in zip(self._inputs, arguments, strict=True):
            if mine is not None and given is not None:
                mine.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._result


def _shape(x: Tensor | None) -> torch.Size | None:
    return None if x is None else x.shape
