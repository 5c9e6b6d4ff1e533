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
from dataclasses import dataclass, field, replace
from typing import Any

from dfcli import cores
from dfcli.cores.wavenet import DOUBLING
from dfcli.data.dataset import Dataset
from dfcli.system import processes
from dfcli.system.device import Device
from dfcli.system.events import Choice
from dfcli.system.words import counted, span
from dfcli.training.settings import Given, Recipe, change, config_of

GPT_SIZES = ((2, 2, 64), (3, 3, 96), (4, 4, 128), (6, 6, 192), (6, 8, 256), (6, 6, 384), (8, 8, 512), (12, 12, 768))
# Cycles, doubling dilations in each, residual channels; for the other widths see `completed`. A small model learns
# nothing from further back than 8 dilations reach.
WAVENET_SIZES = ((2, 8, 32), (2, 8, 48), (2, 10, 64), (3, 10, 64), (3, 10, 128))
LR = {"gpt": {"muon": 0.02, "adamw": 0.01, "sgd": 0.1}, "wavenet": {"muon": 0.045, "adamw": 0.004, "sgd": 0.1}}
TOKENS_PER_PARAMETER = {"gpt": 4.0, "wavenet": 30.0}  # a model that sees fewer is too large for its budget
PARAMETERS_PER_TOKEN = 10.0  # a model with more than that for each token of the corpus only learns it by heart
NGRAM_TOKENS = (20_000, 100_000, 500_000, 500_000, 500_000)  # from so many ids on, 2-grams, 3-grams, ... pay
GOING_ON = 0.3  # of the earlier peak rates, for weights that are trained already
PRETRAINED_LR = 5e-5  # AdamW, for weights trained elsewhere
# The share of a device's peak rate, of a CPU's in float32, that a small model's training usually reaches (in bfloat16 a
# CPU reaches 1.3 to 2 times as much), and on a GPU at most so many FLOP/s, about what an H200 reached.
EFFICIENCY = 0.45
MOST_ON_GPU = {"gpt": 1e14, "wavenet": 2e13}


@dataclass(frozen=True)
class Corpus:
    """What the choices depend on: the training split's size and shape."""

    tokens: int
    documents: int
    longest: int  # ids of the longest document
    vocab_size: int
    lines: bool
    val_tokens: int = 0
    unit: str = "id"  # the word for what an id stands for
    sample_rate: int = 0  # of sound, Hz
    codec: str = ""


def corpus_of(dataset: Dataset) -> Corpus:
    """The corpus that a dataset's training split is."""
    train, codec = dataset.splits["train"], dataset.codec
    val = dataset.splits["val"].tokens_count if "val" in dataset.splits else 0
    sizes = train.tokens_count, train.documents, train.longest, codec.vocab_size
    return Corpus(*sizes, dataset.lines, val, codec.unit, codec.sample_rate, codec.name)


@dataclass
class Draft:
    """A recipe in the making: the model and the recipe so far, and the reason of each choice. What is given is never
    chosen."""

    core: str
    corpus: Corpus
    device: Device
    given: Given
    config: Any = None  # the core's config, once the size is chosen
    recipe: Recipe = field(default_factory=Recipe)
    choices: list[Choice] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """The budget; 0 where it is a time."""
        return self.given.recipe.get("steps", 0)

    @property
    def minutes(self) -> float:
        """The budget; 0 where it is a number of steps."""
        return 0.0 if self.steps else self.given.recipe.get("minutes", 0.0)

    @property
    def on_gpu(self) -> bool:
        return self.device.kind == "cuda"

    @property
    def machine(self) -> str:
        """The kind of device, for a sentence."""
        return {"cpu": "a CPU", "cuda": "a CUDA GPU", "mps": "an Apple GPU"}[self.device.kind]

    def rate(self) -> float | None:
        """About how many FLOP/s training reaches, all processes together; None where it is not known."""
        exact = not self.on_gpu or self.given.recipe.get("precision") == "float32"
        peak = (replace(self.device, precision="float32") if exact else self.device).peak_flops()
        if peak is None:
            return None
        return min(EFFICIENCY * peak, MOST_ON_GPU.get(self.core, peak) if self.on_gpu else peak) * processes.count()

    def tell(self, what: str, value: str, reason: str) -> None:
        """Note the reason of a choice."""
        if what not in self.given.config and what not in self.given.recipe:
            self.choices.append(Choice(what, value, reason))

    def begin(self, **recipe: Any) -> None:
        """Take these values for the recipe, except where others are given."""
        self.recipe = change(Recipe(**recipe), self.given.recipe)

    def set(self, what: str, value: Any, reason: str) -> None:
        """Choose a value of the recipe, if none is given."""
        if what not in self.given.recipe:
            self.recipe = change(self.recipe, {what: value})
            self.tell(what, f"{value:,}" if isinstance(value, int) else str(value), reason)


