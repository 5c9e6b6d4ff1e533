"""The options of preparing data. Each is written once, as a field: its type, default and help.

Nothing here imports NumPy, which takes time at the start of every command.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from dfcli.system.options import option

Codec = Literal["chars", "bytes", "gpt2", "bpe", "mulaw"]


@dataclass(frozen=True)
class HeldOut:
    """Sources of their own for validation and testing."""

    val: tuple[str, ...] = option((), "Validate on this source instead of a share.", "SOURCE")
    test: tuple[str, ...] = option((), "Test on this source instead of a share.", "SOURCE")

    def __post_init__(self) -> None:
        for name in ("val", "test"):
            object.__setattr__(self, name, tuple(getattr(self, name) or ()))


@dataclass(frozen=True)
class Making:
    """How sources become ids: what `Request` and `options.Options` have in common, but for the codec."""

    bpe: str | None = option(None, "For `--codec gpt2`: folder of encoder.json and vocab.bpe.", "DIR")
    vocab_size: int | None = option(None, "Vocabulary size of `--codec bpe`. Default: by corpus size.", "N")
    tokenizer: str | None = option(None, "A tokenizer.json to use as the bpe codec.", "FILE")
    lines: bool = option(False, "Each line of the text is one document.")
    separator: str | None = option(None, "Text that stands between documents within a file.", "TEXT")
    field: str | None = option(None, "The field of JSONL, CSV or Parquet records that holds the text.", "NAME")
    sample_rate: int | None = option(None, "Sample rate of the audio. Default: the sources' own, at most 16,000.", "HZ")
    levels: int | None = option(None, "Mu-law levels of audio: 256, 512, 1024 (the default), 2048 or 4096.", "N")
    label: str | None = option(
        None, "Labels of recordings: the first folder below the source, or a pattern's named groups.", "folder|PATTERN"
    )
    normalize: str = option(
        "none", "Scale each recording: its peak to 1, or its range to -1 to 1.",
        kind=Literal["none", "peak", "minmax"],
    )  # fmt: skip
    val_fraction: float = option(0.1, "Share of the data held out for validation.", "F")
    """The last part of one document, or of each of a few documents; whole documents otherwise. Nothing where sources
    are given for it."""
    test_fraction: float = option(0.0, "Share of the data held out for testing.", "F")


@dataclass(frozen=True)
class Request(Making, HeldOut):
    """How sources become a dataset, as `ingest.prepare.prepare` takes it. Values are checked there."""

    name: str | None = option(None, "Name of the dataset.", "NAME")
    codec: str | None = option(
        None,
        "How data becomes token ids: chars, bytes, gpt2, bpe or mulaw. Default: chars for text, mulaw for audio.",
        "CODEC",
        kind=Codec | None,
    )

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `prepare`."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
