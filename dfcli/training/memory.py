"""How much memory a training takes, whether that fits, and what to lower where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from dfcli import cores
from dfcli.errors import DfError
from dfcli.evaluation.sweep import longest_window, positions_at_once
from dfcli.runs.run import runs_home
from dfcli.system import processes
from dfcli.system.device import Device, out_of_memory
from dfcli.system.events import Choice, Note, OnEvent
from dfcli.system.files import free_bytes
from dfcli.system.words import size
from dfcli.training import backend
from dfcli.training.settings import Recipe, change

if TYPE_CHECKING:
    from dfcli.training.plan import Plan

SHARE = 0.8  # of the memory that is free: what a training is planned to take
RESERVED = 1.25  # times what is in use: what PyTorch takes of a GPU, 1.18 to 1.29 for five shapes on an H200
LEAST_EVALUATED = 2**13  # positions: fewer do not fill a GPU
MOST_SHARDS = 64  # devices that are advised


def estimate(core: str, config: cores.CoreConfig, recipe: Recipe, device: Device, shards: int = 1) -> int:
    """About how much memory training takes in each process, in bytes: weights, gradients and optimiser state in
    float32, in `shards` parts, and what a micro-batch keeps for its backward pass, counted from the tensors that each
    layer saves."""
    device = backend.in_precision(device, config, recipe)
    half = device.precision == "bfloat16"  # what stays in float32 there, such as norms, counts twice
    c: Any = config
    tables = c.channels * sum(c.ngram_rows) if core == "gpt" and recipe.optimizer == "muon" else 0  # see optim.Rows
    memory = 4 * ((config.parameters() - tables) * (2 + _moments(recipe)) + 2 * tables)
    window, rows = recipe.window or config.context, -(-recipe.batch_size // max(shards, processes.count()))
    if device.kind == "cuda" and recipe.accumulate > 1:
        memory += 4 * config.parameters()  # gradients that are added to those which a CUDA graph writes
    if shards > 1:
        memory = _sharded(c, memory, device, shards)
    if device.kind == "cuda":
        memory += _evaluation(c, recipe, device)
    if core == "gpt" and shards == 1 and backend.unsupported(config, recipe, device) is None:
        # Each thread: its gradients, the weights packed for both ways, what it keeps of one row. The n-grams' gradients
        # and places are the whole batch's.
        memory += _rounding(device, max(4 * c.channels, c.vocab_size)) if half else 0
        half = False  # what is kept is in float32
        memory += 3 * 4 * device.threads * (config.parameters() - tables)
        memory += rows * window * c.ngrams * (4 * c.channels + 24)
        kept = c.layers * (10 * c.channels + c.heads * window)
        rows = min(rows, device.threads)
    elif core == "gpt":
        kept = c.layers * c.channels * (18 + (6 if half else 2) * c.qk_norm + 3 * (c.dropout > 0))
        rounded = half and device.kind == "cpu"
        wide = 2 if rounded else 1  # times `half`'s bytes: what a CPU's autocast leaves in float32
        if c.dropout and device.kind == "cpu":  # without fused attention PyTorch keeps the weights, before and after
            kept += wide * c.layers * 3 * (c.heads * window + c.channels * rounded)
        # The gradients of one layer's widest tensors, on the way back; there in both precisions.
        kept += (36 if rounded else 12) * c.channels
        if rounded:
            memory += 2 * (config.parameters() - tables)  # the weights once more
    elif core == "wavenet" and backend.unsupported(config, recipe, device) is None:
        from dfcli.kernels.wavenet_train import slot_bounds  # numba is there, or the kernels would be unsupported

        bounds, together = slot_bounds(rows, window, device.threads)
        memory += 4 * (len(bounds) + 1) * config.parameters()  # each slot's gradients, and weights packed both ways
        memory += _rounding(device, max(2 * c.residual, c.skip, c.head, c.vocab_size)) if half else 0
        kept = c.layers * (3 * c.residual + 1) + 4 * c.residual + c.skip
        positions = rows * window if together else device.threads * max(b - a for a, b in pairwise(bounds))
        return memory + 4 * (positions * kept + rows * window * c.residual)
    elif core == "wavenet":
        kept = c.layers * c.residual * (6 + 2 * half + c.kernel + (c.norm != "none")) + c.skip + c.head
    else:
        kept = c.levels * 4 * c.hidden
        window = 1 if recipe.packing == "last" else window
    memory += rows * window * (kept * (2 if half else 4) + 3 * 4 * c.vocab_size)
    return round(RESERVED * memory) if device.kind == "cuda" else memory


def _rounding(device: Device, width: int) -> int:
    """The bytes in which the kernels' threads round numbers for products of up to `width` outputs."""
    from dfcli.kernels import gemm, gpt_train

    return 4 * device.threads * gemm.rounding_words(gpt_train.BLOCK, width)


