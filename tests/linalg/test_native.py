"""The native operator psilora::spd_solve, and the gates on its CUDA code that need no GPU."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from psilora.linalg import native
from psilora.linalg import spd as linalg_spd

CSRC = Path(__file__).resolve().parents[2] / "csrc"
DTYPES = [torch.float32, torch.float64]
RANKS = [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 48, 63, 64, 65, 100, 127, 128]
#: The same substitutions in another order than the library's: its error, times a factor for the worst draw.
ERROR_FACTOR = 4.0

needs_native = pytest.mark.skipif(not native.available(), reason=f"{native.unavailable_reason()}")


def _has_cuda_kernel() -> bool:
    return native.available() and torch._C._dispatch_has_kernel_for_dispatch_key("psilora::spd_solve", "CUDA")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not _has_cuda_kernel():
        pytest.skip("the native extension was built without CUDA")
    return str(request.param)


def spd(systems: int, rank: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    factor = torch.randn(systems, rank, 3 * rank + 2, dtype=torch.float64)
    return (factor @ factor.mT / (3 * rank)).to(device, dtype)


def normal(*shape: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, dtype=dtype).to(device)


def ridge(attempt: int, rank: int, dtype: torch.dtype) -> float:
    """ridge_j for max |diag| = 1."""
    return 0.0 if attempt == 0 else 8 * rank * torch.finfo(dtype).eps * 1024.0 ** (attempt - 1)


def assert_close_to_float64(solution: Tensor, gram: Tensor, rhs: Tensor) -> None:
    exact = torch.linalg.solve(gram.double(), rhs.double())
    library = torch.cholesky_solve(rhs, torch.linalg.cholesky(gram))
    norm = exact.norm()
    error = (solution.double() - exact).norm() / norm
    allowed = (library.double() - exact).norm() / norm + torch.finfo(gram.dtype).eps
    assert error <= ERROR_FACTOR * allowed


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int64)


def assert_bitwise_equal(left: Tensor, right: Tensor) -> None:
    assert left.shape == right.shape and torch.equal(bits(left), bits(right))


# Accuracy, shapes and strides


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", RANKS)
def test_matches_float64_at_every_kind_of_rank(rank: int, dtype: torch.dtype, device: str) -> None:
    gram, rhs = spd(3, rank, dtype, device), normal(3, rank, 37, dtype=dtype, device=device)
    solution, info = native.spd_solve(gram, rhs)
    assert_close_to_float64(solution, gram, rhs)
    assert info.tolist() == [0, 0, 0]


@needs_native
@pytest.mark.parametrize(("systems", "columns"), list(itertools.product([0, 1, 224], [0, 1, 7, 300])))
def test_numbers_of_systems_and_columns(systems: int, columns: int, device: str) -> None:
    gram = spd(systems, 9, torch.float32, device)
    rhs = normal(systems, 9, columns, dtype=torch.float32, device=device)
    solution, info = native.spd_solve(gram, rhs)
    assert solution.shape == rhs.shape and solution.is_contiguous() and solution.dtype == rhs.dtype
    assert info.shape == (systems,) and info.dtype == torch.int32 and not info.any()
    if solution.numel():
        assert_close_to_float64(solution, gram, rhs)


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "sliced columns": lambda t: torch.nn.functional.pad(t, (3, 2), value=torch.nan)[..., 3:-2],
    "every other column": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "systems last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "negated": lambda t: torch._neg_view(-t),
}


@needs_native
@pytest.mark.parametrize("layout", STRIDES)
def test_strides_change_nothing(layout: str, device: str) -> None:
    gram, rhs = spd(5, 13, torch.float32, device), normal(5, 13, 45, dtype=torch.float32, device=device)
    plain, _ = native.spd_solve(gram, rhs)
    strided, _ = native.spd_solve(STRIDES[layout](gram), STRIDES[layout](rhs))
    assert strided.is_contiguous()
    assert_bitwise_equal(strided, plain)


@needs_native
def test_expanded_inputs(device: str) -> None:
    gram, rhs = spd(1, 6, torch.float64, device), normal(1, 6, 1, dtype=torch.float64, device=device)
    solution, _ = native.spd_solve(gram.expand(4, 6, 6), rhs.expand(4, 6, 5))
    single, _ = native.spd_solve(gram, rhs)
    assert_bitwise_equal(solution, single.expand(4, 6, 5))


@needs_native
def test_reads_only_the_lower_triangle(device: str) -> None:
    gram, rhs = spd(4, 21, torch.float32, device), normal(4, 21, 9, dtype=torch.float32, device=device)
    above = torch.ones(21, 21, dtype=torch.bool, device=device).triu(1)
    assert_bitwise_equal(native.spd_solve(gram.masked_fill(above, torch.nan), rhs)[0], native.spd_solve(gram, rhs)[0])


# The repair policy


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [2, 5, 16, 128])
@pytest.mark.parametrize("attempt", [0, 1, 2, 3])
def test_ridge_ladder(attempt: int, rank: int, dtype: torch.dtype, device: str) -> None:
    """A pivot that only ridge_attempt can lift is repaired by exactly that ridge."""
    diagonal = torch.ones(3, rank, dtype=dtype, device=device)
    if attempt:
        # Halfway below the ridge that must work, and never the largest entry of the diagonal.
        diagonal[1, rank // 2] = -min(ridge(attempt, rank, dtype) / 2, 1.0)
    rhs = normal(3, rank, 11, dtype=dtype, device=device)
    solution, info = native.spd_solve(torch.diag_embed(diagonal), rhs)
    assert info.tolist() == [0, attempt, 0]
    added = torch.tensor([0.0, ridge(attempt, rank, dtype), 0.0], dtype=torch.float64, device=device)
    expected = rhs.double() / (diagonal.double() + added[:, None])[..., None]
    torch.testing.assert_close(solution.double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=0)


def _broken_grams(rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    def changed(row: int, column: int, value: float) -> Tensor:
        gram = torch.eye(rank, dtype=dtype)
        gram[row, column] = value
        return gram

    return {
        "zero": torch.zeros(rank, rank, dtype=dtype),
        "zero diagonal": changed(0, 0, 0.0) * 0 + changed(rank - 1, 0, 1.0) - torch.eye(rank, dtype=dtype),
        "NaN on the diagonal": changed(rank // 2, rank // 2, torch.nan),
        "NaN off the diagonal": changed(rank - 1, 0, torch.nan),
        "infinite diagonal": changed(0, 0, torch.inf),
        "infinite off the diagonal": changed(rank - 1, 0, -torch.inf),
        "indefinite beyond repair": changed(rank - 1, 0, 1e4),
        "all NaN": torch.full((rank, rank), torch.nan, dtype=dtype),
    }


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [2, 7, 33, 128])
def test_systems_beyond_repair_give_exact_zeros(rank: int, dtype: torch.dtype, device: str) -> None:
    broken = torch.stack(list(_broken_grams(rank, dtype).values())).to(device)
    healthy = spd(1, rank, dtype, device)
    gram = torch.cat([healthy, broken, healthy])
    rhs = normal(1, rank, 70, dtype=dtype, device=device).expand(len(gram), rank, 70)
    solution, info = native.spd_solve(gram, rhs)
    assert info.tolist() == [0, *[4] * len(broken), 0]
    assert_bitwise_equal(solution[1:-1], torch.zeros_like(solution[1:-1]))
    alone, _ = native.spd_solve(healthy, rhs[:1])
    assert_bitwise_equal(solution[[0, -1]], alone.expand(2, rank, 70))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zero_rhs_is_an_exact_no_op(zero: float, dtype: torch.dtype, device: str) -> None:
    rank = 7
    gram = torch.stack([torch.eye(rank, dtype=dtype), *_broken_grams(rank, dtype).values()]).to(device)
    rhs = torch.full((len(gram), rank, 150), zero, dtype=dtype, device=device)
    solution, info = native.spd_solve(gram, rhs)
    assert_bitwise_equal(solution, torch.zeros_like(solution))
    assert not info.any()
    # A single entry anywhere ends it.
    rhs[0, -1, -1] = 1.0
    solution, _ = native.spd_solve(gram, rhs)
    assert solution[0, -1, -1] == 1.0 and not solution[1:].any()


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [4, 16, 65, 128])
def test_singular_systems_have_small_residuals(rank: int, dtype: torch.dtype, device: str) -> None:
    """A projection of half the rank: whichever attempt succeeds, the residual is that ridge and rounding."""
    basis = torch.linalg.qr(torch.randn(6, rank, rank // 2, dtype=torch.float64))[0].to(device, dtype)
    gram, rhs = basis @ basis.mT, basis @ normal(6, rank // 2, 10, dtype=dtype, device=device)
    solution, info = native.spd_solve(gram, rhs)
    assert solution.isfinite().all() and (info <= 1).all()
    residual = (gram.double() @ solution.double() - rhs.double()).norm()
    assert residual <= 2 * ridge(1, rank, dtype) * (solution.norm() + rhs.norm())


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_the_pytorch_twin(dtype: torch.dtype, device: str) -> None:
    rank = 12
    lifted = torch.diag_embed(torch.ones(4, rank, dtype=dtype))
    for attempt in (1, 2, 3):
        lifted[attempt, 3, 3] = -min(ridge(attempt, rank, dtype) / 2, 1.0)
    healthy = spd(4, rank, dtype)
    gram = torch.cat([healthy, lifted, *[g[None] for g in _broken_grams(rank, dtype).values()]]).to(device)
    rhs = normal(len(gram), rank, 20, dtype=dtype, device=device)
    rhs[1] = 0
    solution, info = native.spd_solve(gram, rhs)
    twin_solution, twin_info = linalg_spd.spd_solve(gram, rhs)
    assert info.tolist() == twin_info.tolist()
    torch.testing.assert_close(solution, twin_solution, rtol=1e4 * torch.finfo(dtype).eps, atol=0)


@needs_native
def test_non_finite_rhs_stays_in_its_column(device: str) -> None:
    gram, rhs = spd(1, 10, torch.float32, device), normal(1, 10, 8, dtype=torch.float32, device=device)
    clean, _ = native.spd_solve(gram, rhs)
    rhs[0, 4, 5] = torch.nan
    solution, info = native.spd_solve(gram, rhs)
    others = [0, 1, 2, 3, 4, 6, 7]
    assert info.tolist() == [0] and solution[..., 5].isnan().any()
    assert_bitwise_equal(solution[..., others], clean[..., others])


# Reproducibility


@needs_native
@pytest.mark.parametrize("rank", [6, 64])
def test_repeats_are_bitwise_equal(rank: int, device: str) -> None:
    gram, rhs = spd(50, rank, torch.float32, device), normal(50, rank, 33, dtype=torch.float32, device=device)
    first, _ = native.spd_solve(gram, rhs)
    for _ in range(5):
        assert_bitwise_equal(native.spd_solve(gram, rhs)[0], first)


@needs_native
@pytest.mark.parametrize("systems", [1, 9])
def test_threads_and_neighbouring_columns_do_not_matter(systems: int) -> None:
    gram, rhs = spd(systems, 24, torch.float32), normal(systems, 24, 1000, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        parallel, _ = native.spd_solve(gram, rhs)
        torch.set_num_threads(1)
        serial, _ = native.spd_solve(gram, rhs)
    finally:
        torch.set_num_threads(threads)
    assert_bitwise_equal(parallel, serial)
    for begin, end in ((0, 1), (3, 20), (130, 999)):
        assert_bitwise_equal(native.spd_solve(gram, rhs[..., begin:end])[0], serial[..., begin:end])


# PyTorch's contract for operators


@needs_native
@pytest.mark.parametrize("shape", [(3, 5, 4), (0, 5, 4), (2, 8, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    systems, rank, columns = shape
    gram = spd(systems, rank, dtype, device)
    rhs = normal(systems, columns, rank, dtype=dtype, device=device).mT
    torch.library.opcheck(torch.ops.psilora.spd_solve.default, (gram, rhs))


@needs_native
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool, device: str) -> None:
    def turn(gram: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
        solution, info = native.spd_solve(gram * 2, rhs)
        return solution + 1, info.max()

    compiled = torch.compile(turn, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for systems, columns in ((3, 4), (5, 7)):
        gram = spd(systems, 6, torch.float32, device)
        rhs = normal(systems, 6, columns, dtype=torch.float32, device=device)
        for left, right in zip(compiled(gram, rhs), turn(gram, rhs), strict=True):
            assert torch.equal(left, right)


@needs_native
def test_backward_raises(device: str) -> None:
    rhs = normal(1, 3, 2, dtype=torch.float64, device=device).requires_grad_()
    solution, _ = native.spd_solve(spd(1, 3, torch.float64, device), rhs)
    with pytest.raises(RuntimeError, match="not implemented"):
        solution.sum().backward()


@needs_native
@pytest.mark.parametrize(
    ("gram", "rhs", "message"),
    [
        ((2, 2), (1, 2, 3), "Invalid gram shape [2, 2]. Must be (L, r, r)."),
        ((1, 2, 3), (1, 2, 3), "Invalid gram shape [1, 2, 3]. Must be (L, r, r)."),
        ((1, 129, 129), (1, 129, 1), "Invalid rank r=129. Must be in [1, 128]."),
        ((1, 0, 0), (1, 0, 1), "Invalid rank r=0. Must be in [1, 128]."),
        ((2, 3, 3), (2, 3), "Invalid rhs shape [2, 3]. Must be (2, 3, n) to match gram."),
        ((2, 3, 3), (2, 4, 1), "Invalid rhs shape [2, 4, 1]. Must be (2, 3, n) to match gram."),
        ((2, 3, 3), (1, 3, 1), "Invalid rhs shape [1, 3, 1]. Must be (2, 3, n) to match gram."),
    ],
)
def test_shape_errors_name_the_value_and_the_range(gram: tuple[int, ...], rhs: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"spd_solve: {message}")):
        native.spd_solve(torch.zeros(gram), torch.zeros(rhs))


@needs_native
@pytest.mark.parametrize(
    ("gram", "rhs", "message"),
    [
        (torch.bfloat16, torch.bfloat16, "Invalid gram dtype BFloat16. Must be float32 or float64."),
        (torch.int64, torch.float32, "Invalid gram dtype Long. Must be float32 or float64."),
        (torch.float32, torch.float64, "Invalid rhs dtype Double. Must be the dtype of gram, Float."),
    ],
)
def test_dtype_errors_name_the_value_and_the_range(gram: torch.dtype, rhs: torch.dtype, message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(f"spd_solve: {message}")):
        native.spd_solve(torch.zeros(1, 2, 2, dtype=gram), torch.zeros(1, 2, 1, dtype=rhs))


def test_without_the_extension_the_wrapper_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_UNAVAILABLE_REASON", "left out")
    assert not native.available() and native.unavailable_reason() == "left out"
    with pytest.raises(RuntimeError, match="left out"):
        native.spd_solve(torch.eye(2)[None], torch.ones(1, 2, 1))


# The CUDA code without a GPU: its logic in an emulation, its races, its code generation


def _compiler() -> str:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on PATH")
    return compiler


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("emulation") / "emulation.so"
    flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-pthread", "-Wno-unknown-pragmas"]
    result = _run(_compiler(), *flags, CSRC / "cuda" / "emulate_spd_solve.cpp", "-o", library)
    assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(library))


def emulated(library: ctypes.CDLL, gram: Tensor, rhs: Tensor, tile: int, per_block: int) -> tuple[Tensor, Tensor]:
    systems, rank, columns = rhs.shape
    solution = torch.full_like(rhs, torch.nan)
    info = torch.full((systems,), -1, dtype=torch.int32)
    sizes = (ctypes.c_int * 6)(systems, rank, columns, tile, per_block, tile)
    name = "emulate_float32" if rhs.dtype == torch.float32 else "emulate_float64"
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (gram, rhs, solution, info)]
    getattr(library, name)(*pointers, sizes)
    return solution, info


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 4, 16, 17, 33, 64, 127, 128])
def test_emulated_cuda_kernel(emulation: ctypes.CDLL, rank: int, dtype: torch.dtype) -> None:
    """Healthy, zero right-hand side, repaired, beyond repair: one launch, in tiles and ranges of columns."""
    gram = spd(4, rank, dtype)
    gram[2] = torch.eye(rank, dtype=dtype)
    gram[2, -1, -1] = -ridge(1, rank, dtype) / 2 if rank > 1 else 1.0
    gram[3] = torch.nan
    rhs = normal(4, rank, 70, dtype=dtype)
    rhs[1] = 0
    solution, info = emulated(emulation, gram, rhs, tile=32, per_block=64)
    repaired = int(rank > 1)
    assert info.tolist() == [0, 0, repaired, 4]
    assert_close_to_float64(solution[:1], gram[:1], rhs[:1])
    exact = rhs[2] / (gram[2].diagonal() + ridge(repaired, rank, dtype))[:, None]
    torch.testing.assert_close(solution[2], exact, rtol=8 * torch.finfo(dtype).eps, atol=0)
    assert_bitwise_equal(solution[[1, 3]], torch.zeros(2, rank, 70, dtype=dtype))


def _races(source: Path, folder: Path) -> int:
    """Build the emulation under `source` with ThreadSanitizer and return the number of races it reports."""
    program = folder / "races"
    flags = ["-std=c++20", "-O1", "-g", "-fsanitize=thread", "-pthread", "-Wno-unknown-pragmas"]
    build = _run(_compiler(), *flags, "-DPSILORA_RACE_CHECK", source / "cuda" / "emulate_spd_solve.cpp", "-o", program)
    if build.returncode and "tsan" in build.stderr:
        pytest.skip("no ThreadSanitizer runtime")
    assert build.returncode == 0, build.stderr
    result = _run(program)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("ThreadSanitizer does not run with this kernel's address layout")
    return result.stderr.count("WARNING: ThreadSanitizer: data race")


@pytest.mark.slow
def test_emulated_cuda_kernel_has_no_races(tmp_path: Path) -> None:
    assert _races(CSRC, tmp_path) == 0


@pytest.mark.slow
def test_race_check_finds_a_missing_barrier(tmp_path: Path) -> None:
    shutil.copytree(CSRC, tmp_path / "csrc")
    kernel = tmp_path / "csrc" / "cuda" / "spd_solve_kernel.cuh"
    source = kernel.read_text()
    barrier = "    __syncthreads();\n\n    if (threadIdx.x == 0)"
    assert source.count(barrier) == 1
    kernel.write_text(source.replace(barrier, barrier.split("\n\n")[1]))
    assert _races(tmp_path / "csrc", tmp_path) > 0


KERNEL_NAME = "psilora::cuda::spd_solve_kernel"
INSTANTIATIONS = f'#include "{CSRC}/cuda/spd_solve_kernel.cuh"\n' + "".join(
    f"template __global__ void {KERNEL_NAME}<{scalar}>(const psilora::cuda::SpdSolveArgs<{scalar}>);\n"
    for scalar in ("float", "double")
)
#: Indexed by a loop variable, so it cannot stay in registers.
OFFENDER = """
__global__ void offender(float* out, int n) {
  float local[64];
  for (int i = 0; i < n; ++i) local[i] = out[i * 7];
  for (int i = 0; i < n; ++i) out[i] = local[(i * 13) % n];
}
"""
USAGE = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def resource_usage(source: str, architecture: int, folder: Path) -> list[tuple[int, int, int]]:
    """Compile for a GPU; return (stack, spill stores, spill loads) in bytes for each kernel of `source`."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    (folder / "kernel.cu").write_text(source)
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    flags = ["-std=c++17", "-O3", "-gencode", target, "-cubin", "-Xptxas", "-v"]
    result = _run(nvcc, *flags, "-o", folder / "kernel.cubin", folder / "kernel.cu")
    if "Unsupported gpu architecture" in result.stderr:
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr
    return [(int(a), int(b), int(c)) for a, b, c in USAGE.findall(result.stderr + result.stdout)]


@pytest.mark.parametrize("architecture", [80, 89, 90, 100])
def test_cuda_kernel_needs_no_stack_and_spills_nothing(architecture: int, tmp_path: Path) -> None:
    assert resource_usage(INSTANTIATIONS, architecture, tmp_path) == [(0, 0, 0)] * 2


def test_resource_gate_sees_an_offender(tmp_path: Path) -> None:
    ((stack, _, _),) = resource_usage(OFFENDER, 90, tmp_path)
    assert stack > 0
