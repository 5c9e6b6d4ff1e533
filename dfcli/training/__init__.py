"""From what was asked for to a trained run: `plan` (what and why), `train` (the whole), `trainer` (the loop)."""
