"""Every short example runs, learns, and says what it lacks."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
COVERED = {"plain_loop", "hf_trainer", "trl_sft", "ddp", "fsdp", "qlora", "accelerate_loop", "lightning_module"}
COVERED |= {"finetune_llm", "diffusers_unet", "sentence_pairs", "layouts", "relora"}
ELSEWHERE = {"finetune", "finetune_report", "docstrings", "offline"}


def example(name: str) -> Callable[[list[str]], list[float]]:
    main: Callable[[list[str]], list[float]] = importlib.import_module(name).main
    return main


def test_every_example_is_tested_and_listed() -> None:
    files = {path.stem for path in EXAMPLES.glob("*.py")}
    assert files == COVERED | ELSEWHERE
    readme = (EXAMPLES / "README.md").read_text()
    assert {f"{name}.py" for name in files} <= set(re.findall(r"`?(\w+\.py)", readme))


def test_plain_loop_learns_and_goes_on_from_its_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = example("plain_loop")
    whole = main(["--steps", "12", "--checkpoints", str(tmp_path / "whole")])
    assert whole[-1] < whole[0] - 0.3
    assert "projection_residual" in capsys.readouterr().out
    again = main(["--steps", "12", "--checkpoints", str(tmp_path / "whole")])
    assert again == whole[10:]


def test_hf_trainer_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is an extra: psilora[loops]")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    losses = example("hf_trainer")(["--steps", "16", "--output", str(tmp_path)])
    assert losses[-1] < losses[0] - 0.1
    assert list(tmp_path.glob("events.*"))


def test_trl_sft_learns(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is an extra: psilora[loops]")
    losses = example("trl_sft")(["--steps", "16", "--output", str(tmp_path)])
    assert losses[-1] < losses[0] - 0.1


@pytest.fixture
def small_library(tmp_path: Path, checkout_on_path: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A part of the standard library, with packages of both splits, for a program that parses all of it."""
    smollm = importlib.import_module("experiments.tasks.smollm")
    whole, part = Path(sysconfig.get_path("stdlib")), tmp_path / "library"
    part.mkdir()
    for name in ("argparse.py", "calendar.py", "csv.py", "email", "json", "logging", "shlex.py", "textwrap.py"):
        copy = shutil.copy if (whole / name).is_file() else shutil.copytree
        copy(whole / name, part / name)
    monkeypatch.setattr(smollm.sysconfig, "get_path", lambda name: str(part))
    smollm.packages.cache_clear()
    yield
    smollm.packages.cache_clear()


@pytest.mark.usefixtures("small_library")
def test_a_language_model_is_fine_tuned_both_ways_and_its_adapters_are_saved(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is an extra: psilora[loops]")
    runs = example("finetune_llm")(["--tiny", "--quiet", "--steps", "8", "--output", str(tmp_path)])
    assert [run["method"] for run in runs] == ["adamw", "psilora"]
    first = {run["curve"][0] for run in runs}
    assert len(first) == 1 and all(run["validation_loss"] < min(first) - 0.02 for run in runs)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (tmp_path / "psilora").iterdir()}
    assert (tmp_path / "curves.png").stat().st_size > 0
    text = (tmp_path / "samples.md").read_text()
    assert text.count("- its own: ") == text.count("- PSILoRA: ") == 3 and runs[1]["after"][0].split()[0] in text


def test_accelerate_loop_learns() -> None:
    losses = example("accelerate_loop")(["--epochs", "1"])
    assert sum(losses[-5:]) / 5 < losses[0] - 0.1


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:lightning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning")
def test_lightning_module_learns() -> None:
    pytest.importorskip("lightning", reason="Lightning is an extra: psilora[loops]")
    losses = example("lightning_module")(["--steps", "20"])
    assert sum(losses[-5:]) / 5 < losses[0] - 0.1


@pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' own, raised wherever it is called from
@pytest.mark.scenario(
    14, "diffusers", gradient="spectral", tested="examples/diffusers_unet.py: UNet convolutions and text encoder"
)
def test_diffusers_unet_learns(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers", reason="diffusers is an extra: psilora[examples]")
    losses = example("diffusers_unet")(["--steps", "25"])
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert "36 LoRA pairs" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*sentence_transformers.*deprecated:DeprecationWarning")
@pytest.mark.scenario(
    14, "sentence-transformers", gradient="spectral", tested="examples/sentence_pairs.py: trainer, loss with weights"
)
def test_sentence_pairs_learns(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is an extra: psilora[examples]")
    losses = example("sentence_pairs")(["--steps", "30", "--output", str(tmp_path)])
    assert losses[-1] < losses[0] - 0.1


def test_every_layout_learns() -> None:
    pytest.importorskip("loralib", reason="loralib is an extra: psilora[loops]")
    for name, losses in example("layouts")(["--steps", "30"]).items():
        assert losses[-1] < losses[0] - 0.3, name


def test_relora_goes_on_learning_after_each_restart() -> None:
    losses = example("relora")(["--steps", "30", "--every", "10"])
    thirds = [sum(losses[i + 5 : i + 10]) for i in (0, 10, 20)]
    assert thirds[2] < thirds[0] and max(losses) < losses[0] + 0.1


@pytest.mark.distributed
@pytest.mark.scenario(6, "torchrun", gradient="exact", tested="examples/ddp.py: two gloo processes stay bitwise equal")
def test_ddp_under_torchrun() -> None:
    printed = torchrun("ddp.py", "--steps", "6")
    found = re.search(r"loss ([\d.]+) -> ([\d.]+); parameters of 2 processes equal: True", printed)
    assert found is not None and float(found[2]) < float(found[1])


@pytest.mark.distributed
@pytest.mark.scenario(11, "FSDP2 (gloo)", gradient="spectral", tested="examples/fsdp.py: sharded model, checkpoint")
def test_fsdp_under_torchrun(tmp_path: Path) -> None:
    printed = torchrun("fsdp.py", "--steps", "6", "--checkpoint", str(tmp_path / "checkpoint"))
    found = re.search(r"loss ([\d.]+) -> ([\d.]+); process 0 of 2 holds (\d+) of (\d+) LoRA weights", printed)
    assert found is not None and float(found[2]) < float(found[1])
    assert 2 * int(found[3]) == int(found[4])
    assert len(list((tmp_path / "checkpoint").glob("*.distcp"))) == 2


def torchrun(script: str, *arguments: str) -> str:
    """Run an example on two gloo processes and return what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(EXAMPLES / script), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_qlora_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("qlora")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install bitsandbytes"):
        module.main([])


def test_qlora_learns() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    losses = example("qlora")(["--steps", "20"])
    assert losses[-1] < losses[0]
