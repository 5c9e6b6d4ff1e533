"""A training recipe as plain data, and how `--set key=value` changes it and the core's config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dfcli import cores
from dfcli.errors import UsageError
from dfcli.system.words import close


@dataclass(frozen=True)
class Recipe:
    """How a core is trained. Exactly one of `steps` and `minutes` is the budget once a plan is made.

    Raises ValueError where a value is out of bounds.
    """

    # budget
    steps: int = 0  # updates; 0: the budget is a time
    minutes: float = 0.0  # wall clock; 0: the budget is a number of steps
    # what a step sees
    batch_size: int = 16  # sequences of a micro-batch
    accumulate: int = 1  # micro-batches of a step: their gradients are added up
    window: int = 0  # ids of a sequence; 0: the core's context
    packing: Literal["packed", "documents", "last"] = "packed"
    # how the weights move
    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"  # muon: for matrices, AdamW for the rest
    lr: float = 1e-3  # peak learning rate
    adam_lr: float = 3e-3  # with muon: peak learning rate of what AdamW updates
    table_lr: float = 0.05  # with muon: peak learning rate of n-gram tables
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW
    eps: float = 1e-8  # AdamW
    momentum: float = 0.0  # muon, sgd
    weight_decay: float = 0.0
    decay: Literal["matrices", "all"] = "matrices"  # what decays. matrices: 2 dimensions and more; nanoGPT's rule
    clip: float = 0.0  # largest norm of the gradient; 0: none
    # how the learning rate moves
    schedule: Literal["constant", "cosine", "linear", "step", "plateau"] = "constant"
    warmup: int = 0  # steps of linear rise
    decay_start: float = 0.0  # share of the budget after which cosine and linear fall, and step drops
    final_lr: float = 0.0  # what cosine, linear and step end at; what plateau multiplies by: as a share of the peak
    patience: int = 5  # plateau: evaluations without improvement before the drop
    # what is watched and kept
    log_every: int = 0  # steps between lines of metrics.jsonl; 0: by time
    eval_every: int = 0  # steps between evaluations; 0: by time
    eval_tokens: int = 0  # of the validation split in an evaluation; 0: all
    checkpoint_every: int = 0  # steps between checkpoints beside those of better evaluations; 0: by time
    on_nonfinite: Literal["stop", "skip"] = "stop"  # skip: the batch whose loss or gradient is not finite
    skip_limit: int = 10  # batches that may be skipped
    precision: Literal["auto", "float32"] = "auto"  # of products. auto: bfloat16 where the device has units for it
    compile: Literal["auto", "on", "off"] = "auto"
    """auto: what pays here; on: torch.compile too; off: PyTorch, kernel by kernel."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Recipe:
        """The recipe that a run.json holds. Runs of version 0.1 call `packing` "sampling"."""
        return cls(**{"packing" if name == "sampling" else name: value for name, value in values.items()})

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # JSON gives a list
        for name, low, high in (
            ("steps", 0, 10**9), ("batch_size", 1, 10**6), ("accumulate", 1, 10**6), ("window", 0, 10**8),
            ("warmup", 0, 10**9), ("patience", 0, 10**6), ("log_every", 0, 10**9), ("eval_every", 0, 10**9),
            ("eval_tokens", 0, 10**15), ("checkpoint_every", 0, 10**9), ("skip_limit", 0, 10**6),
        ):  # fmt: skip
            _within(name, getattr(self, name), low, high, whole=True)
        for name, low, high in (
            ("minutes", 0, 10**6), ("lr", 0, 1e3), ("adam_lr", 0, 1e3), ("table_lr", 0, 1e3), ("eps", 0, 1),
            ("momentum", 0, 1), ("weight_decay", 0, 100), ("clip", 0, 1e9), ("decay_start", 0, 1), ("final_lr", 0, 1),
        ):  # fmt: skip
            _within(name, getattr(self, name), low, high)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers from 0 to below 1, not {self.betas}")
        for name, kind in get_type_hints(Recipe).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, not `{getattr(self, name)}`")
        if self.steps and self.minutes:
            raise ValueError("steps and minutes exclude each other")


def _within(name: str, value: float, low: float, high: float, whole: bool = False) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{name} must be {kind} from {low:,} to {high:,}, not {value}")


@dataclass(frozen=True)
class Given:
    """The values that the user fixed: fields of the core's config, and fields of the recipe."""

    config: dict[str, Any]
    recipe: dict[str, Any]


def given_by(core: str, overrides: Mapping[str, str], recipe: dict[str, Any]) -> Given:
    """What `--set` and the recipe's own options fix. Raises UsageError for what neither the core nor a recipe has."""
    config, others = override(core, overrides)
    return Given(config, others | recipe)


def config_of(core: str, values: dict[str, Any]) -> cores.CoreConfig:
    """`cores.config`. Raises UsageError for a bad value."""
    try:
        return cores.config(core, values)
    except ValueError as error:
        raise UsageError(str(error)) from None


def override(core: str, overrides: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `--set` asks for: values for the config of core `core`, and values for the recipe.

    Raises UsageError for a key that neither has, listing those there are, and for a value of another type.
    """
    tables = (get_type_hints(cores.CORES[core][0]), get_type_hints(Recipe))
    values: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for key, text in overrides.items():
        if key == "vocab_size":
            raise UsageError("vocab_size cannot be set", "it follows from the data and its codec")
        for table, found in zip(tables, values, strict=True):
            if key in table:
                try:
                    found[key] = parse(text, table[key])
                except ValueError as error:
                    parts = [part if "=" in part else "" for part in f"{key}={text}".split(",")]
                    several = len(parts) > 1 and all(parts)
                    hint = f"give each by its own option: `{' '.join(f'--set {part}' for part in parts)}`"
                    hint = hint if several else f"for example `--set {key}={_example(table[key])}`"
                    raise UsageError(f"`--set {key}={text}`: {error}", hint) from None
                break
        else:
            names = [sorted(table.keys() - {"vocab_size"}) for table in tables]
            meant = close(key, names[0] + names[1])
            hint = f"did you mean `{meant}`? " if meant else ""
            hint += f"of the {core} core: {', '.join(names[0])}; of the recipe: {', '.join(names[1])}"
            raise UsageError(f"`--set` knows no `{key}`", hint)
    return values


def _example(kind: Any) -> str:
    """A value of a field's type, as it is typed."""
    if get_args(kind):
        return ",".join([_example(get_args(kind)[0])] * 2)
    return {bool: "true", int: "4", float: "0.1"}.get(kind, "auto")


def parse(text: str, kind: Any) -> Any:
    """`text` as an int, float, bool, str or tuple of these. Raises ValueError with what was expected."""
    text = text.strip()
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("true or false is expected")
        return text.lower() == "true"
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ValueError("a whole number is expected" if kind is int else "a number is expected") from None
    if get_origin(kind) is tuple:
        return tuple(parse(part, get_args(kind)[0]) for part in text.split(","))
    return text


def change(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """`recipe` with other values. A budget given replaces the one there was. Raises UsageError for a bad value."""
    if values.get("steps"):
        values = {"minutes": 0.0, **values}
    if values.get("minutes"):
        values = {"steps": 0, **values}
    try:
        return replace(recipe, **values)
    except ValueError as error:
        raise UsageError(str(error)) from None