def check(core: str, given: Given) -> None:
    """Raise UsageError where the given values cannot be right for any data."""
    config_of(core, {"vocab_size": 256} | completed(core, given.config, given.config))
    change(Recipe(), given.recipe)


def default(core: str, corpus: Corpus, device: Device, given: Given) -> Draft:
    """The default model and recipe of `core` for the budget, which is among what is `given`."""
    draft = Draft(core, corpus, device, given)
    {"gpt": _gpt_model, "wavenet": _wavenet_model}[core](draft)
    _complete(draft)
    return draft


def going_on(
    core: str, config: cores.CoreConfig, corpus: Corpus, device: Device, given: Given, earlier: dict[str, Any]
) -> Draft:
    """The default recipe for weights that were trained before by the recipe `earlier`, which is empty where it is not
    known. Only the dropout of the model is chosen."""
    draft = Draft(core, corpus, device, given, config)
    _complete(draft, earlier)
    return draft


def _complete(draft: Draft, earlier: dict[str, Any] | None = None) -> None:
    """Choose the recipe for the draft's model."""
    {"gpt": _gpt_recipe, "wavenet": _wavenet_recipe, "charwavenet": _charwavenet_recipe}[draft.core](draft)
    if draft.core == "gpt":
        _dropout(draft)
    if earlier is not None:
        _gently(draft, earlier)
    _cadence(draft)


def _gently(draft: Draft, earlier: dict[str, Any]) -> None:
    """For weights that are trained already: a part of their peak rates, which falls to zero after a short warm-up, so
    that what was learned is not lost; the loss over the whole validation split where that takes little time."""
    given, config, corpus = draft.given.recipe, draft.config, draft.corpus
    optimizer = given.get("optimizer", earlier.get("optimizer", "adamw"))
    values: dict[str, Any] = {"schedule": "linear", "warmup": 10, "decay_start": 0.0, "final_lr": 0.0}
    if optimizer == earlier.get("optimizer"):
        kept = ("optimizer", "betas", "eps", "momentum", "weight_decay", "decay", "clip")
        values |= {name: earlier[name] for name in kept if name in earlier}
        values |= {name: GOING_ON * earlier[name] for name in ("lr", "adam_lr", "table_lr") if name in earlier}
        reason = f"{GOING_ON:g} of the rate of the earlier training"
    elif earlier:
        values["lr"] = GOING_ON * LR["gpt" if draft.core == "gpt" else "wavenet"][optimizer]
        reason = "low, because the weights are trained already"
    else:
        values |= {"optimizer": optimizer, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0}
        values["lr"] = PRETRAINED_LR
        reason = "for weights trained elsewhere: nanoGPT takes 3e-5, llm.c 1e-4"
    draft.recipe = change(draft.recipe, values | given)
    draft.tell("lr", f"{values['lr']:.3g}", reason)
    if draft.steps:
        scored = draft.steps * draft.recipe.batch_size * (draft.recipe.window or config.context)
        short = corpus.val_tokens <= scored / 2
    else:
        rate = draft.rate() or 1e14
        short = corpus.val_tokens * config.flops_per_token() <= rate * 60 * draft.minutes / 5
    if short:
        draft.recipe = change(draft.recipe, {"eval_tokens": 0} | given)


