"""Kernels that the gates must object to, one per rule, and one that they must let pass."""

import triton
import triton.language as tl

from psilora.triton_kernels.variants import Variant


@triton.jit
def _clean(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in tl.range(0, n, BLOCK, num_stages=3):
        total += tl.load(x_ptr + i + offs)
    tl.store(y_ptr + offs, total)


@triton.jit
def _float_atomic(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK))))


@triton.jit
def _spill(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    y = tl.load(x_ptr + n + offs)
    tl.store(y_ptr + offs, x * tl.sum(y) + y * tl.sum(x))


@triton.jit
def _narrow(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in tl.range(0, n, num_stages=3):
        total += tl.load(x_ptr + i + offs)  # the row i + … is not aligned
    tl.store(y_ptr + offs, total)


@triton.jit
def _synchronous(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(0, n):
        total += tl.load(x_ptr + i * BLOCK + offs)
    tl.store(y_ptr + offs, total)


@triton.jit
def _tile(ptr, BLOCK: tl.constexpr):
    return ptr + tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def _transposed_result(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    x = tl.load(_tile(x_ptr, BLOCK)).to(tl.bfloat16)
    gram = tl.dot(x, x)
    tl.store(_tile(y_ptr, BLOCK), tl.dot(x, tl.trans((gram * 2).to(tl.bfloat16))))


@triton.jit
def _transposed_carried(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    x = tl.load(_tile(x_ptr, BLOCK)).to(tl.bfloat16)
    gram = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for _ in range(n):
        gram = tl.dot(x, tl.trans(gram.to(tl.bfloat16)))
    tl.store(_tile(y_ptr, BLOCK), gram)


@triton.jit
def _chained(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for i in range(0, n):
        x = tl.load(_tile(x_ptr + i * BLOCK, BLOCK))
        hi = x.to(tl.bfloat16)
        lo = (x - hi.to(tl.float32)).to(tl.bfloat16)
        total += tl.dot(hi, hi)
        total += tl.dot(hi, lo)
    tl.store(_tile(y_ptr, BLOCK), total)


@triton.jit
def _register_operand(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for i in range(0, n):
        x = tl.load(_tile(x_ptr + i * BLOCK, BLOCK))
        total = tl.dot((x * 2).to(tl.bfloat16), x.to(tl.bfloat16), total)
    tl.store(_tile(y_ptr, BLOCK), total)


@triton.jit
def _precision(x_ptr, y_ptr, n, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    x = tl.load(_tile(x_ptr, BLOCK))
    tl.store(_tile(y_ptr, BLOCK), tl.dot(x, x, input_precision=PRECISION))


@triton.jit
def _printing(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    tl.device_print("n", n)


def _case(expected, kernel, *, block=64, registers=255, streaming=False, **constexprs):
    variant = Variant(
        name="_".join([kernel.__name__.strip("_"), *constexprs.values(), str(registers)]),
        kernel=kernel,
        signature={"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32"},
        constexprs={"BLOCK": block, **constexprs},
        max_registers=registers,
        aligned=("x_ptr", "y_ptr"),
        streaming=streaming,
        targets=(90, 100),
    )
    return variant, expected


#: Variants with what a problem must say on sm_90 or sm_100 (None: no problem on either).
CASES = [
    _case(None, _clean, block=1024, streaming=True),
    _case("floating-point atomic", _float_atomic, block=128),
    _case("spills", _spill, block=16384),
    _case("less than 16 bytes", _narrow, block=128, streaming=True),
    _case("without asynchronous", _synchronous, block=128, streaming=True),
    _case("its budget is", _synchronous, block=1024, registers=16),
    _case("transposed dot result", _transposed_result),
    _case("transposed dot result", _transposed_carried),
    _case("chained", _chained),
    _case("first operand in registers", _register_operand),
    _case("tf32 product", _precision, PRECISION="tf32"),
    _case("input precision tf32x3", _precision, PRECISION="tf32x3"),
    _case("device print", _printing, block=16),
]
VARIANTS = [variant for variant, _ in CASES]
