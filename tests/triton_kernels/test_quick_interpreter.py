"""The interpreter of the tests computes what Triton's does, finds the same faults, and leaves the language alone."""

from __future__ import annotations

import math
import os

import pytest
import torch

from psilora.triton_kernels import _compat

if not _compat.available():
    pytest.skip(_compat.unavailable_reason() or "", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are compiled here", allow_module_level=True)

import quick_interpreter
import triton
import triton.language as tl
from triton.runtime import interpreter

if not quick_interpreter.known():
    pytest.skip(f"the interpreter of Triton {triton.__version__} is left as it is", allow_module_level=True)


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
    tl.store(y_ptr + offs, x + tl.sum(x, axis=0))


@triton.jit
def _arithmetic_kernel(out_ptr, n, PRODUCT: tl.constexpr):
    n += tl.arange(0, 2)
    tl.store(out_ptr + tl.arange(0, 2), n * 2 if PRODUCT else n + n)


@pytest.mark.parametrize("fails", [False, True])
def test_a_launch_restores_the_language(fails: bool) -> None:
    names = {name: getattr(tl, name) for name in dir(tl)}
    x, y = torch.randn(16), torch.full((16,), torch.nan)
    for _ in range(2):
        if fails:
            with pytest.raises(interpreter.InterpreterError, match="undefined"):
                _kernel[(1,)](x, y, fails, 16)
        else:
            _kernel[(1,)](x, y, fails, 16)
            halved = torch.where(x > 0, x, x / 8)
            torch.testing.assert_close(y, halved + halved.sum())
        assert all(getattr(tl, name) is value for name, value in names.items())


def test_device_functions_of_a_launch_replace_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(16), torch.empty(16)
    _kernel[(1,)](x, y, False, 16)
    searched = []
    search = interpreter._patch_builtin
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda pkg, *rest: searched.append(pkg) or search(pkg, *rest))
    _kernel[(1,)](x, y, False, 16)
    assert searched and len(searched) == len(set(searched))


@pytest.mark.parametrize("product", [False, True])
def test_int32_overflow_is_found(product: bool) -> None:
    out = torch.zeros(2, dtype=torch.int32)
    _arithmetic_kernel[(1,)](out, 2**30 - 2, product)
    assert out.tolist() == [2**31 - 4, 2**31 - 2]
    with pytest.raises(interpreter.InterpreterError, match="int32 overflow detected"):
        _arithmetic_kernel[(1,)](out, 2**30 - 1, product)
    _arithmetic_kernel[(1,)](out, -(2**30), product)
    assert out.tolist() == [-(2**31), -(2**31) + 2]
    with pytest.raises(interpreter.InterpreterError, match="int32 overflow detected"):
        _arithmetic_kernel[(1,)](out, -(2**30) - 1, product)


def test_tuples_have_their_types() -> None:
    found = tl.core.tuple([tl.core.constexpr(3), 2.0])
    assert str(found.type) == str(tl.core._type_for_tuple_values(found.values)) and len(found.type.types) == 2
    assert tl.core.tuple([1, 2], found.type).type is found.type


def test_dtypes_are_those_of_the_table() -> None:
    for dtype, expected in ((tl.float32, "float32"), (tl.bfloat16, "uint16"), (tl.int1, "bool")):
        assert interpreter._get_np_dtype(dtype) == interpreter._get_np_dtype(tl.block_type(dtype, [16])) == expected
    pointer = tl.pointer_type(tl.float32)
    assert interpreter._get_np_dtype(pointer) == interpreter._get_np_dtype(tl.block_type(pointer, [16])) == "uint64"


def test_types_of_blocks_are_those_of_the_language() -> None:
    for _ in range(2):
        block = tl.block_type(tl.float32, [tl.constexpr(16), 2])
        assert (list(block.shape), block.numel) == ([16, 2], 32) and block.name.endswith("fp32>")
        assert block == tl.block_type(tl.dtype("fp32"), [16, 2]) and block.element_ty == tl.float32
        assert block not in (tl.block_type(tl.float64, [16, 2]), tl.block_type(tl.float32, [2, 16]), tl.float32)
        with pytest.raises(ValueError, match="power of 2"):
            tl.block_type(tl.float32, [3])
        with pytest.raises(TypeError, match="0d block_type is forbidden"):
            tl.block_type(tl.float32, [])
    pointers = [tl.block_type(tl.pointer_type(tl.float32, const=const), [16]) for const in (False, True)]
    assert pointers[0] != pointers[1] and pointers[1].element_ty.const


@pytest.mark.parametrize("dtype", [tl.float32, tl.pointer_type(tl.float32)], ids=str)
def test_tensors_have_their_shapes(dtype: tl.dtype) -> None:
    for shape in ([16], [4, 8], [16]):
        made = tl.tensor(None, tl.block_type(dtype, shape))
        assert list(made.shape) == [tl.constexpr(s) for s in shape] and made.numel.value == math.prod(shape)
        assert made.dtype == dtype and made.type.is_block()
    alone = tl.tensor(None, dtype)
    assert list(alone.shape) == [] and alone.numel.value == 1 and not alone.type.is_block()


@triton.jit
def _broadcast_kernel(out_ptr, WRONG: tl.constexpr):
    row, column = tl.arange(0, 4)[:, None], tl.arange(0, 8)[None, :]
    wide = row * 10 + column
    if WRONG:
        wide += tl.arange(0, 4)[None, :]
    tl.store(out_ptr + row * 8 + column, wide + (wide + 1) + 1)


def test_shapes_that_differ_are_broadcast() -> None:
    out = torch.zeros(4, 8, dtype=torch.int32)
    _broadcast_kernel[(1,)](out, False)
    wide = 10 * torch.arange(4)[:, None] + torch.arange(8)
    assert out.tolist() == (2 * wide + 2).tolist()
    with pytest.raises(interpreter.InterpreterError, match="incompatible dimensions"):
        _broadcast_kernel[(1,)](out, True)
