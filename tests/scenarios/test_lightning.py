"""Lightning's Trainer: backward runs inside the closure that it hands to step()."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import bare, factors
from naive import PlainState
from tiny import adapted, token_rows
from torch import Tensor, nn
from torch.utils.data import DataLoader

lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is an extra: psilora[loops]")
MisconfigurationException = lightning.utilities.exceptions.MisconfigurationException

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:DeprecationWarning:lightning",
    "ignore:.*does not have many workers.*:UserWarning",
    "ignore:.*treespec, LeafSpec.*:FutureWarning",
)

SETTINGS: dict[str, Any] = {"step": "gradient", "momentum": 0.9}
ACCUMULATE, STEPS = 2, 3


class ClosureAgain(PlainState):
    """Evaluates its closure once more after the step, as a line search would."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        closure()
        super().step()
        closure()


class Module(lightning.LightningModule):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.model, self.make, self.forwards, self.grad_modes = adapted(), make, 0, set()

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        self.forwards += 1
        self.grad_modes.add(torch.is_grad_enabled())
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.model)


def fit(module: Module, tmp_path: Any) -> None:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=0.1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader(token_rows(), batch_size=2))


def plain_loop(model: nn.Module, gradient: str) -> None:
    optimizer = bare(model, 0.1, gradient=gradient, **SETTINGS)
    batches = iter(DataLoader(token_rows(), batch_size=2))
    for _ in range(STEPS):
        optimizer.zero_grad()
        for _ in range(ACCUMULATE):
            (model(**next(batches)).loss / ACCUMULATE).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()


@pytest.mark.scenario(
    12, "Lightning", gradient="exact, tangent", tested="closure run once under enable_grad; accumulation, clipping"
)
@pytest.mark.parametrize("gradient", ["exact", "tangent"])
def test_the_closure_runs_once_with_gradients(gradient: str, tmp_path: Any) -> None:
    module = Module(lambda model: bare(model, 0.1, gradient=gradient, **SETTINGS))
    fit(module, tmp_path)
    assert module.forwards == STEPS * ACCUMULATE and module.grad_modes == {True}
    expected = adapted()
    plain_loop(expected, gradient)
    a, b = factors(expected), factors(module.model)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-7)


def test_naive_steps_run_the_closure_never_or_twice(tmp_path: Any) -> None:
    def naive(cls: type[PlainState]) -> Module:
        return Module(lambda model: cls([p for p in model.parameters() if p.requires_grad]))

    with pytest.raises(MisconfigurationException, match="closure hasn't been executed"):
        fit(naive(PlainState), tmp_path)
    again = naive(ClosureAgain)
    fit(again, tmp_path)
    assert again.forwards == STEPS * (ACCUMULATE + 1)
