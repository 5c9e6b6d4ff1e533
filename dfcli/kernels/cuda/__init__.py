"""Kernels for NVIDIA GPUs: Triton and CUDA graphs."""
