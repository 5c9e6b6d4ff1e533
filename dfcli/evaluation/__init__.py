"""Loss over whole splits, and what it is worth: `sweep`, `baselines`, `evaluate`."""
