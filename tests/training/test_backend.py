"""Which models are trained by compiled functions, and that a machine that cannot trains anyway."""

from __future__ import annotations

import platform
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from dfcli import cores, kernels
from dfcli.kernels import gpt_train, wavenet_train
from dfcli.kernels.compile import Compiled
from dfcli.kernels.cuda import graph
from dfcli.system.device import resolve
from dfcli.system.events import Choice, Note, OnEvent, ignore
from dfcli.training import presets, recipes, sharding
from dfcli.training.backend import TorchBackend, choose, unsupported
from dfcli.training.settings import Recipe
from dfcli.training.state import State
from tests.training.test_trainer import Memory, Rows, trainer

GPT = {
    "vocab_size": 11, "context": 16, "layers": 1, "heads": 2, "channels": 32, "position": "rotary", "norm": "rmsnorm",
    "activation": "relu2", "bias": False, "qkv_bias": False, "qk_norm": True, "tied_head": False,
}  # fmt: skip
WAVENET = {"vocab_size": 11, "dilations": (1, 2), "cycles": 1, "residual": 16, "skip": 16, "head": 16}


def reason(core: str, values: dict[str, Any], recipe: Recipe = Recipe(), **others: Any) -> str | None:  # noqa: B008
    return unsupported(cores.config(core, values | others), recipe, resolve("cpu"))


@pytest.fixture(autouse=True)
def processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


def test_whom_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reason("gpt", GPT) is None
    for other in ({"channels": 24}, {"channels": 416}, {"context": 1024}):
        assert reason("gpt", GPT, **other), other
    assert reason("wavenet", WAVENET) is None
    for other in (
        {"residual": 20},
        {"residual": 288},
        {"skip": 24},
        {"head": 24},
        {"bias": False},
        {"embedding": 8},
        {"decoder": 8},
        {"dilations": (3,)},
    ):
        assert reason("wavenet", WAVENET, **other), other
    for values in (GPT | {"channels": 384}, WAVENET | {"residual": 256, "skip": 32, "head": 32}):
        core = "gpt" if "channels" in values else "wavenet"
        units = resolve("cpu").precision == "bfloat16"
        assert (reason(core, values) is None) == units  # wide ones pay in bfloat16 alone
        assert reason(core, values, recipe=Recipe(precision="float32"))
    assert reason("charwavenet", {"vocab_size": 11})
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert reason("gpt", GPT)


def test_they_fit_what_the_recipes_choose_for_a_laptop() -> None:
    for preset in ("makemore", "nano-cpu"):
        assert reason("gpt", presets.preset("gpt", preset)["config"] | {"vocab_size": 65}) is None
    for layers, heads, channels in recipes.GPT_SIZES[:3]:
        assert reason("gpt", GPT, layers=layers, heads=heads, channels=channels) is None
    for _, _, R in recipes.WAVENET_SIZES:
        assert reason("wavenet", WAVENET, residual=R, skip=2 * R, head=4 * R) is None


