"""The doctor's report and self-test."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys

import pytest
import torch
from models import bare, peft_mlp
from peft import LoraConfig, get_peft_model

import psilora
from psilora import doctor
from psilora.adapters import find_pairs
from psilora.adapters.pair import mebibytes
from psilora.backends.triton import backend as triton_backend
from psilora.doctor.self_test import CASES


def test_it_runs_as_a_module_and_reports_versions_and_backends() -> None:
    plain = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}  # as users have it
    run = subprocess.run(
        [sys.executable, "-m", "psilora.doctor"], capture_output=True, text=True, timeout=300, env=plain
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for word in ("Versions", f"torch {torch.__version__.split('+')[0]}", "reference: active", "triton: ", "Self-test"):
        assert word in run.stdout
    assert "FAILED" not in run.stdout


def test_it_says_what_runs_with_which_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    command = importlib.import_module("psilora.doctor.command")
    for version, steps in ((None, "none"), ("3.2.0", "none"), ("3.4.0", "gradient steps and the"), ("3.8.0", "all")):
        monkeypatch.setattr(command, "_installed", lambda name, version=version: version if name == "triton" else "1")
        *rows, here = doctor.tritons()
        assert rows[0] == "torch 2.6, Triton 3.2: none"
        assert here.startswith(f"here: torch {torch.__version__}, Triton {version or 'not installed'}: {steps}")


def test_nothing_is_trained_where_that_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    self_test = importlib.import_module("psilora.doctor.self_test")
    monkeypatch.setattr(self_test, "_train", lambda *_: pytest.fail("it trains"))
    assert doctor.main(["--no-self-test"]) == 0
    out = capsys.readouterr().out
    assert "Backends" in out and "Self-test" not in out
    with pytest.raises(SystemExit):
        doctor.main(["--self-test", "--no-self-test"])
    assert "exclude each other" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        doctor.main(["--version"])
    assert left.value.code == 0 and capsys.readouterr().out == f"psilora {psilora.__version__}\n"


def test_each_comparison_is_printed_when_it_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The trap: nothing is seen until all of them are through."""
    self_test = importlib.import_module("psilora.doctor.self_test")
    real, printed = self_test._train, []

    def watched(*arguments) -> list[torch.Tensor]:
        printed.append(capsys.readouterr().out)
        return real(*arguments)

    monkeypatch.setattr(self_test, "_train", watched)
    assert doctor.main(["--self-test", "--backend", "reference", "--seconds", "60"]) == 0
    assert printed[0].startswith("Self-test") and all("ok" in said for said in printed[2::2])


def test_the_self_test_passes_and_can_fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert doctor.main(["--self-test"]) == 0
    assert "Versions" not in capsys.readouterr().out
    self_test = importlib.import_module("psilora.doctor.self_test")
    real = self_test._train

    def broken(backend: str, device: str, dtype: torch.dtype, case: dict) -> list[torch.Tensor]:
        result = real(backend, device, dtype, case)
        return result if dtype == torch.float64 else [t * 1.01 for t in result]

    monkeypatch.setattr(self_test, "_train", broken)
    assert doctor.main(["--self-test", "--backend", "reference"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_one_backend_alone_runs_all_cases_within_its_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    trained: list[tuple[str, torch.dtype]] = []
    self_test = importlib.import_module("psilora.doctor.self_test")  # the package hands on the function of that name

    def right(backend: str, device: str, dtype: torch.dtype, case: dict) -> list[torch.Tensor]:
        trained.append((backend, dtype))
        return [torch.ones(1, dtype=torch.float64)]

    monkeypatch.setattr(self_test, "_train", right)
    monkeypatch.setattr(self_test, "backend_unavailable", lambda name: None)
    monkeypatch.setattr(self_test, "check_backend", lambda name: None)
    assert doctor.main(["--self-test", "--backend", "triton", "--seconds", "60"]) == 0
    out = capsys.readouterr().out
    assert out.count("triton on ") == len(CASES) and "reference on" not in out and "left out" not in out
    assert {backend for backend, dtype in trained if dtype == torch.float32} == {"triton"}
    assert doctor.main(["--self-test", "--backend", "triton", "--seconds", "0"]) == 0
    assert f"{len(CASES) - 1} more comparisons were left out after 0 s" in capsys.readouterr().out


def test_a_backend_asked_for_must_run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(triton_backend, "unavailable_reason", lambda: "there is no CUDA device")
    with pytest.raises(SystemExit):
        doctor.main(["--self-test", "--backend", "triton"])
    assert "backend='triton' is not available: there is no CUDA device" in capsys.readouterr().err


def test_memory_counts_shared_inputs_once() -> None:
    pairs, unsupported = find_pairs(peft_mlp((32, 16, 8, 4), r=2))
    assert not unsupported
    lines = doctor.memory(pairs, tokens=1024, itemsize=2)
    total_X, total_S = (32 + 16 + 8) * 1024 * 2, (16 + 8 + 4) * 1024 * 2
    assert f"to {total_X / 2**20:.3g} MiB" in lines[0] and f"S {total_S / 2**20:.3g} MiB" in lines[0]
    state = 2 * ((32 + 16) + (16 + 8) + (8 + 4)) * 4
    assert f"{2 * state / 2**20:.3g} MiB" in lines[4] and f"{state / 2**20:.3g} MiB" in lines[5]
    wide, _ = find_pairs(peft_mlp((32, 16, 8, 4), r=2))
    assert "X 448.0 MiB (shared) to 448.0 MiB" in doctor.memory(wide, tokens=2**22, itemsize=2)[0]


def test_the_layers_of_a_model_without_its_weights(tmp_path, capsys: pytest.CaptureFixture) -> None:
    from transformers import BertConfig

    BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64).save_pretrained(
        tmp_path
    )
    model = ["--model", str(tmp_path), "--target-modules", "query,value", "--tokens", "256"]
    assert doctor.main(model) == 0
    out = capsys.readouterr().out
    assert "2 × query: dense, SᵀX holds 0.00391 MiB, X and S of 256 rows 0.0312 MiB" in out
    assert "2 × query 32×32, r = 8: captured exactly" in out
    assert "together 0.0156 MiB: 4 dense" in out
    assert "together 4 pairs with 2,048 trainable numbers" in out
    assert doctor.main([*model, "--budget", "1e-5"]) == 0
    tight = capsys.readouterr().out
    assert "tangent, dense would hold 0.00391 MiB, and all layers more than 0.0102 MiB" in tight
    assert "together 0.00781 MiB: 2 dense, 2 tangent" in tight
    assert "X 0.0312 MiB (shared) to 0.0625 MiB, S 0.0625 MiB" in out  # query and value read the same input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-modules", "nope"], r"cannot adapt \{'nope'\} of '.*': Target modules \{'nope'\} not found"),
        (["--target-modules", "("], r"cannot adapt \( of '.*': missing \)"),
        (["--budget", "nan"], r"--budget=nan must be >= 0"),
        (["--budget", "-1"], r"--budget=-1.0 must be >= 0"),
        (["--self-test"], r"--self-test trains a model of its own"),
    ],
    ids=str,
)
def test_bad_arguments_end_in_one_line(
    arguments: list[str], message: str, tmp_path, capsys: pytest.CaptureFixture
) -> None:
    from transformers import BertConfig

    BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64).save_pretrained(
        tmp_path
    )
    with pytest.raises(SystemExit) as left:
        doctor.main(["--model", str(tmp_path), *arguments])
    said = str(left.value.code) if isinstance(left.value.code, str) else capsys.readouterr().err
    assert re.search(message, said.splitlines()[-1])


