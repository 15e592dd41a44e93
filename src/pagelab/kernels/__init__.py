"""Triton kernels of the GPU path; each has a function that launches it."""
