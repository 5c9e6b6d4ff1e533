"""The id that stands before a document's first one, as often as the model that reads it needs."""

from __future__ import annotations

MAX_LEAD = 1 << 20  # ids; no model sees more before a document


def is_boundary(boundary: object, lead: object, vocab_size: int) -> bool:
    """Whether a document can begin with `lead` times the id `boundary`; None is a document that begins with its own
    first id. What was read from a file may be of any type."""
    inside = boundary is None or (type(boundary) is int and 0 <= boundary < vocab_size)
    return inside and type(lead) is int and 1 <= lead <= MAX_LEAD
