"""The suites run end to end on tiny shapes, kernels in the interpreter, and never time a wrong result."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("checkout_on_path")


def module(name: str) -> ModuleType:
    return importlib.import_module(f"bench.{name}")


def run(*arguments: str) -> int:
    return module("__main__").main(arguments)


def rows_of(folder: Path, suite: str) -> list[dict]:
    return json.loads((folder / f"{suite}.json").read_text())["rows"]


@pytest.mark.slow
def test_step(tmp_path: Path) -> None:
    arguments = ("--tokens", "17", "--repeats", "1", "--small", "--out", str(tmp_path))
    assert run("step", *arguments) == 0
    rows = {row["method"]: row for row in rows_of(tmp_path, "step")}
    for method in ("PSILoRA exact, momentum (reference)", "per-layer loop, exact, momentum", "AdamW, foreach"):
        assert rows[method]["ms"] > 0 and len(rows[method]["readings"]) == 1
    assert "LoRA-RITE (pytorch_optimizer)" in rows and "Riemannian AdamW (PEFT)" in rows
    ours = rows["PSILoRA exact, momentum (reference)"]
    assert ours["error"] < 1e-3 and ours["planned_launches"] > 4 and ours["operations"] > 10
    # Twice the factors of six layers of rank 4: B_m and A_m.
    assert ours["state_bytes"] == 4 * 4 * 2 * (40 + 24 + 24 + 24 + 24 + 40)
    assert rows["AdamW, foreach"]["state_bytes"] == 2 * ours["state_bytes"]
    if importlib.import_module("psilora.backends.dispatch").backend_unavailable("triton") is None:
        assert rows["PSILoRA exact (triton)"]["ms"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["lorsum", "solve", "scaling", "products"])
def test_other_suites(suite: str, tmp_path: Path) -> None:
    assert run(suite, "--repeats", "1", "--small", "--out", str(tmp_path)) == 0
    record = json.loads((tmp_path / f"{suite}.json").read_text())
    assert record["command"] == f"python -m bench {suite} --repeats 1 --small --out {tmp_path.name}"
    assert str(ROOT) not in json.dumps(record) and record["versions"]["torch"] == torch.__version__
    timed = [row for row in record["rows"] if row["case"] != "machine" and "exponent" not in row["case"]]
    assert all(row["ms"] > 0 for row in timed) and (timed or suite == "products")


@pytest.mark.slow
def test_host(tmp_path: Path) -> None:
    """Launches and bytes are counted, and times refer to an AdamW of the same run."""
    assert run("host", "--repeats", "1", "--seconds", "0.1", "--small", "--out", str(tmp_path)) == 0
    rows = {row["method"].removeprefix("PSILoRA "): row for row in rows_of(tmp_path, "host")}
    assert rows["spectral"]["triton"]["gram_kernel"] == 2 and rows["spectral"]["triton"]["apply_kernel"] == 1
    for row in rows.values():
        assert row["aten_launches"] == sum(row["aten"].values()) >= 4 and row["triton_launches"] >= 5
        assert row["host_ratio"] == row["ms"] / row["adamw_ms"] > 0
    # Momentum 2r(d_in + d_out), metric d_in + d_out, three norms in fp64 and two counts of each of six layers.
    sums = [64, 48, 64, 64, 48, 64]
    assert rows["spectral"]["state_bytes"] == sum(4 * (2 * 4 * d + d) + 24 + 8 for d in sums)
    varying = rows["exact, momentum, N changing every step"]
    assert len(varying["workspace_by_step"]) == len(module("suites.host").VARYING)


def test_the_layers_that_stand_for_a_models_are_none_that_other_kernels_take() -> None:
    host, model = module("suites.host"), module("shapes").MODELS["llama-3-8b"]
    work = host.Bench(model, host.Case("spectral"), "cpu")
    pairs = [adapter.pair for adapter in work.adapters]
    assert len(pairs) == len(model.layers) and all(min(A.shape[1], B.shape[0]) >= 2 * A.shape[0] for A, B in pairs)


def test_launches_are_counted_and_views_are_not() -> None:
    host = module("suites.host")
    x = torch.ones(4, 4)
    with host.Launched() as mode:
        (x.mT[1:] * 2).mT[2:].add_(torch.empty(2, 3))
        torch._foreach_add([x, x], 1.0)
    assert dict(mode.names) == {"mul": 1, "add_": 1, "_foreach_add": 1}


def test_held_bytes_are_those_still_alive() -> None:
    with module("suites.host").Held("meta") as mode:
        kept = torch.empty(100, device="meta").split(50)[0]
        torch.empty(1000, device="meta")
        torch.empty(7)
    assert mode.bytes == 400 == kept.untyped_storage().nbytes() and mode.most == 4400


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient.checkpointing.*:FutureWarning")
def test_train(tmp_path: Path) -> None:
    assert run("train", "--repeats", "1", "--small", "--out", str(tmp_path)) == 0
    rows = rows_of(tmp_path, "train")
    assert {row["case"].split(",")[0] for row in rows} == {"tiny BERT", "tiny Llama-3-8B shape"}
    by_method = {row["method"]: row for row in rows if row["case"].startswith("tiny BERT")}
    assert by_method["PSILoRA exact"]["capture_bytes"] > 0 == by_method["PSILoRA tangent"]["capture_bytes"]
    assert all(row["tokens_per_second"] > 0 and row["peak_bytes"] > 0 and row["error"] < 1 for row in rows)


def test_a_wrong_result_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A per-layer loop that forgets the momentum in the weight's step disagrees with PSILoRA, and both have no time."""
    loop = module("loop")
    right = loop.lorsum_loop

    def forgetful(B, A, c1, terms, *rest):
        return right(B, A, c1, terms[:1], *rest)

    monkeypatch.setattr(loop, "lorsum_loop", forgetful)
    monkeypatch.setattr(module("suites.step"), "KINDS", {"exact, momentum": {}})
    monkeypatch.setattr(module("suites.step"), "SMALL", ("exact, momentum",))
    monkeypatch.setattr(module("suites.step"), "backend_unavailable", lambda name: "not needed here")
    assert run("step", "--repeats", "1", "--small", "--tokens", "9", "--out", str(tmp_path)) == 1
    rows = {row["method"]: row for row in rows_of(tmp_path, "step")}
    ours = rows["PSILoRA exact, momentum (reference)"]
    assert "ms" not in ours and "readings" not in ours and "relative error" in ours["red"]
    assert rows["AdamW, fused"]["ms"] > 0  # checked on its own


