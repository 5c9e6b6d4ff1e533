"""Text and audio to token ids and back. A codec knows no files of the user and no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dfcli.codecs.base import Codec, StreamDecoder, TextCodec, field
from dfcli.codecs.bpe import BPE
from dfcli.codecs.gpt2 import GPT2
from dfcli.codecs.mulaw import MuLaw
from dfcli.codecs.text import Bytes, Chars
from dfcli.errors import CorruptError

CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (Chars, Bytes, GPT2, BPE, MuLaw)}

__all__ = ["BPE", "CODECS", "GPT2", "Bytes", "Chars", "Codec", "MuLaw", "StreamDecoder", "TextCodec", "codec_from_json"]


def codec_from_json(description: dict[str, Any], folder: Path) -> Codec:
    """The codec that `Codec.to_json` described; `folder` holds the files that `Codec.save_files` wrote.

    Raises CorruptError for an unknown codec, a malformed description or changed side files."""
    name = field(description, "name", str)
    if name not in CODECS:
        raise CorruptError(f"the codec {name!a} is unknown", "use a newer dfcli")
    return CODECS[name].from_json(description, Path(folder))
