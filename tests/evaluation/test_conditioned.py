"""Evaluations of runs whose models are told labels or mel spectrograms: figures computed again, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

from dfcli.cores import WaveNet, WaveNetConfig
from dfcli.cores.wavenet import Condition
from dfcli.data.conditions import conditioning
from dfcli.data.dataset import Dataset
from dfcli.errors import CorruptError, DfError, UsageError
from dfcli.evaluation.evaluate import evaluate
from dfcli.ingest.prepare import prepare
from dfcli.runs.run import RUN, Run
from dfcli.system.files import read_json, write_json

RULE = r"(?P<digit>\d)_(?P<speaker>[a-z]+)"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    folder = tmp_path / "digits"
    folder.mkdir()
    for digit in range(2):
        for speaker in ("al", "zoe"):
            for k in range(3):
                samples = 0.3 * random.standard_normal(round(8000 * random.uniform(0.05, 0.2)))
                soundfile.write(folder / f"{digit}_{speaker}_{k}.wav", samples, 8000)
    return folder


@pytest.fixture
def dataset(data: Path) -> Iterator[Dataset]:
    with prepare([str(data)], label=RULE, val_fraction=0.3, levels=256) as made:
        yield made


def save(dataset: Dataset, kind: str) -> tuple[Run, WaveNet]:
    """A run of a model that was not trained, but whose conditions matter."""
    torch.manual_seed(1)
    told = conditioning(dataset, kind)
    assert told is not None
    core = WaveNet(
        WaveNetConfig(
            256, dilations=(1, 2, 4), cycles=1, residual=8, skip=8, head=8, labels=told.counts,
            condition=4 if told.counts else 0, series=told.series,
        )
    )  # fmt: skip
    info = {
        "kind": "wavenet",
        "core": {"name": "wavenet", "config": asdict(core.config)},
        "recipe": {},
        "conditioning": told.to_json(),
        "dataset": {
            "name": dataset.name, "path": str(dataset.path), "fingerprint": dataset.fingerprint,
            "boundary": dataset.boundary, "lines": False, "lead": 1, "normalize": "none",
        },
    }  # fmt: skip
    run = Run.create(f"told-{kind}", info, dataset.codec)
    run.save(1, dict(core.state_dict()), {}, {"val_loss": None})
    return run, core.eval()


@pytest.mark.parametrize("kind", ["labels", "mel"])
def test_each_target_is_scored_with_its_condition(dataset: Dataset, data: Path, kind: str) -> None:
    run, core = save(dataset, kind)
    told, part = run.conditioning, dataset.splits["val"]
    assert told is not None
    nats = targets = 0.0
    for k in range(part.documents):
        ids = torch.from_numpy(part.document(k).astype(np.int64))[None]
        if kind == "mel":
            rows = told.of_sound(dataset.codec, part.document(k)[1:])  # type: ignore[arg-type]
        else:
            rows = told.of_labels(part.labels[k].tolist(), ids.shape[1] - 1)
        index = torch.arange(ids.shape[1] - 1)[None] // told.hop
        with torch.inference_mode():
            logits = core(ids[:, :-1], condition=Condition(rows.labels, rows.series, index))
        nats += float(F.cross_entropy(logits[0].double(), ids[0, 1:], reduction="sum"))
        targets += ids.shape[1] - 1
    found = evaluate(run)
    assert (found.tokens, found.loss) == (targets, pytest.approx(nats / targets, rel=1e-5))
    # Files are labelled by the run's own rule.
    files = evaluate(run, [str(data)])
    assert files.tokens == sum(split.tokens_count - split.documents for split in dataset.splits.values())


def test_unknown_labels_are_refused(dataset: Dataset, data: Path, tmp_path: Path) -> None:
    run, _ = save(dataset, "labels")
    other = tmp_path / "other"
    other.mkdir()
    for name in ("0_al_0.wav", "1_max_1.wav"):
        (other / name).write_bytes((data / "0_al_0.wav").read_bytes() + name.encode())
    with pytest.raises(DfError, match="not trained on the speaker 'max'"):
        evaluate(run, [str(other)])
    with pytest.raises(UsageError, match="makes no sound from mel spectrograms"):
        evaluate(run, measures=True)


def test_measures_stand_beside_their_floors(dataset: Dataset) -> None:
    run, _ = save(dataset, "mel")
    found = evaluate(run, measures=True).measures
    assert found is not None
    assert list(found) == ["model", "mu-law round trip", "Griffin-Lim", "another recording"]
    for distances in found.values():
        assert distances["log_spectral"] > 0
    assert found["model"]["log_spectral"] > found["mu-law round trip"]["log_spectral"]


@pytest.mark.parametrize("damage", ["missing", "mel", "names", "text"])
def test_a_damaged_description_is_noticed(dataset: Dataset, damage: str) -> None:
    run, _ = save(dataset, "mel" if damage == "mel" else "labels")
    info = read_json(run.path / RUN)
    if damage == "missing":
        del info["conditioning"]
    elif damage == "mel":
        info["conditioning"]["mel"]["deviation"][0] = 0
    elif damage == "names":
        info["conditioning"]["labels"]["digit"].append("9")
    else:
        info["conditioning"] = "labels"
    write_json(run.path / RUN, info)
    with pytest.raises(CorruptError, match="does not say what its model is told"):
        evaluate(run.name)
