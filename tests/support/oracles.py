"""Formulas word for word, with dense matrices: what the tests compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from psilora import LoRALinear

F64 = torch.float64


def literal(terms, coefficients, num_iters, prox, metric, first):
    """LoRSum's definition word for word: values, not increments, and explicit inverses."""
    (B1, A1), rest = terms[0], list(zip(coefficients, terms, strict=True))[1:]
    c1 = coefficients[0]
    metric = (torch.ones(B1.shape[0], dtype=F64), torch.ones(A1.shape[1], dtype=F64)) if metric is None else metric
    M_B, M_A = (torch.diag(M) if M.dim() == 1 else M for M in metric)
    eye = torch.eye(B1.shape[1], dtype=F64)

    def turn_A(B):
        rhs = prox * A1 + c1 * (B.T @ M_B @ B1) @ A1
        rhs = rhs + sum((c * (B.T @ B_i) @ A_i @ M_A.inverse() for c, (B_i, A_i) in rest), torch.zeros_like(A1))
        return (B.T @ M_B @ B + prox * eye).inverse() @ rhs

    def turn_B(A):
        rhs = prox * B1 + c1 * B1 @ (A1 @ M_A @ A.T)
        rhs = rhs + sum((c * M_B.inverse() @ B_i @ (A_i @ A.T) for c, (B_i, A_i) in rest), torch.zeros_like(B1))
        return rhs @ (A @ M_A @ A.T + prox * eye).inverse()

    if num_iters == 0:
        return turn_B(A1), turn_A(B1)
    B, A = B1, A1
    for _ in range(num_iters):
        if first == "A":
            A = turn_A(B)
            B = turn_B(A)
        else:
            B = turn_B(A)
            A = turn_A(B)
    return B, A


def dense_gradient(layer: LoRALinear, x: Tensor, y: Tensor) -> Tensor:
    """∂L/∂W of the mean-square loss at the adapted weight."""
    W = layer.base.weight + layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
    W = W.detach().requires_grad_()
    (x @ W.T - y).square().mean().backward()
    return W.grad


def tangent(G: Tensor, B: Tensor, A: Tensor) -> Tensor:
    P_B, P_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    return P_B @ G + G @ P_A - P_B @ G @ P_A


def raised(D: Tensor, damping: float, power: float) -> Tensor:
    """(D + δ)^γ of a diagonal, or (D + δI)^γ of a symmetric matrix."""
    if D.dim() == 1:
        return (D + damping) ** power
    values, vectors = torch.linalg.eigh(D + damping * torch.eye(len(D), dtype=D.dtype))
    return vectors @ torch.diag(values**power) @ vectors.T
