"""Every test has a data dir of its own; the user's real one is never touched."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

# Tests that are themselves started by nohup or in the background inherit ignored signals, and so would their children.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$DFCLI_HOME of this test (not yet created)."""
    folder = tmp_path / "home"
    monkeypatch.setenv("DFCLI_HOME", str(folder))
    return folder
