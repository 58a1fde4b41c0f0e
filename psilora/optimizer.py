"""`PSILoRA`: the optimizer class. It knows the order of a step; the mathematics is in lowrank/ and steps/."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from psilora.adapters.model import Models
from psilora.adapters.pair import LoRAPair, is_sparse, listed
from psilora.backends import dispatch
from psilora.backends.warmup import warm_up
from psilora.distributed.communicator import Communicator
from psilora.distributed.sharding import Gathered, local
from psilora.linalg.precision import full_precision
from psilora.monitor.standstill import why_still
from psilora.options import OPTION_NAMES, Options, refuse_foreign, resolved
from psilora.options.checks import above_zero
from psilora.options.published import PAPER
from psilora.param_groups.bind import Recipe
from psilora.reporting import Reporting
from psilora.steps.assemble import Collected
from psilora.steps.clipping import gradient_factor
from psilora.steps.controller import CONTROLLERS
from psilora.steps.counts import GlobalCounts, global_counts, refuse_unshared
from psilora.steps.gradient_norm import full_squares
from psilora.steps.problem import Problems, Scales
from psilora.steps.state import as_dict, compatible, init_state, loading, plain
from psilora.steps.verify import external_scale

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class PSILoRA(Reporting):
    r"""A full step on the weight of every LoRA pair, cut back to rank r by LoRSum (see `psilora.lorsum`).

    ΔW = s·B·A, with the gradient G = ∂L/∂W, which is never formed. Two kinds of step:

    `step="spectral"`, the default, goes along a polar factor, msign(U Σ Vᵀ) = U Vᵀ, from the LoRA gradients alone:

        G_T ← tangent projection of G at (B, A);  M ← μ·M + (1−μ)·G_T, of rank 2r, carried along;  H = μ·M + (1−μ)·G_T
        (√s·B, √s·A) ← LoRSum of (1 − η·wd)·(√s·B, √s·A) − η·φ·c·msign(H),  c = f·√(8/r·d_max/d_min)

    whitened by a metric of the LoRA gradients. φ ≤ 1 falls with a layer's gradient norm (`fade`), and f ≤ 1 with the
    number of layers (`depth_scale`). d_max and d_min are the larger and the smaller width. Start at lr = 0.1.
    It attaches nothing to the model and works under whatever fills `.grad`, with several processes that average it too.
    Without a gradient only a momentum that is already there moves anything, for as long as it lasts.

    `step="gradient"` is PSI-LoRA / OPLoRA (arXiv 2602.16456, 2509.19977). G = SᵀX comes from the layer's input X and
    output gradient S, which hooks on the inner LoRA layers capture:

        (√s·B, √s·A) ← LoRSum of (1 − η·wd)·(√s·B, √s·A) − η(1−τ)·(Sᵀ, X) − ημ·(B_m, A_m),   λ = η·ρ
        (B_m, A_m)   ← LoRSum of μ·(B_m, A_m) + (1−τ)·(Sᵀ, X)

    In both, lr and prox refer to the weight, whatever alpha is. Grams, solves and state are fp32 or better (fp64 for
    fp64 parameters), also under autocast and for 16-bit parameters.

    The other trainable parameters (heads, `modules_to_save`, norms, biases) are trained by `torch.optim.AdamW` in the
    last param group, under their own rate `adamw_lr`, which follows the same schedule.

    Args:
        model: The model with LoRA adapters, not its parameters; or several, as a list or a dict whose keys begin their
            layers' names ("unet.…"), trained by one optimizer.
        lr: η ≥ 0, a number or one-element tensor.
        step: "spectral" or "gradient", "step_kind" in param groups. None or "auto" below: a default that depends on it.
        num_iters: K ≥ 0 rounds of alternating least squares; 0 is one simultaneous update (preconditioned LoRA).
        solver: "als", alternating least squares; "ritz", with as many products the best matrix in the span of all its
            iterates (see `psilora.ritz`; `prox` then holds for the momentum only, the factors are rebalanced, CUDA is
            waited for). Gradient step only.
        momentum: μ in [0, 1).
        dampening: τ in [0, 1]; None means 0 (heavy ball) for a gradient step without a metric, and μ (an average) else.
        momentum_rank: r_m of a gradient step; None means r. A spectral step's momentum has rank 2r.
        nesterov: Take H as above; False takes H = M. Spectral only.
        joint: Move both factors along one low-rank O; False moves each by half along the polar factor of its own
            gradient's momentum, with half of the state, and no LoRSum. Spectral only.
        fade: Multiply a layer's η by min(1, n̂/n̄), its recent gradient norm over the mean of all steps so far (see
            `psilora.lowrank.spectral.followed`), so that it comes to rest with its gradient. Spectral only.
        cap: How many times its mean norm so far a layer's gradient counts for at most: an outlier is scaled down to it
            before it enters momentum and metric. ≥ 1, or None for no bound. Spectral only.
        balance: Multiply one factor and divide the other by a power of two once their norms are more than 16 times
            apart, which leaves the weight as it is (see `psilora.steps.gauge`); in a gradient step from its 17th on,
            and for K ≤ 1 its momentum's factors likewise. False leaves the factors of both as the recursion has them.
        depth_scale: f > 0. "auto": min(1, √(12/n)) with n pairs that take spectral steps, counted at construction (in
            this process), so that the norm of all their steps together does not grow with n beyond 12. Spectral only.
        prox: ρ ≥ 0, the proximal weight: λ = η·ρ in a gradient step (None: 1e-2), and ρ times the mean of the diagonal
            of each Gram in a spectral one (None: 1e-6).
        weight_decay: wd ≥ 0, decoupled, on the weight ΔW.
        metric: None (Frobenius) or a metric. Spectral: "lora", diagonal, from the LoRA gradients' second moments alone,
            M ∝ (D/mean(D) + δ)^γ, the rate divided by what M enlarges: ‖step‖_F stays about η·φ·c·√(2r); "auto"
            takes it. Gradient: F-LoRSum in M = (D + δ)^γ, diagonal with "kfac" or "shampoo", whole matrices with
            "kfac-dense" or "shampoo-dense", for layers up to 4096 wide: an fp64 eigendecomposition of both sides per
            step, for which CUDA is waited for. "kfac-low-rank", experimental, keeps D = F·Fᵀ + μI with F
            (d, metric_rank) instead, for gradient="exact". "auto" takes None.
        metric_power, metric_beta, damping: γ (None: ½, spectral 1), β₂ and δ (None: 1e-5, spectral 0.1) of the metric.
        metric_rank: k of the low-rank metric; None means r.
        metric_bias_correction: Start D at 0 and divide by 1 − β₂ᵗ; False starts D at 1, as published (I, where dense).
            Gradient only.
        gradient: How G is known to a gradient step. None: "exact". "exact": X and S are kept from backward to step.
            "dense": SᵀX is kept instead, as exact, and less for more than about d_in·d_out/(d_in+d_out) rows, as with
            convolutions, whose X are patches: ∏k times the input.
            "backward": the products of an exact step with K = 1, A first, without momentum and metric are formed inside
            backward, and neither is kept; one call of a layer per step, in one process. "tangent": from `.grad` alone;
            without a metric, nothing is captured. "auto": exact or dense by layer, whichever is smaller, and tangent
            beyond `capture_budget`.
        first: The factor that is updated first, "A" or "B".
        max_grad_norm: Clip the gradient's norm, over all parameters; None for no clipping.
        norm: What counts of a LoRA pair: "lora", dA/√s and dB/√s, or "full", the gradient G of its weight (its
            tangent projection where only `.grad` is known), exact or estimated; see `psilora.steps.gradient_norm`.
        maximize: Ascend instead.
        controller: "slope" multiplies every η by one factor that it finds (see `psilora.steps.controller`), from the
            last increment of every parameter, which it keeps; experimental. None leaves them.
        backend: "auto": Triton kernels on CUDA, once they have agreed with the reference there, else the reference;
            "reference": plain PyTorch; "triton".
        loss_reduction: "mean" or "sum" over the N rows; used by the metric only.
        nonfinite: "skip" makes a step with a non-finite gradient or update a no-op, decided on the device, counted, and
            warned about once; "raise" names the layers instead (waits for the device). Nothing is changed by either.
        unsupported: "raise" on adapters that are not one product s·B·A, or that lie in the memory of another's (PEFT's
            `ensure_weight_tying`), or train them with "adamw".
        groups: Overrides for some layers: a sequence of {"layers": regex searched in the layer's path, or a list of
            paths, **settings}, where " (adapter)" may follow a path; the first match wins, the rest forms group 0.
            Settings are those above from `lr` to `loss_reduction`, without max_grad_norm, norm, controller and backend.
            {"parameters": regex or list of names, **settings} is for parameters outside the pairs, with AdamW's lr,
            betas, eps and weight_decay: an embedding's rate, or norms and biases without decay.
        tokens: Rows N that a layer sees per step in this process, for gradient="auto": tokens, or output positions of a
            convolution. None: as many as each layer saw in the first step. The same in all processes, as every setting.
        capture_budget: Bytes of G that gradient="auto" may hold from backward to step, beside a metric's sums; None for
            no limit.
        process_group: The processes over which `.grad` is averaged, e.g. by DDP; None for all of them. What is captured
            is summed over them by small all-reduces in `step`, which they must therefore call together.
        adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: For the other trainable parameters.
        also: A module outside the model, such as a loss with weights of its own, whose trainable parameters are trained
            with the other ones.

    State: "momentum" (r_m, d_in) and "metric" (d_in,) of a `lora_A` weight, "momentum" (d_out, r_m) and "metric"
    (d_out,) of a `lora_B` weight, "step" of both; a dense metric is (d_in, d_in) and (d_out, d_out), a low-rank one
    (d_in, k) and (d_out, k) beside a "metric_rest" (1,), and "lora" keeps √D; "norms" (3,) of a `lora_B` weight, for
    `fade` and `cap`; and that of the controller. It is created by the first step, or by `init_state`.

    Attributes:
        communicator: Counts the bytes and rounds that captures cost over several processes.

    Raises:
        ValueError: A setting is out of range, no LoRA pair is found, or the model cannot be optimized here.
        TypeError: `model` is not a module.
    """

    # GradScaler then hands over its scale and its verdict on the device, and always calls step.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        model: Models,
        lr: float | Tensor,
        *,
        step: str = "spectral",
        num_iters: int = 1,
        solver: str = "als",
        momentum: float = 0.9,
        dampening: float | None = None,
        momentum_rank: int | None = None,
        nesterov: bool = True,
        joint: bool = True,
        fade: bool = True,
        cap: float | None = 4.0,
        balance: bool = True,
        depth_scale: float | str = "auto",
        prox: float | None = None,
        weight_decay: float = 0.0,
        metric: str | None = "auto",
        metric_power: float | None = None,
        metric_beta: float = 0.99,
        metric_rank: int | None = None,
        metric_bias_correction: bool = True,
        damping: float | None = None,
        gradient: str | None = None,
        first: str = "A",
        max_grad_norm: float | None = None,
        norm: str = "lora",
        maximize: bool = False,
        controller: str | None = None,
        backend: str = "auto",
        loss_reduction: str = "mean",
        nonfinite: str = "skip",
        unsupported: str = "raise",
        groups: Sequence[Mapping[str, Any]] = (),
        tokens: int | None = None,
        capture_budget: float | None = None,
        process_group: ProcessGroup | None = None,
        adamw_lr: float = 1e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        also: nn.Module | None = None,
    ) -> None:
        settings = {name: value for name, value in locals().items() if name in OPTION_NAMES}
        Options.of_settings(resolved(settings))
        refuse_foreign(settings, step)
        dispatch.check_backend(backend)
        above_zero("max_grad_norm", max_grad_norm)
        for name, value, allowed in (
            ("nonfinite", nonfinite, ("skip", "raise")),
            ("norm", norm, ("lora", "full")),
            ("unsupported", unsupported, ("raise", "adamw")),
            ("controller", controller, CONTROLLERS),
        ):
            if value not in allowed:
                raise ValueError(f"Invalid {name}={value!r}. Must be one of {', '.join(map(repr, allowed))}.")
        self.max_grad_norm, self.norm, self.backend, self.nonfinite = max_grad_norm, norm, backend, nonfinite
        adamw = {"lr": adamw_lr, "betas": adamw_betas, "eps": adamw_eps, "weight_decay": adamw_weight_decay}
        recipe = Recipe(settings, groups, {**adamw, "maximize": maximize}, unsupported, also)
        self.communicator = Communicator(process_group)
        self._slope, self._planned = controller is not None, (tokens, capture_budget)
        super().__init__(model, recipe)

    @classmethod
    def paper(cls, model: Models, lr: float | Tensor, **overrides: Any) -> PSILoRA:
        """Return a `PSILoRA` with the settings of the paper (`psilora.options.PAPER`), to compare with it.

        Its metric starts at 1, so early steps are far too small where the true statistics are: good rates lie elsewhere
        than for the defaults. With the LoRA scaling s = 1 (alpha = r) the rate is the paper's own.
        """
        return cls(model, lr, **{**PAPER, **overrides})

    # ---- the step -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; return the closure's loss, if there is one.

        Order: metric, both projections, check, commit, AdamW, drop captures. Everything is computed before anything is
        written, so an error leaves parameters and state as they were. Pairs without gradients are left alone, and so
        are those with a frozen factor, and captured ones with gradients of zero that no backward pass has left there.

        Raises:
            RuntimeError: A gradient is sparse, a capture does not match `.grad`, or (nonfinite="raise") is not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._capture.superseded:
            raise RuntimeError("a newer PSILoRA on the same model took over the hooks of this one")
        self._notices.begin(self.defaults["lr"])
        self._notices.rates(self.param_groups)
        self._capture.refresh()
        all_counts = functools.cache(self._consensus)
        if self._shared is not None:
            all_counts()  # a round of messages, in which all processes take part at this point
        gathered = Gathered()
        try:
            found = self._collect(all_counts, gathered)
            types = found.device_types | {grad.device.type for grad in self._others.gradients}
            if not types:
                self._capture.clear()
                return loss
            with contextlib.ExitStack() as stack:
                for device_type in sorted(types):
                    stack.enter_context(full_precision(device_type))
                self._apply(found.problems, gathered)
        finally:
            self._assembler.release()
        if self._planner.waiting:
            world = self.communicator.world_size
            self._planner.observe(self._capture, {key: counts.rows // world for key, counts in all_counts().items()})
        self._capture.clear()
        self._counters.poll()
        return loss

    def _apply(self, problems: Problems, gathered: Gathered) -> None:
        device = self._counters.values.device
        loss_scale: Tensor | None = getattr(self, "grad_scale", None)
        communicator, controller = self._shared, self._controller
        external, full = external_scale(problems, device, communicator), None
        if self.max_grad_norm is not None and self.norm == "full":
            full = full_squares(problems, external, communicator, device)
        clip = gradient_factor(problems, self._others.gradients, self.max_grad_norm, loss_scale, device, full)
        rate = None if controller is None else controller.begin(problems, clip, self.state)
        share = 1.0 if communicator is None else 1 / communicator.world_size
        scales = Scales(clip, external, rate, share)
        wanted = self._observer.wanted
        seen = self._observer.before(problems, scales, self._capture.nbytes()) if wanted else []
        buckets = dispatch.compute(problems, scales, self.backend, communicator, self._backends)
        self._taken = problems.prepared["route"].said
        others = [local(grad) for grad in self._others.gradients]
        wrong, overflow = dispatch.refused(buckets, others, device), self._overflow(device)
        if communicator is not None or self._sharded:
            overflow = torch.zeros_like(wrong) if overflow is None else overflow
            sums = self.communicator.sums([wrong.float(), overflow.float()])
            wrong, overflow = sums[0] > 0, sums[1] > 0
        skipped = wrong if overflow is None else wrong & ~overflow  # an overflow is GradScaler's to count
        if self.nonfinite == "raise" and bool(skipped):
            names = listed(dispatch.nonfinite(buckets, others))
            raise RuntimeError(f"non-finite gradient or update in {names}; no parameter or state was changed")
        ok = ~(wrong if overflow is None else wrong | overflow)
        writes = [*dispatch.stage(buckets, ok), gathered.write_back]
        if controller is not None:
            writes.insert(0, controller.end(buckets, clip, ok, self.state))
        repaired = [bucket.update.repaired.to(device) for bucket in buckets] or [torch.zeros_like(skipped)]
        repaired_here = ok * (repaired[0] if len(repaired) == 1 else torch.stack(repaired).sum())
        self._others.step(ok, clip)  # first: it may still ask for memory, the writes do not
        for write in writes:
            write()
        self._counters.add(skipped, repaired_here)
        if wanted:
            self._observer.after(seen, scales)

    @property
    def _shared(self) -> Communicator | None:
        """What sums captures over several processes; None where `.grad`, averaged by whoever runs them, is enough."""
        return self.communicator if self._capture.records and self.communicator.world_size > 1 else None

    def _consensus(self) -> dict[int, GlobalCounts]:
        """What all processes know of each pair, by its id."""
        pairs, shared = list(self._pairs.values()), self._shared
        if shared is not None:
            refuse_unshared(self._options(), shared.world_size)
        return {
            id(pair): counts for pair, counts in zip(pairs, global_counts(pairs, self._capture, shared), strict=True)
        }

    def _collect(self, all_counts: Callable[[], Mapping[int, GlobalCounts]], gathered: Gathered) -> Collected:
        """The pairs that have gradients."""
        settings = self._options()
        self._planner.check(settings)
        shared = self._shared is not None
        found = self._assembler.collect(settings, self._capture, all_counts, self.state, gathered, shared)
        self._notices.without_activations(found.blind)
        self._notices.halved(found.halved)
        self._notices.trained(bool(found.problems or found.halved), found.still, self._why_still)
        self._notices.partly(found.moving, found.still, self._why_still)
        if any(is_sparse(grad) for grad in self._others.gradients):
            raise RuntimeError("a parameter outside the LoRA pairs has a sparse gradient; AdamW needs dense ones")
        return found

    def _why_still(self, pair: LoRAPair, trained: bool) -> str:
        return why_still(pair, self._known_model(), self._capture.record(pair), trained)

    def _overflow(self, device: torch.device) -> Tensor | None:
        """Whether a GradScaler, which tells through `found_inf`, wants this step skipped, a 0-d bool; None without."""
        found: Tensor | None = getattr(self, "found_inf", None)
        return None if found is None else found.to(device).sum() > 0

    # ---- state --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_state(self) -> None:
        """Create the LoRA state that the current settings need, where it does not exist yet."""
        for pair, options in self._options():
            init_state(Gathered().pair(pair), options, self.state[pair.lora_B], self.state[pair.lora_A])
        if self._controller is not None:
            self._controller.init_state(self.state)

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict in plain numbers; groups also hold the "names" of what they train, in order."""
        state = super().state_dict()
        for group, names in zip(state["param_groups"], self._names(), strict=True):
            group.update(plain(group), names=names)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state exactly: the fp32 state of 16-bit parameters is not rounded to the parameters' dtype.

        An option that it lacks, being of another version, stays as it is here. Empty groups at the end may be missing.
        Layers are told by name: a prefix of all paths and what wrappers insert do not matter, another order does.

        Raises:
            ValueError: It is another optimizer's, of other layers or parameters, not whole, or needs other hooks;
                nothing has been changed.
        """

        def check(given: Mapping[str, Any]) -> dict[str, Any]:
            found, settings = compatible(given, self.param_groups, self._pairs, self._names())
            self._planner.check(settings)
            self._assembler.forget()
            return found

        with loading(self, check):
            super().load_state_dict(as_dict(state_dict))
        self._capture.clear()

    def warmup(self) -> list[str]:
        """Compile everything that a step on the kernels needs, ahead of the first one; return in words what was done.

        Nothing else is changed: no parameter, state, gradient or random number. On CUDA it takes up to minutes, once
        for a machine, since Triton keeps what it has compiled. It waits for the device. Captured layers are compiled
        for X and S of the adapters' dtypes, which autocast may change. On the reference backend it does nothing, and
        says why.
        """
        controlled = self._controller is not None
        return warm_up(
            self._options(), self.state, self.gradients(), self.backend, self._planner.tokens, increments=controlled
        )
