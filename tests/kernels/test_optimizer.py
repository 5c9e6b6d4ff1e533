"""The optimiser's compiled functions against the plain ones of `optim`."""

from __future__ import annotations

import copy

import pytest
import torch

from dfcli import cores
from dfcli.kernels.optimizer import WIDEST
from dfcli.system.events import ignore
from dfcli.training import optim
from dfcli.training.backend import CompiledBackend, TorchBackend
from dfcli.training.optim import Optimizer
from dfcli.training.settings import Recipe
from tests.generation.engine import cpu

GPT = {"vocab_size": 11, "context": 16, "layers": 2, "heads": 2, "channels": 32, "tied_head": False, "ngrams": 4}
SHAPES = (
    (64, 64), (192, 64), (64, 256), (16, 16), (32, 48), (112, 96), (384, 128), (128, 128), (16, 512),  # ours
    (24, 48), (48, 24), (1, 64), (160, 144), (144, 400),  # an odd side, or wider than ours: PyTorch's
)  # fmt: skip


def compiled(threads: int) -> CompiledBackend:
    core = cores.build("wavenet", {"vocab_size": 11, "dilations": (1, 2), "residual": 16, "skip": 16, "head": 16})
    return CompiledBackend(core, Recipe(), cpu(threads), ignore)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_orthogonalised_matrices_agree(threads: int) -> None:
    backend = compiled(threads)
    assert max(min(shape) for shape in SHAPES) > WIDEST
    torch.manual_seed(0)
    matrices = [torch.randn(shape) for shape in SHAPES]
    matrices[1] = matrices[1].T.contiguous().T  # lies the other way round
    matrices[2] *= 1e-6
    matrices[3][:, :8] *= 1e-4  # singular values far apart
    matrices.append(torch.zeros(32, 64))
    before = [matrix.clone() for matrix in matrices]
    found = backend.orthogonalise_all(matrices)
    for matrix, same, new, expected in zip(matrices, before, found, optim.orthogonalise_all(matrices), strict=True):
        assert torch.equal(matrix, same)
        assert new.shape == expected.shape
        assert torch.allclose(new, expected, atol=2e-4), matrix.shape
    values = torch.linalg.svdvals(found[SHAPES.index((384, 128))])
    assert 0.6 < values.min()
    assert values.max() < 1.3


def test_a_matrix_that_is_not_a_number_stays_so_and_spoils_no_other() -> None:
    backend = compiled(2)
    torch.manual_seed(0)
    good, bad = torch.randn(32, 64), torch.randn(32, 64)
    bad[3, 5] = torch.nan
    found = backend.orthogonalise_all([bad, good])
    assert found[0].isnan().all()
    assert torch.allclose(found[1], optim.orthogonalise_all([good])[0], atol=2e-4)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_rows_of_tables_agree(threads: int) -> None:
    backend = compiled(threads)
    torch.manual_seed(0)
    tables = []
    for N, R in ((11**2, 7), (1000, 300), (50, 50), (20, 0), (30, 1)):
        rows = torch.randperm(N)[:R].sort().values
        tables.append((torch.randn(N, 32), rows, torch.randn(R, 32), torch.zeros(N), torch.zeros(N)))
    expected = copy.deepcopy(tables)
    for lr in (0.05, 0.02, 0.01):
        backend.update_rows(tables, lr, 1e-10)
        optim.update_rows(expected, lr, 1e-10)
    for found, right in zip(tables, expected, strict=True):
        for a, b in zip(found, right, strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_an_optimizer_takes_the_same_steps() -> None:
    core = cores.build("gpt", GPT)
    other = copy.deepcopy(core)
    recipe = Recipe(optimizer="muon", weight_decay=0.1)
    plain, fast = Optimizer(core, recipe), Optimizer(other, recipe)
    plain.use(TorchBackend(core, recipe, cpu()))
    fast.use(compiled(2))
    for step in range(4):
        torch.manual_seed(step)
        ids = torch.randint(11, (4, 16))
        for each, optimizer in ((core, plain), (other, fast)):
            each(ids).square().mean().backward()
            optimizer.step(0.5)
    for (name, p), q in zip(core.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-4), name
