"""The default recipes: what is trained, and how, when no preset is asked for.

Every choice depends on the data, the kind of device and the budget, and is told with its reason. With a number of steps
nothing depends on a measured speed, so the same line gives the same run on every machine of that kind; with a time,
the size of the model follows from the device's rate.

GPT: tables for the last 2 to 6 ids together, RMSNorm, rotary positions, QK-norm, squared ReLU, no biases, untied
head, projections that start at zero; Muon for the matrices, RMSprop by row for the tables, AdamW for the rest; a short
rise, then a linear fall to zero over the last 70 % (scaled down from KellerJordan/modded-nanogpt, track 3).
WaveNet: cycles of doubling dilations, RMSNorm before each layer, residual projections and last layer that start at
zero, embeddings that are alike for neighbouring levels, Muon for the matrices, many short windows a step.
What was tried, and what it gave: tests/benchmarks/experiments.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from dfcli import cores
from dfcli.cores.wavenet import DOUBLING
from dfcli.system import processes
from dfcli.system.device import Device
from dfcli.system.events import Choice
from dfcli.system.words import counted
from dfcli.training import backend
from dfcli.training.settings import Recipe

DEFAULT_MINUTES = 5.0

GPT_SIZES = ((2, 2, 64), (3, 3, 96), (4, 4, 128), (6, 6, 192), (6, 8, 256), (6, 6, 384), (8, 8, 512), (12, 12, 768))
# Cycles, doubling dilations in each, residual channels; for the other widths see `completed`. A small model learns
# nothing from further back than 8 dilations reach.
WAVENET_SIZES = ((2, 8, 32), (2, 10, 64), (3, 10, 64), (3, 10, 128))
LR = {
    "gpt": {"muon": 0.02, "adamw": 0.01, "sgd": 0.1},
    "wavenet": {"muon": 0.045, "adamw": 0.004, "sgd": 0.1},
}
TOKENS_PER_PARAMETER = {"gpt": 4.0, "wavenet": 12.0}  # a model that sees fewer is too large for its budget
PARAMETERS_PER_TOKEN = 10.0  # a model with more than that for each token of the corpus only learns it by heart
NGRAM_TOKENS = (20_000, 100_000, 500_000, 500_000, 500_000)  # from so many ids on, 2-grams, 3-grams, ... pay
GOING_ON = 0.3  # of the earlier peak rates, for weights that are trained already
PRETRAINED_LR = 5e-5  # AdamW, for weights trained elsewhere
EFFICIENCY = 0.45  # the share of a device's peak rate that a small model's training usually reaches


@dataclass(frozen=True)
class Corpus:
    """What the choices depend on: the training split's size and shape."""

    tokens: int
    documents: int
    longest: int  # ids of the longest document
    vocab_size: int
    lines: bool
    val_tokens: int = 0
    unit: str = "id"  # what an id stands for, in a word: a sample of sound, or just an id


@dataclass
class Draft:
    """A default recipe in the making: values for the core's config and for the recipe, and the reasons."""

    core: str
    config: dict[str, Any]
    recipe: dict[str, Any]
    choices: list[Choice] = field(default_factory=list)

    def choose(self, what: str, value: str, reason: str) -> None:
        self.choices.append(Choice(what, value, reason))


def default(
    core: str,
    corpus: Corpus,
    device: Device,
    steps: int,
    minutes: float,
    pinned: dict[str, Any],
    earlier: dict[str, Any] | None = None,
) -> Draft:
    """The default recipe of `core` for a budget of `steps` or else `minutes`.

    `pinned` holds the config values and recipe values that are given and so not chosen here; `earlier` is the
    recipe by which the weights were trained before (empty where it is not known): then `pinned` holds the whole config.
    """
    make = {"gpt": _gpt, "wavenet": _wavenet, "charwavenet": _charwavenet}[core]
    draft = make(corpus, device, steps, minutes, pinned, earlier is not None)
    if earlier is not None:
        _going_on(draft, corpus, device, steps, minutes, earlier, pinned)
    given = {name: value for name, value in pinned.items() if name in Recipe.__dataclass_fields__}
    draft.recipe |= given
    draft.choices = [choice for choice in draft.choices if choice.what not in given]
    _cadence(draft, device, steps)
    return draft


