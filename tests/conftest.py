"""Every test has a data dir of its own; the user's real one is never touched."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$DFCLI_HOME of this test (not yet created)."""
    folder = tmp_path / "home"
    monkeypatch.setenv("DFCLI_HOME", str(folder))
    return folder
