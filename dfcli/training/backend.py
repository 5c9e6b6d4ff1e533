"""The backends of training: PyTorch, which is the reference, and compiled kernels for the models they support."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfcli import cores
from dfcli.cores.protocols import Backend, Pass
from dfcli.data.batches import Batch
from dfcli.system.device import Device, out_of_memory
from dfcli.system.events import Choice, Note, OnEvent
from dfcli.system.processes import ALONE, Processes
from dfcli.system.words import first_line
from dfcli.training import optim, sharding
from dfcli.training.loss import cross_entropy
from dfcli.training.settings import Recipe

WIDE = 256  # channels of a GPT from which on PyTorch is faster in bfloat16 on a CPU with units for it
ROOM = 1.25  # times as many rows of a condition as the first batch has: few others have more


def choose(
    core: cores.Core, recipe: Recipe, device: Device, on_event: OnEvent, processes: Processes = ALONE
) -> Backend:
    """The backend for a core on its device, its kernels compiled: the same in each process, whose weights would drift
    apart otherwise. The choice is told; where kernels fail, training goes on with PyTorch alone."""
    sharded = "the weights are in parts over several processes" if sharding.is_sharded(core) else None
    reason, compiled = sharded or unsupported(core.config, recipe, device), None
    if reason is None:
        try:
            compiled = CompiledBackend(core, recipe, device, on_event)
        except Exception as error:  # numba's errors have no base class
            reason = f"the compiled kernels do not work here ({first_line(error)[:200]})"
    missing, _ = processes.agree(int(compiled is None), 0.0)
    if compiled is not None and not missing:
        on_event(Choice("backend", "compiled", f"kernels for this model on this CPU, in {compiled.device.precision}"))
        return compiled
    backend, reason = TorchBackend(core, recipe, device), reason or "the compiled kernels do not work in every process"
    on_event(Choice("backend", "PyTorch", f"{reason}; in {backend.device.precision}"))
    return backend


def in_precision(device: Device, config: cores.CoreConfig, recipe: Recipe, compiled: bool = True) -> Device:
    """The device with the precision of a training's products: its own, except where the recipe asks for float32 or a
    CPU computes that faster. Kernels take bfloat16 for some widths; by PyTorch, of a small model (or where kernels are
    not to be `compiled`), the conversions cost more than the products."""
    wide = isinstance(config, cores.WaveNetConfig) or (isinstance(config, cores.GPTConfig) and config.channels >= WIDE)
    if recipe.precision == "float32":
        rounded = False
    elif device.kind == "cpu" and compiled and unsupported(config, recipe, device) is None:
        rounded = _kernel(config).rounds(config)
    else:
        rounded = device.kind != "cpu" or wide
    return device if rounded else replace(device, precision="float32")


def unsupported(config: cores.CoreConfig, recipe: Recipe, device: Device) -> str | None:
    """None where compiled kernels train a model of this config, else the reason, a clause."""
    if recipe.compile != "auto":
        return f"`compile` is {recipe.compile}"
    if device.kind != "cpu":
        return "the compiled kernels are for a CPU"
    if recipe.packing == "last":
        return "the compiled kernels train on every position, and this recipe on the last one only"
    precision = "float32" if recipe.precision == "float32" else device.precision
    try:
        kernel = _kernel(config)
        return "there are no kernels for this core" if kernel is None else kernel.supports(config, precision)
    except Exception as error:  # a missing or broken numba raises ImportError, OSError and others
        return f"the compiled kernels cannot be imported ({first_line(error)[:200]})"


def _kernel(config: cores.CoreConfig) -> Any:
    """The module of `kernels/` that trains such a core, or None."""
    if isinstance(config, cores.GPTConfig):
        from dfcli.kernels import gpt_train as kernel
    elif isinstance(config, cores.WaveNetConfig):
        from dfcli.kernels import wavenet_train as kernel
    else:
        return None
    return kernel


def tensors(batch: Batch, device: Device) -> tuple[Tensor, Tensor, Tensor | None, Any]:
    """A batch's ids, targets, positions and condition on a device."""

    def moved(x: Any) -> Any:
        if x is None:
            return None
        # From pinned memory a copy waits for nothing; from other memory it waits for all work that is queued.
        return (x.pin_memory() if device.torch_device.type == "cuda" else x).to(device.torch_device, non_blocking=True)

    condition = batch.condition and cores.Condition(*map(moved, batch.condition))
    return moved(batch.ids), moved(batch.targets), moved(batch.positions), condition


