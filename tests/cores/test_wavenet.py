"""WaveNet against a naive statement of the paper's equations, receptive fields, and the lecture's tree."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dfcli.cores import CharWaveNet, CharWaveNetConfig, Condition, WaveNet, WaveNetConfig

from .variants import small, told


def told_at(core: WaveNet, condition: Condition, t: int) -> torch.Tensor:
    """The condition at position t: the sum of the labels' embeddings, then the series."""
    row, parts = condition.index[0, t], []
    if condition.labels is not None:
        parts.append(sum(table.weight[condition.labels[row, i]] for i, table in enumerate(core.labels)))
    if condition.series is not None:
        parts.append(condition.series[row].to(core.table.weight.dtype))
    return torch.cat(parts)


def equations(core: WaveNet, ids: list[int], condition: Condition | None = None) -> torch.Tensor:
    """The logits [T, V] by loops over time and layers (sections 2.1, 2.3, 2.4 and 2.5, figure 4)."""
    c = core.config
    xs = [core.entry(core.table.weight[i]) for i in ids]
    skips = [torch.zeros(c.skip, dtype=xs[0].dtype) for _ in ids]
    for number, layer in enumerate(core.layers):
        R = c.residual
        inputs = [x / torch.sqrt(x.square().mean() + torch.finfo(x.dtype).eps) if layer.normed else x for x in xs]
        outputs = []
        for t in range(len(ids)):
            total = layer.dilated.bias if c.bias else torch.zeros(2 * R, dtype=xs[0].dtype)
            for tap in range(c.kernel):
                back = (c.kernel - 1 - tap) * layer.dilation
                if t - back >= 0:
                    total = total + layer.dilated.weight[:, tap * R : (tap + 1) * R] @ inputs[t - back]
            if condition is not None:
                total = total + layer.condition.weight @ told_at(core, condition, t)
            z = torch.tanh(total[:R]) * torch.sigmoid(total[R:])
            skips[t] = skips[t] + core.skip.weight[:, number * R : (number + 1) * R] @ z
            outputs.append(xs[t] + layer.residual(z))
        xs = outputs
    if c.bias:
        skips = [skip + core.skip.bias for skip in skips]
    return torch.stack([core.decoder(core.head2(F.relu(core.head1(F.relu(s))))) for s in skips])


@pytest.mark.parametrize("name", ["paper", "kernel-3", "kernel-1", "sc09", "normed", "conditioned", "vocoder"])
def test_equals_the_equations(name: str) -> None:
    core = small(name)
    assert isinstance(core, WaveNet)
    core.double()
    ids = torch.randint(17, (1, 15), generator=torch.Generator().manual_seed(5))
    targets = torch.randint(17, (15,), generator=torch.Generator().manual_seed(6))
    gradients = []
    condition = told(core, (torch.arange(15) // 4)[None])
    logits = core(ids, **condition)[0], equations(core, ids[0].tolist(), **condition)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-9, rtol=1e-9)
    for x in logits:
        core.zero_grad()
        F.cross_entropy(x, targets).backward()
        gradients.append({n: p.grad.clone() for n, p in core.named_parameters() if p.grad is not None})
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][parameter], atol=1e-9, rtol=1e-9)


def test_published_sizes() -> None:
    assert WaveNetConfig().context == 3 * 1023 + 1 == 3070
    sc09 = WaveNetConfig(cycles=4, skip=1024, head=512, embedding=256, decoder=256, bias=False)
    assert sc09.parameters() == 4_244_480
    assert sc09.context == 4093
    assert CharWaveNetConfig().parameters() == 76_579


