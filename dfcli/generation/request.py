"""The options of sampling. Each is written once, as a field: its type, default and help.

Nothing here imports PyTorch or NumPy, which take seconds.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dfcli.errors import UsageError
from dfcli.system.options import check_device, checkpoint_option, device_option, option

if TYPE_CHECKING:
    from dfcli.cores.protocols import Picking

MOST_CLIPS = 100_000  # of one call


@dataclass(frozen=True)
class Filters:
    """What may be picked. None leaves a filter out; `temperature` 0 always takes the most likely id.

    Raises UsageError for a value that makes no sense.
    """

    temperature: float = option(
        1.0, "Above 1: more varied. Below 1: more predictable. 0: always the likeliest token.", "T"
    )
    top_k: int | None = option(None, "Choose among the K likeliest tokens only.", "K")
    top_p: float | None = option(None, "Choose among the likeliest tokens whose probabilities add up to P.", "P")
    min_p: float | None = option(None, "Leave out tokens with less than P times the probability of the likeliest.", "P")

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(
                f"the temperature must be a number from 0 up, not {self.temperature}",
                "0 is greedy, 1 as trained",
            )
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top-k must be at least 1, not {self.top_k}", "leave it out to keep every id")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top-p must be above 0 and at most 1, not {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UsageError(f"min-p must be from 0 to 1, not {self.min_p}")

    def picking(self) -> Picking:
        """The same for engines: a filter that is left out gets the value that filters nothing. A top-k above the
        vocabulary keeps every id."""
        from dfcli.cores.protocols import Picking

        everything = Picking()
        return Picking(
            float(self.temperature),
            everything.top_k if self.top_k is None else min(self.top_k, everything.top_k),
            1.0 if self.top_p is None else float(self.top_p),
            0.0 if self.min_p is None else float(self.min_p),
        )


@dataclass(frozen=True)
class SampleRequest(Filters):
    """The options of text and of sound. A `seed` of None is replaced by one that is drawn."""

    num: int = option(1, "How many samples.", "N")
    seed: int = option(None, "The same seed gives the same samples.", "N", kind=int | None)
    device: str = device_option()
    engine: Literal["auto", "plain", "fast"] = option(
        "auto", "How to run the model; auto takes the fastest and says which."
    )
    checkpoint: str | int = checkpoint_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device(self.device)
        object.__setattr__(self, "seed", chosen_seed(self.seed))
        if not 1 <= self.num <= MOST_CLIPS:
            raise UsageError(f"the number of samples must be from 1 to {MOST_CLIPS:,}, not {self.num}")


@dataclass(frozen=True)
class TextRequest(SampleRequest):
    tokens: int | None = option(None, "Number of tokens to write, at most; 500 by default.", "N")
    stop: str | None = option(None, "Stop before this text.", "TEXT")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens is not None and self.tokens < 1:
            raise UsageError(f"the number of tokens must be at least 1, not {self.tokens}")
        if self.stop == "":
            raise UsageError("the stop text is empty", "leave it out to stop at no text")


@dataclass(frozen=True)
class SoundRequest(SampleRequest):
    seconds: float | None = option(None, "Length of the sound.", "S")
    labels: Mapping[str, str] = option(
        dict, "A label's value, such as speaker=george; may be repeated.", "NAME=VALUE", flags=("--label",)
    )
    mel: Path | None = option(None, "Make this recording's sound again (a vocoder).", "CLIP")
    best: int | None = option(None, "Keep the K most likely of the --num clips.", "K")
    normalize: Literal["none", "peak"] = option("none", "peak: bring each clip to the usual level, -1 dB.")
    prime: Path | None = option(None, "Continue this recording.", "CLIP")
    keep_prime: bool = option(False, "Write the recording before its continuation.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mel", "prime"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(path))
        object.__setattr__(self, "labels", dict(self.labels or {}))
        if self.prime is None and self.keep_prime:
            raise UsageError("there is no prime to keep", "give one with `--prime clip.wav`")
        if self.normalize not in ("none", "peak"):
            raise UsageError(f"there is no normalisation {self.normalize!r} of clips", "known: none, peak")

    def limit(self, rate: int) -> int | None:
        """`seconds` in samples. Raises UsageError where that is less than one."""
        if self.seconds is None:
            return None
        samples = round(self.seconds * rate) if math.isfinite(self.seconds) else 0
        if samples < 1:
            raise UsageError(f"the length must be at least one sample of {rate:,} Hz, not {self.seconds} seconds")
        return samples


def chosen_seed(seed: int | None) -> int:
    """`seed`; where it is None, one that is drawn. Raises UsageError for one outside 0 .. 2**63 - 1."""
    if seed is None:
        return secrets.randbelow(2**31)
    if not 0 <= seed < 2**63:
        raise UsageError(f"the seed must be from 0 to 2**63 - 1, not {seed}")
    return seed
