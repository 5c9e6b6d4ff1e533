"""The published models as data: one table, each entry with its source. `--set` changes any value.

An entry holds
- core, config: which core, and what differs from its config's defaults; vocab_size: of the published data
- recipe: fields of `settings.Recipe`; seed: the published one
- data: what the published protocol fixes (arguments of `ingest.prepare.prepare`); corpus: the published data's name
- start: what `--init` must give, where it is not trained from the beginning
- source, published: where the values are from, and the figure to compare with; notes: what had to be chosen here
"""

from __future__ import annotations

from typing import Any

from dfcli.errors import UsageError
from dfcli.system.words import closest

_SHAKESPEARE = {"codec": "chars", "val_fraction": 0.1}
_NANO = {
    "position": "learned", "norm": "layernorm", "activation": "gelu", "bias": False, "qkv_bias": False,
    "tied_head": True, "init": "gpt2",
}  # fmt: skip
_NANO_RECIPE = {
    "optimizer": "adamw", "lr": 1e-3, "final_lr": 0.1, "schedule": "cosine", "warmup": 100, "betas": (0.9, 0.99),
    "weight_decay": 0.1, "decay": "matrices", "clip": 1.0, "log_every": 10, "eval_every": 250, "checkpoint_every": 250,
}  # fmt: skip
_GPT2 = {
    "context": 1024, "position": "learned", "norm": "layernorm", "activation": "gelu_tanh", "bias": True,
    "qkv_bias": True, "tied_head": True, "init": "gpt2",
}  # fmt: skip
_BROWN = "Radford et al. 2019; lr from Brown et al. 2020, table 2.1; the rest as `gpt2`"
_NAMES = {"codec": "chars", "lines": True}