def test_paper_receptive_field_by_perturbation() -> None:
    """The sample 3,069 steps back still counts, the one before it does not.

    Random weights would bury the oldest sample's one path below rounding. These keep every path at the same strength:
    inputs so small that tanh is the identity, each layer adding its past tap to its input."""
    core = WaveNet(WaveNetConfig(residual=4, skip=4, head=4)).eval().double()
    with torch.no_grad():
        for name, parameter in core.named_parameters():
            parameter.zero_() if "bias" in name else parameter.abs_()
        core.table.weight.mul_(1e-14)
        for layer in core.layers:
            layer.residual.weight.copy_(torch.eye(4))
            layer.dilated.weight.zero_()
            layer.dilated.weight[:4, :4] = 2 * torch.eye(4)  # the filter's past tap; the gate is sigmoid(0) = 1/2
    ids = torch.randint(256, (1, 3072), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        last = core(ids, last_only=True)
        for oldest, seen in ((2, True), (1, False), (0, False)):
            other = ids.clone()
            other[0, oldest] = (other[0, oldest] + 128) % 256
            assert bool((core(other, last_only=True) != last).any()) is seen


def test_charwavenet_is_the_lectures_tree() -> None:
    """8 characters -> 4 pairs -> 2 -> 1, as FlattenConsecutive(2), Linear, BatchNorm, tanh three times."""
    core = small("charwavenet")
    assert isinstance(core, CharWaveNet)
    core.train()
    ids = torch.randint(17, (6, 8), generator=torch.Generator().manual_seed(1))
    x = core.table(ids)
    for join in core.joins:
        x = x.view(6, x.shape[1] // 2, -1) @ join.linear.weight.T
        mean, variance = x.mean((0, 1), keepdim=True), x.var((0, 1), keepdim=True, unbiased=False)
        x = torch.tanh((x - mean) / torch.sqrt(variance + 1e-5) * join.norm.weight + join.norm.bias)
    expected = core.head(x.squeeze(1))
    torch.testing.assert_close(core(ids, last_only=True)[:, 0], expected, atol=1e-5, rtol=1e-5)


def test_charwavenet_starts_near_uniform() -> None:
    torch.manual_seed(42)
    core = CharWaveNet(CharWaveNetConfig())
    ids, targets = torch.randint(27, (512, 8)), torch.randint(27, (512,))
    loss = F.cross_entropy(core(ids, last_only=True)[:, 0], targets).item()
    assert loss == pytest.approx(math.log(27), abs=0.1)


def test_zero_initialisation_starts_from_the_amplitudes_of_mu_law() -> None:
    core = WaveNet(WaveNetConfig(cycles=1, residual=32, init="zero"))
    table = core.table.weight.detach()
    y = torch.arange(256) / 255 * 2 - 1
    amplitude = y.sign() * torch.expm1(y.abs() * torch.log(torch.tensor(256.0))) / 255
    assert torch.allclose(table[:, 2], 2 * torch.tanh(16 * amplitude), atol=1e-5)
    distance = torch.cdist(table, table)
    assert (distance.diagonal(1) < 0.15 * distance.max()).all()
    assert core(torch.zeros(1, 3, dtype=torch.int64)).abs().max() == 0
    assert WaveNet(WaveNetConfig(vocab_size=1, cycles=1, residual=2, init="zero")).table.weight.isfinite().all()


def test_a_condition_must_be_the_models() -> None:
    ids = torch.zeros(1, 3, dtype=torch.int64)
    for name, other in (("paper", "vocoder"), ("conditioned", "paper"), ("conditioned", "vocoder")):
        with pytest.raises(ValueError, match="takes"):
            small(name)(ids, **told(small(other), ids) or {"condition": None})


def test_a_model_of_neutral_conditions_starts_as_the_model_without() -> None:
    plain = WaveNetConfig(vocab_size=17, cycles=1, residual=16, init="zero")
    core = WaveNet(replace(plain, labels=(3,), condition=8))
    rows = core.gate_biases(Condition(torch.tensor([[0], [2]]), None, torch.zeros(1, 3, dtype=torch.int64)))
    assert rows.shape == (10, 2, 32)
    assert torch.equal(rows[:, 0], rows[:, 1])
    assert torch.equal(rows[3, 0], core.layers[3].dilated.bias)
