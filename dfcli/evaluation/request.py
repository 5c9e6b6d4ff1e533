"""The options of an evaluation. Each is written once, as a field: its type, default and help.

Nothing here imports PyTorch or NumPy, which take seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from dfcli.errors import UsageError
from dfcli.system.options import checkpoint_option, device_option, option


@dataclass(frozen=True)
class Request:
    data: tuple[str, ...] = option((), "Other data than the run's own; files are scored whole.", "NAME|PATH")
    split: str | None = option(None, "val, test or train; val by default.", "SPLIT")
    stride: int | None = option(
        None, "Distance between evaluation windows (GPT only). Smaller gives more context but is slower.", "N"
    )
    limit: int | None = option(None, "Score only the first N tokens, for a quick look.", "N")
    measures: bool = option(False, "Of a vocoder: also spectral distances of clips that it makes again.")
    checkpoint: str | int = checkpoint_option()
    device: str = device_option()

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", tuple(self.data or ()))
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit must be at least 1 token, not {self.limit}")

    @property
    def plain(self) -> bool:
        """Whether a split is scored whole, as the end of a training does."""
        return not (self.data or self.stride or self.limit or self.measures)
