"""Which code computes a step: the reference in plain PyTorch, or the Triton kernels."""
