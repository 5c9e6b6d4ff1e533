"""Sources (files, folders, standard input, downloads) to prepared datasets. Knows codecs and files, but no model."""
