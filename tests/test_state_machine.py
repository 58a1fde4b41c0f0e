"""Whatever a training loop does, in whatever order: the optimizer goes where a float64 shadow goes, and nowhere else.

A hypothesis state machine drives a small model through passes, passes that fail half-way, both kinds of zero_grad,
clipping, freezing, other rates, checkpointed regions, saving and loading into the same or a new optimizer, and steps.
`shadow.Shadow` does the same with dense gradients of the weights and plain transcriptions of the formulas.
"""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from shadow import Layer, Shadow
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from psilora import LoRALinear, PSILoRA

DIMS, RANK, ALPHA = (6, 5, 7, 4), 2, 3.0
RATES = (0.0, 0.02, 0.05, 0.2)
SEEDS = st.integers(0, 200)
ROWS = st.integers(4, 7)


class Interrupted(Exception):
    """What a pass raises half-way."""


class Net(nn.Module):
    """l3(tanh(l2(tanh(l1 x)))) that can fail at the input of a layer, forward or backward, or be checkpointed."""

    def __init__(self, B_zero: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        layers = [LoRALinear(nn.Linear(i, o).double(), RANK, ALPHA) for i, o in zip(DIMS[:-1], DIMS[1:], strict=True)]
        self.layers = nn.ModuleList(layers)
        for layer in layers:
            if not B_zero:
                nn.init.normal_(layer.lora_B.weight, std=0.3)
        self.fails: tuple[str, int] | None = None

    def forward(self, x: Tensor, checkpointing: str = "none") -> Tensor:
        for i in range(len(self.layers)):
            if self.fails == ("forward", i):
                raise Interrupted
            if self.fails == ("backward", i):
                x.register_hook(self.interrupt)
            if checkpointing == "none":
                x = self.block(i, x)
            else:
                x = checkpoint(self.block, i, x, use_reentrant=checkpointing == "reentrant")
        return x

    def block(self, i: int, x: Tensor) -> Tensor:
        y: Tensor = self.layers[i](x)
        return torch.tanh(y) if i < len(self.layers) - 1 else y

    @staticmethod
    def interrupt(grad: Tensor) -> Tensor:
        raise Interrupted


def batch(seed: int, rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, size, generator=generator, dtype=torch.float64) for size in (DIMS[0], DIMS[-1]))
    return x.requires_grad_(), 3 * y  # a reentrant checkpoint needs an input with a gradient


