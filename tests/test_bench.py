"""The benches run end to end on small shapes, and refuse to time a wrong result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow
def test_gpu_bench_on_small_shapes(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    settings = ("--device", "cpu", "--models", "tiny", "--tokens", "17", "--repeats", "2", "--steps", "exact")
    run = bench("bench.gpu_bench", *settings, "--out", str(out))
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(out.read_text())["models"]["tiny"]
    assert {row["name"] for row in result["products"]} == {"xv", "stz"}
    assert all(row["error"] < 1e-6 and row["ms"] > 0 for row in result["products"])
    backends = {(row["name"], row["backend"]) for row in result["steps"]}
    assert ("exact", "triton") in backends and ("exact", "reference") in backends


def test_a_wrong_result_is_not_timed() -> None:
    sys.path.insert(0, str(ROOT))
    try:
        import torch

        from bench.gpu_bench import check
    finally:
        sys.path.remove(str(ROOT))
    assert check("right", torch.ones(3), torch.ones(3).double()) == 0
    with pytest.raises(SystemExit, match="wrong: relative error .* nothing is timed on a wrong result"):
        check("wrong", torch.ones(3) * 1.1, torch.ones(3).double())


def test_the_gpu_script_says_so_without_a_device() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    run = subprocess.run(
        ["bash", "bench/gpu.sh"],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "OUT": "/tmp"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 1 and "no CUDA device" in run.stderr
