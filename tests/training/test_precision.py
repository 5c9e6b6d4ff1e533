"""Which precision a training's products have, and that a run learns as much in each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dfcli
from dfcli import cores
from dfcli.errors import UsageError
from dfcli.system.device import Device
from dfcli.training.backend import in_precision
from dfcli.training.settings import Recipe
from dfcli.training.train import plan
from tests.distributed.work import at
from tests.generation.engine import cpu
from tests.kernels.passes import needs_amx

CPU = replace(cpu(), precision="bfloat16")
GPU = Device(torch.device("cuda", 0), "cuda", "GPU", "bfloat16", "", 1)
SMALL = {"vocab_size": 11, "context": 8, "layers": 1, "heads": 2, "channels": 32}
WIDE = SMALL | {"channels": 2048, "heads": 16}


@pytest.mark.parametrize(
    ("device", "core", "values", "recipe", "precision"),
    [
        (CPU, "gpt", SMALL, {"compile": "off"}, "float32"),
        (CPU, "gpt", WIDE, {"compile": "off"}, "bfloat16"),
        (CPU, "gpt", WIDE, {"precision": "float32"}, "float32"),
        (CPU, "wavenet", {"vocab_size": 11}, {"compile": "off"}, "bfloat16"),
        (CPU, "charwavenet", {"vocab_size": 11}, {}, "float32"),
        (cpu(), "gpt", WIDE, {}, "float32"),
        (GPU, "gpt", SMALL, {}, "bfloat16"),
        (GPU, "charwavenet", {"vocab_size": 11}, {}, "bfloat16"),
        (GPU, "gpt", SMALL, {"precision": "float32"}, "float32"),
    ],
)
def test_the_precision_is_the_devices_where_that_pays(
    device: Device, core: str, values: dict[str, Any], recipe: dict[str, str], precision: str
) -> None:
    assert in_precision(device, cores.config(core, values), Recipe(**recipe)).precision == precision


@needs_amx
@pytest.mark.parametrize(("channels", "precision"), [(32, "bfloat16"), (48, "float32")])
def test_kernels_round_the_widths_that_fill_their_tiles(channels: int, precision: str) -> None:
    config = cores.config("gpt", SMALL | {"channels": channels, "heads": 1})
    assert in_precision(CPU, config, Recipe()).precision == precision
    assert in_precision(CPU, config, Recipe(), compiled=False).precision == "float32"


@needs_amx
def test_a_run_learns_as_much_in_each_precision_and_resumes_in_its_own(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    losses = {}
    for precision in ("auto", "float32"):
        values = {"precision": precision, "channels": "32", "layers": "2"}
        asked: dict[str, Any] = {"steps": 60, "overrides": values, "device": "cpu"}
        shown = plan("gpt", [str(text)], **asked)
        assert shown.to_json()["precision"] == ("bfloat16" if precision == "auto" else "float32")
        losses[precision] = dfcli.train("gpt", [str(text)], name=precision, **asked).val_loss
        again = f"{precision}-again"
        assert dfcli.train("gpt", [str(text)], name=again, stop=at(20, lambda: "asked"), **asked).steps == 20
        dfcli.train("gpt", name=again, resume=True, device="cpu")
        ends = [dfcli.Run.open(name).load("last").model for name in (precision, again)]
        assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    assert losses["auto"] != losses["float32"]
    assert losses["auto"] == pytest.approx(losses["float32"], rel=0.1)


@needs_amx
@pytest.mark.parametrize("first", ["bfloat16", "float32"])
def test_a_run_goes_on_on_another_processor(first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 where it began in it, or where the other processor has nothing else, which is then said."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    monkeypatch.setattr("dfcli.system.device._has_amx", lambda: first == "bfloat16")
    values = {"channels": "32", "layers": "2"}
    asked: dict[str, Any] = {"steps": 20, "overrides": values, "device": "cpu", "name": "r"}
    dfcli.train("gpt", [str(text)], stop=at(10, lambda: "asked"), **asked)
    assert dfcli.Run.open("r").info["precision"] == first
    monkeypatch.setattr("dfcli.system.device._has_amx", lambda: first == "float32")
    events: list[Any] = []
    dfcli.train("gpt", resume=True, device="cpu", name="r", on_event=events.append)
    words = [str(event) for event in events]
    assert any("kernels for this model on this CPU, in float32" in text for text in words)
    assert any("in bfloat16: it goes on" in text for text in words) == (first == "bfloat16")


def test_another_precision_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text to train on, a few words long\n" * 9)
    with pytest.raises(UsageError, match="precision must be one of auto, float32, not `half`"):
        plan("gpt", [str(text)], steps=1, overrides={"precision": "half"})