def _gpt_model(draft: Draft) -> None:
    corpus = draft.corpus
    context, reason = (
        256 if draft.on_gpu else 128 if _long(draft) else 64,
        f"learns fastest on {draft.machine} in this time",
    )
    if corpus.lines and corpus.longest <= context:
        context, reason = corpus.longest, "the longest line"
    ngrams = 1 + sum(corpus.tokens >= least for least in NGRAM_TOKENS)
    draft.tell("context", str(context), reason)
    many = f"; {counted(corpus.tokens, corpus.unit)} to train on"
    reason = f"looks up the last {'2-' * (ngrams > 2)}{ngrams} {corpus.unit}s together{many}"
    if corpus.codec == "bpe":
        ngrams, reason = 1, "no n-gram tables, so that the model can be exported; with byte pairs they would gain 1 %"
    elif ngrams == 1:
        reason = f"no n-gram tables{many}"
    draft.tell("ngrams", str(ngrams), reason)
    values = {
        "vocab_size": corpus.vocab_size, "context": context, "position": "rotary", "norm": "rmsnorm",
        "activation": "relu2", "bias": False, "qkv_bias": False, "qk_norm": True, "tied_head": False, "init": "zero",
        "ngrams": ngrams,
    }  # fmt: skip
    sizes = [{"layers": layers, "heads": heads, "channels": channels} for layers, heads, channels in GPT_SIZES]
    _size(draft, [values | size for size in sizes], usual=5 if draft.on_gpu else 2)


def _long(draft: Draft) -> bool:
    return draft.on_gpu or draft.steps > 2000 or draft.minutes > 1