def _gpt(corpus: Corpus, device: Device, steps: int, minutes: float, pinned: dict[str, Any], fixed: bool) -> Draft:
    long = device.kind == "cuda" or steps > 2000 or minutes > 1
    context = 256 if device.kind == "cuda" else 128 if long else 64
    reason = f"what pays on {_article(device)} with this budget"
    if corpus.lines and corpus.longest <= context:
        context, reason = corpus.longest, "the longest line"
    config: dict[str, Any] = {
        "vocab_size": corpus.vocab_size, "context": context, "position": "rotary", "norm": "rmsnorm",
        "activation": "relu2", "bias": False, "qkv_bias": False, "qk_norm": True, "tied_head": False, "init": "zero",
        "ngrams": 1 + sum(corpus.tokens >= least for least in NGRAM_TOKENS),
    }  # fmt: skip
    recipe: dict[str, Any] = {
        "optimizer": "muon", "adam_lr": 0.01, "momentum": 0.95, "betas": (0.9, 0.95), "eps": 1e-10,
        "schedule": "linear", "warmup": 10, "decay_start": 0.3, "final_lr": 0.0,
        "eval_tokens": 1_000_000 if device.kind == "cuda" else 32_768,
    }  # fmt: skip
    recipe["lr"] = LR["gpt"][pinned.get("optimizer", "muon")]
    draft = Draft("gpt", config, recipe)
    if not fixed:
        if "context" not in pinned:
            draft.choose("context", str(context), reason)
        if "ngrams" not in pinned:
            draft.choose("ngrams", str(config["ngrams"]), f"tables of up to so many ids, of {corpus.tokens:,}")
        sizes = [
            config | {"layers": layers, "heads": heads, "channels": channels} for layers, heads, channels in GPT_SIZES
        ]
        _size(draft, sizes, 5 if device.kind == "cuda" else 2, corpus, device, steps, minutes, pinned)
    config |= {name: value for name, value in pinned.items() if name not in Recipe.__dataclass_fields__}
    if corpus.lines and corpus.longest <= config["context"]:
        recipe["packing"] = "documents"
        draft.choose("packing", "documents", "every line fits a sequence")
    # On a CPU many small steps beat few large ones at first; later larger ones learn as much from an id, and take less
    # time for it: Muon's products, which grow faster with the channels than a step's, do not depend on its ids.
    tokens = 16_384 if device.kind == "cuda" else max(3072 if long else 1024, 8 * config["channels"])
    length = pinned.get("window") or config["context"]
    if (recipe | pinned).get("packing") == "documents":
        length = max(1, corpus.tokens // corpus.documents)
    recipe["batch_size"] = max(1, tokens // (length * pinned.get("accumulate", 1)))
    mean = f", at {length:,} ids a line" if recipe.get("packing") == "documents" else ""
    draft.choose("batch_size", str(recipe["batch_size"]), f"about {tokens:,} ids a step on {_article(device)}{mean}")
    _dropout(draft, corpus, device, steps, minutes, pinned)
    return draft


def _wavenet(corpus: Corpus, device: Device, steps: int, minutes: float, pinned: dict[str, Any], fixed: bool) -> Draft:
    config: dict[str, Any] = {
        "vocab_size": corpus.vocab_size, "kernel": 2, "norm": "rmsnorm", "init": "zero",
    }  # fmt: skip
    cuda = device.kind == "cuda"
    recipe: dict[str, Any] = {
        "optimizer": "muon", "adam_lr": 0.01, "momentum": 0.8, "betas": (0.9, 0.95), "eps": 1e-10,
        "schedule": "linear", "warmup": 20, "decay_start": 0.3, "final_lr": 0.0, "clip": 1.0,
        "eval_tokens": 1_000_000 if cuda else 65_536,
    }  # fmt: skip
    recipe["lr"] = LR["wavenet"][pinned.get("optimizer", "muon")]
    draft = Draft("wavenet", config, recipe)
    if not fixed:
        sizes = [
            config | {"cycles": cycles, "dilations": DOUBLING[:n], "residual": residual}
            for cycles, n, residual in WAVENET_SIZES
        ]
        _size(draft, sizes, 2 if cuda else 0, corpus, device, steps, minutes, pinned)
    config |= {name: value for name, value in pinned.items() if name not in Recipe.__dataclass_fields__}
    # As many samples of many recordings teach more than those of one, though each begins without a past.
    samples, hears = 65_536 if cuda else 4096, cores.config("wavenet", config).context
    recipe["window"], reason = min(samples, max(256, 2 ** round(math.log2(hears / 2)))), "many short ones teach more"
    packing = pinned.get("packing")
    if packing == "documents":
        recipe["window"], reason = min(samples, corpus.longest), "from each one's beginning"
    draft.choose("window", f"{recipe['window']:,}", f"{reason}; the model hears {counted(hears, corpus.unit)}")
    accumulate, window = pinned.get("accumulate", 1), pinned.get("window", recipe["window"]) or hears
    recipe["batch_size"] = max(1, samples // (window * accumulate))
    many = recipe["batch_size"] * accumulate * (1 if packing == "last" else window)
    most = "at most " if packing == "documents" else ""
    reason = f"{most}{counted(many, corpus.unit)} a step on {_article(device)}"
    draft.choose("batch_size", str(recipe["batch_size"]), reason)
    return draft


def _charwavenet(
    corpus: Corpus, device: Device, steps: int, minutes: float, pinned: dict[str, Any], fixed: bool
) -> Draft:
    """The lecture's own, for a run of the preset `makemore` that is trained on."""
    recipe: dict[str, Any] = {
        "batch_size": 32, "packing": "last", "optimizer": "sgd", "schedule": "step", "decay_start": 0.75,
        "final_lr": 0.1, "eval_tokens": 65_536,
    }  # fmt: skip
    recipe["lr"] = LR["wavenet"][pinned.get("optimizer", "sgd")]
    return Draft("charwavenet", {"vocab_size": corpus.vocab_size}, recipe)


def _size(
    draft: Draft,
    sizes: list[dict[str, Any]],
    usual: int,
    corpus: Corpus,
    device: Device,
    steps: int,
    minutes: float,
    pinned: dict[str, Any],
) -> None:
    """Take the largest of `sizes` that the budget and the corpus feed; with a number of steps, at most the `usual`.
    What is `pinned` replaces what they say."""
    given = {name: value for name, value in pinned.items() if name not in Recipe.__dataclass_fields__}
    sizes = [completed(draft.core, size | given, given) for size in sizes]
    dense = {"ngrams": 1} if draft.core == "gpt" else {}  # a table costs next to nothing, whatever its size
    counts = [cores.config(draft.core, size | dense).parameters() for size in sizes]
    most = PARAMETERS_PER_TOKEN * corpus.tokens
    fed = max((i for i, count in enumerate(counts) if count <= most), default=0)
    rate = None if steps else device.peak_flops()
    if rate is None:
        chosen = min(usual, fed)
        reason = "usual on " + _article(device) if chosen == usual else "small, as the corpus is"
    else:
        wanted = TOKENS_PER_PARAMETER[draft.core]
        flops = 60 * minutes * rate * processes.count() * EFFICIENCY
        costs = [3 * cores.config(draft.core, size).flops_per_token() for size in sizes]
        affordable = max((i for i, cost in enumerate(costs) if flops / cost >= wanted * counts[i]), default=0)
        chosen = min(affordable, fed)
        reason = f"the largest that sees about {wanted:.0f} tokens per parameter in {_minutes(minutes)} here"
        if chosen < affordable:
            reason = "as large as the corpus feeds"
        elif chosen == 0:
            reason = f"the smallest, for {_minutes(minutes)} here"
    draft.config |= sizes[chosen]
    if all(size == sizes[0] for size in sizes):  # nothing was left to choose
        return
    apart = " beside the tables" if draft.config.get("ngrams", 1) > 1 else ""
    draft.choose("size", f"{counts[chosen] / 1e6:.2g}M parameters{apart}", reason)


def completed(core: str, config: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The config with what follows from what is `given`. GPT: heads that fit channels, or the other way round: heads of
    about 32 channels, or whole 16 channels for each head. WaveNet: twice the residual channels for the skips, four
    times for the head."""
    if core == "wavenet" and "residual" in config:
        widths = {name: min(times * config["residual"], 100_000) for name, times in (("skip", 2), ("head", 4))}
        return config | widths | given
    if core != "gpt" or ("heads" in given) == ("channels" in given):
        return config
    if "heads" in given:
        step = 16 * max(1, given["heads"])
        return {"position": "rotary"} | config | {"channels": max(1, round(config.get("channels", step) / step)) * step}
    channels = given["channels"]
    most = min(1000, channels // 2)  # what GPTConfig allows
    fitting = [heads for heads in range(1, most + 1) if channels % (2 * heads) == 0] or [1]
    return {"position": "rotary"} | config | {"heads": min(fitting, key=lambda heads: abs(channels / heads - 32))}


def _dropout(draft: Draft, corpus: Corpus, device: Device, steps: int, minutes: float, pinned: dict[str, Any]) -> None:
    """Dropout where the corpus is read so often that the model would learn it by heart."""
    recipe = draft.recipe | pinned
    length = pinned.get("window") or draft.config["context"]
    if steps:
        tokens = steps * recipe["batch_size"] * recipe.get("accumulate", 1) * length
    else:
        rate = device.peak_flops() or 0.0
        tokens = (
            rate
            * processes.count()
            * EFFICIENCY
            * 60
            * minutes
            / (3 * cores.config("gpt", draft.config).flops_per_token())
        )
    epochs = tokens / max(1, corpus.tokens)
    # A model that is small beside its corpus cannot learn it by heart, however often it reads it.
    small = cores.config("gpt", draft.config | {"ngrams": 1}).parameters() < 2 * corpus.tokens
    read = epochs / 3 if device.kind == "cpu" else epochs  # with dropout: it is not compiled there
    shares = {"dropout": 0.0 if read < (20 if small else 6) else 0.1 if read < 40 else 0.2}
    if draft.config["ngrams"] > 1:  # tables can, soon
        by_epochs = ((4, 0.7), (2.2, 0.6), (1.5, 0.4), (0.7, 0.2), (0, 0.0))
        shares["ngram_dropout"] = next(share for least, share in by_epochs if epochs >= least)
    times = "less than once" if epochs < 1 else "about once" if epochs < 1.5 else f"about {epochs:,.0f} times"
    for name, share in shares.items():
        if name not in pinned:
            draft.config[name] = share
            draft.choose(name, f"{share:g}", f"the budget reads the corpus {times}")


def _going_on(
    draft: Draft,
    corpus: Corpus,
    device: Device,
    steps: int,
    minutes: float,
    earlier: dict[str, Any],
    pinned: dict[str, Any],
) -> None:
    """For weights that are trained already: a part of their peak rates, which falls to zero after a short warm-up, so
    that what was learned is not shaken off; the loss over the whole validation split where that takes little time."""
    recipe = draft.recipe
    optimizer = pinned.get("optimizer", earlier.get("optimizer", "adamw"))
    if optimizer == earlier.get("optimizer"):
        kept = ("optimizer", "betas", "eps", "momentum", "weight_decay", "decay", "clip")
        recipe |= {name: earlier[name] for name in kept if name in earlier}
        rates = {name: GOING_ON * earlier[name] for name in ("lr", "adam_lr", "table_lr") if name in earlier}
        reason = f"{GOING_ON:g} of the earlier training's"
    elif earlier:
        rates, reason = {"lr": GOING_ON * LR["gpt" if draft.core == "gpt" else "wavenet"][optimizer]}, "low, to go on"
    else:
        recipe |= {"optimizer": optimizer, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0}
        rates, reason = {"lr": PRETRAINED_LR}, "for weights trained elsewhere: nanoGPT takes 3e-5, llm.c 1e-4"
    recipe |= rates | {"schedule": "linear", "warmup": 10, "decay_start": 0.0, "final_lr": 0.0}
    draft.choose("lr", f"{rates['lr']:.3g}", reason)
    config: Any = cores.config(draft.core, draft.config)
    if steps:
        short = corpus.val_tokens <= steps * recipe["batch_size"] * (recipe.get("window") or config.context) / 2
    else:
        rate = EFFICIENCY * (device.peak_flops() or 1e15)
        short = corpus.val_tokens * config.flops_per_token() <= rate * 60 * minutes / 5
    if short:
        recipe["eval_tokens"] = 0


def _cadence(draft: Draft, device: Device, steps: int) -> None:
    """How often to log, evaluate and save: by steps where the budget is steps, else by time."""
    if steps:
        recipe = {"batch_size": 1, "accumulate": 1, "window": 0, "eval_tokens": 0} | draft.recipe
        window = recipe["window"] or draft.config.get("context", 1)
        forward = steps * recipe["batch_size"] * recipe["accumulate"] * window
        training = 3 * forward  # a training step costs 3 forward passes
        evaluations = max(1, min(10, training // (10 * max(1, recipe["eval_tokens"]))))  # a tenth of the work at most
        chosen = {
            "log_every": max(1, min(100, steps // 100)),
            "eval_every": max(1, steps // evaluations),
            "checkpoint_every": max(1, steps // 10),
        }
        draft.recipe = chosen | draft.recipe


def _minutes(minutes: float) -> str:
    return f"{minutes:g} minute{'s' * (minutes != 1)}"


def _article(device: Device) -> str:
    return {"cpu": "a CPU", "cuda": "a CUDA GPU", "mps": "an Apple GPU"}[device.kind]


def memory_bytes(core: str, config: cores.CoreConfig, recipe: Recipe, device: Device) -> int:
    """About how much memory training takes in each process, in bytes: weights, gradients and optimiser state in
    float32, and what a micro-batch keeps for its backward pass, counted from the tensors that each layer saves."""
    optimizer = {"sgd": int(recipe.momentum > 0), "adamw": 2, "muon": 2}[recipe.optimizer]
    c: Any = config
    tables = c.channels * sum(c.ngram_rows) if core == "gpt" and recipe.optimizer == "muon" else 0  # see optim.Rows
    weights = 4 * ((config.parameters() - tables) * (2 + optimizer) + 2 * tables)
    window, rows = recipe.window or config.context, -(-recipe.batch_size // processes.count())
    if core == "gpt" and backend.unsupported(config, recipe, device) is None:
        # Each thread: its gradients, the weights packed for both ways, what it keeps of one row. The n-grams' gradients
        # and places are the whole batch's.
        weights += 3 * 4 * device.threads * (config.parameters() - tables)
        weights += rows * window * c.ngrams * (4 * c.channels + 24)
        kept = c.layers * (10 * c.channels + c.heads * window)
        rows = min(rows, device.threads)
    elif core == "gpt":
        kept = c.layers * c.channels * (18 + 2 * c.qk_norm + 8 * (c.dropout > 0))
    elif core == "wavenet" and backend.unsupported(config, recipe, device) is None:
        from dfcli.kernels.wavenet_train import slot_bounds  # numba is there, or the kernels would be unsupported

        bounds, together = slot_bounds(rows, window, device.threads)
        weights += 4 * (len(bounds) + 1) * config.parameters()  # each slot's gradients, and weights packed both ways
        kept = c.layers * (3 * c.residual + 1) + 4 * c.residual + c.skip
        positions = rows * window if together else device.threads * max(b - a for a, b in pairwise(bounds))
        return weights + 4 * (positions * kept + rows * window * c.residual)
    elif core == "wavenet":
        kept = c.layers * c.residual * (6 + c.kernel + (c.norm != "none")) + c.skip + c.head
    else:
        kept = c.levels * 4 * c.hidden
        window = 1 if recipe.packing == "last" else window
    wide = 2 if device.precision == "bfloat16" else 4
    return weights + rows * window * (kept * wide + 3 * 4 * c.vocab_size)
