"""The interpreter of the tests computes what Triton's does, and leaves the language as it was."""

from __future__ import annotations

import os

import pytest
import torch

from psilora.triton_kernels import _compat

if not _compat.available():
    pytest.skip(_compat.unavailable_reason() or "", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are compiled here", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime import interpreter


@triton.jit
def _halved(x, FAILS: tl.constexpr):
    if FAILS:
        x = x + undefined  # noqa: F821
    return tl.where(x > 0, x, 0.5 * x)


@triton.jit
def _kernel(x_ptr, y_ptr, FAILS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    for _ in tl.range(0, 3):
        x = _halved(x, FAILS)
    tl.store(y_ptr + offs, x)


@pytest.mark.parametrize("fails", [False, True])
def test_a_launch_restores_the_language(fails: bool) -> None:
    if not hasattr(interpreter, "_LangPatchScope"):
        pytest.skip("this Triton's interpreter is not changed")
    names = {name: getattr(tl, name) for name in dir(tl)}
    x, y = torch.randn(16), torch.full((16,), torch.nan)
    for _ in range(2):
        if fails:
            with pytest.raises(interpreter.InterpreterError, match="undefined"):
                _kernel[(1,)](x, y, fails, 16)
        else:
            _kernel[(1,)](x, y, fails, 16)
            torch.testing.assert_close(y, torch.where(x > 0, x, x / 8), rtol=0, atol=0)
        assert all(getattr(tl, name) is value for name, value in names.items())


def test_device_functions_of_a_launch_replace_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(interpreter, "_LangPatchScope"):
        pytest.skip("this Triton's interpreter is not changed")
    searched = []
    search = interpreter._patch_builtin
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda pkg, *rest: searched.append(pkg) or search(pkg, *rest))
    _kernel[(1,)](torch.randn(16), torch.empty(16), False, 16)
    assert searched and len(searched) == len(set(searched))
