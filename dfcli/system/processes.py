"""The processes of one training: one alone, or several that torchrun started, on one machine or more.

torchrun gives each process its rank in the environment. `joined` connects them; callers then use the same methods as a
process alone, for which each method does nothing. Two ways of communication:

- The store (a key-value server that torchrun runs) carries plans, errors and turns. A process can wait in it for hours,
  because another one prepares data, and Ctrl-C still ends it.
- Collectives carry tensors: gloo between CPUs, nccl between GPUs. Every process must call the same ones in the same
  order. If a process ends early, the others raise `Elsewhere`; torchrun then ends them too.

Gradients are added up here instead of by DistributedDataParallel, because compiled kernels write gradients directly,
where its hooks do not see them. PyTorch is imported when processes join, so that `rank` costs nothing.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

from dfcli.errors import DfError, UsageError
from dfcli.system.words import first_line

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dfcli.system.device import Device

T = TypeVar("T")

_GROUPS = itertools.count()  # trainings of this process so far: the same in each process

TIMEOUT = timedelta(minutes=10)  # of a collective: the first process may write a checkpoint meanwhile
BUCKET = 2**24  # gradients that travel together: 64 MB of float32
_REASONS = (None, "interrupted", "terminated")  # to stop, see `Pulse`
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Elsewhere(DfError):
    """An error of another process of this training. Only the first process reports it."""

    def __init__(self, message: str, hint: str = "", exit_code: int = 1) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code


def _number(name: str, default: int) -> int:
    """A number that torchrun set; `default` unless everything that it sets is there."""
    if not all(os.environ.get(key) for key in _NEEDED):
        return default
    try:
        return int(os.environ[name])
    except ValueError:
        raise UsageError(f"{name}={os.environ[name]} in the environment is no number", "start with torchrun") from None


def rank() -> int:
    """The number of this process among those of its training; 0 is the one that prints and writes."""
    return _number("RANK", 0)


def count() -> int:
    """How many processes train together."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """The number of this process on its machine."""
    return _number("LOCAL_RANK", 0)


def local_count() -> int:
    """How many processes of the training run on this machine."""
    return _number("LOCAL_WORLD_SIZE", 1)


class Processes:
    """A process alone: nothing is shared, and each method returns at once. `Group` overrides what several do."""

    rank, count = 0, 1
    sharded = False  # whether each process holds a part of the weights: FSDP then adds up their gradients

    @property
    def first(self) -> bool:
        """Whether this process prints, logs and writes."""
        return self.rank == 0

    def rows(self, total: int) -> slice:
        """The rows of a batch of `total` that this process computes. `total` is a multiple of `count`."""
        share = total // self.count
        return slice(self.rank * share, (self.rank + 1) * share)

    def together(self, work: Callable[[], T]) -> T:
        """The result of `work` once it has succeeded in every process. Raises the error of the lowest rank."""
        return work()

    def from_first(self, value: Any) -> Any:
        """The value, of the kinds that JSON has, of the first process."""
        return value

    def refuse(self, error: DfError) -> None:
        """In the first process: raise `error` in the others, unless they have had a value from this one."""

    def connect(self, device: Device) -> None:
        """Open the collectives, for tensors on `device`. Every process calls it once, before the methods below."""

    def error(self, message: str, hint: str) -> DfError:
        """The error to raise where every process meets the same one."""
        return DfError(message, hint) if self.first else Elsewhere(message, hint)

    def add_gradients(self, parameters: Iterable[nn.Parameter], total: Tensor) -> None:
        """Replace all gradients, and the scalar `total` beside them, by their sums over the processes. The gradients of
        sharded weights are sums already."""

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sums of `values` over the processes, in float64."""
        return list(values)

    def agree(self, code: int, clock: float) -> tuple[int, float]:
        """The largest `code` of all processes, and the clock of the first one."""
        return code, clock

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the first one's values of `tensors`, in place."""

    def check_equal(self, tensors: Sequence[Tensor]) -> None:
        """Raise DfError unless `tensors` (float32), where each process has them whole, have the same bits in each."""

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Raise Elsewhere where a collective of FSDP fails in the block, because another process has ended."""
        yield

    def leave(self) -> None:
        """End the connection."""


ALONE = Processes()


class Group(Processes):
    """One of several processes. `store` is torchrun's; nothing else uses its part `name`."""

    def __init__(self, store: Any, name: str) -> None:
        import torch
        import torch.distributed

        distributed: Any = torch.distributed
        self.rank, self.count = rank(), count()
        self._torch, self._distributed = torch, distributed
        self._store, self._exchanges = distributed.PrefixStore(name, store), 0

    # --- by the store

    def together(self, work: Callable[[], T]) -> T:
        result, failure = None, None
        try:
            result = work()
        except DfError as error:
            failure = error
        said = [failure.message, failure.hint, failure.exit_code] if failure else []
        for number, error in enumerate(self._exchange(json.dumps(said).encode())):
            if error := json.loads(error):
                if failure and number == self.rank == 0:
                    raise failure
                raise Elsewhere(f"process {number} of {self.count}: {error[0]}" if number else error[0], *error[1:])
        return cast(T, result)

    def from_first(self, value: Any) -> Any:
        found = json.loads(self._exchange(json.dumps([value, None]).encode() if self.first else b"")[0])
        if found[1]:
            raise Elsewhere(*found[1])
        return found[0]

    def refuse(self, error: DfError) -> None:
        if not self._exchanges:
            self._exchange(json.dumps([None, [error.message, error.hint, error.exit_code]]).encode())

    def _exchange(self, mine: bytes) -> list[bytes]:
        """What each process has given to this call, by rank. Waits as long as it takes."""
        self._exchanges += 1
        with _connected():
            self._store.set(f"{self._exchanges}/{self.rank}", mine)
            return [self._wait(f"{self._exchanges}/{number}") for number in range(self.count)]

    def _wait(self, key: str) -> bytes:
        pause = 0.001
        while not self._store.check([key]):  # its own `wait` does not hear Ctrl-C
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
        return self._store.get(key)

    # --- by collectives

    def connect(self, device: Device) -> None:
        on_gpu = device.kind == "cuda"
        self._where = device.torch_device
        with _connected():
            self._distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo", rank=self.rank, world_size=self.count, timeout=TIMEOUT,
                store=self._distributed.PrefixStore("collectives", self._store),
                device_id=self._where if on_gpu else None,
            )  # fmt: skip

    def add_gradients(self, parameters: Iterable[nn.Parameter], total: Tensor) -> None:
        parameters = [] if self.sharded else list(parameters)
        grads = [p.grad for p in parameters if p.grad is not None]
        with _connected():
            for bucket in _buckets([total, *(grad for grad in grads if not grad.is_sparse)]):
                flat = self._torch.cat([tensor.flatten() for tensor in bucket])
                self._distributed.all_reduce(flat)
                sums = flat.split([tensor.numel() for tensor in bucket])
                for tensor, part in zip(bucket, sums, strict=True):
                    tensor.copy_(part.view_as(tensor))
            for p in parameters:
                if p.grad is not None and p.grad.is_sparse:
                    p.grad = self._sparse_sum(p.grad.coalesce())

    def _sparse_sum(self, grad: Tensor) -> Tensor:
        """The sum of gradients that hold some rows of a table [N, C]: nccl cannot reduce sparse tensors."""
        rows, values = grad.indices()[0], grad.values()
        counts = [int(n) for n in self._gather(self._torch.tensor([len(rows)], device=rows.device))]
        most = max(counts)
        padded = self._torch.cat((rows, rows.new_zeros(most - len(rows))))
        wide = self._torch.cat((values, values.new_zeros(most - len(values), values.shape[1])))
        rows = self._torch.cat([part[:n] for part, n in zip(self._gather(padded), counts, strict=True)])
        values = self._torch.cat([part[:n] for part, n in zip(self._gather(wide), counts, strict=True)])
        return self._torch.sparse_coo_tensor(rows[None], values, grad.shape, check_invariants=False).coalesce()

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        parts = [self._torch.empty_like(tensor) for _ in range(self.count)]
        self._distributed.all_gather(parts, tensor.contiguous())
        return parts

    def sums(self, values: Sequence[float]) -> list[float]:
        tensor = self._torch.tensor(values, dtype=self._torch.float64)
        with _connected():
            self._distributed.all_reduce(tensor)
        return tensor.tolist()

    def agree(self, code: int, clock: float) -> tuple[int, float]:
        both = self._torch.tensor([code, clock if self.first else -math.inf], dtype=self._torch.float64)
        with _connected():
            self._distributed.all_reduce(both, self._distributed.ReduceOp.MAX)
        return int(both[0]), float(both[1])

    def send(self, tensors: Sequence[Tensor]) -> None:
        with _connected():
            for tensor in tensors:
                there = tensor.detach().to(self._where).contiguous()
                self._distributed.broadcast(there, 0)
                tensor.detach().copy_(there)

    def check_equal(self, tensors: Sequence[Tensor]) -> None:
        if self.sharded:
            return
        bits = [tensor.detach().contiguous().view(self._torch.int32).sum(dtype=self._torch.int64) for tensor in tensors]
        with _connected():
            parts = self._gather(self._torch.stack(bits))
        wrong = [number for number, part in enumerate(parts) if not part.equal(parts[0])]
        if wrong:
            raise DfError(
                f"the weights of process {wrong[0]} of {self.count} are no longer those of process 0",
                "this should not happen: resume from the last checkpoint, and check that machine's memory",
            )

    @contextmanager
    def explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not self.sharded or not re.search("gloo|nccl|connection", str(error), re.IGNORECASE):
                raise
            raise _ended(error) from None

    def leave(self) -> None:
        if self._distributed.is_initialized():
            self._distributed.destroy_process_group()