@pytest.mark.parametrize("core_name", ["gpt", "charwavenet"])
def test_a_machine_whose_numba_is_broken_trains_anyway(core_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(kernels, "gpt_train")
    monkeypatch.setitem(sys.modules, "dfcli.kernels.gpt_train", None)
    events: list[object] = []
    core = cores.build(core_name, GPT if core_name == "gpt" else {"vocab_size": 11, "levels": 3})
    made = trainer(core, Recipe(steps=2, batch_size=2), Memory(), on_event=events.append)
    assert made.run() is None
    assert made.backend.name == "torch"
    reasons = [event.reason for event in events if isinstance(event, Choice)]
    assert len(reasons) == 1
    missing = "the compiled kernels cannot be imported (ModuleNotFoundError" if core_name == "gpt" else "there are no"
    assert reasons[0].startswith(missing)


@pytest.mark.parametrize("kept", [True, False])
def test_it_is_told_once_where_any_kernel_is_compiled(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Compiled.load

    def told(self: Compiled, on_event: OnEvent, *arguments: Any) -> None:
        if not kept or "newton" in self.folder.name:
            on_event(Note("compiling"))
        load(self, ignore, *arguments)

    monkeypatch.setattr(Compiled, "load", told)
    events: list[object] = []
    choose(cores.build("gpt", GPT), Recipe(), resolve("cpu"), events.append)
    assert [event for event in events if isinstance(event, Note)] == [Note("compiling")]


def test_a_machine_without_a_compiler_trains_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(core: Any) -> Any:
        def forward(*_: Any) -> Tensor:
            raise RuntimeError("no compiler found\nand a long story")

        return forward

    monkeypatch.setattr(torch, "compile", no_compiler)
    events: list[object] = []
    weights = []
    for compile in ("on", "off"):
        torch.manual_seed(0)
        core = cores.build("charwavenet", {"vocab_size": 11, "levels": 3, "embedding": 4, "hidden": 6})
        made = trainer(core, Recipe(steps=3, batch_size=2, compile=compile), Memory(), on_event=events.append)
        assert made.run() is None
        weights.append(core.state_dict())
    notes = [event.text for event in events if isinstance(event, Note)]
    assert len(notes) == 1
    assert "torch.compile does not work here (RuntimeError: no compiler found)" in notes[0]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


class Exhausted:
    """A compiled core, or a recorded graph, for which there is not enough memory."""

    def __init__(self, *_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_memory_that_runs_out_is_no_missing_compiler_and_no_missing_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []
    core = cores.build("charwavenet", {"vocab_size": 11, "levels": 3, "embedding": 4, "hidden": 6})
    backend = TorchBackend(core, Recipe(steps=3, compile="on"), resolve("cpu"))
    monkeypatch.setattr(torch, "compile", lambda _: Exhausted)
    monkeypatch.setattr(graph, "Replayed", Exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        backend.warm_up(lambda: Rows(2).at(0), events.append)
    assert events == []
    backend._record([], events.append)  # a pass without a graph may fit
    assert [getattr(event, "text", "") for event in events] == [
        "without a CUDA graph, which is slower (there is too little memory for one)"
    ]


def test_that_weights_in_parts_are_not_compiled_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "is_sharded", lambda _: True)
    core = cores.build("gpt", GPT)
    for compile, told in (("auto", 0), ("off", 0), ("on", 1)):
        events: list[object] = []
        backend = TorchBackend(core, Recipe(steps=3, compile=compile), resolve("cpu"))
        backend.warm_up(lambda: pytest.fail("no batch is needed"), events.append)
        assert len(events) == told
    assert isinstance(events[0], Note)
    assert "`compile=on` has no effect" in events[0].text


@pytest.mark.parametrize(("core_name", "values"), [("gpt", GPT | {"ngrams": 3}), ("wavenet", WAVENET)])
def test_compiled_training_stopped_and_resumed_ends_as_one_that_never_stopped(
    core_name: str, values: dict[str, Any]
) -> None:
    recipe = Recipe(steps=7, batch_size=3, accumulate=2, optimizer="muon", lr=0.02, momentum=0.9, clip=1.0)

    def build(seed: int) -> Any:
        torch.manual_seed(seed)
        return cores.build(core_name, values)

    whole, parts = Memory(), Memory()
    made = trainer(build(0), recipe, whole)
    assert made.run() is None
    assert made.backend.name == "compiled"
    polls = iter(range(100))
    assert trainer(build(0), recipe, parts, stop=lambda: "asked" if next(polls) == 3 else None).run() == "asked"
    model, optimizer, state = parts.saves[3]
    core = build(99)
    core.load_state_dict(model)
    resumed = trainer(core, recipe, parts, state=State.from_json(state))
    resumed.optimizer.load_state_tensors(optimizer)
    assert resumed.run() is None
    for part, other in zip(parts.saves[7][:2], whole.saves[7][:2], strict=True):
        assert part.keys() == other.keys()
        assert all(torch.equal(part[name], other[name]) for name in other)


@pytest.mark.parametrize(
    ("core_name", "values", "optimizer"),
    [
        *(("gpt", GPT | {"ngrams": 3, "init": "torch"}, optimizer) for optimizer in ("muon", "adamw", "sgd")),
        *(("wavenet", WAVENET, optimizer) for optimizer in ("muon", "sgd")),
    ],
)
def test_compiled_training_ends_as_training_without_it(
    core_name: str, values: dict[str, Any], optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, reasons = [], []
    for compile in ("auto", "off", "broken"):
        if compile == "broken":
            monkeypatch.setattr(wavenet_train, "build", lambda *_: 1 / 0)
            monkeypatch.setattr(gpt_train, "build", lambda *_: 1 / 0)
        torch.manual_seed(0)
        core, events = cores.build(core_name, values), []
        asked = "off" if compile == "off" else "auto"
        recipe = Recipe(
            steps=3, batch_size=3, accumulate=2, optimizer=optimizer, lr=0.01, clip=1.0, compile=asked,
            precision="float32",
        )  # fmt: skip
        made = trainer(core, recipe, Memory(), on_event=events.append)
        assert made.run() is None
        assert (made.backend.name == "torch") == (compile != "auto")
        weights.append(core.state_dict())
        reasons += [event.reason for event in events if isinstance(event, Choice)]
    assert reasons[0] == "kernels for this model on this CPU, in float32"
    assert reasons[1] == "`compile` is off; in float32"
    assert reasons[2].startswith("the compiled kernels do not work here (ZeroDivisionError")
    for name, weight in weights[1].items():
        assert torch.allclose(weights[0][name], weight, atol=1e-3), name
        assert torch.allclose(weights[2][name], weight, atol=1e-3), name  # its tables' gradients lie another way
