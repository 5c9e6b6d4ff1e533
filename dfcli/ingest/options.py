"""What a dataset is made by, apart from its sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dfcli.codecs import CODECS, Codec
from dfcli.codecs.boundary import MAX_LEAD
from dfcli.codecs.bpe import check_vocab_size
from dfcli.codecs.mulaw import DEFAULT_LEVELS, LEVELS
from dfcli.errors import UsageError
from dfcli.ingest.audio import NORMALIZE
from dfcli.ingest.labels import Labelling
from dfcli.ingest.request import Making
from dfcli.ingest.splits import check_fractions
from dfcli.system.words import closest

SPLIT_RULES = ("auto", "makemore", "makemore-transformer")


@dataclass(frozen=True)
class Options(Making):
    """How sources become a dataset. Two datasets of the same sources and the same options are the same."""

    codec: str | Codec | None = None
    """"chars", "bytes", "gpt2", "bpe" (trained on the training split), "mulaw", or a Codec that is used as it is; None:
    chars for text, mulaw for audio."""
    quantizer: str = "torchaudio"
    """Of mulaw, see `codecs.MuLaw`."""
    split_rule: str = "auto"
    """"auto", or "makemore" and "makemore-transformer" for the published splits of lines."""
    lead: int = 1
    """How many boundary ids stand before a document's first id when it is read; recorded for the reader."""
    whole: bool = False
    """Everything becomes one split `all` of a dataset that is removed when it is closed."""

    @property
    def labelling(self) -> Labelling | None:
        """`label`, parsed. Raises UsageError where it is no pattern."""
        return Labelling(self.label) if self.label is not None else None

    @property
    def mulaw_levels(self) -> int:
        """The levels of a new codec: as given; else those that sound best, or the 256 of the published quantizer s4."""
        return self.levels or (DEFAULT_LEVELS if self.quantizer == "torchaudio" else 256)

    @property
    def purpose(self) -> str:
        """What the data are for, behind "nothing to"."""
        return "score" if self.whole else "learn from"

    def check(self) -> None:
        """Raise UsageError for values that are unknown, out of range or contradict each other."""
        for value, known, what in (
            (self.codec if isinstance(self.codec, str) else "bytes", CODECS, "codec"),
            (self.normalize, NORMALIZE, "normalisation"),
            (self.split_rule, SPLIT_RULES, "split rule"),
            (self.mulaw_levels, LEVELS, "number of levels"),
        ):
            if value not in known:
                raise UsageError(f"there is no {what} {value!r}", closest(str(value), map(str, known)))
        if self.split_rule != "auto" and not self.lines:
            raise UsageError(f"the split rule {self.split_rule} is one of lines", "add `--lines`")
        if not 1 <= self.lead <= MAX_LEAD:
            raise UsageError(f"a lead of {self.lead} is not from 1 to {MAX_LEAD:,} boundaries before a document")
        if self.bpe is not None and self.codec != "gpt2":
            raise UsageError("`--bpe` is for the gpt2 codec", "add `--codec gpt2`, or leave it out")
        if self.tokenizer is not None and self.codec not in (None, "bpe"):
            raise UsageError("`--tokenizer` is for the bpe codec", "leave out `--codec`, or make it `--codec bpe`")
        if self.tokenizer is not None and self.vocab_size is not None:
            raise UsageError("`--tokenizer` fixes the vocabulary", "leave out `--vocab-size`")
        if self.vocab_size is not None:
            if self.codec != "bpe":
                raise UsageError("`--vocab-size` is for the bpe codec", "add `--codec bpe`, or leave it out")
            check_vocab_size(self.vocab_size)
        ways = [self.lines, self.separator is not None, self.field is not None]
        if sum(ways) > 1:
            raise UsageError("`--lines`, `--separator` and `--field` exclude each other", "give one of them")
        if self.separator == "" or self.field == "":
            raise UsageError("`--separator` and `--field` cannot be empty")
        _ = self.labelling
        check_fractions(self.val_fraction, self.test_fraction)

    def refuse_for(self, kind: str) -> None:
        """Raise UsageError where an option is given that means nothing for `kind` "text" or "audio"."""
        wrong = {
            "--lines": self.lines and kind == "audio",
            "--separator": self.separator is not None and kind == "audio",
            "--field": self.field is not None and kind == "audio",
            "--sample-rate": self.sample_rate is not None and kind == "text",
            "--normalize": self.normalize != "none" and kind == "text",
            "--levels": self.levels is not None and kind == "text",
            "--label": self.label is not None and kind == "text",
        }
        for option, is_wrong in wrong.items():
            if is_wrong:
                raise UsageError(f"`{option}` makes no sense for {kind}", "leave it out")

    def as_json(self) -> dict[str, Any]:
        """The options as dataset.json has them."""
        return {**vars(self), "codec": self.codec.to_json() if isinstance(self.codec, Codec) else self.codec}

    def given(self) -> dict[str, Any]:
        """The options that differ from their default: a later version with more options gives the same."""
        defaults = Options().as_json()
        return {name: value for name, value in self.as_json().items() if value != defaults[name]}
