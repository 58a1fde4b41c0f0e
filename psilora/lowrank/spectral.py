"""The spectral step in coefficients: everything that does not depend on the widths of the layers.

The tall matrices of one side are combinations Z·x of few columns Z = [F, M, D] (d, n): the whitened factor F (r), the
old momentum M (2r, or none) and the LoRA gradient D (r). With the Gram matrix Γ = ZᵀZ, (Z·x)ᵀ(Z·y) = xᵀΓy: a step asks
of the layers only Γ_B and Γ_A, finds coefficients, and gives back products with Z. The algebra in between is on n×n
matrices, for all layers of a rank at once, whatever their widths; in float64, because Grams of fp32 data then keep
their small eigenvalues, nothing under- or overflows between 1e-30 and 1e30, and no factorisation fails.

Matrices of both sides stand upright here: A-side coefficients belong to Z_A (d_in, n), whose first columns are Aᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from psilora.linalg.polar import polar
from psilora.lowrank.lorsum import turns
from psilora.triton_kernels.slots import LARGEST, LEAST_NORM, LEAST_SQUARE, RESIDUAL_RIDGE

#: Rounding of xᵀΓx in units of n·eps·Σᵢ xᵢ²Γᵢᵢ; the worst case is n, the usual one well below 1.
ROUNDING = 8


@dataclass
class Numbers:
    """Settings of L layers; tensors are (L, 1, 1) in float64.

    Attributes:
        rank: r.
        mu, fresh: μ and 1 − τ.
        nesterov: Whether h = μ·m + (1 − τ)·g replaces m.
        rate: η·c.
        decay: −η·wd, or None.
        ridge: λ of the factors' Grams, relative to the mean of their diagonals.
        num_iters, first: Of LoRSum.
        dtype: Of the polar factor.
        fades: Whether the rate fades with the gradient's norm.
        cap: The largest gradient norm that is taken as it is, in units of the mean; infinite where all are.
        norms: (L, 3), from the steps before: their number t, n̂ and n̄; None where the norms are not followed.
        seen: What `followed` has found, where the metric had to know it already.
        raw_B, raw_A: Grams (L, r, r) of the factors before they were whitened, BᵀB and AAᵀ; None without a metric.
        spread_B, spread_A: N_U of both sides, see `size`; None without a metric.
    """

    rank: int
    mu: Tensor
    fresh: Tensor
    nesterov: bool
    rate: Tensor
    decay: Tensor | None
    ridge: Tensor
    num_iters: int
    first: str
    dtype: torch.dtype
    fades: bool
    cap: Tensor
    norms: Tensor | None = None
    seen: Seen | None = None
    raw_B: Tensor | None = None
    raw_A: Tensor | None = None
    spread_B: Tensor | None = None
    spread_A: Tensor | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """Layers with equal keys can be joined."""
        known = (self.fades, self.norms is None, self.seen is None, self.raw_B is None)
        return (self.rank, self.nesterov, self.decay is None, self.num_iters, self.first, self.dtype, *known)


@dataclass
class Seen:
    """What the size of a layer's gradient means for its step; tensors are (L, 1, 1) in float64, but for the norms.

    Attributes:
        taken: κ, the share of the gradient that is taken.
        share: φ, the share of the rate.
        norms: The new t, n̂ and n̄, (L, 3).
    """

    taken: Tensor
    share: Tensor
    norms: Tensor


@dataclass
class Coefficients:
    """What a step does, in the span of each side, (L, n, ·) in float64.

    Attributes:
        step_B, step_A: Increments of the whitened factors (r columns).
        momentum_B, momentum_A: The new whitened momentum (2r columns).
        repaired: Per layer, the number of factorisations that failed.
        norms: The new t, n̂ and n̄, (L, 3), or None.
    """

    step_B: Tensor
    step_A: Tensor
    momentum_B: Tensor
    momentum_A: Tensor
    repaired: Tensor
    norms: Tensor | None = None


class Roots:
    """T with TᵀΓT = I for Γ = ZᵀZ (L, k, k): Z·T is orthonormal, and Z = (Z·T)·Lᵀ with Lᵀ = (Z·T)ᵀZ.

    T is the inverse of the upper Cholesky factor of Γ + λI. Directions that are not in Z, or only by rounding, have a
    norm below 1 in Z·T and hardly show in L: a ridge in L would mix them into what it is joined with. Γ = 0 gives
    T = L = 0, and so does a factorisation that fails, which is counted.

    Args:
        gram: Γ, float64.
        ridge: λ/scale, a number or (L, 1, 1).
        scale: (L, 1, 1); by default the mean of Γ's diagonal. Where it is at most `least`, Γ is taken for 0.
    """

    def __init__(self, gram: Tensor, ridge: float | Tensor, scale: Tensor | None = None, least: float = 0.0) -> None:
        scale = mean_diagonal(gram) if scale is None else scale
        alive = scale > least
        unit = torch.where(alive, scale, 1.0)
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        factor, info = torch.linalg.cholesky_ex(gram / unit + ridge * eye)
        failed = alive & (info != 0)[:, None, None]
        dead = ~alive | failed
        factor = torch.where(dead, eye, factor)
        inverse = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
        self.T = (inverse.mT / unit.sqrt()).masked_fill(dead, 0.0)
        self.L = gram @ self.T
        self.failed = failed.flatten().long()


def mean_diagonal(gram: Tensor) -> Tensor:
    """Return the mean of the diagonals, (L, 1, 1)."""
    return gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]


def roots_of(gram: Tensor, x: Tensor, ridge: float | Tensor, whole: Tensor | None = None, least: float = 0.0) -> Roots:
    """Return the roots of the Gram of Z·x; λ is `ridge` times the mean of its diagonal, or of that of Z·`whole`.

    To λ is added what rounding can take from xᵀΓx when the coefficients are large and cancel.
    """
    inner = x.mT @ (gram @ x)
    scale = mean_diagonal(inner if whole is None else whole.mT @ (gram @ whole)).clamp_min(0)
    terms = (x.square() * gram.diagonal(dim1=-2, dim2=-1)[:, :, None]).sum((-2, -1))[:, None, None] / x.shape[-1]
    unit = ROUNDING * gram.shape[-1] * torch.finfo(gram.dtype).eps
    return Roots(inner, ridge + unit * terms / torch.where(scale == 0, 1.0, scale), scale, least)


class Spans:
    """The spans of both sides of L layers as one batch of 2L, B's before A's: what is done alike is done at once.

    Attributes:
        gram: Γ (2L, n, n).
        base: The coefficients of F itself.
        roots, q: T of FᵀF, and the coefficients of the orthonormal basis F·T.
    """

    def __init__(self, gram: Tensor, rank: int, ridge: Tensor) -> None:
        self.gram, self.rank = gram, rank
        self.layers, self.size = len(gram) // 2, gram.shape[-1]
        eye = torch.eye(rank, dtype=gram.dtype, device=gram.device)
        self.base = self.place(eye.expand(len(gram), rank, rank), 0)
        self.roots = roots_of(gram, self.base, ridge, least=LEAST_SQUARE)
        self.q = self.place(self.roots.T, 0)

    def place(self, block: Tensor, start: int) -> Tensor:
        """Return the coefficients (2L, n, k) that are `block` from row `start` on and 0 elsewhere."""
        return torch.nn.functional.pad(block, (0, 0, start, self.size - start - block.shape[-2]))

    def swapped(self, both: Tensor) -> Tensor:
        """Return A's half before B's."""
        return both.roll(self.layers, 0)

    def halves(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B's half, A's half)."""
        return both[: self.layers], both[self.layers :]

    def gradient(self) -> Tensor:
        """Return g: D_B·T_A and D_A·T_B."""
        return self.place(self.swapped(self.roots.T), self.size - self.rank)

    def squares(self) -> Tensor:
        """Return ‖D_B·T_A‖² + ‖D_A·T_B‖², (L,)."""
        g = self.gradient()
        both_B, both_A = self.halves((g * (self.gram @ g)).sum((-2, -1)))
        return both_B + both_A

    def carried(self) -> Tensor:
        """Return the old momentum in the new tangent space: M_B(M_AᵀQ_A) and M_A(M_BᵀQ_B)."""
        return self.place(self.swapped(self.gram[:, self.rank : self.size - self.rank] @ self.q), self.rank)

    def along(self, x: Tensor) -> Tensor:
        """Return (F·T)ᵀ(Z·x)."""
        return self.q.mT @ (self.gram @ x)


