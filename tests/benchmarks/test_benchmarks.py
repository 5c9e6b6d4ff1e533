"""Each benchmark runs, with settings so small that its figures mean nothing, and prints the figures it promises."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from tests.benchmarks import (
    byte_pairs,
    common,
    estimate,
    experiments,
    memory,
    nano_cpu_ratio,
    prepare,
    records,
    tokenizer,
    train_gpt,
    train_wavenet,
)

TEXT = "".join(f"The {n % 97}th line of {n}, which is no poem.\n" for n in range(600))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "poem.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Three noises a speaker: indices 0 and 4 are a test's, 10 is not."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in (0, 4, 10):
        soundfile.write(folder / f"7_jo_{index}.wav", 0.1 * random.standard_normal(6000), 8000)
    return folder


@pytest.fixture
def printed(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """`printed(main, words)`: the JSON it prints, with where and when."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rate = common.product_rate
    monkeypatch.setattr(common, "product_rate", lambda *_, **__: rate(size=256, rounds=1))

    def call(main: Callable[[list[str]], None], *words: object) -> dict[str, Any]:
        main([str(word) for word in words])
        out = capfd.readouterr().out
        figures = json.loads(out[out.index("{\n") :])  # the last that is printed
        assert figures["versions"].keys() == {"python", "torch"}
        assert figures["date"]
        assert figures["machine"]
        return figures

    return call


@pytest.mark.slow
def test_train_gpt(printed: Callable[..., dict[str, Any]], text: Path) -> None:
    seconds = ("--minutes", "0.02", "--shares")
    figures = printed(train_gpt.main, "--data", text, "--anchor-steps", 1, *seconds)
    assert figures["anchor"]["seconds"] > 0
    (run,) = figures["recipes"]
    assert run["val_loss"] < math.log(40)
    assert run["share_of_anchor_time"] == pytest.approx(run["train_seconds"] / figures["anchor"]["seconds"])
    whole, alone = run["share_of_product_rate_with_validation"], run["share_of_product_rate"]
    rest = run["share_of_time_for_validation_and_checkpoints"]
    assert 0 < rest < 1
    assert whole == pytest.approx(alone * (1 - rest))


@pytest.mark.slow
def test_train_wavenet(printed: Callable[..., dict[str, Any]], recordings: Path) -> None:
    words = ("--minutes", "0.005", "--recipe-minutes", "0.005")
    figures = printed(train_wavenet.main, "--data", recordings, *words)
    assert figures["samples"] == {"train": 6001, "val": 12_002}
    assert 0 < figures["anchor"]["bits_per_sample"] < 9
    (run,) = figures["recipes"]
    assert run["bits_per_sample"] == pytest.approx(figures["anchor"]["bits_per_sample"] - run["bits_below_anchor"])


def test_the_plain_wavenet_sees_what_the_config_says() -> None:
    import torch

    from dfcli.cores import WaveNetConfig

    config = WaveNetConfig(vocab_size=11, dilations=(1, 2, 4), cycles=1, residual=4, skip=6, head=6)
    core = train_wavenet.PlainWaveNet(config)
    assert sum(p.numel() for p in core.parameters()) == pytest.approx(config.parameters(), abs=60)
    ids = torch.randint(11, (1, 20))
    other = ids.clone()
    other[0, 5] = (ids[0, 5] + 1) % 11
    changed = (core(ids) != core(other)).any(-1)[0].nonzero().flatten()
    assert changed.min() == 5
    assert changed.max() == 5 + config.context - 1