class TorchBackend:
    """`Backend` of PyTorch's autograd, with torch.compile where that is asked for or pays, and on CUDA as one graph."""

    name = "torch"

    def __init__(self, core: cores.Core, recipe: Recipe, device: Device) -> None:
        self._core, self._forward = core, core
        self.device = in_precision(device, core.config, recipe, self.name == "compiled")
        self._recipe, self._last = recipe, recipe.packing == "last"
        self._graph: Any = None  # kernels.cuda.graph.Replayed of `_gradients`
        self._learning: list[torch.nn.Parameter] = []  # the parameters of its gradients
        self._room = 0  # rows that a condition is padded to for the graph
        self.threads = device.threads
        self._sharded = sharding.is_sharded(core)
        self.sparse = device.kind == "cpu" and not self._sharded  # saves writing and reading tables of megabytes

    def backward(self, ids: Tensor, targets: Tensor, positions: Tensor | None, condition: Any, count: int) -> Tensor:
        if self._graph:
            arguments = self._arguments(ids, targets, positions, condition, count)
            if self._graph.fits(arguments):
                loss, *grads = self._graph(arguments)
                for p, grad in zip(self._learning, grads, strict=True):
                    if p.grad is not None:
                        p.grad.add_(grad)
                    else:  # the next replay writes into the same memory
                        p.grad = grad.clone() if self._recipe.accumulate > 1 else grad
                return loss
        loss = self._loss(ids, targets, positions, condition)
        (loss / max(1, count)).backward()
        return loss.detach()

    def _loss(self, ids: Tensor, targets: Tensor, positions: Tensor | None, condition: Any = None) -> Tensor:
        with self.device.autocast(training=True):
            more = {} if condition is None else {"condition": condition}
            logits = self._forward(ids, positions, self._last, **more)
            return cross_entropy(logits, targets[:, -1:] if self._last else targets)

    def _arguments(
        self, ids: Tensor, targets: Tensor, positions: Tensor | None, condition: Any, count: int
    ) -> list[Tensor | None]:
        """Of `_gradients`, of the same shapes for each batch: a condition's rows, whose number changes, are padded to
        `_room`. The number of targets is a tensor too, which a graph can read."""
        number = torch.full((), max(1, count), dtype=torch.float32, device=ids.device)
        labels, series, index = condition or (None, None, None)
        rows = [x if x is None else F.pad(x, (0, 0, 0, max(0, self._room - len(x)))) for x in (labels, series)]
        return [ids, targets, positions, number, *rows, index]

    def _gradients(self, ids: Any, targets: Any, positions: Any, count: Any, *parts: Any) -> list[Tensor]:
        """The summed loss, and the gradients of the mean's over `count` targets, of `_learning`."""
        self._core.zero_grad()
        condition = None if parts[-1] is None else cores.Condition(*parts)
        loss = self._loss(ids, targets, positions, condition)
        (loss / count).backward()
        self._learning = [p for p in self._core.parameters() if p.grad is not None]
        grads = [p.grad for p in self._learning if p.grad is not None]
        self._core.zero_grad()  # nothing but what is returned is left of the pass
        return [loss.detach(), *grads]

    def orthogonalise_all(self, matrices: list[Tensor]) -> list[Tensor]:
        if self._sharded:
            return sharding.one_by_one(optim.orthogonalise_all, matrices)
        return optim.orthogonalise_all(matrices)

    def update_rows(self, tables: list[tuple[Tensor, ...]], lr: float, eps: float) -> None:
        optim.update_rows(tables, lr, eps)

    def warm_up(self, batch: Callable[[], Batch], on_event: OnEvent) -> None:
        """Make the pass faster where that is possible: torch.compile, and on CUDA a graph of all its kernels. Passes of
        a batch try it, and change nothing; where that fails it is told, and the pass stays as it was. Sharded weights
        are left alone: not tried on a GPU yet. Raises what PyTorch raises where memory runs out."""
        if self._sharded and self._recipe.compile == "on":
            on_event(Note("`compile=on` has no effect: weights in parts over several processes are trained uncompiled"))
        on_cuda = self.device.kind == "cuda" and self._recipe.compile != "off"
        if self._sharded or not (on_cuda or self._recipe.compile == "on"):
            return
        buffers = {name: buffer.clone() for name, buffer in self._core.named_buffers()}  # BatchNorm's, which it moves
        one = tensors(batch(), self.device)
        if one[3] is not None:
            self._room = round(ROOM * max(len(rows) for rows in one[3][:2] if rows is not None))
        try:
            example = self._arguments(*one, 1)
            self._compile(example, on_event)
            if on_cuda:
                self._record(example, on_event)
        finally:
            self._core.zero_grad()
            for name, buffer in self._core.named_buffers():
                buffer.copy_(buffers[name])

    def _compile(self, example: list[Tensor | None], on_event: OnEvent) -> None:
        """torch.compile where the recipe asks for it or it pays: on CUDA for budgets of more than two minutes or 2,000
        steps, because it takes half a minute in each process. On a CPU it has not been shown to pay."""
        r, kind = self._recipe, self.device.kind
        wanted = r.compile == "auto" and kind == "cuda" and (r.minutes > 2 or r.steps > 2000)
        if not (r.compile == "on" or wanted):
            return
        try:
            self._forward, self.sparse = torch.compile(self._core), False  # it cannot compile sparse gradients
            self._gradients(*example)
        except Exception as error:  # whatever the compiler of this machine raises
            if out_of_memory(error):  # `memory.explained` says what to lower
                raise
            on_event(Note(f"torch.compile does not work here ({first_line(error)[:200]}); training uncompiled"))
            self._forward, self.sparse = self._core, kind == "cpu"

    def _record(self, example: list[Tensor | None], on_event: OnEvent) -> None:
        """A graph of the pass. A batch with more rows of a condition than `_room` is computed without the graph."""
        try:
            from dfcli.kernels.cuda.graph import Replayed

            self._graph = Replayed(self._gradients, example)
        except (ImportError, RuntimeError) as error:
            why = "there is too little memory for one" if out_of_memory(error) else first_line(error)[:200]
            on_event(Note(f"without a CUDA graph, which is slower ({why})"))


