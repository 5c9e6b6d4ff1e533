"""GPT against an independent implementation, and the initialisation of the published models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfcli.cores import GPT, GPTConfig
from dfcli.cores.gpt import Head

from .variants import small


def test_equals_transformers_gpt2() -> None:
    """Same weights, same logits, loss and gradients as Hugging Face's GPT-2."""
    transformers = pytest.importorskip("transformers", reason="the transformers package is not installed")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=101, n_positions=32, n_embd=48, n_layer=3, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config)
    for parameter in theirs.parameters():  # biases at zero would hide a missing one
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    ours = GPT(GPTConfig(101, 32, 3, 4, 48, activation="gelu_tanh"))
    names = {
        "tokens.weight": "transformer.wte.weight", "positions.weight": "transformer.wpe.weight",
        "norm.weight": "transformer.ln_f.weight", "norm.bias": "transformer.ln_f.bias",
    }  # fmt: skip
    for i in range(3):
        for a, b in {
            "attention_norm": "ln_1", "mlp_norm": "ln_2", "attention.qkv": "attn.c_attn",
            "attention.projection": "attn.c_proj", "mlp.expansion": "mlp.c_fc", "mlp.projection": "mlp.c_proj",
        }.items():  # fmt: skip
            for part in ("weight", "bias"):
                names[f"blocks.{i}.{a}.{part}"] = f"transformer.h.{i}.{b}.{part}"
    source = dict(theirs.named_parameters())

    def as_ours(name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Their Conv1D keeps its matrix [in, out]."""
        return tensor.T if ".c_" in names[name] and tensor.ndim == 2 else tensor

    parameters = dict(ours.named_parameters())
    assert set(parameters) == set(names)
    for name, parameter in parameters.items():
        parameter.data.copy_(as_ours(name, source[names[name]].data))

    ids = torch.randint(101, (2, 33))
    logits = ours(ids[:, :-1])
    reference = theirs(ids[:, :-1]).logits
    torch.testing.assert_close(logits, reference, atol=1e-4, rtol=1e-4)
    losses = [F.cross_entropy(x.flatten(0, 1), ids[:, 1:].flatten()) for x in (logits, reference)]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)
    for loss in losses:
        loss.backward()
    for name, parameter in parameters.items():
        expected = source[names[name]].grad
        assert expected is not None
        torch.testing.assert_close(parameter.grad, as_ours(name, expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("layers", "heads", "channels", "parameters"),
    [
        (12, 12, 768, 124_439_808),
        (24, 16, 1024, 354_823_168),
        (36, 20, 1280, 774_030_080),
        (48, 25, 1600, 1_557_611_200),
    ],
)
def test_published_sizes(layers: int, heads: int, channels: int, parameters: int) -> None:
    assert GPTConfig(50257, 1024, layers, heads, channels).parameters() == parameters


def test_gpt2_initialisation() -> None:
    torch.manual_seed(0)
    core = GPT(GPTConfig(500, 64, 8, 4, 128))
    assert core.tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert core.blocks[0].attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert core.blocks[3].mlp.projection.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert core.blocks[0].mlp.expansion.bias.abs().max() == 0
    assert core.head.weight is core.tokens.weight


def test_zero_initialisation_starts_uniform() -> None:
    core = GPT(GPTConfig(50, 8, 2, 2, 8, tied_head=False, init="zero")).eval()
    assert core(torch.arange(8)[None]).abs().max() == 0


@pytest.mark.parametrize("values", [{"dropout": 0.5}, {"ngrams": 3, "ngram_dropout": 0.5}])
def test_dropout_is_for_training_only(values: dict[str, Any]) -> None:
    core = GPT(GPTConfig(50, 8, 2, 2, 8, **values))
    if core.config.ngrams > 1:
        for table in core.ngrams.tables:
            nn.init.normal_(table.weight)
    ids = torch.arange(8)[None]
    assert not torch.equal(core(ids), core(ids))
    core.eval()
    assert torch.equal(core(ids), core(ids))


def test_ngram_dropout_leaves_out_whole_ngrams() -> None:
    core = GPT(GPTConfig(50, 8, 2, 2, 8, ngrams=2, ngram_dropout=0.25))
    nn.init.ones_(core.ngrams.tables[0].weight)
    ids = torch.arange(8).expand(100, 8)
    read = core.ngrams(ids, ids[:, :0])
    assert torch.equal(read, read[..., :1].expand_as(read))
    left_out = (read == 0).all(dim=-1)
    assert torch.allclose(read[~left_out], torch.tensor(4 / 3))
    assert 0.2 < left_out.float().mean() < 0.3


def test_rotary_positions_are_relative() -> None:
    """Attention depends on distances alone, so a row with its document in the middle equals the document alone."""
    core = small("modern")
    ids = torch.arange(6)[None]
    row = torch.cat((torch.full((1, 4), 16), ids), dim=1)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    with torch.inference_mode():
        torch.testing.assert_close(core(row, positions)[:, 4:], core(ids), atol=1e-5, rtol=1e-5)


def test_more_ids_than_the_context() -> None:
    with pytest.raises(ValueError, match="context"):
        small("nano")(torch.zeros((1, 13), dtype=torch.int64))


@pytest.mark.parametrize("bias", [False, True])
def test_the_padded_head_is_the_head(bias: bool) -> None:
    head = Head(16, 65, bias=bias)
    x = torch.randn(2, 3, 16, requires_grad=True)
    expected = torch.nn.functional.linear(x, head.weight, head.bias)
    assert torch.equal(head(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(x)
    assert found.shape == (2, 3, 65)
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
    found.float().sum().backward()
    assert head.weight.grad is not None
    torch.testing.assert_close(head.weight.grad, x.detach().sum((0, 1)).expand(65, 16), rtol=0.02, atol=0.02)
