"""A function of tensors on an NVIDIA GPU as one CUDA graph: its hundreds of kernels are launched together. A small
model's training step is otherwise as slow as Python launches kernels, about 10 µs each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def recorded(function: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """The graph of what `function` computes, and what it returned, which every replay writes anew in the same place.
    The function is called twice.

    Raises what PyTorch raises where it cannot be recorded, for instance where it waits for the GPU. Then the current
    stream and the random numbers are as before: PyTorch 2.11 leaves both as if it were still recording."""
    current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        function()  # what libraries set up at their first use must not be recorded
    current.wait_stream(stream)
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    before, graph = generator.clone_state(), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = function()
    except BaseException as error:
        torch.cuda.set_stream(current)
        generator.graphsafe_set_state(before)
        cause = error.__context__  # of the function; the error is of the recording's end
        raise cause if isinstance(cause, RuntimeError) else error from None
    return graph, result


class Replayed:
    """`function` for arguments of the shapes of `example`, where None stays None: recorded once, then replayed. What it
    returns lies in the same memory after every call. The random numbers are those of the generator at that time.

    Raises as `recorded`."""

    def __init__(self, function: Callable[..., list[Tensor]], example: Sequence[Tensor | None]) -> None:
        self._inputs = [None if x is None else x.clone() for x in example]
        self._graph, self._result = recorded(lambda: function(*self._inputs))

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