def _gpt_recipe(draft: Draft) -> None:
    corpus, config = draft.corpus, draft.config
    draft.begin(
        optimizer="muon", lr=LR["gpt"][draft.given.recipe.get("optimizer", "muon")], adam_lr=0.01, momentum=0.95,
        betas=(0.9, 0.95), eps=1e-10, schedule="linear", warmup=10, decay_start=0.3, final_lr=0.0,
        eval_tokens=1_000_000 if draft.on_gpu else 32_768,
    )  # fmt: skip
    if corpus.lines and corpus.longest <= config.context:
        draft.set("packing", "documents", "every line fits a sequence")
    # On a CPU many small steps beat few large ones at first; later larger ones learn as much from an id, and take less
    # time for it: Muon's products, which grow faster with the channels than a step's, do not depend on its ids.
    tokens = 16_384 if draft.on_gpu else max(3072 if _long(draft) else 1024, 8 * config.channels)
    length, mean = draft.recipe.window or config.context, ""
    if draft.recipe.packing == "documents":
        length = max(1, corpus.tokens // corpus.documents)
        mean = f", at {counted(length, corpus.unit)} a line"
    rows = max(1, tokens // (length * draft.recipe.accumulate))
    draft.set("batch_size", rows, f"about {counted(tokens, corpus.unit)} a step on {draft.machine}{mean}")


def _wavenet_model(draft: Draft) -> None:
    values = {"vocab_size": draft.corpus.vocab_size, "kernel": 2, "norm": "rmsnorm", "init": "zero"}
    sizes = [
        values | {"cycles": cycles, "dilations": DOUBLING[:n], "residual": residual}
        for cycles, n, residual in WAVENET_SIZES
    ]
    _size(draft, sizes, usual=3 if draft.on_gpu else 0)


def _wavenet_recipe(draft: Draft) -> None:
    draft.begin(
        optimizer="muon", lr=LR["wavenet"][draft.given.recipe.get("optimizer", "muon")], adam_lr=0.01, momentum=0.8,
        betas=(0.9, 0.95), eps=1e-10, schedule="linear", warmup=20, decay_start=0.3, final_lr=0.0, clip=1.0,
        eval_tokens=1_000_000 if draft.on_gpu else 65_536,
    )  # fmt: skip
    # As many samples of many recordings teach more than those of one, though each begins without a past.
    samples, context, corpus = 65_536 if draft.on_gpu else 4096, draft.config.context, draft.corpus
    documents = draft.recipe.packing == "documents"
    window, reason = min(samples, max(256, 2 ** round(math.log2(context / 2)))), "short training excerpts"
    if documents:
        window, reason = min(samples, draft.corpus.longest), "from the beginning of each recording"
    draft.set("window", window, f"{reason}; the model looks back {span(context, corpus.sample_rate, corpus.unit)}")
    recipe, window = draft.recipe, draft.recipe.window or context
    rows = max(1, samples // (window * recipe.accumulate))
    scored = rows * recipe.accumulate * (1 if recipe.packing == "last" else window)
    most = "at most " if documents else ""
    draft.set("batch_size", rows, f"{most}{counted(scored, corpus.unit)} a step on {draft.machine}")


def _charwavenet_recipe(draft: Draft) -> None:
    """The lecture's own, for a run of the preset `makemore` that is trained on."""
    draft.begin(
        batch_size=32, packing="last", optimizer="sgd", lr=LR["wavenet"][draft.given.recipe.get("optimizer", "sgd")],
        schedule="step", decay_start=0.75, final_lr=0.1, eval_tokens=65_536,
    )  # fmt: skip


def _size(draft: Draft, sizes: list[dict[str, Any]], usual: int) -> None:
    """Take the largest of `sizes`, each completed by what is given, that the budget and the corpus feed; with a number
    of steps, at most the `usual`."""
    core, given, corpus = draft.core, draft.given.config, draft.corpus
    configs: list[Any] = [config_of(core, completed(core, size | given, given)) for size in sizes]
    # A table costs next to nothing, whatever its size.
    counts = [(replace(config, ngrams=1) if core == "gpt" else config).parameters() for config in configs]
    fed = max((i for i, n in enumerate(counts) if n <= PARAMETERS_PER_TOKEN * corpus.tokens), default=0)
    rate = None if draft.steps else draft.rate()
    if rate is None:
        chosen = min(usual, fed)
        reason = f"usual on {draft.machine}" if chosen == usual else "small, as the corpus is"
    else:
        wanted, time = TOKENS_PER_PARAMETER[core], f"{draft.minutes:g} minute{'s' * (draft.minutes != 1)}"
        tokens = [60 * draft.minutes * rate / (3 * config.flops_per_token()) for config in configs]
        affordable = max((i for i, n in enumerate(tokens) if n >= wanted * counts[i]), default=0)
        chosen = min(affordable, fed)
        reason = f"the largest that sees about {wanted:.0f} tokens per parameter in {time} here"
        if chosen < affordable:
            reason = "as large as the corpus feeds"
        elif chosen == 0:
            reason = f"the smallest size, because {time} is short"
    draft.config = configs[chosen]
    if any(config != configs[0] for config in configs):  # else nothing was left to choose
        tables = ", and the n-gram tables" if core == "gpt" and draft.config.ngrams > 1 else ""
        draft.tell("size", f"{counts[chosen] / 1e6:.2g}M parameters{tables}", reason)


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


def _dropout(draft: Draft) -> None:
    """Dropout where the corpus is read so often that the model would learn it by heart."""
    recipe, config, corpus = draft.recipe, draft.config, draft.corpus
    if draft.steps:
        tokens = draft.steps * recipe.batch_size * recipe.accumulate * (recipe.window or config.context)
    else:
        rate = draft.rate() or 0.0
        tokens = rate * 60 * draft.minutes / (3 * config.flops_per_token())
    epochs = tokens / max(1, corpus.tokens)
    # A model that is small beside its corpus cannot learn it by heart, however often it reads it.
    small = replace(config, ngrams=1).parameters() < 2 * corpus.tokens
    read = epochs / 3 if draft.device.kind == "cpu" else epochs  # measured when kernels had no dropout
    shares = {"dropout": 0.0 if read < (20 if small else 6) else 0.1 if read < 40 else 0.2}
    if config.ngrams > 1:  # a table learns by heart sooner than the model beside it
        by_epochs = ((4, 0.7), (2.2, 0.6), (1.5, 0.4), (0.7, 0.2), (0, 0.0))
        shares["ngram_dropout"] = next(share for least, share in by_epochs if epochs >= least)
    times = "less than once" if epochs < 1 else "about once" if epochs < 1.5 else f"about {epochs:,.0f} times"
    for name, share in shares.items():
        if name not in draft.given.config:
            draft.config = replace(draft.config, **{name: share})
            draft.tell(name, f"{share:g}", f"the budget reads the corpus {times}")


def _cadence(draft: Draft) -> None:
    """How often to log, evaluate and save: by steps where the budget is steps, else by time."""
    if not draft.steps:
        return
    recipe, steps = draft.recipe, draft.steps
    scored = 1 if recipe.packing == "last" else recipe.window or draft.config.context
    forward = steps * recipe.batch_size * recipe.accumulate * scored
    # A training step costs 3 forward passes; evaluations take a tenth of the work at most.
    evaluations = max(1, min(10, 3 * forward // (10 * max(1, recipe.eval_tokens))))
    chosen = {
        "log_every": max(1, min(100, steps // 100)),
        "eval_every": max(1, steps // evaluations),
        "checkpoint_every": max(1, steps // 10),
    }
    draft.recipe = change(recipe, chosen | draft.given.recipe)