class CompiledBackend(TorchBackend):
    """`Backend` of the kernels for a CPU. Raises what numba raises where it cannot compile."""

    name = "compiled"

    def __init__(self, core: cores.Core, recipe: Recipe, device: Device, on_event: OnEvent) -> None:
        from dfcli.kernels.compile import once
        from dfcli.kernels.optimizer import OptimizerKernels
        from dfcli.kernels.threads import WorkerPool

        super().__init__(core, recipe, device)
        workers, on_event = WorkerPool(device.threads), once(on_event)
        self._pass: Pass = _kernel(core.config).build(core, workers, on_event, self.device.precision)
        self._kernels = OptimizerKernels(workers, on_event)
        self.threads = 1  # what is left to PyTorch is too short to be worth waking threads for

    def backward(self, ids: Tensor, targets: Tensor, positions: Tensor | None, condition: Any, count: int) -> Tensor:
        nats, grads = self._pass(ids, targets, positions, condition, count)
        for p, grad in grads:
            p.grad = grad if p.grad is None else p.grad + grad
        return nats

    def warm_up(self, batch: Callable[[], Batch], on_event: OnEvent) -> None:
        pass

    def orthogonalise_all(self, matrices: list[Tensor]) -> list[Tensor]:
        ours = [self._kernels.fits(matrix) for matrix in matrices]
        small = self._kernels.orthogonalise(
            [m for m, fits in zip(matrices, ours, strict=True) if fits], optim.NEWTON_SCHULZ
        )
        large = optim.orthogonalise_all([m for m, fits in zip(matrices, ours, strict=True) if not fits])
        small_, large_ = iter(small), iter(large)
        return [next(small_ if fits else large_) for fits in ours]

    def update_rows(self, tables: list[tuple[Tensor, ...]], lr: float, eps: float) -> None:
        self._kernels.update_rows(tables, lr, eps)
