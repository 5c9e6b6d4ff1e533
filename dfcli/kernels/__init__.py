"""The arithmetic of the cores, compiled for a CPU or a GPU: optional, for speed.

What a kernel promises is in `cores/protocols.py`. Each module that trains or samples has `supports`, which gives None
or the reason against a config, and `build`. `known.py` lists the fields and values that they compute.
"""
