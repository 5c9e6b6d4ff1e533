"""Parts that measure speed: training steps and generation."""

from __future__ import annotations

import io
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

from tests.gpu.common import Note, Where

ALPHABET = "\n" + "".join(chr(33 + i) for i in range(64))


def throughput(where: Where, note: Note) -> None:
    """Steps of the trainer on random ids: kernel by kernel, as a CUDA graph, and as one with torch.compile."""
    gpt2 = {
        "vocab_size": 50_257, "context": 1024, "layers": 12, "heads": 12, "channels": 768, "activation": "gelu_tanh",
    }  # fmt: skip
    tables = {"vocab_size": 65, "context": 256, "layers": 6, "heads": 6, "channels": 384, "position": "rotary",
              "norm": "rmsnorm", "activation": "relu2", "bias": False, "qkv_bias": False, "qk_norm": True,
              "tied_head": False, "init": "zero", "ngrams": 6}  # fmt: skip
    tiny = {"layers": 1, "heads": 2, "channels": 32, "context": 32, "vocab_size": 65} if where.quick else {}
    says: dict[str, str] = {}
    for name, config, rows, recipe in (
        ("gpt2", gpt2, 16, {"optimizer": "adamw", "clip": 1.0}),
        ("default with tables", tables, 64, {"optimizer": "muon", "lr": 0.02, "momentum": 0.95}),
    ):
        for way, compiling in {"": "off", " as a graph": "auto", " compiled": "on"}.items():
            if way and not where.on_gpu:
                continue
            batch = 2 if where.quick else rows
            figures = steps(config | tiny, recipe | {"compile": compiling, "batch_size": batch}, where)
            note(**{name + way: figures})
            share = f", {figures['share_of_peak']:.0%} of peak" if figures["share_of_peak"] else ""
            what = f"{name}{way}: {figures['tokens_per_second']:,.0f} tokens/s"
            says[name + way] = f"{what}{share}, {figures['first_seconds']:.1f} s to the first step"
            note(says=says)


def steps(config: dict[str, Any], recipe: dict[str, Any], where: Where) -> dict[str, Any]:
    """The median step of a trainer that writes nothing."""
    import torch

    from dfcli import cores
    from dfcli.data.batches import Batch
    from dfcli.system.device import resolve
    from dfcli.system.processes import Pulse
    from dfcli.training.saver import Nowhere
    from dfcli.training.settings import Recipe, change
    from dfcli.training.trainer import Trainer

    device = resolve(where.device)
    torch.manual_seed(0)
    core = cores.GPT(cores.GPTConfig(**config)).to(device.torch_device)
    ids = torch.randint(config["vocab_size"], (8, recipe["batch_size"], config["context"] + 1))

    class Random:
        def at(self, step: int, micro: int = 0) -> Batch:
            return Batch(ids[step % 8, :, :-1].contiguous(), ids[step % 8, :, 1:].contiguous(), None)

    count: int = 4 if where.quick else 30
    moments: list[float] = []
    planned = change(Recipe(), recipe | {"steps": count, "window": config["context"]})
    ask = lambda: moments.append(time.perf_counter())  # noqa: E731
    began = time.perf_counter()
    with device.repeatable():
        Trainer(core, planned, Random(), Nowhere(Path()), device, pulse=Pulse(stop=ask)).run()
    seconds = statistics.median(b - a for a, b in itertools.pairwise(moments[count // 3 :]))
    rate = recipe["batch_size"] * config["context"] / seconds
    peak = device.peak_flops()
    flops = 3 * core.config.flops_per_token() * rate
    return {
        "tokens_per_second": rate, "milliseconds": 1000 * seconds, "first_seconds": moments[1] - began,
        "flops_per_second": flops, "share_of_peak": flops / peak if peak and not where.quick else None,
        "parameters": core.config.parameters(), "precision": device.precision,
    }  # fmt: skip


def generation(where: Where, note: Note) -> None:
    """Tokens a second of untrained models, one sequence and many; both engines pick the same ids."""
    import torch

    import dfcli
    from dfcli import cores
    from dfcli.codecs import Chars, MuLaw
    from tests.generation.runs import save

    torch.manual_seed(1)
    quick = where.quick
    gpt = {"layers": 1, "heads": 2, "channels": 32, "context": 32} if quick else {"context": 256}
    large = gpt if quick else {"layers": 12, "heads": 12, "channels": 768, "context": 1024}
    wavenet: dict[str, Any] = {"cycles": 1, "residual": 16, "skip": 16, "head": 16} if quick else {
        "cycles": 3, "residual": 64, "skip": 256, "head": 256}  # fmt: skip
    save("nano", cores.GPT(cores.GPTConfig(65, **gpt)), Chars(ALPHABET))
    save("124M", cores.GPT(cores.GPTConfig(65, **large)), Chars(ALPHABET))
    save("paper", cores.WaveNet(cores.WaveNetConfig(256, **wavenet)), MuLaw(16_000), boundary=128)
    says: dict[str, str] = {}
    for name in ("paper", "nano", "124M"):
        for num in (1, 2 if quick else 64):
            rates, made = {}, {}
            for engine in ("plain", "auto"):
                tokens = 20 if quick else 200 if engine == "plain" else 2000
                if name == "paper":
                    out = io.BytesIO() if num == 1 else where.work / "out.wav"
                    result = dfcli.sample_audio(
                        name, tokens / 16_000, out, num=num, seed=1, device=where.device, engine=engine
                    )
                    made[engine] = out.getvalue() if isinstance(out, io.BytesIO) else b""
                else:
                    result = dfcli.sample_text(
                        name, "!", tokens=tokens, num=num, seed=1, device=where.device, engine=engine
                    )
                    made[engine] = result.samples[0]
                rates[result.engine] = result.tokens_per_second
            length = min(map(len, made.values()))
            alike = made["plain"][44:length] == made["auto"][44:length]  # behind the wav's header
            note(**{f"{name} x {num}": {"tokens_per_second": rates, "alike": alike}})
            note.check(alike or not where.on_gpu, f"{name} x {num}: the engines make different ids")
            each = ", ".join(f"{engine} {rate:,.0f}/s" for engine, rate in rates.items())
            says[f"{name} {num}"] = f"{name} x {num}: {each}"
            note(says=says)
