"""Data that several tests of training use."""

from __future__ import annotations

import random
from pathlib import Path

import pytest


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A file of 3,000 characters, of which 300 validate."""
    words = random.Random(0)
    path = tmp_path / "text.txt"
    path.write_text("".join(words.choice(["the ", "cat ", "sat.\n", "on ", "a mat "]) for _ in range(700))[:3000])
    return str(path)
