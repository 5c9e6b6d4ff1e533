"""The compiled GPT step against the core's own: logits and picks, also where the cache is full, and many sequences."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dfcli.cores import GPT, GPTConfig
from dfcli.cores.protocols import Picking
from dfcli.generation import engines
from dfcli.generation.plain import Plain
from dfcli.generation.sampling import Dice, pick
from dfcli.kernels import gpt_sample
from tests.generation.engine import cpu, picking, start

V = 50
VARIANTS = {
    "gpt2": {"activation": "gelu_tanh", "init": "gpt2"},
    "nanogpt": {"activation": "gelu", "bias": False, "qkv_bias": False},
    "lecture": {"activation": "relu", "qkv_bias": False, "tied_head": False, "head_bias": True},
    "modern": {
        "position": "rotary", "norm": "rmsnorm", "activation": "relu2", "bias": False, "qkv_bias": False,
        "qk_norm": True, "tied_head": False,
    },
    "2-grams": {"ngrams": 2},
    "4-grams": {"ngrams": 4, "context": 6},
    "one head": {"heads": 1},
    "whole tiles": {"channels": 64, "heads": 2, "vocab_size": 64},
    "one id": {"context": 1},
    "two ids": {"context": 2},
    "odd context": {"context": 17},
}  # fmt: skip


def build(**values: Any) -> GPT:
    torch.manual_seed(3)
    small = {"vocab_size": V, "context": 24, "layers": 2, "heads": 3, "channels": 30, "init": "torch"}
    core = GPT(GPTConfig(**small | values)).eval()
    with torch.no_grad():
        for parameter in core.parameters():
            parameter += 0.05 * torch.randn_like(parameter)  # gains and biases too
    return core


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_picks_are_the_plain_steps(variant: str) -> None:
    core = build(**VARIANTS[variant])
    opening = [[1, 2, 3][: core.context], [4, 5, 6][: core.context]]
    fast = start(gpt_sample.build(core, cpu()), opening)
    plain = start(Plain(core, cpu()), opening)
    for uniforms in np.split(Dice(9, range(2)).draw(60), 60, axis=1):  # beyond the context, more than once
        np.testing.assert_array_equal(fast.generate(uniforms, picking()), plain.generate(uniforms, picking()))
        ours = np.concatenate([part.logits for part in fast.parts])[:, : core.config.vocab_size]
        np.testing.assert_allclose(ours, plain._logits, atol=1e-4)


@pytest.mark.parametrize("filters", [picking(), picking(0), picking(0.8, 20), picking(1, None, 0.9, 0.01)])
def test_long_chunks(filters: Picking) -> None:
    core = build()
    uniforms = Dice(4, range(2)).draw(200)
    made = [
        start(engine, [[1, 2], [3, 4]]).generate(uniforms, filters)
        for engine in (gpt_sample.build(core, cpu()), Plain(core, cpu()))
    ]
    np.testing.assert_array_equal(*made)


@pytest.fixture(scope="module")
def trained() -> GPT:
    """A model that has learned something of words in any order."""
    torch.manual_seed(1)
    words = ["the ", "cat ", "sat ", "on ", "a mat.\n", "Where ", "was ", "it? ", "There, ", "and here.\n"]
    ids = torch.tensor(list("".join(random.Random(0).choices(words, k=2000)).encode()))
    core = GPT(GPTConfig(256, context=64, layers=2, heads=2, channels=32))
    optimizer = torch.optim.Adam(core.parameters(), 1e-2)
    for _ in range(60):
        batch = torch.stack([ids[begin : begin + 65] for begin in torch.randint(len(ids) - 65, (8,)).tolist()])
        loss = F.cross_entropy(core(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 3  # nats; 5.5 is what knows nothing
    return core.eval()


@pytest.mark.parametrize(
    ("seed", "filters"), [(0, picking()), (1, picking(0.9, 50)), (2, picking(1, None, 0.95, 0.01))]
)
def test_a_thousand_ids_of_a_trained_model(trained: GPT, seed: int, filters: Picking) -> None:
    """The compiled engine's picks are those of the plain engine's logits after the same ids, except where a uniform
    number lies within 1e-6 of the border between two ids."""
    uniforms = Dice(seed, [0]).draw(1000)
    fast, plain = (start(engine, [[10]]) for engine in (gpt_sample.build(trained, cpu()), Plain(trained, cpu())))
    for roll in uniforms[0]:
        np.testing.assert_allclose(fast.parts[0].logits[:, :256], plain._logits, atol=1e-4)
        allowed = {pick(plain._logits, filters, np.array([min(max(roll + d, 0), 1)]))[0] for d in (-1e-6, 0, 1e-6)}
        made = fast.generate(np.array([[roll]]), filters)[0, 0]
        assert made in allowed
        with torch.inference_mode():
            plain._read(trained.step(torch.tensor([made]), plain._state))


def test_where_the_chunks_are_cut_changes_nothing() -> None:
    uniforms = Dice(9, range(2)).draw(80)
    engine = gpt_sample.build(build(), cpu())
    whole = start(engine, [[1, 2], [2, 3]]).generate(uniforms, picking())
    start(engine, [[1, 2], [2, 3]])
    cuts = [1, 8, 21, 22, 23, 24, 25, 60]  # the cache holds 24
    parts = [engine.generate(part, picking()) for part in np.split(uniforms, cuts, axis=1)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("same", [False, True])
def test_sequences_do_not_touch_each_other(threads: int, same: bool) -> None:
    core, opening = build(), [[0 if same else number, 3, 5, 7] for number in range(5)]
    uniforms = Dice(2, range(5)).draw(50)
    together = start(gpt_sample.build(core, cpu(threads)), opening).generate(uniforms, picking())
    for number in range(5):
        alone = start(gpt_sample.build(core, cpu()), opening[number : number + 1])
        np.testing.assert_array_equal(alone.generate(uniforms[number : number + 1], picking())[0], together[number])


def test_it_is_compiled_for_one_kind_of_arguments() -> None:
    start(gpt_sample.build(build(**VARIANTS["modern"]), cpu(2)), [[1], [2], [3]]).generate(
        Dice(0, range(3)).draw(30), picking(0.5, 3, 0.5, 0.5)
    )
    assert len(gpt_sample._tokens._dispatcher.overloads) == 1


def test_large_models_are_left_to_the_plain_step_where_there_are_many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt_sample, "LARGE", 1000)
    for threads, name in ((1, "numba"), (2, "numba"), (3, "plain")):
        engine, reason = engines.choose("gpt", build(), 1, cpu(threads))
        assert engine.name == name
    assert reason == "PyTorch reads weights of this size faster, with all CPUs"


def test_a_model_that_diverged_is_told() -> None:
    core = build()
    torch.nn.init.constant_(core.blocks[0].mlp.projection.bias, float("nan"))
    engine = start(gpt_sample.build(core, cpu()), [[1]])
    engine.generate(Dice(1, [0]).draw(3), picking())
    assert not engine.finite()