def spectral_step(gram_B: Tensor, gram_A: Tensor, numbers: Numbers) -> Coefficients:
    """Return the spectral step of L layers from their Grams (L, n, n), n = 4r, or 2r without momentum.

    With orthonormal Q_B = B·T_B, Q_A = A·T_A (as columns), the tangent gradient has the parts g_B = D_B·T_A = G·Q_A and
    g_A = D_A·T_B = GᵀQ_B, and the momentum M_B·M_Aᵀ is transported into the same space:

        m_B = μ·M_B(M_AᵀQ_A) + (1−τ)·g_B,   m_A = μ·M_A(M_BᵀQ_B) + (1−τ)·g_A,   h = μ·m + (1−τ)·g
        new momentum = [Q_B, m_B⊥]·[m_A, Q_A]ᵀ,   m_B⊥ = m_B − Q_B Q_Bᵀ m_B

    T = [Q_B, h_B⊥]·[h_A, Q_A]ᵀ = [Q_B, U_B]·K·[Q_A, U_A]ᵀ with h_B⊥ = U_B L_Bᵀ, h_A = Q_A Hᵀ + U_A L_Aᵀ and
    K = [[H, L_A], [L_Bᵀ, 0]]: all bases are orthonormal, so msign(T) = [Q_B, U_B]·msign(K)·[Q_A, U_A]ᵀ = O. At B = 0
    Q_B, H and L_A vanish and O = polar(h_B)·Q_Aᵀ without a branch. Then LoRSum of (1 − η·wd)·(B, A) − η·c·O.
    """
    n = numbers
    spans = Spans(torch.cat([gram_B, gram_A]), n.rank, torch.cat([n.ridge] * 2))
    mu, fresh = torch.cat([n.mu] * 2), torch.cat([n.fresh] * 2)
    rate, taken, norms = _measured(spans, n)
    rate = rate / size(spans, n)
    g = fresh * taken * spans.gradient()
    m = g + mu * spans.carried() if spans.size > 2 * n.rank else g
    h = mu * m + g if n.nesterov else m
    o_B, o_A, residual = _msign(spans, h, n.dtype)
    (step_B, step_A), failed = _lorsum(spans, -rate * o_B, o_A, n)
    (q_B, q_A), (m_B, m_A) = spans.halves(spans.q), spans.halves(m)
    outside_B = m_B - q_B @ (q_B.mT @ (gram_B @ m_B))
    both = spans.roots.failed + residual.failed
    return Coefficients(
        step_B=step_B,
        step_A=step_A,
        momentum_B=torch.cat([q_B, outside_B], -1),
        momentum_A=torch.cat([m_A, q_A], -1),
        repaired=failed + both[: spans.layers] + both[spans.layers :],
        norms=norms,
    )


