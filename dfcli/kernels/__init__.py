"""The arithmetic of the cores, compiled for a CPU or a GPU. Without this folder
everything works, only slower."""
