"""Train, sample and evaluate a small GPT or WaveNet: everything the command `df` does, as functions.

    import dfcli

    result = dfcli.train("gpt", ["shakespeare.txt"], minutes=3)
    print(dfcli.sample_text(result.run, prompt="ROMEO:", tokens=200).samples[0])
    print(dfcli.evaluate(result.run).bits_per_byte)

Names are imported when they are first used (PEP 562), so that `import dfcli` is quick and free of PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dfcli.errors import CorruptError, DfError, UsageError

if TYPE_CHECKING:
    from dfcli.data.dataset import Dataset, list_datasets, remove_dataset
    from dfcli.evaluation.evaluate import evaluate
    from dfcli.generation.sample import sample_audio, sample_text
    from dfcli.ingest.download import get as download
    from dfcli.ingest.prepare import prepare
    from dfcli.runs.run import Run, list_runs
    from dfcli.runs.run import newest as newest_run
    from dfcli.runs.run import remove as remove_run
    from dfcli.training.train import plan, train

__version__ = "0.1.0"

_HOME = {
    "Dataset": "dfcli.data.dataset:Dataset",
    "Run": "dfcli.runs.run:Run",
    "download": "dfcli.ingest.download:get",
    "evaluate": "dfcli.evaluation.evaluate:evaluate",
    "list_datasets": "dfcli.data.dataset:list_datasets",
    "list_runs": "dfcli.runs.run:list_runs",
    "newest_run": "dfcli.runs.run:newest",
    "plan": "dfcli.training.train:plan",
    "prepare": "dfcli.ingest.prepare:prepare",
    "remove_dataset": "dfcli.data.dataset:remove_dataset",
    "remove_run": "dfcli.runs.run:remove",
    "sample_audio": "dfcli.generation.sample:sample_audio",
    "sample_text": "dfcli.generation.sample:sample_text",
    "train": "dfcli.training.train:train",
}

__all__ = [
    "CorruptError", "Dataset", "DfError", "Run", "UsageError", "download", "evaluate", "list_datasets", "list_runs",
    "newest_run", "plan", "prepare", "remove_dataset", "remove_run", "sample_audio", "sample_text", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