def _gpt2(layers: int, heads: int, channels: int, lr: float, source: str, published: str) -> dict[str, Any]:
    """A size of GPT-2."""
    return {
        "core": "gpt",
        "vocab_size": 50_257,
        "config": _GPT2 | {"layers": layers, "heads": heads, "channels": channels},
        "recipe": {
            "batch_size": 12, "accumulate": 40, "steps": 600_000, "optimizer": "adamw", "lr": lr, "final_lr": 0.1,
            "schedule": "cosine", "warmup": 2000, "betas": (0.9, 0.95), "weight_decay": 0.1, "decay": "matrices",
            "clip": 1.0, "log_every": 10, "eval_every": 1000, "eval_tokens": 2_457_600, "checkpoint_every": 1000,
        },
        "seed": 1337,
        "data": {"codec": "gpt2"},
        "source": source,
        "published": published,
        "notes": (
            "a step is 491,520 tokens (batch_size 12 x accumulate 40 x 1024), as published: lower accumulate for small "
            "data",
            "dropout 0, as nanoGPT trains it",
        ),
    }  # fmt: skip


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "gpt": {
        "makemore": {
            "core": "gpt",
            "vocab_size": 27,
            "config": {
                "context": 16, "layers": 4, "heads": 4, "channels": 64, "position": "learned", "norm": "layernorm",
                "activation": "gelu_tanh", "bias": True, "qkv_bias": True, "tied_head": False, "init": "torch",
                "dropout": 0.1,
            },
            "recipe": {
                "steps": 30_000, "batch_size": 32, "packing": "documents", "optimizer": "adamw", "lr": 5e-4,
                "betas": (0.9, 0.99), "weight_decay": 0.01, "decay": "all", "log_every": 100, "eval_every": 500,
                "checkpoint_every": 5000,
            },
            "seed": 3407,
            "data": _NAMES | {"split_rule": "makemore-transformer"},
            "corpus": "names",
            "source": "karpathy/makemore, makemore.py",
            "published": "loss of about 1.92 on 1,000 test names",
            "notes": (
                "the published run has no last step: 30,000 is this table's",
                "dropout 0.1 is minGPT's, which makemore.py was cut from: without it, as in makemore.py today, the "
                "model overfits at 1.96 (`--set dropout=0`)",
            ),
        },
        "nano-cpu": {
            "core": "gpt",
            "vocab_size": 65,
            "config": _NANO | {"context": 64, "layers": 4, "heads": 4, "channels": 128, "dropout": 0.0},
            "recipe": _NANO_RECIPE | {"steps": 2000, "batch_size": 12, "eval_tokens": 15_360},
            "seed": 1337,
            "data": _SHAKESPEARE,
            "corpus": "shakespeare",
            "source": "karpathy/nanoGPT, README.md (the line for a laptop) and config/train_shakespeare_char.py",
            "published": "validation loss 1.88 on 20 random batches",
        },
        "nano": {
            "core": "gpt",
            "vocab_size": 65,
            "config": _NANO | {"context": 256, "layers": 6, "heads": 6, "channels": 384, "dropout": 0.2},
            "recipe": _NANO_RECIPE | {"steps": 5000, "batch_size": 64},
            "seed": 1337,
            "data": _SHAKESPEARE,
            "corpus": "shakespeare",
            "source": "karpathy/nanoGPT, config/train_shakespeare_char.py",
            "published": "validation loss 1.4697, the best over evaluations of 200 random batches",
        },
        "lecture": {
            "core": "gpt",
            "vocab_size": 65,
            "config": {
                "context": 256, "layers": 6, "heads": 6, "channels": 384, "position": "learned", "norm": "layernorm",
                "activation": "relu", "bias": True, "qkv_bias": False, "head_bias": True, "tied_head": False,
                "dropout": 0.2, "embedding_dropout": False, "init": "normal",
            },
            "recipe": {
                "steps": 5000, "batch_size": 64, "optimizer": "adamw", "lr": 3e-4, "betas": (0.9, 0.999),
                "weight_decay": 0.01, "decay": "all", "log_every": 10, "eval_every": 500, "checkpoint_every": 500,
            },
            "seed": 1337,
            "data": _SHAKESPEARE,
            "corpus": "shakespeare",
            "source": "karpathy/ng-video-lecture, gpt.py",
            "published": "validation loss of about 1.48",
        },
        "gpt2": _gpt2(
            12, 12, 768, 6e-4, "Radford et al. 2019; training as karpathy/nanoGPT, config/train_gpt2.py",
            "124,439,808 parameters; validation loss of about 2.85 on OpenWebText",
        ),
        "gpt2-medium": _gpt2(24, 16, 1024, 3e-4, _BROWN, "354,823,168 parameters"),
        "gpt2-large": _gpt2(36, 20, 1280, 2.5e-4, _BROWN, "774,030,080 parameters"),
        "gpt2-xl": _gpt2(48, 25, 1600, 2e-4, _BROWN, "1,557,611,200 parameters"),
        "finetune_shakespeare": {
            "core": "gpt",
            "start": "the weights of a published GPT-2",
            "vocab_size": 50_257,
            "config": _GPT2 | {"layers": 48, "heads": 25, "channels": 1600},
            "recipe": {
                "batch_size": 1, "accumulate": 32, "steps": 20, "optimizer": "adamw", "lr": 3e-5,
                "betas": (0.9, 0.95), "weight_decay": 0.1, "decay": "matrices", "clip": 1.0, "log_every": 1,
                "eval_every": 5, "eval_tokens": 40_960, "checkpoint_every": 20,
            },
            "seed": 1337,
            "data": {"codec": "gpt2"},
            "corpus": "shakespeare",
            "source": "karpathy/nanoGPT, config/finetune_shakespeare.py",
            "published": "no figure is published; GPT-2 XL there, whose folder `--init` takes",
            "notes": ("`--init` takes any size of GPT-2; the model is that of its folder",),
        },
    },
    "wavenet": {
        "makemore": {
            "core": "charwavenet",
            "vocab_size": 27,
            "config": {"levels": 3, "embedding": 24, "hidden": 128},
            "recipe": {
                "steps": 200_000, "batch_size": 32, "packing": "last", "optimizer": "sgd", "lr": 0.1,
                "schedule": "step", "decay_start": 0.75, "final_lr": 0.1, "log_every": 1000, "eval_every": 10_000,
                "checkpoint_every": 10_000,
            },
            "seed": 42,
            "data": _NAMES | {"split_rule": "makemore", "lead": 8},
            "corpus": "names",
            "source": "karpathy/nn-zero-to-hero, makemore part 5",
            "published": "76,579 parameters; loss 1.769 on train and 1.9936 on validation",
        },
        "paper": {
            "core": "wavenet",
            "vocab_size": 256,
            "config": {"cycles": 3, "kernel": 2, "residual": 64, "skip": 256, "head": 256},
            "recipe": {
                "steps": 200_000, "batch_size": 8, "window": 16_000, "optimizer": "adamw", "lr": 1e-3,
                "log_every": 10, "eval_every": 1000, "eval_tokens": 1_600_000, "checkpoint_every": 1000,
            },
            "data": {"codec": "mulaw", "levels": 256, "sample_rate": 16_000},
            "source": "van den Oord et al. 2016, arXiv 1609.03499",
            "published": "receptive field 3,070 samples (3 x 1023 + 1)",
            "notes": (
                "the paper gives no channel counts: 64 residual, 256 skip and 256 head are this table's",
                "the paper gives no optimiser, batch or steps: Adam at 1e-3 on 8 x 16,000 samples is nv-wavenet's, the "
                "200,000 steps are kan-bayashi/PytorchWaveNetVocoder's",
            ),
        },
        "speaker": {
            "core": "wavenet",
            "vocab_size": 256,
            "config": {
                "cycles": 5, "kernel": 2, "residual": 64, "skip": 256, "head": 256, "labels": (109,), "condition": 109,
            },
            "recipe": {
                "steps": 200_000, "batch_size": 8, "window": 16_000, "optimizer": "adamw", "lr": 1e-3,
                "log_every": 10, "eval_every": 1000, "eval_tokens": 1_600_000, "checkpoint_every": 1000,
            },
            "data": {"codec": "mulaw", "levels": 256, "sample_rate": 16_000, "label": "folder"},
            "source": "van den Oord et al. 2016, arXiv 1609.03499, section 3.1",
            "published": "44 hours of 109 speakers (VCTK), a one-hot speaker, a receptive field of about 300 ms",
            "notes": (
                "the speaker is the first folder below the data's; `--label PATTERN` takes it from file names",
                "109 channels for each speaker's embedding leave each layer as free as the paper's one-hot does",
                "the paper gives no layers: 5 cycles of 10 see 5,116 samples, 320 ms; channels and recipe are those of "
                "preset `paper`",
            ),
        },
        "vocoder": {
            "core": "wavenet",
            "vocab_size": 256,
            "config": {"cycles": 3, "kernel": 3, "residual": 128, "skip": 128, "head": 128, "series": 80},
            "recipe": {
                "steps": 500_000, "batch_size": 8, "window": 10_240, "optimizer": "adamw", "lr": 1e-3,
                "schedule": "step", "decay_start": 0.4, "final_lr": 0.5,
                "log_every": 10, "eval_every": 1000, "eval_tokens": 1_600_000, "checkpoint_every": 1000,
            },
            "condition": "mel",
            "data": {"codec": "mulaw", "levels": 256, "sample_rate": 22_050},
            "source": "r9y9/wavenet_vocoder a35fff7, hparams.py and egs/mulaw256",
            "published": "LJSpeech, mel 80 x 125-7600 Hz, fft 1,024, hop 256; 30 layers of 256 gate channels",
            "notes": (
                "as there: layers, channels, mel settings, batch, steps, Adam at 1e-3; its learning rate halves every "
                "200,000 steps, here once, at 200,000",
                "not as there: a frame is repeated instead of a learned upsampler, and there is no weight "
                "normalisation, pre-emphasis, trimming or averaging of weights",
            ),
        },
        "sc09": {
            "core": "wavenet",
            "vocab_size": 256,
            "config": {
                "cycles": 4, "kernel": 2, "residual": 64, "skip": 1024, "head": 512, "embedding": 256, "decoder": 256,
                "bias": False,
            },
            "recipe": {
                "steps": 780_000, "batch_size": 8, "window": 20_093, "packing": "documents", "optimizer": "adamw",
                "lr": 1e-3, "betas": (0.9, 0.999), "schedule": "plateau", "final_lr": 0.2, "patience": 5,
                "log_every": 10, "eval_every": 3895, "checkpoint_every": 3895,
            },
            "data": {
                "codec": "mulaw", "levels": 256, "quantizer": "s4", "sample_rate": 16_000, "normalize": "minmax",
                "lead": 4093,
            },
            "corpus": "sc09",
            "source": "state-spaces/s4, configs/model/baseline/wavenet.yaml and experiment/audio/wavenet-sc09.yaml",
            "published": "4,244,480 parameters; 1.925 bits a sample on SC09 (Goel et al. 2022, arXiv 2202.09729)",
            "notes": (
                "an epoch of SC09 is 3,895 steps: 200 epochs, validated after each",
                "each clip is scaled to -1..1 before mu-law: its bits compare only with those of clips scaled so",
            ),
        },
    },
}  # fmt: skip


def preset(kind: str, name: str) -> dict[str, Any]:
    """The entry `name` of `kind` ("gpt" or "wavenet"). Raises UsageError listing those there are."""
    if name not in PRESETS[kind]:
        raise UsageError(f"{kind} has no preset `{name}`", closest(name, PRESETS[kind]))
    return PRESETS[kind][name]