def _moments(recipe: Recipe) -> int:
    """What the optimiser keeps of each weight: so many numbers."""
    return int(recipe.momentum > 0) if recipe.optimizer == "sgd" else 2


def evaluated_together(config: cores.CoreConfig, recipe: Recipe, device: Device) -> int:
    """Positions of one forward pass of an evaluation during training on a GPU: about as many as a micro-batch has, from
    LEAST_EVALUATED to what evaluations take at other times. A window that is longer is a pass of its own."""
    trained = recipe.batch_size * (recipe.window or config.context)
    return min(positions_at_once(config.vocab_size, device), max(LEAST_EVALUATED, trained))


def _evaluation(config: cores.CoreConfig, recipe: Recipe, device: Device) -> int:
    """The bytes that an evaluation takes beside training, whose CUDA graph keeps its memory to itself: the most that a
    forward pass holds at one time. A number that a matrix product gives takes `width` bytes; the stream, a norm and
    what a layer reads take 4."""
    c: Any = config
    width = 2 if device.precision == "bfloat16" else 4
    if isinstance(config, cores.GPTConfig):
        # In an MLP: the stream before and after attention, the norm; the product, its relu and the square, each 4 C.
        kept = c.channels * (3 * 4 + 3 * 4 * width)
    elif isinstance(config, cores.WaveNetConfig):
        # Of every layer its input, its gate twice (alone, and beside the others') and the condition's bias of 2 R; of
        # one layer the stream, the taps and the sums of 2 R; in the head two products, each with its relu.
        kept = c.layers * c.residual * (4 + 2 * width + 2 * width * (c.row > 0))
        kept += c.residual * (4 + 4 * c.kernel + 2 * width) + 2 * width * (c.skip + c.head)
    else:
        kept = 6 * width * c.hidden  # the input, the pairs of 2 C, the product, its norm and tanh
    # The logits stand beside the above; then beside a copy in float32 and their log-softmax.
    kept = max(kept + width * c.vocab_size, 3 * 4 * c.vocab_size)
    return kept * max(evaluated_together(config, recipe, device), longest_window(config, recipe.eval_tokens or None))


