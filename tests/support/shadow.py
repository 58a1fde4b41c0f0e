"""A float64 shadow of a small model and of its optimizer: dense G from autograd on the weights themselves, and both
kinds of step transcribed from the formulas with dense d_out×d_in matrices. Of psilora's own code only the soft polar
factor of a diagonal matrix is called.

The shadow knows what a user did (calls, resets, freezes, clips), not how a capture works.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from psilora.linalg.polar import polar

#: The ridge of a spectral step's Grams at prox=0, in units of their mean diagonal.
RIDGE = 1e-12


@dataclass
class Layer:
    """W = base + s·B·A with everything that a step knows of it.

    Attributes:
        dA, dB: What `.grad` holds; None where autograd left nothing.
        G: SᵀX of the calls that reached it since the last reset, with what clipping has done to it.
        calls: (X, S) of these calls.
        blur: To what share of a step its last polar factor is determined by the ridges that the method has.
    """

    base: Tensor
    bias: Tensor
    B: Tensor
    A: Tensor
    s: float
    trains_A: bool = True
    trains_B: bool = True
    dA: Tensor | None = None
    dB: Tensor | None = None
    G: Tensor | None = None
    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    blur: float = 0.0
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def update(self) -> Tensor:
        """ΔW."""
        return self.s * self.B @ self.A


class Shadow:
    """The model l3(tanh(l2(tanh(l1 x)))) and its optimizer.

    Args:
        layers: l1, l2, l3.
        settings: step, gradient settings K, first, μ, wd, ρ, metric, … by their names in METHOD.
    """

    def __init__(self, layers: list[Layer], lr: float, **settings: Any) -> None:
        self.layers, self.lr, self.settings = layers, lr, settings
        self.moved = 0

    # ---- what a user does ---------------------------------------------------------------------------------------

    def backward(self, x: Tensor, y: Tensor, *, down_to: int = 0) -> None:
        """One forward and backward pass of the mean squared error, which ends before layer `down_to` − 1."""
        weights = [(layer.base + layer.update).requires_grad_() for layer in self.layers]
        inputs, outputs, h = [], [], x
        for i, (layer, W) in enumerate(zip(self.layers, weights, strict=True)):
            inputs.append(h.detach())
            z = h @ W.T + layer.bias
            z.retain_grad()
            outputs.append(z)
            h = torch.tanh(z) if i < len(weights) - 1 else z
        (h - y).square().mean().backward()
        for layer, W, X, z in list(zip(self.layers, weights, inputs, outputs, strict=True))[down_to:]:
            G, S = W.grad, z.grad
            assert G is not None and S is not None
            layer.G = G if layer.G is None else layer.G + G
            layer.calls.append((X, S.clone()))
            if layer.trains_A:
                dA = layer.s * layer.B.T @ G
                layer.dA = dA if layer.dA is None else layer.dA + dA
            if layer.trains_B:
                dB = layer.s * G @ layer.A.T
                layer.dB = dB if layer.dB is None else layer.dB + dB

    def zero_grad(self, to_none: bool) -> None:
        for layer in self.layers:
            layer.G, layer.calls = None, []
            layer.dA, layer.dB = (
                None if to_none or grad is None else torch.zeros_like(grad) for grad in (layer.dA, layer.dB)
            )

    def clip(self, limit: float) -> None:
        grads = [grad for layer in self.layers for grad in (layer.dA, layer.dB) if grad is not None]
        if not grads:
            return
        factor = min(1.0, limit / (float(torch.stack([g.norm() for g in grads]).norm()) + 1e-6))
        for layer in self.layers:
            layer.dA, layer.dB, layer.G = (None if t is None else factor * t for t in (layer.dA, layer.dB, layer.G))
            layer.calls = [(X, factor * S) for X, S in layer.calls]

    def saved(self) -> Any:
        return copy.deepcopy((self.lr, [(layer.B, layer.A, layer.state) for layer in self.layers]))

    def load(self, saved: Any) -> None:
        self.lr, layers = copy.deepcopy(saved)
        for layer, (B, A, state) in zip(self.layers, layers, strict=True):
            layer.B, layer.A, layer.state = B, A, state

    def step(self) -> None:
        for layer in self.layers:
            if layer.dA is None or layer.dB is None or not (layer.trains_A and layer.trains_B):
                continue
            if self.settings["step"] == "gradient":
                if layer.G is not None:  # a zero without a call is no gradient
                    self._gradient_step(layer)
            else:
                G = torch.zeros_like(layer.base) if layer.G is None else layer.G
                self._spectral_step(layer, G)

    # ---- METHOD §2 to 6 -----------------------------------------------------------------------------------------

    def _gradient_step(self, layer: Layer) -> None:
        n, state, root, G = self.settings, layer.state, math.sqrt(layer.s), layer.G
        assert G is not None
        mu, eta = n["momentum"], self.lr
        tau = 0.0 if n["metric"] is None else mu
        lam = eta * n["prox"]
        B, A = root * layer.B, root * layer.A
        if not state:
            rows = torch.randn(A.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            state.update(B_m=torch.zeros_like(B), A_m=rows, t=0)
            state.update(D_A=torch.zeros(A.shape[1]).double(), D_B=torch.zeros(B.shape[0]).double())
        M_A, M_B = self._kfac(layer) if n["metric"] == "kfac" else (None, None)
        target = -eta * (1 - tau) * G - eta * mu * state["B_m"] @ state["A_m"]
        new = lorsum(B, A, 1 - eta * n["weight_decay"], target, n["num_iters"], n["first"], lam, M_B, M_A)
        if mu:
            state["B_m"], state["A_m"] = lorsum(
                state["B_m"], state["A_m"], mu, (1 - tau) * G, max(1, n["num_iters"]), n["first"], lam
            )
        state["t"] += 1
        layer.B, layer.A = new[0] / root, new[1] / root

    def _kfac(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """M of K-FAC, diagonal, bias-corrected; β₂ = .99, γ = ½, δ = 1e-5, a mean-reduced loss."""
        state, beta = layer.state, 0.99
        X, S = (torch.cat(part) for part in zip(*layer.calls, strict=True))
        N = len(X)
        state["D_A"] = beta * state["D_A"] + (1 - beta) * X.square().sum(0) / N
        state["D_B"] = beta * state["D_B"] + (1 - beta) * N * S.square().sum(0)
        correction = 1 - beta ** (state["t"] + 1)
        return (state["D_A"] / correction + 1e-5).sqrt(), (state["D_B"] / correction + 1e-5).sqrt()

    # ---- METHOD §13 ---------------------------------------------------------------------------------------------

    def _spectral_step(self, layer: Layer, G: Tensor) -> None:
        n, state, root, mu = self.settings, layer.state, math.sqrt(layer.s), self.settings["momentum"]
        B, A = root * layer.B, root * layer.A
        (d_out, r), d_in = B.shape, A.shape[1]
        if not state:
            state.update(M=torch.zeros_like(G), t=0, recent=0.0, mean=0.0)
            state.update(D_A=torch.zeros(d_in).double(), D_B=torch.zeros(d_out).double())
        R_A, R_B = inverse_root(A @ A.T), inverse_root(B.T @ B)
        g_B, g_A = G @ A.T @ R_A, R_B @ B.T @ G
        whitened = "cap" not in n  # the norm that fading follows is that of the whitened tangent gradient
        norm = math.nan if whitened else float((g_B.square().sum() + g_A.square().sum()).sqrt())
        taken, share = (1.0, 1.0) if whitened else self._followed(state, norm, mu)
        w_A, w_B = torch.ones(d_in).double(), torch.ones(d_out).double()
        if n["metric"] == "lora":
            state["D_B"] = 0.99 * state["D_B"] + 0.01 * (taken * g_B).square().mean(1)
            w_B = weights(state["D_B"])
            if B.any():
                state["D_A"] = 0.99 * state["D_A"] + 0.01 * (taken * g_A).square().mean(0)
                w_A = weights(state["D_A"])
        whiten = w_B[:, None] * w_A
        size = math.sqrt(enlarged(B, w_B) * enlarged(A.T, w_A)) if n["metric"] == "lora" else 1.0
        B, A = w_B[:, None] * B, A * w_A
        gradient = (1 - mu) * taken * tangent(G / whiten, B, A)
        if whitened:
            taken, share = self._followed(state, float(gradient.norm() / (1 - mu)), mu)
        m = mu * tangent(state["M"] / whiten, B, A) + gradient
        h = mu * m + gradient if n["nesterov"] and mu else m
        U, sigma, Vt = torch.linalg.svd(h, full_matrices=False)
        # msign, softly: `polar` takes a singular value below 1e-3 of the largest to less than 1, as its own tests show.
        soft = polar(torch.diag(sigma)).diagonal()
        x = (sigma / sigma[0]).square() if sigma[0] > 0 else torch.ones_like(sigma)
        layer.blur = float((soft * RIDGE / (x + RIDGE)).max())
        msign = U @ (soft[:, None] * Vt)
        c = math.sqrt(8 / r * max(d_out, d_in) / min(d_out, d_in))
        decay = 1 - self.lr * n["weight_decay"]
        B, A = lorsum(B, A, decay, -self.lr * share * c / size * msign, n["num_iters"], n["first"], None)
        state["M"] = m * whiten
        layer.B, layer.A = B / w_B[:, None] / root, A / w_A / root

    def _followed(self, state: dict[str, Any], norm: float, mu: float) -> tuple[float, float]:
        """κ and φ: an outlier is capped at `cap` times the mean norm, counts for 4 of them, and the rate fades."""
        taken, cap = 1.0, self.settings.get("cap")
        begun = state["mean"] > 0
        if begun and cap is not None and norm > cap * state["mean"]:
            taken = cap * state["mean"] / norm
        if begun:
            norm = min(norm, 4 * state["mean"])
        state["t"] = state["t"] + 1 if begun else 1
        state["recent"] = mu * state["recent"] + (1 - mu) * norm
        state["mean"] = state["mean"] + (norm - state["mean"]) / state["t"] if begun else norm
        if not self.settings["fade"]:
            return taken, 1.0
        if state["mean"] == 0:
            return taken, 0.0
        return taken, min(1.0, state["recent"] / (1 - mu ** state["t"]) / state["mean"])


def lorsum(
    B: Tensor,
    A: Tensor,
    c1: float,
    target: Tensor,
    num_iters: int,
    first: str,
    lam: float | None,
    M_B: Tensor | None = None,
    M_A: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """LoRSum of c₁·(B, A) and the dense sum `target` of all other terms, by the formulas of METHOD §2 as they stand.

    lam = None: 1e-12 times the mean of each Gram's diagonal, and a factor stays where the other is 0.
    """
    M_B = torch.ones(len(B)).double() if M_B is None else M_B
    M_A = torch.ones(A.shape[1]).double() if M_A is None else M_A
    B1, A1, eye = B, A, torch.eye(A.shape[0]).double()

    def turn_A(B: Tensor) -> Tensor:
        gram = B.T @ (M_B[:, None] * B)
        ridge = RIDGE * float(gram.diagonal().mean()) if lam is None else lam
        if not (gram.any() or ridge):
            return A1
        value = ridge * A1 + c1 * B.T @ (M_B[:, None] * B1) @ A1 + B.T @ target / M_A
        return torch.linalg.solve(gram + ridge * eye, value)

    def turn_B(A: Tensor) -> Tensor:
        gram = (A * M_A) @ A.T
        ridge = RIDGE * float(gram.diagonal().mean()) if lam is None else lam
        if not (gram.any() or ridge):
            return B1
        value = ridge * B1 + c1 * B1 @ ((A1 * M_A) @ A.T) + target @ A.T / M_B[:, None]
        return torch.linalg.solve(gram + ridge * eye, value.T).T

    if num_iters == 0:
        return turn_B(A1), turn_A(B1)
    for name in (("A", "B") if first == "A" else ("B", "A")) * num_iters:
        if name == "A":
            A = turn_A(B)
        else:
            B = turn_B(A)
    return B, A


def inverse_root(gram: Tensor) -> Tensor:
    """(gram + 1e-12·mean diagonal)^−½, 0 where gram = 0."""
    if not gram.any():
        return torch.zeros_like(gram)
    values, vectors = torch.linalg.eigh(gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).double())
    return (vectors * values.rsqrt()) @ vectors.T


def tangent(matrix: Tensor, B: Tensor, A: Tensor) -> Tensor:
    """P_B·Y + Y·P_A − P_B·Y·P_A."""
    Q_A, Q_B = inverse_root(A @ A.T) @ A, B @ inverse_root(B.T @ B)
    right = matrix @ Q_A.T @ Q_A
    return right + Q_B @ (Q_B.T @ (matrix - right))


def weights(D: Tensor) -> Tensor:
    """w = (D/mean(D) + 0.1)^½."""
    mean = D.mean()
    return ((D / mean if mean > 0 else D) + 0.1).sqrt()


def enlarged(F: Tensor, w: Tensor) -> float:
    """The mean square of 1/w times an orthonormal direction, half of them of the columns of w·F, half by the metric."""
    if bool((w == 1).all()):
        return 1.0
    share, r = w.square() - 0.1, F.shape[1]
    p = 1.01 * share / (share + 0.01)
    total, most = float(p.sum()), min(F.shape)
    others = (float((p / w.square()).sum()) + 10 * max(0.0, most - total)) / max(total, most)
    if not F.any():
        return others
    weighted = w[:, None] * F
    return (float((F @ inverse_root(weighted.T @ weighted)).square().sum()) / r + others) / 2
