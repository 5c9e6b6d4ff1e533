"""What came of a training: the figures of `df train --json`, kept as result.json in the folder of a finished run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, get_type_hints

from dfcli.errors import CorruptError
from dfcli.runs.run import RESULT, Run
from dfcli.system.files import DAMAGED, read_json, write_json

PLACE = ("run", "path")  # not in result.json, because a run may be renamed or copied
ADDED = {
    "closed": True,
    "start_val_loss": None,
    "last_val_loss": None,
    "overfitting": False,
}  # what results of version 0.1 lack


@dataclass(frozen=True)
class TrainResult:
    """What came of a training. Its fields are the keys of `df train --json`."""

    run: str
    path: str
    preset: str | None
    steps: int  # updates made
    tokens_seen: int  # targets the updates were made on
    train_seconds: float  # from just before the first step, evaluations and checkpoints included
    tokens_per_second: float  # tokens_seen / train_seconds
    val_loss: float | None  # nats a token, of the checkpoint that sample and eval use by default
    closed: bool  # whether val_loss is over the whole validation split, not over the recipe's part of it
    best_step: int | None  # that checkpoint's step
    start_val_loss: float | None  # of the weights that `--init` gave, over what val_loss is over
    last_val_loss: float | None  # of the last step, over the recipe's part of the validation split
    overfitting: bool  # whether the validation loss rose after best_step while the training loss fell
    parameters: int
    device: str
    seed: int
    skipped: int  # batches left out because their loss or gradient was not finite
    stopped: str | None  # why it ended early: "interrupted", "terminated"; None when it is finished


def write_result(run: Run, result: TrainResult) -> None:
    """Keep the result of a finished run, atomically."""
    values = {key: value for key, value in asdict(result).items() if key not in PLACE}
    write_json(run.path / RESULT, {"format": 1, **values})


def read_result(run: Run) -> TrainResult | None:
    """The result of a finished run; None where it is not finished. CorruptError where the file is damaged."""
    path = run.path / RESULT
    if not path.exists():
        return None
    values: dict[str, Any] = ADDED | read_json(path) | {"run": run.name, "path": str(run.path)}
    kinds = get_type_hints(TrainResult)
    if not all(f.name in values and isinstance(values[f.name], kinds[f.name]) for f in fields(TrainResult)):
        raise CorruptError(f"{path} is damaged: it is not the result of a training", DAMAGED)
    return TrainResult(**{f.name: values[f.name] for f in fields(TrainResult)})
