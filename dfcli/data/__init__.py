"""Sources to prepared datasets to batches. Knows codecs and files, but no model and no terminal."""