def factor_step(gram_B: Tensor, gram_A: Tensor, numbers: Numbers) -> Coefficients:
    """Return the simpler step of each factor along the polar factor of its own gradient, whitened by the other factor.

    From Grams of [F, M, D] (L, n, n), n = 3r, or of [F, D] without momentum, with M the factors' plain momenta:

        m ← μ·M + (1−τ)·D,  h = μ·m + (1−τ)·D
        B ← √(1 − η·wd)·B − ½η·c·polar(h_B·T_A)·T_Aᵀ,   A likewise      T_A·T_Aᵀ = (AAᵀ)⁻¹, T_B·T_Bᵀ = (BᵀB)⁻¹

    While B = 0, T_B = 0 and A waits. For tall Y = Q·Lᵀ with orthonormal Q, polar(Y) = Q·polar(Lᵀ).
    """
    n = numbers
    spans = Spans(torch.cat([gram_B, gram_A]), n.rank, torch.cat([n.ridge] * 2))
    one_rate, taken, norms = _measured(spans, n)
    mu, fresh, rate = (torch.cat([t] * 2) for t in (n.mu, n.fresh, one_rate))
    eye = spans.base[:, : n.rank]
    m = g = fresh * taken * spans.place(eye, spans.size - n.rank)
    if spans.size > 2 * n.rank:
        m = g + mu * spans.place(eye, n.rank)
    T = spans.swapped(spans.roots.T)
    y = (mu * m + g if n.nesterov else m) @ T
    roots = roots_of(spans.gram, y, RESIDUAL_RIDGE)
    step = -0.5 * rate * (y @ (roots.T @ _polar(roots.L.mT, n.dtype))) @ T.mT
    if n.decay is not None:
        step = step + ((1 + torch.cat([n.decay] * 2)).clamp_min(0).sqrt() - 1) * spans.base
    (step_B, step_A), (m_B, m_A) = spans.halves(step), spans.halves(m)
    failed_B, failed_A = spans.halves(spans.roots.failed + roots.failed)
    return Coefficients(step_B, step_A, m_B, m_A, failed_B + failed_A, norms)