def test_an_adapter_without_a_base_and_a_rank_above_the_width_are_named(
    tmp_path, capsys: pytest.CaptureFixture
) -> None:
    from transformers import BertConfig

    LoraConfig(r=4, target_modules=["query"]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(SystemExit, match="does not say what its base model is"):
        doctor.main(["--model", str(tmp_path / "adapter")])
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertConfig(**sizes).save_pretrained(tmp_path)
    assert doctor.main(["--model", str(tmp_path), "--target-modules", "query", "--rank", "1000"]) == 0
    assert "query 32×32, r = 1000, more than the 32 it can use: captured exactly" in capsys.readouterr().out


def test_a_convolutional_model(tmp_path, capsys: pytest.CaptureFixture) -> None:
    """A single name means the layers of that name, wherever they are; "all-linear" would find none here."""
    from transformers import ResNetConfig

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    config.save_pretrained(tmp_path)
    assert doctor.main(["--model", str(tmp_path), "--target-modules", "convolution", "--tokens", "512"]) == 0
    out = capsys.readouterr().out
    assert "1 × convolution 8×147, r = 8: captured exactly, by patches of 7×7" in out
    rows, dense = 512 * (147 + 8) * 2, 4 * 147 * 8
    assert f"1 × convolution: dense, SᵀX holds {mebibytes(dense)}, X and S of 512 rows {mebibytes(rows)}" in out
    assert doctor.main(["--model", str(tmp_path), "--target-modules", ".*encoder.*convolution"]) == 0
    assert "8×147" not in capsys.readouterr().out
    images = ["--target-modules", "convolution", "--image", "64", "--batch", "2"]
    assert doctor.main(["--model", str(tmp_path), *images]) == 0
    out = capsys.readouterr().out  # every layer has rows of its own: strides of 2 halve the 64 pixels
    assert "Memory at 2 images of 64×64" in out
    for rows, d_in, d_out in ((2 * 32**2, 147, 8), (2 * 16**2, 72, 8), (2 * 8**2, 8, 16), (2 * 8**2, 144, 16)):
        captured = mebibytes(rows * (d_in + d_out) * 2)
        assert f"SᵀX holds {mebibytes(4 * d_in * d_out)}, X and S of {rows} rows {captured}" in out


def test_rows_of_images_are_those_that_training_sees(tmp_path, capsys: pytest.CaptureFixture) -> None:
    from transformers import AutoModel, ViTConfig

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViTConfig(hidden_size=32, image_size=32, patch_size=8, **sizes)
    config.save_pretrained(tmp_path)
    settings = LoraConfig(r=2, target_modules=["projection", "q_proj"])
    with torch.device("meta"):
        skeleton = get_peft_model(AutoModel.from_config(config), settings)
    model = get_peft_model(AutoModel.from_config(config), settings)
    optimizer = bare(model)
    model(pixel_values=torch.randn(3, 3, 32, 32)).last_hidden_state.square().mean().backward()
    seen = [record.rows for record in optimizer.captured()]
    assert doctor.rows_of_images(skeleton, find_pairs(skeleton)[0], 3, 32) == seen == [3 * 16, 3 * 17]
    with pytest.raises(SystemExit, match="cannot run the model on images of 30×30: Input image size"):
        doctor.main(["--model", str(tmp_path), "--image", "30"])
    for arguments, error in (("--image 0", "--image=0 must be >= 1"), ("--batch -1", "--batch=-1 must be >= 1")):
        with pytest.raises(SystemExit):
            doctor.main(arguments.split())
        assert error in capsys.readouterr().err


def test_an_unreadable_model_is_named() -> None:
    with pytest.raises(SystemExit, match="cannot read the configuration of '/nowhere'"):
        doctor.main(["--model", "/nowhere"])
    with pytest.raises(SystemExit):
        doctor.main(["--rank", "0"])