class Machine(RuleBasedStateMachine):
    """What both kinds of step have in common.

    Attributes:
        counts: Over all runs of a class: its steps, those told to 1e-3 or better that moved a pair, other events.
    """

    counts: Counter[str]
    tolerance: float

    def setup(self, draw: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def begin(self, B_zero: bool, lr: float, **drawn: Any) -> None:
        self.net, self.chosen = Net(B_zero), self.setup(drawn)
        self.optimizer = PSILoRA(self.net, lr, **self.chosen)
        modules = [m for m in self.net.layers if isinstance(m, LoRALinear)]
        layers = [
            Layer(*(t.detach().clone() for t in (m.base.weight, m.base.bias, m.lora_B.weight, m.lora_A.weight)), s=1.5)
            for m in modules
        ]
        assert all(m.scaling == 1.5 for m in modules)
        self.modules = modules
        self.shadow = Shadow(layers, lr, **self.shadow_settings())
        self.clipped, self.kept = False, None
        self.seen = self.factors()

    def shadow_settings(self) -> dict[str, Any]:
        options = {k: v for k, v in self.optimizer.param_groups[0].items() if k not in ("params", "lr")}
        return {**options, "step": options["step_kind"], "prox": 1e-2 if options["prox"] is None else options["prox"]}

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        return [(m.lora_B.weight.detach().clone(), m.lora_A.weight.detach().clone()) for m in self.modules]

    # ---- passes -------------------------------------------------------------------------------------------------

    @rule(seed=SEEDS, rows=ROWS, checkpointing=st.sampled_from(["none", "none", "reentrant", "plain"]))
    @precondition(lambda self: not self.clipped)
    def backward(self, seed: int, rows: int, checkpointing: str) -> None:
        x, y = batch(seed, rows)
        (self.net(x, checkpointing) - y).square().mean().backward()
        self.shadow.backward(x.detach(), y)
        self.counts["checkpointed" if checkpointing != "none" else "plain"] += 1

    @rule(seed=SEEDS)
    def forward_alone(self, seed: int) -> None:
        """An evaluation, and a forward pass whose graph is dropped."""
        x, _ = batch(seed, 5)
        with torch.no_grad():
            self.net(x)
        self.net(x)

    @rule(seed=SEEDS, at=st.integers(1, 2))
    def forward_that_fails(self, seed: int, at: int) -> None:
        self.net.fails = ("forward", at)
        with pytest.raises(Interrupted):
            self.net(batch(seed, 5)[0])
        self.net.fails = None

    @rule(seed=SEEDS, at=st.integers(1, 2))
    @precondition(lambda self: not self.clipped)
    def backward_that_fails(self, seed: int, at: int) -> None:
        """The layers from `at` on have their gradients, those before it none of this pass."""
        x, y = batch(seed, 5)
        self.net.fails = ("backward", at)
        loss = (self.net(x) - y).square().mean()
        self.net.fails = None
        with pytest.raises(Interrupted):
            loss.backward()
        self.shadow.backward(x.detach(), y, down_to=at)
        self.counts["interrupted"] += 1

    # ---- what lies between passes and steps ---------------------------------------------------------------------

    @rule(whose=st.sampled_from(["model", "optimizer"]), to_none=st.booleans())
    def zero_grad(self, whose: str, to_none: bool) -> None:
        (self.net if whose == "model" else self.optimizer).zero_grad(set_to_none=to_none)
        if whose == "model" and not to_none:
            assert all(p.grad is None or not p.grad.any() for p in self.net.parameters())
        self.shadow.zero_grad(to_none)
        self.clipped = False

    @rule(limit=st.sampled_from([0.01, 0.5, 100.0]))
    def clip(self, limit: float) -> None:
        torch.nn.utils.clip_grad_norm_(
            [p for p in self.net.parameters() if p.requires_grad or p.grad is not None], limit
        )
        self.shadow.clip(limit)
        self.clipped = True

    @rule(lr=st.sampled_from(RATES))
    def change_rate(self, lr: float) -> None:
        self.optimizer.param_groups[0]["lr"] = self.shadow.lr = lr

    @rule(at=st.integers(0, 2), side=st.sampled_from(["A", "B", "both"]))
    def freeze(self, at: int, side: str) -> None:
        self._train(at, side, False)

    @rule(at=st.integers(0, 2), side=st.sampled_from(["A", "B", "both"]))
    @precondition(lambda self: all(layer.G is None for layer in self.shadow.layers))
    def unfreeze(self, at: int, side: str) -> None:
        self._train(at, side, True)

    def _train(self, at: int, side: str, value: bool) -> None:
        module, layer = self.modules[at], self.shadow.layers[at]
        if side != "B":
            module.lora_A.requires_grad_(value)
            layer.trains_A = value
        if side != "A":
            module.lora_B.requires_grad_(value)
            layer.trains_B = value

    # ---- saving and loading -------------------------------------------------------------------------------------

    @rule()
    def save(self) -> None:
        content = io.BytesIO()
        torch.save({"model": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}, content)
        self.kept = content.getvalue(), self.shadow.saved()

    @rule(fresh=st.booleans())
    @precondition(lambda self: self.kept is not None)
    def load(self, fresh: bool) -> None:
        """Into the optimizer that there is, or into a new one, as after a restart."""
        assert self.kept is not None
        content = torch.load(io.BytesIO(self.kept[0]))
        if fresh:
            self.optimizer.detach()
            frozen = [p for p in self.net.parameters() if not p.requires_grad]
            for module in self.modules:  # an optimizer is built on a model that is trained
                module.lora_A.requires_grad_()
                module.lora_B.requires_grad_()
            self.optimizer = PSILoRA(self.net, 0.3, **self.chosen)
            for p in frozen:
                p.requires_grad_(False)
        self.net.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.optimizer.zero_grad()
        self.shadow.load(self.kept[1])
        self.shadow.zero_grad(True)
        self.clipped, self.seen = False, self.factors()
        self.counts["loaded"] += 1

    # ---- steps --------------------------------------------------------------------------------------------------

    @rule(whose=st.sampled_from(["model", "optimizer"]), to_none=st.booleans())
    @precondition(lambda self: any(layer.dA is not None for layer in self.shadow.layers))
    def step(self, whose: str, to_none: bool) -> None:
        before, expected = self.factors(), [layer.update for layer in self.shadow.layers]
        self.shadow.step()
        self.optimizer.step()
        moved = False
        for (B, A), old, layer, module in zip(before, expected, self.shadow.layers, self.modules, strict=True):
            B_new, A_new = module.lora_B.weight.detach(), module.lora_A.weight.detach()
            new, wanted = module.scaling * B_new @ A_new, layer.update
            change = float((wanted - old).norm())
            if change == 0:
                assert torch.equal(B_new, B) and torch.equal(A_new, A)
            else:
                error = float((new - wanted).norm()) / change
                bound = self.tolerance + 30 * layer.blur + 1e-13 * float(wanted.norm()) / change
                assert error < bound, f"{error:.1e} of the step, {bound:.1e} allowed"
                moved = moved or bound < 1e-3
            self.agree(layer, module)
        self.counts["steps"] += 1
        self.counts["moving"] += moved
        self.seen = self.factors()
        self.zero_grad(whose, to_none)

    def agree(self, layer: Layer, module: LoRALinear) -> None:
        raise NotImplementedError

    @rule()
    def step_without_a_gradient(self) -> None:
        self.zero_grad("optimizer", True)
        self.step("optimizer", True)

    @rule(seed=SEEDS, fresh=st.booleans())
    @precondition(lambda self: not self.clipped)
    def train_twice_from_a_save(self, seed: int, fresh: bool) -> None:
        self.save()
        self.train(seed)
        self.load(fresh)
        self.train(seed)

    @rule(seed=SEEDS)
    @precondition(lambda self: not self.clipped)
    def train(self, seed: int) -> None:
        """A whole iteration."""
        self.backward(seed, 5, "none")
        self.step("optimizer", True)

    @rule(seed=SEEDS, limit=st.sampled_from([0.05, 0.5]))
    @precondition(lambda self: not self.clipped)
    def train_clipped(self, seed: int, limit: float) -> None:
        self.backward(seed, 5, "none")
        self.clip(limit)
        self.step("model", False)

    @rule(seed=SEEDS, checkpointing=st.sampled_from(["reentrant", "plain"]))
    @precondition(lambda self: not self.clipped)
    def train_accumulated(self, seed: int, checkpointing: str) -> None:
        self.backward(seed, 4, checkpointing)
        self.backward(seed + 1, 6, "none")
        self.step("optimizer", True)

    @rule(seed=SEEDS, at=st.integers(1, 2))
    @precondition(lambda self: not self.clipped)
    def train_after_a_failure(self, seed: int, at: int) -> None:
        """As a loop that survives an error: it starts the iteration again."""
        self.backward_that_fails(seed, at)
        self.zero_grad("optimizer", True)
        self.train(seed)

    @rule(seed=SEEDS, lr=st.sampled_from(RATES[1:]))
    @precondition(lambda self: not self.clipped)
    def train_unfrozen(self, seed: int, lr: float) -> None:
        self.zero_grad("optimizer", True)
        for at in range(len(self.modules)):
            self._train(at, "both", True)
        self.change_rate(lr)
        self.train(seed)

    # ---- what always holds --------------------------------------------------------------------------------------

    @invariant()
    def nothing_but_a_step_moves_a_factor(self) -> None:
        if not hasattr(self, "net"):
            return
        for (B, A), module, layer in zip(self.seen, self.modules, self.shadow.layers, strict=True):
            assert torch.equal(module.lora_B.weight, B) and torch.equal(module.lora_A.weight, A)
            assert torch.equal(module.base.weight, layer.base)
            for grad, wanted in ((module.lora_A.weight.grad, layer.dA), (module.lora_B.weight.grad, layer.dB)):
                assert (grad is None) == (wanted is None)
                if grad is not None and wanted is not None:
                    torch.testing.assert_close(grad, wanted, rtol=1e-6, atol=1e-9)

    def teardown(self) -> None:
        if hasattr(self, "optimizer"):
            assert self.optimizer.stats()["skipped_steps"] == 0
            self.optimizer.detach()


class GradientMachine(Machine):
    counts: Counter[str] = Counter()
    tolerance = 1e-6

    @initialize(
        B_zero=st.booleans(),
        lr=st.sampled_from(RATES[1:3]),
        num_iters=st.integers(0, 2),
        first=st.sampled_from("AB"),
        momentum=st.sampled_from([0.0, 0.9]),
        metric=st.sampled_from([None, "kfac"]),
        gradient=st.sampled_from(["exact", "dense"]),
        weight_decay=st.sampled_from([0.0, 0.1]),
    )
    def start(self, B_zero: bool, lr: float, **drawn: Any) -> None:
        self.begin(B_zero, lr, **drawn)

    def setup(self, draw: dict[str, Any]) -> dict[str, Any]:
        return {"step": "gradient", **draw}

    def agree(self, layer: Layer, module: LoRALinear) -> None:
        """The factors themselves: λ sees how the weight is split."""
        torch.testing.assert_close(module.lora_B.weight.detach(), layer.B, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(module.lora_A.weight.detach(), layer.A, rtol=1e-5, atol=1e-8)


class SpectralMachine(Machine):
    counts: Counter[str] = Counter()
    tolerance = 1e-5

    @initialize(
        B_zero=st.booleans(),
        lr=st.sampled_from(RATES[1:3]),
        num_iters=st.integers(0, 2),
        first=st.sampled_from("AB"),
        momentum=st.sampled_from([0.0, 0.9]),
        metric=st.sampled_from([None, "lora"]),
        nesterov=st.booleans(),
        fade=st.booleans(),
        weight_decay=st.sampled_from([0.0, 0.1]),
    )
    def start(self, B_zero: bool, lr: float, **drawn: Any) -> None:
        self.begin(B_zero, lr, **drawn)

    def setup(self, draw: dict[str, Any]) -> dict[str, Any]:
        return {"step": "spectral", "prox": 0.0, **draw}

    def agree(self, layer: Layer, module: LoRALinear) -> None:
        """The same weight in other factors is the same state: the shadow goes on from the optimizer's split of it."""
        layer.B, layer.A = module.lora_B.weight.detach().clone(), module.lora_A.weight.detach().clone()


@pytest.mark.filterwarnings("ignore:psilora. :UserWarning", "ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("machine", [GradientMachine, SpectralMachine])
def test_a_training_loop_in_any_order(machine: type[Machine]) -> None:
    machine.counts.clear()
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=50,
            stateful_step_count=14,
            deadline=None,
            derandomize=True,
            print_blob=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
    counts = machine.counts
    assert counts["steps"] > 120 and counts["moving"] > counts["steps"] / 2, counts
    assert min(counts[name] for name in ("checkpointed", "interrupted", "loaded")) > 10, counts
