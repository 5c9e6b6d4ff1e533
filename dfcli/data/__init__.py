"""A prepared dataset on disk, and training batches from it."""