def test_measure_alternates_and_refuses_nan() -> None:
    measure = module("measure")
    seen: list[str] = []
    candidates = [
        measure.Candidate(name, lambda name=name: seen.append(name), lambda: 0.0, 0.0, count=False) for name in "ab"
    ]
    wrong = measure.Candidate("wrong", lambda: seen.append("wrong"), lambda: float("nan"), 1.0)
    rows = measure.measure("case", [*candidates, wrong], device="cpu", repeats=3, seconds=60)
    assert seen == ["a", "b", "b", "a"] * 2 + ["a", "b"]
    assert [len(row["readings"]) for row in rows[:2]] == [3, 3] and "ms" not in rows[2] and rows[2]["error"] == "nan"


def test_what_cannot_be_captured_is_timed_plainly_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    measure, cuda, runs = module("measure"), module("cuda"), []

    class Refused:
        def __init__(self, calls: list) -> None:
            raise RuntimeError("operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(cuda, "Replay", Refused)
    monkeypatch.setattr(cuda, "elapsed", lambda run: run() or 1.0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    run = lambda: runs.append(1)  # noqa: E731
    candidate = measure.Candidate("a", run, lambda: 0.0, 0.0, calls=(run,), count=False)
    (row,) = measure.measure("case", [candidate], device="cuda", repeats=3, seconds=60)
    assert row["ms"] == 1.0 and len(runs) == measure.WARM_UP + 3
    assert row["not_captured"] == "operation not permitted when stream is capturing"
    assert module("__main__")._line(row).endswith("not captured: operation not permitted when stream is capturing")


def test_the_time_limit_ends_the_rounds() -> None:
    measure = module("measure")
    candidate = measure.Candidate("a", lambda: None, lambda: 0.0, 0.0, count=False)
    (row,) = measure.measure("case", [candidate], device="cpu", repeats=10**6, seconds=0.0)
    assert len(row["readings"]) == measure.FEWEST


def test_peak_bytes_and_operations_are_those_of_the_run() -> None:
    measure = module("measure")
    x = torch.ones(1000)
    assert measure.operations(lambda: (x + 1) * 2) == 2
    assert 8000 <= measure.peak_bytes(lambda: (x + 1) * 2, "cpu") < 9000


def test_the_gpu_script_says_so_without_a_device() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    script = subprocess.run(
        ["bash", "bench/gpu.sh"],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "OUT": "/tmp"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert script.returncode == 1 and "no CUDA device" in script.stderr
    wrong = subprocess.run(["bash", "bench/gpu.sh", "test"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 2 and "usage: bash bench/gpu.sh [first|tests|sanitize|bench|all]" in wrong.stderr


@pytest.mark.skipif(sys.version_info < (3, 11), reason="bench/gpu.sh needs python -P")
def test_the_gpu_script_imports_what_it_has_installed(tmp_path: Path) -> None:
    """`python -m` would put the checkout first, whose psilora has no kernels; the script says so where it happens."""
    reason = importlib.import_module("psilora.backends.dispatch").backend_unavailable("triton")
    if reason is not None:
        pytest.skip(f"no Triton backend: {reason}")

    def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        settings = {**os.environ, "PYTHON": sys.executable, "PSILORA_BUILD_EXT": "0", **environment}
        command = ["bash", str(ROOT / "bench/site.sh"), *arguments]
        return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300)

    site = tmp_path / "site"
    installed = script(str(tmp_path))
    assert installed.returncode == 0, installed.stderr
    assert installed.stdout.splitlines()[0] == str((site / "psilora/__init__.py").resolve())
    assert (site / "psilora/triton_kernels/xv.py").exists() and not (site / "triton_kernels").exists()
    shadowed = script("--check", str(tmp_path), PYTHONPATH=f"{ROOT}:{site}")
    assert shadowed.returncode == 1
    assert "the kernels cannot run" in shadowed.stderr or f"not from {site.resolve()}" in shadowed.stderr
    (site / "psilora/triton_kernels").rename(tmp_path / "elsewhere")
    without = script("--check", str(tmp_path), PYTHONPATH=str(site))
    assert without.returncode == 1
    assert "the kernels cannot run" in without.stderr or "psilora.triton_kernels is imported from" in without.stderr


def test_the_gpu_script_runs_no_module_from_the_checkout() -> None:
    lines = (ROOT / "bench/gpu.sh").read_text().splitlines()
    modules = [line for line in lines if re.search(r" -m (pytest|psilora|bench)", line) and not line.startswith("#")]
    assert "export PSILORA_BUILD_EXT=0  # no step on CUDA uses the extension" in lines
    assert len(modules) == 6 and all('"${python[@]}"' in line for line in modules)
    assert 'python=("$PYTHON" -P)  # see site.sh' in lines


@pytest.mark.slow
def test_a_selection_runs_each_suite_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host suite asks for Triton's interpreter, which is too late once another suite has imported Triton."""
    main = module("__main__")
    assert main.SELECTIONS["cpu"][-1] == "host" and set(main.SELECTIONS["cpu"]) <= set(main.SUITES)
    monkeypatch.setitem(main.SELECTIONS, "cpu", ("solve", "host"))
    monkeypatch.chdir(ROOT)
    assert run("cpu", "--small", "--repeats", "1", "--seconds", "0.1", "--out", str(tmp_path)) == 0
    record = json.loads((tmp_path / "host.json").read_text())
    assert record["command"].startswith("python -m bench host --small") and rows_of(tmp_path, "solve")
    monkeypatch.setitem(main.SELECTIONS, "cpu", ("nothing", "solve"))
    (tmp_path / "solve.json").unlink()
    assert run("cpu", "--small", "--repeats", "1", "--out", str(tmp_path)) == 1
    assert rows_of(tmp_path, "solve")
