"""Training with conditions: what the model becomes, exact resume, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from dfcli.errors import UsageError
from dfcli.runs.run import Run
from dfcli.training.train import TrainResult, plan, train

PATTERN = r"(?P<digit>\d)_(?P<speaker>[a-z]+)"
SMALL = {"residual": "16", "cycles": "1", "dilations": "1,2,4", "batch_size": "4", "window": "64", "warmup": "1"}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones whose pitch is the digit's, and whose loudness the speaker's; of half a second each."""
    folder, rng = tmp_path_factory.mktemp("recordings"), np.random.default_rng(0)
    for digit in range(2):
        for loud, speaker in ((0.1, "ann"), (0.8, "bob")):
            for take in range(4):
                tone = loud * np.sin(np.arange(500) * (0.2 + 0.3 * digit)) + 0.01 * rng.standard_normal(500)
                soundfile.write(folder / f"{digit}_{speaker}_{take}.wav", tone, 1000)
    return folder


def trained(recordings: Path, name: str, **options: Any) -> TrainResult:
    given = {"name": name, "steps": 6, "device": "cpu", "overrides": SMALL, "seed": 3}
    return train("wavenet", [str(recordings)], **given | options)


@pytest.mark.parametrize("told", [{"label": PATTERN}, {"condition": "mel"}])
def test_a_conditioned_run_resumes_bit_for_bit(recordings: Path, told: dict[str, str]) -> None:
    trained(recordings, "whole", **told)
    asked = iter(range(100))
    stopped = trained(recordings, "parts", stop=lambda: "interrupted" if next(asked) == 3 else None, **told)
    assert stopped.stopped == "interrupted"
    with pytest.raises(UsageError, match="--condition"):
        trained(recordings, "parts", resume=True, condition="none")
    trained(recordings, "parts", resume=True)
    whole, parts = (Run.open(name).load("last").model for name in ("whole", "parts"))
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    run = Run.open("whole")
    assert run.conditioning is not None
    if "label" in told:
        assert run.conditioning.names == {"digit": ["0", "1"], "speaker": ["ann", "bob"]}
        assert run.conditioning.progress is not None
    else:
        assert run.conditioning.mel is not None


def test_what_is_refused(recordings: Path) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("wavenet", {"condition": "labels"}, "has no labels"),
        ("wavenet", {"condition": "smell"}, "no condition"),
        ("wavenet", {"condition": "mel", "label": "folder"}, "exclude"),
        ("wavenet", {"overrides": {"series": "3"}}, "follows from the data"),
        ("gpt", {"label": "folder"}, "WaveNets"),
    ]
    for kind, options, says in cases:
        with pytest.raises(UsageError, match=says):
            plan(kind, [str(recordings)], **options)
