"""Precision policy: full fp32 wherever a step or a capture multiplies, whatever the user's switches say."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from models import bare, data, factors, mse, plain_mlp, train

from psilora.linalg.precision import full_convolutions, full_precision

BACKENDS = torch.backends

pytestmark = pytest.mark.skipif(
    not hasattr(BACKENDS, "fp32_precision"), reason="this torch has the older precision switches alone"
)


def inherited() -> tuple[str, ...]:
    """What products and convolutions use now."""
    owners = (BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul, BACKENDS.cudnn.conv, BACKENDS.mkldnn.conv)
    return tuple(owner.fp32_precision for owner in owners)


@pytest.fixture
def tf32() -> Iterator[None]:
    """As transformers sets it for `TrainingArguments(tf32=True)`, and for torch_compile on a GPU."""
    for owner in (BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul):
        owner.fp32_precision = "none"  # the older switch, which another test may have used, leaves its own word here
    BACKENDS.fp32_precision = "tf32"
    yield
    BACKENDS.fp32_precision = "none"


def test_products_are_in_full_precision_under_the_newer_switches(tf32: None) -> None:
    """The trap: torch then refuses to read `get_float32_matmul_precision`."""
    with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
        torch.get_float32_matmul_precision()
    assert inherited()[:2] == ("tf32", "tf32")
    with pytest.raises(KeyError), full_precision("cpu"):
        assert inherited()[:2] == ("ieee", "ieee")
        raise KeyError
    assert inherited()[:2] == ("tf32", "tf32")
    BACKENDS.fp32_precision = "none"
    assert inherited()[:2] == ("none", "none")  # still inherited


@pytest.mark.parametrize("settings", [{"step": "spectral", "metric": "lora"}, {"gradient": "dense"}], ids=str)
def test_training_takes_no_notice_of_the_newer_switches(settings: dict, request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    model, batch = plain_mlp(dtype=torch.float32), data(dtype=torch.float32)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, bare(model, 0.1, **settings), [batch] * 2, mse)
    wanted = factors(model)
    model.load_state_dict(start)
    request.getfixturevalue("tf32")
    train(model, bare(model, 0.1, **settings), [batch] * 2, mse)
    assert all(torch.equal(value, wanted[name]) for name, value in factors(model).items())


def test_convolutions_are_in_full_precision_and_the_switches_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap: cuDNN takes tf32 for fp32 convolutions unless told otherwise."""
    cudnn = BACKENDS.cudnn
    monkeypatch.setattr(cudnn, "benchmark", True)
    assert inherited()[2:] == ("tf32", "none") and not cudnn.deterministic
    with pytest.raises(KeyError), full_convolutions():
        assert inherited()[2:] == ("ieee", "ieee") and cudnn.deterministic and not cudnn.benchmark
        raise KeyError
    assert inherited()[2:] == ("tf32", "none") and not cudnn.deterministic and cudnn.benchmark
    assert cudnn.allow_tf32  # the older switch can be read again
