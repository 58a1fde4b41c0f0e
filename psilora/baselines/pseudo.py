"""Inverses, roots and polar factors that leave out what is rounding, so that zero gives zero."""

from __future__ import annotations

import torch
from torch import Tensor


def rounding(M: Tensor) -> float:
    """Return the size of singular values, relative to the largest, that counts as rounding: eps·(larger side)."""
    return max(M.shape) * torch.finfo(M.dtype).eps


def _on_spectrum(gram: Tensor, power: float) -> Tensor:
    """gram^power (r, r) of a symmetric, positive semidefinite matrix, zero where an eigenvalue is rounding."""
    values, vectors = torch.linalg.eigh(gram)
    keep = values > (rounding(gram) * values.amax()).clamp_min(0)
    powers = torch.where(keep, values.clamp_min(torch.finfo(gram.dtype).tiny) ** power, 0.0)
    result: Tensor = (vectors * powers) @ vectors.mT
    return result


def inverse_root(gram: Tensor) -> Tensor:
    """Return gram^(−½) (r, r), zero on the eigenvectors whose eigenvalues are rounding: the pseudo-inverse's root."""
    return _on_spectrum(gram, -0.5)


def pseudo_inverse(gram: Tensor) -> Tensor:
    """Return gram⁻¹ (r, r), zero on the eigenvectors whose eigenvalues are rounding."""
    return _on_spectrum(gram, -1.0)


def polar(M: Tensor) -> Tensor:
    """Return UVᵀ of M = UΣVᵀ without the singular vectors whose values are rounding."""
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    factor: Tensor = (U * (S > rounding(M) * S.amax())) @ Vh
    return factor
