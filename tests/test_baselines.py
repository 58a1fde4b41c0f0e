"""The baselines against float64 transcriptions of their definitions."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import data, factors, mse, peft_mlp, plain_mlp, train
from torch import Tensor, nn

from psilora import PSILoRA, baselines
from psilora.adapters import LoRAPair, find_pairs
from psilora.baselines import (
    AltLoRA,
    LoFT,
    LoRAMuon,
    LoRAPro,
    PreconditionedAdamW,
    PreconditionedSGD,
    ProjectedMomentum,
    Riemannion,
    SVDLoRA,
)
from psilora.baselines.base import Layer
from psilora.baselines.lora_pro import sylvester
from psilora.baselines.pseudo import inverse_root, polar, pseudo_inverse

STEPS = 4
EVERY: list[tuple[type, dict[str, Any]]] = [
    (SVDLoRA, {"momentum": 0.9}),
    (SVDLoRA, {"rule": "adamw"}),
    (ProjectedMomentum, {"num_iters": 2}),
    (ProjectedMomentum, {"num_iters": 0}),
    (PreconditionedSGD, {"momentum": 0.9}),
    (PreconditionedAdamW, {}),
    (LoRAMuon, {}),
    (Riemannion, {}),
    (AltLoRA, {}),
    (AltLoRA, {"second": True}),
    (LoFT, {}),
    (LoRAPro, {}),
]
NAMES = [f"{cls.__name__}-{'-'.join(map(str, settings.values()))}" for cls, settings in EVERY]


State = dict[str, Any]
Rule = Callable[[Tensor, Tensor, Tensor, State], tuple[Tensor, Tensor]]


def test_every_baseline_is_among_them() -> None:
    assert {cls.__name__ for cls, _ in EVERY} == set(baselines.__all__)


def full_gradients(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """G = ∂L/∂W of every adapted layer, by autograd on the base weight."""
    weights = {pair.name: pair.owner.base.weight for pair in find_pairs(model)[0]}
    for weight in weights.values():
        weight.requires_grad_(True)
    grads = torch.autograd.grad(mse(model, batch), list(weights.values()))
    for weight in weights.values():
        weight.requires_grad_(False)
    return dict(zip(weights, grads, strict=True))


def scaled(pair: LoRAPair) -> tuple[Tensor, Tensor]:
    root = pair.scaling**0.5
    return pair.B.clone() * root, pair.A.clone() * root


def follow(cls: type, settings: dict[str, Any], rule: Rule, zero_B: bool = False, product: bool = False) -> None:
    """Train with the class and, layer by layer, with `rule` on (B̃, Ã) and the dense G; both must agree.

    `product`: in B̃·Ã alone, where a method says nothing of its factors.
    """
    model = plain_mlp()
    if zero_B:
        for pair in find_pairs(model)[0]:
            nn.init.zeros_(pair.lora_B)
    pairs = find_pairs(model)[0]
    optimizer = cls(model, 0.05, **settings)
    states: dict[str, State] = {pair.name: {} for pair in pairs}
    for _ in range(STEPS):
        batch = data()
        gradients = full_gradients(model, batch)
        expected = {p.name: rule(*scaled(p), gradients[p.name], states[p.name]) for p in pairs}
        train(model, optimizer, [batch])
        for pair in pairs:
            got, want = scaled(pair), expected[pair.name]
            if product:
                got, want = (got[0] @ got[1],), (want[0] @ want[1],)
            for one, other in zip(got, want, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("zero_B", [False, True])
def test_svdlora_equals_dense_svd_with_heavy_ball(zero_B: bool) -> None:
    def rule(B: Tensor, A: Tensor, G: Tensor, state: State) -> tuple[Tensor, Tensor]:
        state["M"] = 0.9 * state.get("M", 0) + G
        U, S, Vh = torch.linalg.svd(B @ A * (1 - 0.05 * 0.1) - 0.05 * state["M"], full_matrices=False)
        return U[:, :4] * S[:4].sqrt(), S[:4].sqrt()[:, None] * Vh[:4]

    follow(SVDLoRA, {"momentum": 0.9, "weight_decay": 0.1}, rule, zero_B)


def test_svdlora_adamw_is_torch_adamw_on_the_weight_then_dense_svd() -> None:
    def rule(B: Tensor, A: Tensor, G: Tensor, state: State) -> tuple[Tensor, Tensor]:
        weight = state.setdefault("W", nn.Parameter((B @ A).clone()))
        adam = state.setdefault("adam", torch.optim.AdamW([weight], lr=0.05, betas=(0.8, 0.95), weight_decay=0.1))
        weight.data.copy_(B @ A)
        weight.grad = G
        adam.step()
        U, S, Vh = torch.linalg.svd(weight.detach(), full_matrices=False)
        return U[:, :4] * S[:4].sqrt(), S[:4].sqrt()[:, None] * Vh[:4]

    follow(SVDLoRA, {"rule": "adamw", "betas": (0.8, 0.95), "weight_decay": 0.1}, rule)


@pytest.mark.parametrize("num_iters", [0, 1, 3])
def test_projected_momentum(num_iters: int) -> None:
    lr, mu, tau, lam, eye = 0.05, 0.9, 0.2, 0.05 * 1e-3, torch.eye(4, dtype=torch.float64)
    inverse = torch.linalg.inv

    def lorsum(B: Tensor, A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
        W, B0, A0 = B @ A - lr * G, B, A
        if num_iters == 0:
            return (W @ A.T + lam * B) @ inverse(A @ A.T + lam * eye), inverse(B.T @ B + lam * eye) @ (
                B.T @ W + lam * A
            )
        for _ in range(num_iters):
            A = inverse(B.T @ B + lam * eye) @ (B.T @ W + lam * A0)
            B = (W @ A.T + lam * B0) @ inverse(A @ A.T + lam * eye)
        return B, A

    def rule(B: Tensor, A: Tensor, G: Tensor, state: State) -> tuple[Tensor, Tensor]:
        B, A = lorsum(B, A, G)
        gram_B, gram_A = inverse(B.T @ B + lam * eye), inverse(A @ A.T + lam * eye)
        g_B, g_A = G @ A.T @ gram_A, gram_B @ B.T @ G
        if not state:
            state.update(m_B=g_B, m_A=g_A, B=B, A=A)
            return B, A
        p_B, p_A = state["m_B"] @ state["A"] @ A.T @ gram_A, gram_B @ B.T @ state["B"] @ state["m_A"]
        state.update(m_B=mu * p_B + (1 - tau) * g_B, m_A=mu * p_A + (1 - tau) * g_A, B=B, A=A)
        return B - lr * mu * p_B, A - lr * mu * p_A

    follow(ProjectedMomentum, {"num_iters": num_iters, "momentum": mu, "dampening": tau, "prox": 1e-3}, rule)


def preconditioned(B: Tensor, A: Tensor, G: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    eye = torch.eye(4, dtype=torch.float64)
    return (
        G @ A.T @ torch.linalg.inv(A @ A.T + damping * eye),
        torch.linalg.inv(B.T @ B + damping * eye) @ B.T @ G,
    )


def test_preconditioned_sgd() -> None:
    def rule(B: Tensor, A: Tensor, G: Tensor, state: State) -> tuple[Tensor, Tensor]:
        g = preconditioned(B, A, G, 1e-3)
        state["m"] = [0.9 * old + new for old, new in zip(state.get("m", (0, 0)), g, strict=True)]
        return B - 0.05 * state["m"][0], A - 0.05 * state["m"][1]

    follow(PreconditionedSGD, {"momentum": 0.9, "damping": 1e-3}, rule)


def test_preconditioned_sgd_is_one_simultaneous_lorsum_step() -> None:
    """With its damping equal to λ = η·ρ and no momentum it is PSILoRA with K = 0."""
    first, second = plain_mlp(), plain_mlp()
    second.load_state_dict(first.state_dict())
    batches = [data() for _ in range(3)]
    train(first, PreconditionedSGD(first, 0.05, damping=0.05 * 1e-2), batches)
    reference = PSILoRA(second, 0.05, step="gradient", num_iters=0, momentum=0.0, prox=1e-2, gradient="tangent")
    train(second, reference, batches)
    for name, value in factors(first).items():
        torch.testing.assert_close(value, factors(second)[name], rtol=1e-8, atol=1e-10)


def test_preconditioned_adamw_is_torch_adamw_on_the_preconditioned_gradients() -> None:
    def rule(B: Tensor, A: Tensor, G: Tensor, state: State) -> tuple[Tensor, Tensor]:
        pair = state.setdefault("p", (nn.Parameter(B.clone()), nn.Parameter(A.clone())))
        adam = state.setdefault("adam", torch.optim.AdamW(pair, lr=0.05, betas=(0.8, 0.95), weight_decay=0.1))
        for parameter, gradient in zip(pair, preconditioned(B, A, G, 1e-3), strict=True):
            parameter.grad = gradient
        adam.step()
        return pair[0].detach().clone(), pair[1].detach().clone()

    follow(PreconditionedAdamW, {"betas": (0.8, 0.95), "weight_decay": 0.1, "damping": 1e-3}, rule)


@pytest.mark.parametrize("zero_B", [False, True])
def test_lora_muon(zero_B: bool) -> None:
    def root(gram: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(gram)
        return vectors @ torch.diag(values**-0.5) @ vectors.T

    def msign(M: Tensor) -> Tensor:
        U, _, Vh = torch.linalg.svd(M, full_matrices=False)
        return U @ Vh

    def rule(B: Tensor, A: Tensor, G: Tensor, state: State) -> tuple[Tensor, Tensor]:
        m_B = state["B"] = 0.9 * state.get("B", 0) + 0.1 * G @ A.T
        m_A = state["A"] = 0.9 * state.get("A", 0) + 0.1 * B.T @ G
        R_A = root(A @ A.T)
        new_B = B - 0.025 * msign(m_B @ R_A) @ R_A
        if not B.any():
            return new_B, A
        R_B = root(B.T @ B)
        return new_B, A - 0.025 * R_B @ msign(R_B @ m_A)

    follow(LoRAMuon, {"momentum": 0.9}, rule, zero_B)


def test_a_half_step_of_lora_muon_moves_the_weight_by_half_the_rate() -> None:
    model = plain_mlp()
    pair = find_pairs(model)[0][0]
    B, A = scaled(pair)
    train(model, LoRAMuon(model, 0.2), [data()])
    moved = scaled(pair)
    for change in ((moved[0] - B) @ A, B @ (moved[1] - A)):
        singular = torch.linalg.svdvals(change)
        torch.testing.assert_close(singular[:4], torch.full((4,), 0.1, dtype=torch.float64))


def pinv(M: Tensor) -> Tensor:
    return torch.linalg.pinv(M, rtol=1e-12)


@pytest.mark.parametrize("zero_B", [False, True])
def test_riemannion_is_muon_in_the_tangent_space_of_dense_matrices(zero_B: bool) -> None:
    def cut(M: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        keep = S[:rank] > 1e-12 * S[0]
        return U[:, :rank][:, keep], S[:rank][keep], Vh[:rank][keep]

    def rule(B: Tensor, A: Tensor, G: Tensor, state: State) -> tuple[Tensor, Tensor]:
        W, left, right = B @ A, B @ pinv(B), pinv(A) @ A

        def projected(Z: Tensor) -> Tensor:
            return left @ Z + Z @ right - left @ Z @ right

        M = state["M"] = projected(G) + 0.8 * (projected(state["M"]) if state else 0.0)
        U, _, Vh = cut(M, 8)
        U, S, Vh = cut((1 - 0.05 * 0.1) * W - 0.05 * projected(U @ Vh), 4)
        return U * S, Vh

    follow(Riemannion, {"momentum": 0.8, "weight_decay": 0.1}, rule, zero_B, product=True)


def test_riemannion_does_not_depend_on_the_split() -> None:
    first, second = plain_mlp(), plain_mlp()
    second.load_state_dict(first.state_dict())
    T = torch.eye(4, dtype=torch.float64) + 0.3 * torch.randn(4, 4, dtype=torch.float64)
    for pair in find_pairs(second)[0]:
        pair.lora_B.data.copy_(pair.lora_B @ T)
        pair.lora_A.data.copy_(torch.linalg.inv(T) @ pair.lora_A)
    batches = [data() for _ in range(3)]
    for model in (first, second):
        train(model, Riemannion(model, 0.05), batches)
    for one, two in zip(find_pairs(first)[0], find_pairs(second)[0], strict=True):
        torch.testing.assert_close(one.B @ one.A, two.B @ two.A, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("zero_B", [False, True])
def test_altlora_projects_its_momentum_and_moves_one_factor_per_step(second: bool, zero_B: bool) -> None:
    def rule(B: Tensor, A: Tensor, G: Tensor, state: State) -> tuple[Tensor, Tensor]:
        turn = state["n"] = state.get("n", -1) + 1
        name, t = "BA"[turn % 2], turn // 2 + 1
        if name == "A":  # of the weight's increment O·m only what the new O can express is kept
            g, back = pinv(B) @ G, pinv(B) @ state["O_A"] @ state["m_A"] if "O_A" in state else 0.0
        else:
            g, back = G @ pinv(A), state["m_B"] @ state["O_B"] @ pinv(A) if "O_B" in state else 0.0
        m = state[f"m_{name}"] = 0.8 * back + 0.2 * g
        state[f"O_{name}"] = B if name == "A" else A
        v = state[f"v_{name}"] = 0.95 * state.get(f"v_{name}", 0.0) + 0.05 * g**2
        D = m / (1 - 0.8**t)
        if second:
            D = D / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        return (B, A - 0.05 * (D + 0.1 * A)) if name == "A" else (B - 0.05 * (D + 0.1 * B), A)

    follow(AltLoRA, {"betas": (0.8, 0.95), "second": second, "weight_decay": 0.1}, rule, zero_B)


@pytest.mark.parametrize("zero_B", [False, True])
def test_loft_carries_both_moments_of_the_weight_over(zero_B: bool) -> None:
    def rule(B: Tensor, A: Tensor, G: Tensor, state: State) -> tuple[Tensor, Tensor]:
        n = state["n"] = state.get("n", -1) + 1
        result = {"A": A, "B": B}
        for name, other in (("A", B), ("B", A.T)):  # what the moments of a factor are multiplied with
            g = pinv(other) @ (G if name == "A" else G.T)
            C = pinv(other) @ state[f"O_{name}"] if n else torch.zeros(4, 4, dtype=G.dtype)
            m = state[f"m_{name}"] = 0.8 * C @ state.get(f"m_{name}", g) + 0.2 * g
            old = state.get(f"p_{name}", [torch.zeros(4, 4, dtype=G.dtype)] * g.shape[1])
            p = [0.95 * C @ p_j @ C.T + 0.05 * torch.outer(c, c) for p_j, c in zip(old, g.T, strict=True)]
            state[f"p_{name}"], state[f"O_{name}"] = p, other
            v = torch.stack([(other @ p_j @ other.T).diagonal() for p_j in p], 1)
            D = other @ m / (1 - 0.8 ** (n + 1)) / ((v / (1 - 0.95 ** (n + 1))).clamp_min(0).sqrt() + 1e-6)
            if name == "BA"[n % 2]:
                step = pinv(other) @ D
                result[name] = result[name] - 0.05 * ((step if name == "A" else step.T) + 0.1 * result[name])
        return result["B"], result["A"]

    follow(LoFT, {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}, rule, zero_B)


def test_loft_is_adamw_on_the_weight_at_full_rank() -> None:
    """In a step of A, with B square and orthogonal and no memory, the weight moves as AdamW moves it."""
    Q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    optimizer = object.__new__(LoFT)
    group = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    W = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))
    adam = torch.optim.AdamW([W], lr=0.05, betas=(0.8, 0.95), weight_decay=0.0)
    state: dict[str, Tensor] = {"step": torch.tensor(1.0)}  # A's turn
    G = torch.randn(6, 6, dtype=torch.float64)
    A = Q.T @ W.detach()
    step_B, step_A, _ = optimizer.propose(Layer(Q, A, Q.T @ G, G @ A.T, None), state, {**group, "betas": (0.0, 0.0)})
    W.grad = G
    adam.param_groups[0]["betas"] = (0.0, 0.0)
    before = W.detach().clone()
    adam.step()
    torch.testing.assert_close(Q @ step_A, W.detach() - before, rtol=1e-7, atol=1e-9)
    assert not step_B.any()


@pytest.mark.parametrize("zero_B", [False, True])
def test_lora_pro_follows_adam_on_the_equivalent_gradient(zero_B: bool) -> None:
    def rule(B: Tensor, A: Tensor, G: Tensor, state: State) -> tuple[Tensor, Tensor]:
        left, right = B @ pinv(B), pinv(A) @ A
        g = left @ G + G @ right - left @ G @ right
        weight = state.setdefault("W", nn.Parameter(torch.zeros_like(G)))
        adam = state.setdefault("adam", torch.optim.AdamW([weight], lr=1.0, betas=(0.8, 0.95), weight_decay=0.0))
        weight.grad = g
        weight.data.zero_()
        adam.step()
        D = -weight.detach()
        eye = torch.eye(4, dtype=G.dtype)
        system = torch.kron(B.T @ B, eye) + torch.kron(eye, A @ A.T)
        X = torch.linalg.solve(system, -(pinv(B) @ D @ A.T).flatten()).view(4, 4)
        g_A, g_B = pinv(B) @ D + X @ A, (D - left @ D) @ pinv(A) - B @ X
        kept = (1 - 0.05 * 0.1) ** 0.5
        return kept * B - 0.05 * g_B, kept * A - 0.05 * g_A

    follow(LoRAPro, {"betas": (0.8, 0.95), "weight_decay": 0.1}, rule, zero_B)


def test_the_steps_of_lora_pro_are_the_tangent_projection_of_its_direction() -> None:
    """Whatever X is; and with no preconditioner at all (ε huge), of the gradient."""
    model = plain_mlp()
    pair = find_pairs(model)[0][0]
    B, A = scaled(pair)
    batch = data()
    G = full_gradients(model, batch)[pair.name]
    optimizer = LoRAPro(model, 1e-7 * 1e9, eps=1e9)
    train(model, optimizer, [batch])
    new_B, new_A = scaled(pair)
    left, right = B @ pinv(B), pinv(A) @ A
    change = (new_B - B) @ A + B @ (new_A - A)
    torch.testing.assert_close(change, -1e-7 * (left @ G + G @ right - left @ G @ right), rtol=1e-5, atol=1e-12)


def test_sylvester_with_null_directions() -> None:
    first, second = (torch.randn(4, 6, dtype=torch.float64) for _ in range(2))
    first, second, right = first @ first.T, second @ second.T, torch.randn(4, 4, dtype=torch.float64)
    X = sylvester(first, second, right)
    torch.testing.assert_close(first @ X + X @ second, right)
    assert not sylvester(torch.zeros(4, 4), torch.zeros(4, 4), torch.ones(4, 4)).any()


def test_polar_factors_and_roots_leave_out_null_directions() -> None:
    M = torch.randn(6, 2, dtype=torch.float64) @ torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.svdvals(polar(M)), torch.tensor([1.0, 1, 0, 0], dtype=torch.float64))
    assert not polar(torch.zeros(6, 4)).any() and not inverse_root(torch.zeros(4, 4)).any()
    gram = M.T @ M
    root = inverse_root(gram)
    torch.testing.assert_close(root @ root, torch.linalg.pinv(gram, rtol=1e-10))
    torch.testing.assert_close(pseudo_inverse(gram), root @ root)


@pytest.mark.parametrize(("cls", "settings"), EVERY, ids=NAMES)
@pytest.mark.parametrize("zero_B", [False, True])
def test_zero_rate_and_zero_gradient_are_exact_no_ops(cls: type, settings: dict[str, Any], zero_B: bool) -> None:
    model = plain_mlp(dtype=torch.float32)
    if zero_B:
        for pair in find_pairs(model)[0]:
            nn.init.zeros_(pair.lora_B)
    before = factors(model)
    train(model, cls(model, 0.0, **settings), [data(dtype=torch.float32) for _ in range(3)])
    optimizer = cls(model, 0.1, **settings)
    for _ in range(2):
        optimizer.zero_grad()
        (mse(model, data(dtype=torch.float32)) * 0).backward()
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in factors(model).items())


@pytest.mark.parametrize(("cls", "settings"), EVERY, ids=NAMES)
def test_the_lora_scaling_does_not_matter(cls: type, settings: dict[str, Any]) -> None:
    """The same (B̃, Ã) under another alpha follows the same ΔW."""
    first, second = peft_mlp(lora_alpha=4), peft_mlp(lora_alpha=16)
    second.load_state_dict(first.state_dict())
    for one, two in zip(find_pairs(first)[0], find_pairs(second)[0], strict=True):
        ratio = (one.scaling / two.scaling) ** 0.5
        two.lora_A.data.copy_(one.lora_A * ratio)
        two.lora_B.data.copy_(one.lora_B * ratio)
    batches = [data() for _ in range(3)]
    for model in (first, second):
        train(model, cls(model, 0.02, **settings), batches)
    for one, two in zip(find_pairs(first)[0], find_pairs(second)[0], strict=True):
        torch.testing.assert_close(one.scaling * one.B @ one.A, two.scaling * two.B @ two.A, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("cls", "settings"), EVERY[:4], ids=NAMES[:4])
def test_clipping_after_backward_reaches_the_full_gradient(cls: type, settings: dict[str, Any]) -> None:
    results = []
    for clipped in (True, False):
        torch.manual_seed(1)
        model, batch = plain_mlp(), data()
        optimizer = cls(model, 0.05, **settings)
        (mse(model, batch) * (1.0 if clipped else 0.25)).backward()
        if clipped:
            for pair in find_pairs(model)[0]:
                pair.lora_A.grad.mul_(0.25), pair.lora_B.grad.mul_(0.25)
        optimizer.step()
        results.append(factors(model))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-7, atol=1e-10)


def test_a_gradient_that_the_capture_does_not_explain_is_refused() -> None:
    model = plain_mlp()
    optimizer = SVDLoRA(model, 0.05)
    mse(model, data()).backward()
    before = factors(model)
    model.l2.lora_B.weight.grad.normal_()
    with pytest.raises(RuntimeError, match=r"l2: the captured activations miss \.grad"):
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in factors(model).items())


def test_other_parameters_are_trained_by_adamw_and_the_state_resumes_exactly() -> None:
    model = plain_mlp()
    model.l3.base.bias.requires_grad_()
    twin = plain_mlp()
    twin.l3.base.bias.requires_grad_()
    batches = [data() for _ in range(4)]
    optimizer = SVDLoRA(model, 0.05, momentum=0.9, adamw_lr=0.01)
    train(model, optimizer, batches[:2])
    twin.load_state_dict(model.state_dict())
    resumed = SVDLoRA(twin, 0.3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, batches[2:])
    train(twin, resumed, batches[2:])
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)
    assert "exp_avg" in optimizer.state[model.l3.base.bias]


@pytest.mark.parametrize(("cls", "settings"), EVERY, ids=NAMES)
def test_a_copy_with_its_model_trains_as_the_original_or_is_refused(cls: type, settings: dict[str, Any]) -> None:
    model = plain_mlp()
    model.l3.base.bias.requires_grad_()
    optimizer = cls(model, 0.05, **settings)
    train(model, optimizer, [data()])
    if optimizer._capture is not None:
        with pytest.raises(TypeError, match=rf"a {cls.__name__} that captures .* use state_dict\(\)"):
            copy.deepcopy((model, optimizer))
        return
    before = copy.deepcopy(model.state_dict())
    batches = [data() for _ in range(2)]
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    for twin, copied in copies:
        train(twin, copied, batches)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    train(model, optimizer, batches)
    for twin, _ in copies:
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (SVDLoRA, {"rule": "adam"}, r"Invalid rule='adam'. Must be one of 'sgd', 'adamw'."),
        (SVDLoRA, {"momentum": 1.0}, r"Invalid momentum=1.0. Must be in \[0, 1\)."),
        (SVDLoRA, {"lr": -1.0}, r"Invalid lr=-1.0. Must be in \[0, inf\)."),
        (SVDLoRA, {"betas": (0.9, 1.0)}, r"Invalid betas\[1\]=1.0. Must be in \[0, 1\)."),
        (SVDLoRA, {"betas": 0.9}, r"Invalid betas=0.9. Must be two numbers in \[0, 1\)."),
        (SVDLoRA, {"lr": "x"}, r"Invalid lr='x'. Must be in \[0, inf\)."),
        (ProjectedMomentum, {"dampening": "x"}, r"Invalid dampening='x'. Must be in \[0, 1\]."),
        (ProjectedMomentum, {"adamw_eps": None}, r"Invalid adamw_eps=None. Must be finite and >= 0."),
        (ProjectedMomentum, {"num_iters": -1}, r"Invalid num_iters=-1. Must be an integer >= 0."),
        (ProjectedMomentum, {"dampening": 2}, r"Invalid dampening=2. Must be in \[0, 1\]."),
        (PreconditionedSGD, {"damping": -1.0}, r"Invalid damping=-1.0. Must be in \[0, inf\)."),
        (LoRAMuon, {"momentum": -0.1}, r"Invalid momentum=-0.1. Must be in \[0, 1\)."),
    ],
)
def test_bad_settings_name_the_value(cls: type, settings: dict[str, Any], message: str) -> None:
    model = plain_mlp()
    with pytest.raises(ValueError, match=message):
        cls(model, **{"lr": 0.1, **settings})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