def followed(squares: Tensor, numbers: Numbers) -> Seen | None:
    """Return what the size of each layer's gradient means for its step; None where it means nothing.

    n_t is the norm of the two sides of the tangent gradient, n_t² = ‖G·Q_A‖² + ‖GᵀQ_B‖² in the orthonormal bases of the
    factors, not whitened. It counts as min(n_t, 4·n̄_(t−1)) in:

        n̂_t = average of n_1, …, n_t with weights μ^(t−k),   n̄_t = their plain average

    The rate is multiplied by φ = min(1, n̂/n̄): msign forgets the size of the gradient, so that a layer would go on at
    the full rate where its gradient has all but vanished: a task that is learnt, a layer that is switched off, momentum
    that runs out. The gradient is multiplied by κ = min(1, cap·n̄_(t−1)/n_t): one outlier would otherwise be all that
    the momentum remembers for 1/(1−μ) steps, and the metric for 1/(1−β₂).

    Args:
        squares: n_t², (L,).
        numbers: With `norms` and `cap`.
    """
    if numbers.norms is None:
        return None
    norm = squares.clamp_min(0).sqrt()
    steps, recent, mean = numbers.norms.unbind(-1)
    # A layer that has had no gradient so far begins now.
    begun, mu, cap = mean >= LEAST_NORM, numbers.mu.flatten(), numbers.cap.flatten()
    taken = torch.where(begun & (norm > cap * mean), cap * mean / norm, 1.0)
    norm = torch.where(begun, torch.minimum(norm, LARGEST * mean), norm)
    steps = torch.where(begun, steps + 1, 1.0)
    recent = mu * recent + (1 - mu) * norm
    mean = torch.where(begun, mean + (norm - mean) / steps, norm)
    share = torch.ones_like(mean)
    if numbers.fades:
        size = recent / (1 - mu**steps)
        share = torch.where(mean >= LEAST_NORM, (size / mean).clamp(max=1.0), 0.0)
    return Seen(taken[:, None, None], share[:, None, None], torch.stack([steps, recent, mean], -1))


def size(spans: Spans, numbers: Numbers) -> Tensor | float:
    """Return what a step would be too large by for its rate, √(N_B·N_A) (L, 1, 1).

    A step is 1/w times what is orthonormal on each side: half of its directions are the factor's, Q_F = F·T, the others
    those of the momentum outside. N = ½(N_F + N_U) is the mean square of 1/w times such a direction,

        N_F = ‖Q_F/w‖²_F/r = tr(Tᵀ·FᵀF·T)/r  with F as it was before it was whitened,

    and N_U what is known of the others by the metric alone, see `spread`. Where F = 0, N = N_U.
    """
    n = numbers
    if n.raw_B is None or n.raw_A is None or n.spread_B is None or n.spread_A is None:
        return 1.0
    T, raw, spread_out = spans.roots.T, torch.cat([n.raw_B, n.raw_A]), torch.cat([n.spread_B, n.spread_A])
    of_factor = (T * (raw @ T)).sum((1, 2))[:, None, None] / n.rank
    of_B, of_A = spans.halves(torch.where(of_factor > 0, (of_factor + spread_out) / 2, spread_out))
    return (of_B * of_A).sqrt()