def _sharded(config: Any, weights: int, device: Device, shards: int) -> int:
    """What `weights` bytes of weights, gradients and optimiser state take in each process of training.sharding: its
    part, and what is gathered of the tables and of two blocks, with gradients."""
    of_all = config.parameters()
    of_block = replace(config, layers=2).parameters() - replace(config, layers=1).parameters()
    gathered = 8 * (of_all - max(0, config.layers - 2) * of_block)
    copies = 2 * of_all if device.precision == "bfloat16" else 0  # autocast's, kept for the backward pass
    # Before and after the training a model is whole: on a CPU with the optimiser's state, which is read with it.
    return max(weights // shards + gathered + copies, (12 if device.kind == "cpu" else 4) * of_all)


def shards(core: str, config: cores.CoreConfig, recipe: Recipe, device: Device) -> tuple[int, list[Choice]]:
    """In how many parts the weights are to be: one for each process where they are too large for one device whatever
    the batch, and parts of them are not; else 1. And the reason."""
    count, total = processes.count(), device.memory_bytes()[1]
    if count == 1 or core != "gpt":
        return 1, []
    row = change(recipe, {"batch_size": 1})
    alone = estimate(core, config, row, device)
    if alone <= total or estimate(core, config, row, device, count) > total:
        return 1, []
    reason = f"FSDP: a part of them and of the optimizer's state in each process; whole they would take {size(alone)}"
    return count, [Choice("weights", f"in {count} parts", f"{reason}, and a process has {size(total)}")]


def fitted(
    core: str, config: cores.CoreConfig, recipe: Recipe, device: Device, shards: int = 1
) -> tuple[Recipe, list[Choice]]:
    """The recipe with its batch in 2, 4, ... parts, if the memory that is free now asks for it, and the reason."""
    smaller, free = recipe, device.memory_bytes()[0]
    while smaller.batch_size > 1 and estimate(core, config, smaller, device, shards) > SHARE * free:
        smaller = _halved(smaller)
    if smaller is recipe or estimate(core, config, smaller, device, shards) > SHARE * free:  # no batch is small enough
        return recipe, []
    reason = f"parts of a step, {smaller.batch_size} sequences each, because {size(free)} of memory are free"
    return smaller, [Choice("accumulate", str(smaller.accumulate), reason)]


def check_fits(plan: Plan) -> None:
    """Raise DfError where training cannot fit into the memory, or its checkpoints onto the disk."""
    _, total = plan.device.memory_bytes()
    if plan.memory > total:
        raise DfError(
            f"training would take about {size(plan.memory)} of memory, and this machine has {size(total)}", advice(plan)
        )
    wanted = 4 * 4 * plan.parameters * (1 + _moments(plan.recipe))  # the best, the last two, and the one being written
    home = runs_home()
    while not home.exists():
        home = home.parent
    if free_bytes(home) < wanted:
        raise DfError(
            f"the checkpoints would take about {size(wanted)}, and {home} has {size(free_bytes(home))} free",
            "free some space, or put DFCLI_HOME on another disk",
        )


def warn(plan: Plan, on_event: OnEvent) -> None:
    """Say where training takes more memory than is free now."""
    free, _ = plan.device.memory_bytes()
    if plan.memory > free:
        text = f"training takes about {size(plan.memory)} of memory, and {size(free)} are free"
        on_event(Note(f"{text}: {advice(plan)}"))


@contextmanager
def explained(plan: Plan) -> Iterator[None]:
    """Say what to lower where memory runs out in the block: DfError."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        message = f"there is not enough memory on {plan.device.name} for this training"
        raise DfError(message, advice(plan)) from None


def advice(plan: Plan) -> str:
    """What to lower so that training fits into the memory that is free now."""
    recipe = plan.recipe
    while recipe.batch_size > 1:
        recipe = _halved(recipe)
        memory = estimate(plan.core, plan.config, recipe, plan.device, plan.shards)
        if memory < SHARE * plan.device.memory_bytes()[0]:
            rows, parts = recipe.batch_size, recipe.accumulate
            about = "" if rows * parts == plan.recipe.batch_size * plan.recipe.accumulate else "about "
            return f"`--batch-size {rows} --set accumulate={parts}` learns {about}the same in about {size(memory)}"
    more = _more_devices(plan) if plan.core == "gpt" else ""
    return {
        "gpt": f"choose a smaller model: lower `--set layers=...`, `--set channels=...` or `--set context=...`{more}",
        "wavenet": "lower `--set window=...`, or choose a smaller model: `--set residual=...`, `--set skip=...`",
        "charwavenet": "choose a smaller model: lower `--set hidden=...`",
    }[plan.core]


def _more_devices(plan: Plan) -> str:
    """The end of a sentence that says how many devices can hold the model, or nothing."""
    if plan.device.kind == "mps":
        return ""
    row, total = change(plan.recipe, {"batch_size": 1}), plan.device.memory_bytes()[1]
    count = max(1, processes.count())
    while count <= MOST_SHARDS // 2:
        count *= 2
        if estimate(plan.core, plan.config, row, plan.device, count) <= total:
            what = f"`torchrun --nproc-per-node {count}`" if plan.device.kind == "cuda" else "torchrun"
            return f"; or train it on {count} such {'GPUs' if plan.device.kind == 'cuda' else 'machines'} with {what}"
    return ""


def _halved(recipe: Recipe) -> Recipe:
    return change(recipe, {"batch_size": -(-recipe.batch_size // 2), "accumulate": 2 * recipe.accumulate})
