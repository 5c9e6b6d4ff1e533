"""The options of an evaluation. Each is written once, as a field: its type, default and help.

Nothing here imports PyTorch or NumPy, which take seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfcli.errors import UsageError
from dfcli.system.options import check_device, checkpoint_option, device_option, option
from dfcli.system.words import closest

if TYPE_CHECKING:
    from dfcli.runs import Run

SPLITS = ("val", "test", "train", "all")


@dataclass(frozen=True)
class Request:
    data: tuple[str, ...] = option((), "Other data than the run's own; files are scored whole.", "NAME|PATH")
    split: str | None = option(None, "val, test or train; val by default.", "SPLIT")
    stride: int | None = option(
        None, "Distance between evaluation windows in tokens (GPT only). Smaller gives more context but is slower.", "N"
    )
    limit: int | None = option(None, "Score only the first N tokens, for a quick look.", "N")
    measures: bool = option(False, "For a vocoder: also make recordings again, and give their spectral distances.")
    checkpoint: str | int = checkpoint_option()
    device: str = device_option()

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", tuple(self.data or ()))
        check_device(self.device)
        splits = SPLITS if self.data else SPLITS[:-1]  # only files that are given are one split
        if self.split not in (None, *splits):
            raise UsageError(f"there is no split `{self.split}`", closest(str(self.split), splits))
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit must be at least 1 token, not {self.limit}")

    @property
    def plain(self) -> bool:
        """Whether a split is scored whole, as the end of a training does."""
        return not (self.data or self.stride or self.limit or self.measures)

    def check(self, run: Run) -> None:
        """Raise UsageError for what a run does not have. Loads no PyTorch."""
        if "packed" not in run.info:
            run.resolve(self.checkpoint)
        splits = run.info.get("dataset", {}).get("splits")
        if not self.data and isinstance(splits, dict) and (split := self.split or "val") not in splits:
            raise UsageError(f"the data of the run `{run.name}` has no split `{split}`", choice_of(splits))
        if not self.measures:
            return
        from dfcli.generation.checks import condition_info

        if not condition_info(run).vocoder:
            raise UsageError(f"run `{run.name}` is no vocoder: --measures compares clips of one", "leave it out")


def choice_of(splits: Iterable[str]) -> str:
    """The hint that names the splits that there are, as they are typed."""
    return "give " + " or ".join(f"`--split {split}`" for split in sorted(splits))
