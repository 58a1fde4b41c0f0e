"""Precision, r×r solves, polar factors and eigenvectors: batched linear algebra without a notion of LoRA."""
