"""Real data beside the checkout, for the tests that compare with the outside world; without it they skip."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def shared_data() -> Path | None:
    """$DFCLI_TEST_DATA, or a `shared/data` folder beside the repository; None where neither exists."""
    named = os.environ.get("DFCLI_TEST_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    return folder if folder.is_dir() else None


def shared_file(name: str) -> Path:
    """A file or folder of `shared_data`; the calling test skips where it is missing."""
    folder = shared_data()
    if folder is None or not (folder / name).exists():
        pytest.skip(f"needs {name} (set DFCLI_TEST_DATA to a folder that holds it)")
    return folder / name
