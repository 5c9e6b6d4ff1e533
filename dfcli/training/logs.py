"""The figures of a training for TensorBoard or Weights & Biases, which are packages of their own."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from dfcli.errors import UsageError
from dfcli.runs.run import Run
from dfcli.system.events import OnEvent
from dfcli.system.words import closest
from dfcli.training.events import Finished, Step

LOGS = ("tensorboard", "wandb")
FIGURES = ("train_loss", "val_loss", "lr", "tokens_per_second")


def check_log(name: str) -> None:
    """Raise UsageError where there is no such log, or its package is not installed."""
    if name not in LOGS:
        raise UsageError(f"there is no log `{name}`", closest(name, LOGS))
    if find_spec(name) is None:
        raise UsageError(f"--log {name} takes a package that is not installed", f"`pip install {name}`")


def logged(name: str | None, run: Run, on_event: OnEvent) -> OnEvent:
    """`on_event`, which also writes the figures of each step to the log `name`, if one is given: TensorBoard's to the
    folder `tensorboard` of the run. A resumed run goes on with its log."""
    if name is None:
        return on_event
    write, close = (_tensorboard if name == "tensorboard" else _wandb)(run)

    def listen(event: object) -> None:
        if isinstance(event, Step):
            figures = {key: getattr(event, key) for key in FIGURES}
            write(event.step, {key: value for key, value in figures.items() if value is not None})
        elif isinstance(event, Finished):
            close()
        on_event(event)

    return listen


Write = Callable[[int, dict[str, float]], object]


def _tensorboard(run: Run) -> tuple[Write, Callable[[], object]]:
    from torch.utils.tensorboard import SummaryWriter

    steps = run.steps()
    writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=steps[-1] + 1 if steps else None)

    def write(step: int, figures: dict[str, float]) -> None:
        for key, value in figures.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return write, writer.close


def _wandb(run: Run) -> tuple[Write, Callable[[], object]]:
    import wandb  # pyright: ignore[reportMissingImports]

    config = {"core": run.info["core"], "recipe": run.info.get("recipe"), "data": run.info["dataset"]["name"]}
    named = {"project": "dfcli", "name": run.name, "id": run.name, "resume": "allow"}
    made: Any = wandb.init(**named, config=config, dir=str(run.path))
    return (lambda step, figures: made.log(figures, step=step)), made.finish
