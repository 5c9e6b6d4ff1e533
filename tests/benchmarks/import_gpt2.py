"""A published GPT-2's shape from a Hugging Face folder: import, one step of training, and transformers' logits.

    python -m tests.benchmarks.import_gpt2 [--sizes gpt2 distilgpt2 ...] [--preset finetune_shakespeare]

transformers writes the folders, with random weights and biases. `gpt2` has all its layers: it is imported, trained for
one step by the recipe for going on from weights, or by a preset, each in a process of its own, whose memory is
measured. The other sizes have their widths and 2 layers (distilgpt2 all 6). Logits are compared on one full context.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import common

SIZES = {  # layers, heads, channels
    "gpt2": (12, 12, 768),
    "gpt2-medium": (2, 16, 1024),
    "gpt2-large": (2, 20, 1280),
    "gpt2-xl": (2, 25, 1600),
    "distilgpt2": (6, 12, 768),
}
TEXT_BYTES = 200_000


def make(folder: Path, text: Path, layers: int, heads: int, channels: int) -> int:
    """Write a random GPT-2 and a tokenizer; gives its parameters."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from dfcli.codecs import BPE

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_head=heads, n_embd=channels))
    for parameter in model.parameters():  # biases at zero would hide a missing one
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    BPE.train([text.read_text(encoding="utf-8")], 512).save_files(folder)
    return model.num_parameters()


def imported(folder: Path, name: str) -> float:
    """Seconds of an import."""
    from dfcli.runs.huggingface import import_folder

    began = time.perf_counter()
    import_folder(folder, name)
    return time.perf_counter() - began


def difference(folder: Path, name: str) -> dict[str, float]:
    """How far the logits of an imported run are from transformers', on a full context of random ids."""
    import torch
    from transformers import AutoModelForCausalLM

    from dfcli.runs.run import Run

    core, _ = Run.open(name).build()
    ids = torch.randint(0, 50_257, (1, 1024), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = core(ids)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
    return {
        "largest_difference": float((ours - theirs).abs().max()),
        "largest_logit": float(theirs.abs().max()),
        "same_first_choice": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
    }


def step(folder: Path, text: Path, preset: str | None) -> dict[str, Any]:
    """One step from the folder's weights: its seconds, and those of the whole command with its validations."""
    from dfcli.runs.run import Run
    from dfcli.training.train import train

    began = time.perf_counter()
    result = train("gpt", [str(text)], init=str(folder), preset=preset, steps=1, device="cpu", seed=0)
    run = Run.open(result.run)
    recipe = run.info["recipe"]
    kept = ("optimizer", "lr", "batch_size", "accumulate", "window", "schedule", "warmup")
    return {
        "command_seconds": time.perf_counter() - began,
        "step_seconds": result.tokens_seen / max(row["tokens_per_second"] for row in run.metrics()),
        "tokens": result.tokens_seen,
        "val_loss": result.val_loss,
        "parameters": result.parameters,
        "recipe": {name: recipe[name] for name in kept},
    }


def main(words: Sequence[str] | None = None) -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--preset", help="for the step; the default recipe for going on without it")
    given = parser.parse_args(words)
    found: dict[str, Any] = {}
    with common.home() as home:
        text = home / "text.txt"
        every = b"".join(path.read_bytes() for path in common.library()[:40])
        text.write_bytes(bytes(byte for byte in every if byte < 128)[:TEXT_BYTES])
        for name in given.sizes:
            folder = home / name
            parameters, _ = common.in_child(make, folder, text, *SIZES[name])
            seconds, most = common.in_child(imported, folder, f"{name}-run")
            logits, _ = common.in_child(difference, folder, f"{name}-run")
            found[name] = {
                "layers": SIZES[name][0],
                "parameters": parameters,
                "import_seconds": seconds,
                "import_megabytes": most / 1e6,
                **logits,
            }
            if name == "gpt2":
                figures, most = common.in_child(step, folder, text, given.preset)
                found[name]["step"] = figures | {"megabytes": most / 1e6}
            print(f"{name}: largest difference {logits['largest_difference']:.2g}", flush=True)
    common.report({"benchmark": "import_gpt2", "sizes": found})


if __name__ == "__main__":
    main()