def spread(counted: Tensor, inverse: Tensor, least: Tensor, directions: Tensor | int) -> Tensor:
    """Return N_U, the mean square of 1/w times a direction of the momentum: msign gives each the same.

    A direction lies in the channels that have a gradient: N_U = Σ p/w² over Σ p, where a channel counts
    p = (1 + ε)·D̂/(D̂ + ε), D̂ = D/mean(D), ε = `slots.COUNTING`. Directions that these channels have no room for lie in
    the others, at most 1/w² = δ^(−γ):

        N_U = (Σ p/w² + (m − Σ p)₊·δ^(−γ))/max(Σ p, m),   m = min(r, d)

    Args:
        counted: Σ p over the channels, float64.
        inverse: Σ p/w², of the same shape.
        least: δ^γ, the least w².
        directions: m.
    """
    room = counted.clamp_min(directions)
    return (inverse + (room - counted) / least) / room


def _measured(spans: Spans, numbers: Numbers) -> tuple[Tensor, Tensor | float, Tensor | None]:
    """Return φ·η·c (L, 1, 1), κ of both sides (2L, 1, 1) and the new t, n̂ and n̄."""
    seen = numbers.seen
    if seen is None:
        seen = followed(spans.squares(), numbers) if numbers.norms is not None else None
    if seen is None:
        return numbers.rate, 1.0, None
    return numbers.rate * seen.share, torch.cat([seen.taken] * 2), seen.norms


def _polar(K: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the polar factor of small float64 matrices, computed in `dtype`."""
    largest = K.abs().amax((-2, -1), keepdim=True)
    return polar((K / torch.where(largest == 0, 1.0, largest)).to(dtype)).to(K.dtype)


def _msign(spans: Spans, h: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Roots]:
    """Return the coefficients (o_B, o_A) of O = msign of the tangent [Q_B, h_B⊥]·[h_A, Q_A]ᵀ, and the roots of h⊥."""
    along = spans.along(h)
    outside = h - spans.q @ along
    roots = roots_of(spans.gram, outside, RESIDUAL_RIDGE, h)
    (_, H), (L_B, L_A) = spans.halves(along), spans.halves(roots.L)
    K = torch.cat([torch.cat([H.mT, L_A], -1), torch.cat([L_B.mT, torch.zeros_like(H)], -1)], -2)
    basis_B, basis_A = spans.halves(torch.cat([spans.q, outside @ roots.T], -1))
    return basis_B @ _polar(K, dtype), basis_A, roots


def _lorsum(spans: Spans, t_B: Tensor, t_A: Tensor, n: Numbers) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return the increments of LoRSum of (1 + decay)·(B, A) + (t_B, t_A), and how many factorisations failed.

    In increment form; see `psilora.lorsum`.
    """
    grams = dict(zip("BA", spans.halves(spans.gram), strict=True))
    targets, base = {"B": t_B, "A": t_A}, spans.base[: spans.layers]
    steps = {"B": torch.zeros_like(base), "A": torch.zeros_like(base)}
    failed = torch.zeros(spans.layers, dtype=torch.int64, device=base.device)

    def turn(name: str, at: Tensor) -> Tensor:
        nonlocal failed
        other = "A" if name == "B" else "B"
        current = base + at
        change = -at if n.decay is None else n.decay * base - at
        weighted = grams[other] @ current
        rhs = base @ (change.mT @ weighted) + targets[name] @ (targets[other].mT @ weighted)
        roots = roots_of(grams[other], current, n.ridge, least=LEAST_SQUARE)
        failed = failed + roots.failed
        step: Tensor = (rhs @ roots.T) @ roots.T.mT
        return step

    if n.num_iters == 0:
        steps = {"A": turn("A", steps["B"]), "B": turn("B", steps["A"])}
    for name in turns(n.num_iters, n.first):
        steps[name] = turn(name, steps["A" if name == "B" else "B"])
    return (steps["B"], steps["A"]), failed
