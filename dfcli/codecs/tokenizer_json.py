"""A text codec as Hugging Face's `tokenizer.json`, which `tokenizers` and `transformers` open and which gives the same
ids: characters as whole words, everything else as byte-level byte-pair encodings."""

from __future__ import annotations

import json
from typing import Any

from dfcli.codecs.base import Codec, TextCodec
from dfcli.codecs.bpe import BPE, FILE, parts_of
from dfcli.codecs.bytelevel import END_OF_TEXT, printable_to_byte
from dfcli.codecs.gpt2 import GPT2
from dfcli.codecs.text import Bytes, Chars
from dfcli.errors import UsageError
from dfcli.system.files import strict_json


def check_exportable(codec: Codec) -> None:
    """Raise UsageError where `tokenizer_json` has no case for a codec."""
    if not isinstance(codec, BPE | Bytes | Chars | GPT2):
        raise UsageError(
            f"a model with the codec {codec.name} cannot be exported: there is no tokenizer.json for this codec",
            "train one on text: `df train gpt --codec chars`, or `bytes`, `gpt2` or `bpe`",
        )


def tokenizer_json(codec: TextCodec) -> bytes:
    """The content of tokenizer.json for a codec that `check_exportable` accepts; of a BPE its own file, byte for byte.
    A character that the alphabet lacks is an error there too."""
    if isinstance(codec, BPE):
        return codec.files[FILE]
    parts: dict[str, Any]
    if isinstance(codec, Chars):
        parts = {
            "pre_tokenizer": {
                "type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False,
            },
            "decoder": {"type": "Fuse"},
            # The word for what is unknown is not in the vocabulary, so that it cannot stand for anything.
            "model": {"type": "WordLevel", "vocab": {c: i for i, c in enumerate(codec.alphabet)}, "unk_token": "<unk>"},
        }  # fmt: skip
    else:
        vocab, merges = _pairs(codec)
        step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        parts = {
            "pre_tokenizer": {**step, "use_regex": isinstance(codec, GPT2)},
            "decoder": {**step, "use_regex": True},
            "model": {
                "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                "vocab": vocab, "merges": merges,
            },
        }  # fmt: skip
    added = []
    if codec.end_of_text is not None:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added.append({"id": codec.end_of_text, "content": END_OF_TEXT, **flags, "special": True})
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None}
    return json.dumps({**head, "post_processor": None, **parts}, ensure_ascii=False).encode("utf-8")


def with_beginning(content: bytes, ids: list[int]) -> bytes:
    """A tokenizer.json whose texts begin with `ids`, as a document begins with its boundary; one that adds anything
    already stays as it is. Its `encode(text, add_special_tokens=False)` leaves them out."""
    if not ids:
        return content
    values = json.loads(content)
    others = parts_of(values.get("post_processor"), "processors")
    if any(step.get("type") != "ByteLevel" for step in others):  # that one only trims the places of tokens
        return content
    names = {number: token for token, number in values["model"]["vocab"].items()}
    names |= {entry["id"]: entry["content"] for entry in values["added_tokens"]}
    first = [{"SpecialToken": {"id": names[number], "type_id": 0}} for number in ids]
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    known = {names[number]: {"id": names[number], "ids": [number], "tokens": [names[number]]} for number in ids}
    rule = {"type": "TemplateProcessing", "single": [*first, a], "pair": [*first, a, b], "special_tokens": known}
    values["post_processor"] = {"type": "Sequence", "processors": [*others, rule]} if others else rule
    return json.dumps(values, ensure_ascii=False).encode("utf-8")


def beginning(content: bytes) -> list[int]:
    """The ids that the texts of a tokenizer.json begin with; none where it says nothing of the kind."""
    found: list[int] = []
    try:
        for rule in parts_of(strict_json(content).get("post_processor"), "processors"):
            for part in rule.get("single", []):
                if "Sequence" in part:
                    break
                found += rule["special_tokens"][part["SpecialToken"]["id"]]["ids"]
    except (ValueError, KeyError, TypeError):
        return []
    return found


def _pairs(codec: TextCodec) -> tuple[dict[str, int], list[list[str]]]:
    """The vocabulary and the merges of bytes, or of GPT-2's files, in printable characters."""
    if isinstance(codec, GPT2):
        return codec.vocabulary(), codec.merges()
    assert isinstance(codec, Bytes)
    return {printable: ord(byte) for printable, byte in printable_to_byte().items()}, []
