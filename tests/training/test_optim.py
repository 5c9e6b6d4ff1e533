from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dfcli import cores
from dfcli.errors import CorruptError
from dfcli.training.optim import Optimizer, matrices, orthogonalise
from dfcli.training.settings import Recipe

GPT = {"vocab_size": 11, "context": 8, "layers": 2, "heads": 2, "channels": 8, "tied_head": False}
WAVENET = {"vocab_size": 16, "dilations": (1, 2), "cycles": 1, "residual": 4, "skip": 6, "head": 8}


def set_gradients(core: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for p in core.parameters():
        p.grad = torch.randn_like(p)


def jordan(grad: Tensor, buffer: Tensor, momentum: float) -> Tensor:
    """Muon's update of one matrix, as Keller Jordan writes it, in float64."""
    buffer.lerp_(grad, 1 - momentum)
    g = grad.lerp(buffer, momentum)
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x.T if g.shape[0] > g.shape[1] else x
    return x * max(1.0, g.shape[0] / g.shape[1]) ** 0.5


def test_muon_equals_the_plain_reference() -> None:
    core = cores.build("gpt", GPT)
    hidden = matrices(core)
    assert len(hidden) == 8
    recipe = Recipe(optimizer="muon", lr=0.02, momentum=0.95, weight_decay=0.1)
    optimizer = Optimizer(core, recipe)
    expected = {name: p.detach().double() for name, p in hidden.items()}
    buffers = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in range(3):
        set_gradients(core, step)
        for name, p in hidden.items():
            assert p.grad is not None
            update = jordan(p.grad.double(), buffers[name], 0.95)
            expected[name] = expected[name] * (1 - 0.5 * 0.02 * 0.1) - 0.5 * 0.02 * update
        optimizer.step(0.5)
        for name, p in hidden.items():
            assert torch.allclose(p.double(), expected[name], atol=1e-5), name


def test_orthogonalise_evens_out_singular_values() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 8, 20)))
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize("shape", [(2, 6, 40), (3, 8, 16), (2, 8, 15), (1, 5, 5)])
def test_both_forms_of_the_iteration_agree(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    x[0] *= torch.linspace(1, 1e-4, shape[1])[:, None]  # singular values far apart
    assert torch.allclose(orthogonalise(x).double(), orthogonalise(x.double()), atol=1e-4)


def test_muon_leaves_tables_and_the_output_layer_alone() -> None:
    assert not {"tokens.weight", "head.weight"} & matrices(cores.build("gpt", GPT)).keys()
    tied = cores.build("gpt", GPT | {"tied_head": True})
    assert "tokens.weight" not in matrices(tied)
    assert matrices(cores.build("wavenet", WAVENET)).keys() == {
        "layers.0.dilated.weight", "layers.0.residual.weight", "layers.1.dilated.weight", "layers.1.residual.weight",
        "skip.weight", "head1.weight",
    }  # fmt: skip
    assert "decoder.weight" not in matrices(cores.build("wavenet", WAVENET | {"decoder": 5}))


def test_muon_takes_convolutions_as_matrices() -> None:
    core = nn.Sequential(nn.Conv1d(4, 6, 2), nn.Linear(6, 3))
    flat = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
    recipe = Recipe(optimizer="muon", lr=0.1, momentum=0.9)
    with torch.no_grad():
        flat[0].weight.copy_(core[0].weight.flatten(1))
    for model in (core, flat):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    core[0].weight.grad = torch.randn(6, 4, 2)
    flat[0].weight.grad = core[0].weight.grad.flatten(1).clone()
    for model in (core, flat):
        Optimizer(model, recipe).step(1.0)
    assert torch.equal(core[0].weight.flatten(1), flat[0].weight)


def assert_same_steps(core: nn.Module, ours: Optimizer, other: nn.Module, plain: torch.optim.Optimizer) -> None:
    """Three steps at half the learning rate leave both models with the same weights; `plain` has the half already."""
    for step in range(3):
        set_gradients(core, step)
        set_gradients(other, step)
        ours.step(0.5)
        plain.step()
    for p, q in zip(core.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_adamw_is_torchs_and_decays_matrices_only() -> None:
    recipe = Recipe(optimizer="adamw", lr=0.01, betas=(0.8, 0.9), weight_decay=0.3)
    core = cores.build("gpt", GPT)
    other = copy.deepcopy(core)
    groups = [
        {"params": [p for p in other.parameters() if p.ndim >= 2], "weight_decay": 0.3},
        {"params": [p for p in other.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    plain = torch.optim.AdamW(groups, lr=0.005, betas=(0.8, 0.9), eps=1e-8, foreach=False)
    assert_same_steps(core, Optimizer(core, recipe), other, plain)


def test_sgd_is_torchs() -> None:
    core = cores.build("gpt", GPT)
    other = copy.deepcopy(core)
    plain = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    assert_same_steps(core, Optimizer(core, Recipe(optimizer="sgd", lr=0.1, momentum=0.9)), other, plain)


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_the_compiler_is_not_imported(name: str) -> None:
    code = (
        "import sys; from torch import nn; from dfcli.training.optim import Optimizer;"
        "from dfcli.training.settings import Recipe; core = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2));"
        f"optimizer = Optimizer(core, Recipe(optimizer={name!r}, momentum=0.9));"
        "import torch; core(torch.ones(1, 4)).sum().backward(); optimizer.step(1.0);"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_decay_all_reaches_biases() -> None:
    core = cores.build("gpt", GPT)
    for p in core.parameters():
        p.grad = torch.zeros_like(p)
    with torch.no_grad():
        core.blocks[0].mlp.expansion.bias.fill_(1.0)  # pyright: ignore
    Optimizer(core, Recipe(lr=0.1, weight_decay=0.5, decay="all")).step(1.0)
    assert torch.allclose(core.blocks[0].mlp.expansion.bias, torch.tensor(0.95))  # pyright: ignore


def backward(core: nn.Module, seed: int) -> None:
    """The gradients of some loss over ids of which no two steps read the same."""
    torch.manual_seed(seed)
    ids = torch.randint(0, 11, (2, 8))
    logits = core(ids)
    (logits * torch.randn_like(logits)).sum().backward()


@pytest.mark.parametrize("sparse", [True, False])
def test_a_row_moves_when_it_is_read_by_the_root_mean_square_of_its_own_gradients(sparse: bool) -> None:
    core = cores.build("gpt", GPT | {"ngrams": 3})
    optimizer = Optimizer(core, Recipe(optimizer="muon", lr=0.01, table_lr=0.2, eps=1e-10))
    for table in optimizer.rows.tables.values():
        table.sparse = sparse
    tables = [table.weight for table in core.ngrams.tables]  # pyright: ignore
    expected = [table.detach().clone() for table in tables]
    history: list[dict[int, list[Tensor]]] = [{} for _ in tables]
    for step in range(4):
        backward(core, step)
        for table, values, past in zip(tables, expected, history, strict=True):
            assert table.grad is not None
            assert table.grad.is_sparse == sparse
            for row, grad in enumerate(table.grad.to_dense()):
                if grad.any():
                    past.setdefault(row, []).append(grad)
                    values[row] -= 0.5 * 0.2 * grad / torch.stack(past[row]).square().mean().sqrt()
        optimizer.gradient_norm()
        optimizer.step(0.5)
    for table, values, past in zip(tables, expected, history, strict=True):
        assert torch.allclose(table, values, atol=1e-6)
        assert {len(grads) for grads in past.values()} >= {1, 2}
        assert len(past) < len(table)


def test_rows_are_for_muon_alone() -> None:
    assert not Optimizer(cores.build("gpt", GPT | {"ngrams": 3}), Recipe()).rows.tables


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("core_name", ["gpt", "n-grams", "wavenet"])
def test_state_tensors_carry_everything(name: str, core_name: str) -> None:
    torch.manual_seed(0)
    recipe = Recipe(optimizer=name, lr=0.01, momentum=0.9)
    core = cores.build("wavenet", WAVENET) if core_name == "wavenet" else cores.build("gpt", GPT)
    if core_name == "n-grams":
        core = cores.build("gpt", GPT | {"ngrams": 3})
    optimizer = Optimizer(core, recipe)
    for step in range(2):
        set_gradients(core, step)
        optimizer.step(1.0)
    other = copy.deepcopy(core)
    again = Optimizer(other, recipe)
    again.load_state_tensors({key: tensor.clone() for key, tensor in optimizer.state_tensors().items()})
    for step in range(2, 5):
        for model, opt in ((core, optimizer), (other, again)):
            set_gradients(model, step)
            opt.step(0.7)
    for p, q in zip(core.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_parameters_without_a_gradient_are_left_alone() -> None:
    core = cores.build("wavenet", WAVENET)
    before = core.layers[1].residual.weight.clone()  # pyright: ignore
    core(torch.zeros(1, 5, dtype=torch.int64)).sum().backward()
    for recipe in (Recipe(optimizer="muon", lr=0.1), Recipe(lr=0.1)):
        Optimizer(core, recipe).step(1.0)
    assert torch.equal(core.layers[1].residual.weight, before)  # pyright: ignore


def test_a_state_of_another_model_is_refused() -> None:
    optimizer = Optimizer(cores.build("gpt", GPT), Recipe())
    with pytest.raises(CorruptError, match="no place"):
        optimizer.load_state_tensors({"exp_avg/nowhere": torch.zeros(2)})
    with pytest.raises(CorruptError, match="no place"):
        optimizer.load_state_tensors({"exp_avg/tokens.weight": torch.zeros(2)})


def test_norm_and_clip_are_over_all_gradients() -> None:
    core = cores.build("gpt", GPT)
    optimizer = Optimizer(core, Recipe())
    set_gradients(core, 0)
    every = torch.cat([p.grad.flatten() for p in core.parameters() if p.grad is not None])
    assert optimizer.gradient_norm().item() == pytest.approx(every.norm().item(), rel=1e-5)
    optimizer.clip_gradients(every.norm().item(), every.norm().item() * 2)
    assert optimizer.gradient_norm().item() == pytest.approx(every.norm().item(), rel=1e-5)
    optimizer.clip_gradients(every.norm().item(), 1.5)
    assert optimizer.gradient_norm().item() == pytest.approx(1.5, rel=1e-5)


def test_norm_and_clip_reach_sparse_gradients() -> None:
    core = cores.build("gpt", GPT | {"ngrams": 3})
    optimizer = Optimizer(core, Recipe(optimizer="muon"))
    backward(core, 0)
    whole = optimizer.gradient_norm().item()
    optimizer.drop_gradients()
    for table in optimizer.rows.tables.values():
        table.sparse = True
    backward(core, 0)
    assert core.ngrams.tables[0].weight.grad.is_sparse  # pyright: ignore
    assert optimizer.gradient_norm().item() == pytest.approx(whole, rel=1e-5)
    optimizer.clip_gradients(whole, 0.5)
    assert optimizer.gradient_norm().item() == pytest.approx(0.5, rel=1e-5)


def test_step_drops_the_gradients() -> None:
    core = cores.build("gpt", GPT)
    set_gradients(core, 0)
    Optimizer(core, replace(Recipe(), optimizer="sgd")).step(1.0)
    assert all(p.grad is None for p in core.parameters())