@cache
def _server() -> Any:
    """torchrun's store. The first process serves it where torchrun does not."""
    import torch.distributed

    distributed: Any = torch.distributed
    if not distributed.is_available():
        raise UsageError("this PyTorch cannot connect processes", "train in one process, without torchrun")
    with _connected():
        return next(distributed.rendezvous("env://"))[0]


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that torchrun started, connected through its store; `ALONE` where it started one, or none.

    Raises UsageError where PyTorch cannot connect processes, Elsewhere where another process does not come.
    """
    if count() == 1:
        yield ALONE
        return
    group = Group(_server(), f"dfcli-{next(_GROUPS)}")
    try:
        yield group
    finally:
        group.leave()


class Pulse:
    """The clock and the request to stop of a training, the same in each of its processes.

    For a process alone they are `clock` and `stop`. For several they change only with a `beat`, which all processes
    make at the same places of the loop. So whatever depends on the time is decided alike everywhere.
    """

    def __init__(
        self,
        processes: Processes = ALONE,
        clock: Callable[[], float] = time.perf_counter,
        stop: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.processes, self._clock, self._stop = processes, clock, stop
        self._now, self._reason = 0.0, None

    def beat(self) -> None:
        """Take the first process's clock, and a request that any process has had."""
        if self.processes.count > 1:
            code, self._now = self.processes.agree(_REASONS.index(self._stop()), self._clock())
            self._reason = _REASONS[code]

    def clock(self) -> float:
        """Seconds."""
        return self._clock() if self.processes.count == 1 else self._now

    def stop(self) -> str | None:
        """The reason to stop, or None."""
        return self._stop() if self.processes.count == 1 else self._reason


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process holds a part, gathered by all of them together; any other as it is."""
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in groups of up to BUCKET numbers (or of one larger tensor)."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


@contextmanager
def _connected() -> Iterator[None]:
    """A collective that fails means that another process has ended, or no longer answers."""
    try:
        yield
    except RuntimeError as error:  # of which DistBackendError is one
        raise _ended(error) from None


def _ended(error: RuntimeError) -> Elsewhere:
    return Elsewhere(
        f"another process of this training has ended or does not answer ({first_line(error)[:200]})",
        "its own message says why; repeat the torchrun line with `--resume` to go on from the last checkpoint",
    )
