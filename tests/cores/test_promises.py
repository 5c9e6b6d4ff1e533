"""What every core promises, on every variant: causality, context, incremental form, counts, bounds."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dfcli import cores

from .variants import VARIANTS, small, told

every_variant = pytest.mark.parametrize("name", VARIANTS)


def draw(core: cores.Core, batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(core.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def rows(batch: int, length: int) -> torch.Tensor:
    """The condition row of each position: they change every third position, and differ between sequences."""
    return (torch.arange(length) // 3 + torch.arange(batch)[:, None]) % 4


@every_variant
def test_causal_and_exactly_the_context(name: str) -> None:
    """Changing id t changes the logits from t to t + context - 1, and no others."""
    core = small(name)
    length = core.context if isinstance(core, cores.GPT) else 2 * core.context + 3
    ids = draw(core, 1, length)
    with torch.inference_mode():
        condition = told(core, rows(1, length))
        logits = core(ids, **condition)
        for t in range(length):
            other = ids.clone()
            other[0, t] = (other[0, t] + 1) % core.config.vocab_size
            changed = (core(other, **condition) - logits)[0].abs().amax(-1) > 0
            assert not changed[:t].any()
            assert changed[t : t + core.context].any()
            assert not changed[t + core.context :].any()
            if t + core.context <= length:
                assert changed[t + core.context - 1], "the oldest id within the context must count"


@every_variant
def test_incremental_equals_forward(name: str) -> None:
    core = small(name)
    ids = draw(core, 3, 12)
    with torch.inference_mode():
        index = rows(3, 12)
        full = core(ids, **told(core, index))
        for chunks in ([1] * 12, [5] + [1] * 7, [3, 1, 4, 1, 3], [12]):
            state, start = core.init_state(3), 0
            for size in chunks:
                part, at = ids[:, start : start + size], index[:, start : start + size]
                if size == 1:
                    logits, state = core.step(part[:, 0], state, **told(core, at[:, 0]))
                else:
                    logits, state = core.prefill(part, state, **told(core, at))
                start += size
                torch.testing.assert_close(logits, full[:, start - 1], atol=1e-5, rtol=1e-5)


@every_variant
def test_long_incremental(name: str) -> None:
    """Beyond the context: a WaveNet goes on exactly; a GPT restarts from the newest half."""
    core = small(name)
    ids, index = draw(core, 2, 50), rows(2, 50)
    with torch.inference_mode():
        state, logits = core.init_state(2), torch.empty(0)
        for t in range(50):
            logits, state = core.step(ids[:, t], state, **told(core, index[:, t]))
            if isinstance(core, cores.GPT):
                kept = t + 1 if t < 12 else 6 + (t - 12) % 7
                assert state.length == kept
                expected = core(ids[:, t + 1 - kept : t + 1])[:, -1]
            else:
                expected = core(ids[:, : t + 1], **told(core, index[:, : t + 1]))[:, -1]
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        at_once, _ = core.prefill(ids, core.init_state(2), **told(core, index))
        torch.testing.assert_close(at_once, logits, atol=1e-5, rtol=1e-5)


@every_variant
def test_last_only(name: str) -> None:
    core = small(name)
    ids = draw(core, 3, 11)
    with torch.inference_mode():
        condition = told(core, rows(3, 11))
        last = core(ids, last_only=True, **condition)
        torch.testing.assert_close(last, core(ids, **condition)[:, -1:], atol=1e-5, rtol=1e-5)


@every_variant
def test_documents_in_one_row_do_not_see_each_other(name: str) -> None:
    core = small(name)
    first, second, third = draw(core, 2, 5, 2), draw(core, 2, 1, 3), draw(core, 2, 6, 4)
    row = torch.cat((first, second, third), dim=1)
    positions = torch.tensor([*range(5), 0, *range(6)]).expand(2, -1)
    with torch.inference_mode():
        index = rows(2, 12)
        parts = zip((first, second, third), index.split((5, 1, 6), dim=1), strict=True)
        alone = torch.cat([core(part, **told(core, at)) for part, at in parts], dim=1)
        torch.testing.assert_close(core(row, positions, **told(core, index)), alone, atol=1e-5, rtol=1e-5)


@every_variant
def test_parameters_by_formula(name: str) -> None:
    core = small(name)
    assert core.config.parameters() == sum(parameter.numel() for parameter in core.parameters())


@every_variant
def test_flops_by_formula(name: str) -> None:
    """Against torch's own counter, over a full context. It counts all of attention where we count the causal half."""
    core = small(name)
    T = core.context
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        core(draw(core, 1, T), **told(core, rows(1, T)))
    expected = core.config.flops_per_token() * T
    if isinstance(core, cores.GPT):
        c = core.config
        # torch's counter does not see the fused CPU attention kernel
        seen_attention = sum(v for k, v in counter.get_flop_counts()["Global"].items() if "attention" in str(k))
        matrices = counter.get_total_flops() - seen_attention
        assert expected - c.layers * 2 * c.channels * (c.context + 1) * T == matrices
    elif isinstance(core, cores.CharWaveNet):
        # the row's first joins also cover positions before its start
        assert expected <= counter.get_total_flops() <= 2 * expected
    else:
        c = core.config
        projections = 4 * 2 * c.layers * 2 * c.residual * c.row  # of four condition rows, however many positions
        assert expected + projections == counter.get_total_flops()


@every_variant
def test_config_survives_json(name: str) -> None:
    config = small(name).config
    again = cores.config(VARIANTS[name][0], json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("gpt", {"vocab_size": 0}, "vocab_size"),
        ("gpt", {"vocab_size": 65, "layers": 10**9}, "layers"),
        ("gpt", {"vocab_size": 65, "heads": 5}, "multiple of heads"),
        ("gpt", {"vocab_size": 65, "dropout": 1.0}, "dropout"),
        ("gpt", {"vocab_size": 65, "dropout": float("nan")}, "dropout"),
        ("gpt", {"vocab_size": 65, "activation": "swish"}, "activation"),
        ("gpt", {"vocab_size": 65, "channels": 15, "heads": 5, "position": "rotary"}, "even"),
        ("gpt", {"vocab_size": 10_000_000, "channels": 100_000, "heads": 1}, "parameters"),
        ("gpt", {"vocab_size": 65, "bias": 1}, "bias"),
        ("gpt", {"vocab_size": 65, "wings": 2}, "wings"),
        ("gpt", {}, "vocab_size"),
        ("wavenet", {"dilations": []}, "dilations"),
        ("wavenet", {"dilations": [0]}, "dilation"),
        ("wavenet", {"kernel": True}, "kernel"),
        ("wavenet", {"labels": [2], "condition": 0}, "condition"),
        ("wavenet", {"labels": [2, 0], "condition": 8}, "names"),
        ("wavenet", {"labels": [1_000_000] * 100, "condition": 100_000}, "parameters"),
        ("wavenet", {"series": -1}, "series"),
        ("wavenet", {"dilations": [1_000_000] * 900, "cycles": 900}, "receptive field"),
        ("charwavenet", {"levels": 99}, "levels"),
        ("lstm", {}, "lstm"),
    ],
)
def test_bounds(name: str, values: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        cores.config(name, values)


@pytest.mark.parametrize("name", ["nano", "paper"])
def test_a_norm_that_only_the_check_knows_is_not_taken_for_the_default(name: str) -> None:
    config = small(name).config
    object.__setattr__(config, "norm", "tanhnorm")
    with pytest.raises(KeyError, match="tanhnorm"):
        cores.GPT(config) if isinstance(config, cores.GPTConfig) else cores.WaveNet(config)  # pyright: ignore[reportArgumentType]