def test_nano_cpu_ratio(printed: Callable[..., dict[str, Any]], text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, loop = set[int](), common.nano_loop

    def watched(dataset: Any) -> Any:
        core, step = loop(dataset)
        return core, lambda i: (seen.add(torch.get_num_threads()), step(i))

    monkeypatch.setattr(common, "nano_loop", watched)
    figures = printed(nano_cpu_ratio.main, "--data", text, "--rounds", 2, "--steps", 1)
    speeds = figures["trainer_tokens_per_second"] / figures["plain_tokens_per_second"]
    low, high = figures["quartiles"]
    assert low <= figures["ratio"] <= high
    assert low / 2 < speeds < high * 2
    assert seen == {figures["threads"]}


def test_experiments(printed: Callable[..., dict[str, Any]], text: Path) -> None:
    small = "layers=1 heads=2 channels=8 batch_size=2"
    figures = printed(experiments.main, "gpt", "--data", text, "--minutes", 0.01, small, small + " ngrams=1")
    with_tables, without = figures["variants"]
    assert with_tables["parameters"] > without["parameters"]
    assert 0 < without["val_loss"] < 5


@pytest.mark.slow
def test_memory(printed: Callable[..., dict[str, Any]], text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SMALL", 200_000)
    figures = printed(memory.main, "--data", text, "--gigabytes", 0.001, "--steps", 2)
    assert figures["small"]["tokens"] == pytest.approx(200_000, abs=100)
    assert figures["large"]["tokens"] == pytest.approx(1_000_000, abs=100)
    assert 20 < figures["small"]["preparation_megabytes"] < figures["small"]["training_megabytes"]


def test_estimate(printed: Callable[..., dict[str, Any]]) -> None:
    """The only benchmark whose figure is held: an estimate must be about right on every machine."""
    figures = printed(estimate.main, "dropout")["dropout"]
    assert figures["ratio"] == pytest.approx(figures["planned"] / figures["measured"])
    assert 0.7 < figures["ratio"] < 1.3


def test_prepare(printed: Callable[..., dict[str, Any]], text: Path, recordings: Path) -> None:
    words = ("--audio", recordings, "--megabytes", 0.2, "--audio-minutes", 0.1)
    figures = printed(prepare.main, "--data", text, *words)
    for name in ("chars", "bytes", "lines"):
        assert figures[name]["megabytes_per_second"] == pytest.approx(0.2 / figures[name]["seconds"], rel=0.01)
    assert figures["audio"]["times_real_time"] == pytest.approx(6 / figures["audio"]["seconds"], rel=0.2)
    assert figures["audio_resampled"]["sample_rate"] == 16_000


def test_tokenizer(printed: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "installed", lambda: iter([TEXT.encode()]))
    figures = printed(tokenizer.main, "--megabytes", 0.1, "--vocab-size", 300)
    assert figures["distinct_megabytes"] == pytest.approx(len(TEXT) / 1e6, rel=0.01)
    assert figures["bytes_read"] == pytest.approx(1e5, rel=0.01)
    assert figures["codec"] == "bpe, 300 ids"


def test_records(printed: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "SMALL", 200_000)
    figures = printed(records.main, "--gigabytes", 0.0005)
    assert figures["small"]["megabytes"] == pytest.approx(0.2, rel=0.05)
    assert 0.35e6 < figures["large"]["tokens"] < 0.5e6  # without the records' other fields and their escapes


@pytest.mark.slow
def test_byte_pairs(printed: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--cpu-minutes", 0.01, "--megabytes", 0.3, "--models", "bpe", "bytes")
    models = printed(byte_pairs.main, *words)["models"]
    assert 1 < models["bytes"]["bits_per_byte"] < 8
    assert models["bpe"]["val_bytes"] == pytest.approx(models["bytes"]["val_bytes"], rel=0.01)
    assert models["bpe"]["val_tokens"] < models["bytes"]["val_tokens"]


def test_memory_of_a_child_counts_what_it_holds_and_text_repeats_by_lines(tmp_path: Path, text: Path) -> None:
    size, least = common.in_child(len, b"1" * 50_000_000)
    assert size == 50_000_000
    assert least > 50_000_000
    copy = common.repeated(text, tmp_path / "copy.txt", 3 * len(TEXT) + 100).read_text()
    assert copy.startswith(3 * TEXT)
    assert len(copy) < 3 * len(TEXT) + 200
    assert copy.endswith("\n")
