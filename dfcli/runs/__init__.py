"""Runs on disk and how they get there safely. Importing this imports neither torch nor numpy."""

from __future__ import annotations

from dfcli.runs.checkpoint import Checkpoint
from dfcli.runs.run import Run, list_runs, newest, remove, rename

__all__ = ["Checkpoint", "Run", "list_runs", "newest", "remove", "rename"]
