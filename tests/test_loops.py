"""Training loops around the optimizer: GradScaler, torch.compile, autocast."""

from __future__ import annotations

import pytest
import torch
from models import bare, data, factors, mse, peft_mlp, plain_mlp


@pytest.mark.parametrize("kind", [{}, {"gradient": "tangent", "metric": "kfac"}], ids=str)
def test_grad_scaler_with_an_overflow(kind: dict) -> None:
    """GradScaler scales S, unscales only .grad, and skips step() on an overflow: scale right, nothing stale."""
    scaled, plain = peft_mlp(dtype=torch.float32), peft_mlp(dtype=torch.float32)
    plain.load_state_dict(scaled.state_dict())
    ours, theirs = bare(scaled, 0.1, **kind), bare(plain, 0.1, **kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for step in range(4):
        batch = data(8 + step, dtype=torch.float32)
        overflow = step == 1
        scaled.zero_grad()
        scaler.scale(mse(scaled, batch) * (float("inf") if overflow else 1)).backward()
        scaler.step(ours)
        scaler.update()
        if not overflow:
            theirs.zero_grad()
            mse(plain, batch).backward()
            theirs.step()
    assert scaler.get_scale() == 512.0
    assert ours.stats()["skipped_steps"] == 0
    a, b = factors(scaled), factors(plain)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=2e-4, atol=2e-6)


# torch.compile's own tracer looks at .grad of its graph inputs, which torch itself warns about
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_trains_the_same(backend: str) -> None:
    eager, other = plain_mlp(), plain_mlp()
    other.load_state_dict(eager.state_dict())
    torch._dynamo.reset()
    ours, theirs = bare(other, 0.1), bare(eager, 0.1)
    compiled = torch.compile(other, backend=backend)
    for _ in range(2):
        batch = data()
        ours.zero_grad()
        mse(compiled, batch).backward()
        ours.step()
        theirs.zero_grad()
        mse(eager, batch).backward()
        theirs.step()
    a, b = factors(eager), factors(other)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-10, atol=1e-12)
