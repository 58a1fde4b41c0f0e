"""The loaders of the papers' tasks, on small files of the published formats, and a training run on each."""

from __future__ import annotations

import gzip
import importlib
import json
import math
import pickle
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the experiments need psilora[experiments]")
pytest.importorskip("pytorch_optimizer", reason="the experiments need psilora[experiments]")

ROOT = Path(__file__).parents[2]
WORDS = "alpha beta gamma delta one two three question context : unanswerable good bad".split()


pytestmark = pytest.mark.usefixtures("checkout_on_path")


def module(name: str) -> ModuleType:
    return importlib.import_module(f"experiments.{name}")


def run(task: str, data: Path, out: Path, *options: str) -> list[Any]:
    """Run the command with two methods at one rate; return the results."""
    methods = ("--optimizers", "adamw", *options)
    arguments = [task, *methods, "--lrs", "1e-3", "--seeds", "0", "--quiet", "--data", str(data), "--out", str(out)]
    module("__main__").main(arguments)
    results = [result for _, result in module("store").load(out)]
    assert results and all(math.isfinite(result.test.loss) for result in results)
    return results


def write_idx(path: Path, array: np.ndarray, zipped: bool = False) -> None:
    content = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    if zipped:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def mnist_files(folder: Path) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    arrays = {}
    for prefix, count in (("train", 150), ("t10k", 20)):
        arrays[prefix] = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = random.integers(0, 10, count, dtype=np.uint8)
        write_idx(folder / f"{prefix}-images-idx3-ubyte", arrays[prefix], zipped=prefix == "train")
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", labels)
    return arrays


def test_mnist_reads_idx_files_zipped_or_not_and_trains(tmp_path: Path) -> None:
    arrays = mnist_files(tmp_path)
    splits = module("tasks.vision").mnist(tmp_path)
    for name, prefix in (("train", "train"), ("test", "t10k")):
        pixels = splits[name][0][:, 0] * 0.3081 + 0.1307
        torch.testing.assert_close(pixels, torch.from_numpy(arrays[prefix]).float() / 255)
    results = run("mnist", tmp_path, tmp_path / "out", "psilora-paper")
    assert len(results) == 2 and {result.steps for result in results} == {10}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "is not an IDX file of unsigned bytes"),
        (b"\x89PNG", "is not an IDX file of unsigned bytes"),
        (b"\0\0\x08\x01\0\0\0\x05abc", r"holds 3 bytes; its sizes \(5,\) need 5"),
    ],
)
def test_broken_idx_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        module("tasks.vision").read_idx(path)


def test_table1_trains_every_method_resumes_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table1 = module("table1")
    monkeypatch.setattr(table1, "POINTS", 2)
    mnist_files(tmp_path)
    out = tmp_path / "out"
    command = ["table1", "--data", str(tmp_path), "--out", str(out), "--lrs", "0.02", "--seeds", "0-1", "--quiet"]
    module("__main__").main([*command, "--epochs", "1"])
    files = {path: path.read_bytes() for path in out.rglob("*.json")}
    assert len(files) == 2 * len(table1.METHODS)
    victim = next(iter(files))
    victim.unlink()
    module("__main__").main([*command, "--epochs", "1"])
    assert {path: path.read_bytes() for path in out.rglob("*.json")} == files  # the missing one, bit for bit

    merged = tmp_path / "results" / "table1.json"
    assert module("store").merge(out, merged) == len(files)
    runs = [run for run in module("store").contents(merged.parent) if run["table1"]["method"] == "oplora-2"]
    accuracies = [[100 * share for share in run["accuracy"].values()] for run in runs]
    assert [run["table1"]["seed"] for run in runs] == [0, 1] and {len(a) for a in accuracies} == {2}
    row = next(line for line in table1.table(module("store").contents(out)) if line.startswith("| OPLoRA ×2 |"))
    mean, final = (np.array([f(a) for a in accuracies]) for f in (np.mean, lambda a: a[-1]))
    shown = [f"{v.mean():.2f} ± {v.std(ddof=1):.2f}" for v in (mean, final)]
    assert row == f"| OPLoRA ×2 | 0.02 | 1 | 2 | {shown[0]} | {shown[1]} | 98.55 ± 0.10 | 0 | 0 |"
    assert row in module("report").write(merged.parent).read_text()


def test_table1_chooses_by_validation_and_goes_on_beyond_an_edge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table1 = module("table1")
    asked = []

    def train(dataset: str, method: str, lr: float, seed: int, epochs: int, folder: Path) -> dict[str, Any]:
        asked.append((lr, seed))
        marks = range(table1.POINTS * epochs)
        better = {"sgd": lr, "adamw": -abs(lr - 0.002)}[method]  # one grows with the rate, one is best at its centre
        curve = {mark: 0.5 + better for mark in marks}
        return {"validation": curve, "accuracy": {mark: 1 - share for mark, share in curve.items()}, "stats": {}}

    monkeypatch.setattr(table1, "train", train)
    command = ["table1", "--data", str(tmp_path), "--out", str(tmp_path), "--seeds", "0-2", "--quiet"]
    module("__main__").main([*command, "--optimizers", "sgd"])
    assert asked == [(0.01, 0), (0.02, 0), (0.05, 0), (0.1, 0), (0.2, 0), (0.2, 1), (0.2, 2)]
    asked.clear()
    module("__main__").main([*command, "--optimizers", "adamw"])
    assert asked == [(0.001, 0), (0.002, 0), (0.005, 0), (0.002, 1), (0.002, 2)]
    rows = table1.table(module("store").contents(tmp_path))
    assert "| LoRA, SGD | 0.2\\* | 5 | 3 | 30.00 ± 0.00 |" in rows[-2]  # test accuracy, at an edge of the grid
    assert "| LoRA, AdamW | 0.002 | 3 | 3 | 50.00 ± 0.00 |" in rows[-1]


def test_table1_has_the_papers_twelve_rows_and_full_training_moves_the_weights(tmp_path: Path) -> None:
    table1, vision = module("table1"), module("tasks.vision")
    assert len(table1.PAPER) == 12 and table1.PAPER.keys() <= table1.METHODS.keys()
    model = vision.adapted(vision.LeNet5(), 8)
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    before = [layer.base.weight.clone() for layer in layers]
    (optimizer,) = table1.METHODS["full"].build(model, 0.02, 0.0)
    model(torch.randn(4, 1, 28, 28)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(layer.base.weight, was) for layer, was in zip(layers, before, strict=True))
    assert all(layer.lora_A.weight.grad is None and not layer.lora_B.weight.any() for layer in layers)


def test_table1_adapts_the_linear_layers_and_trains_the_convolutions() -> None:
    table1, vision = module("table1"), module("tasks.vision")
    model = vision.adapted(vision.LeNet5(), table1.DATASETS["mnist"].rank)
    trained = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    adapters = {f"classifier.{i}.lora_{side}" for i in (0, 2, 4) for side in "AB"}
    assert trained == {"features.0", "features.3", *adapters}
    assert {m.lora_A.weight.shape[0] for m in model.modules() if hasattr(m, "lora_A")} == {8}


def test_a_run_of_table1_that_is_not_finite_is_named(tmp_path: Path) -> None:
    mnist_files(tmp_path)
    table1 = module("table1")
    found = table1.train("mnist", "sgd", 1e30, 0, 2, tmp_path)
    line = table1.table(
        [{"table1": {"dataset": "mnist", "method": "sgd", "lr": 1e30, "seed": 0, "epochs": 2}, **found}]
    )[-1]
    assert "| not finite |" in line


def test_cifar100_reads_its_pickles_and_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "cifar-100-python"
    inner.mkdir()
    random = np.random.default_rng(0)
    for name, count in (("train", 80), ("test", 10)):
        data = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        content = {b"data": data, b"fine_labels": random.integers(0, 100, count).tolist(), b"filenames": [b"x"]}
        (inner / name).write_bytes(pickle.dumps(content, protocol=2))
    x, y = module("tasks.vision").cifar100(tmp_path)["test"]
    restored = (
        x * torch.tensor([0.267, 0.256, 0.276])[:, None, None] + torch.tensor([0.507, 0.487, 0.441])[:, None, None]
    )
    torch.testing.assert_close(restored.reshape(10, -1), torch.from_numpy(data).float() / 255)
    monkeypatch.setitem(module("tasks.vision").EPOCHS, "cifar100", 2)
    run("cifar100", tmp_path, tmp_path / "out")


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("executed",)


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(pickle.UnpicklingError, match=r"builtins.print, which no CIFAR-100 file needs"):
        module("tasks.vision").cifar100(tmp_path)
    assert "executed" not in capsys.readouterr().out


def test_a_task_with_local_data_says_that_it_needs_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="mnist needs --data"):
        module("__main__").main(["mnist", "--lrs", "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds no model"):
        run("wikitext", tmp_path, tmp_path / "out")


# ---- language --------------------------------------------------------------------------------------------------------


def save_model(folder: Path, kind: str) -> None:
    """A tiny random model and a word tokenizer, as `save_pretrained` leaves them."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind != "gpt2":
        words.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    size = len(vocabulary)
    torch.manual_seed(0)
    if kind == "roberta":
        config = transformers.RobertaConfig(
            vocab_size=size,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=200,
            pad_token_id=0,
        )
        model = transformers.RobertaModel(config)
    elif kind == "t5":
        config = transformers.T5Config(
            vocab_size=size, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        model = transformers.T5ForConditionalGeneration(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=size, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
        )
        model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


GLUE_FILES = {
    "cola": ("CoLA", None, "gj04\t1\t\tgood one\ngj04\t0\t*\tbad two\n", [(("good one",), 1), (("bad two",), 0)]),
    "sst2": ("SST-2", "sentence\tlabel", 'good " one\t1\nbad two\t0\n', [(('good " one',), 1), (("bad two",), 0)]),
    "mnli": (
        "MNLI",
        "index\tsentence1\tsentence2\tgold_label",
        "0\talpha\tbeta\tneutral\n1\tone\ttwo\t-\n2\tgamma\tdelta\tentailment\n",
        [(("alpha", "beta"), 1), (("gamma", "delta"), 2)],
    ),
    "stsb": ("STS-B", "index\tsentence1\tsentence2\tscore", "0\talpha\tbeta\t2.5\n", [(("alpha", "beta"), 2.5)]),
}


@pytest.mark.parametrize("name", GLUE_FILES)
def test_glue_files_are_read(tmp_path: Path, name: str) -> None:
    folder, header, rows, expected = GLUE_FILES[name]
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "train.tsv").write_text((header + "\n" if header else "") + rows)
    language = module("tasks.language")
    assert language.read_glue(tmp_path, language.GLUE[name], "train.tsv") == expected


def test_a_glue_file_without_its_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "RTE").mkdir()
    (tmp_path / "RTE" / "dev.tsv").write_text("sentence1\tlabel\none\tentailment\n")
    language = module("tasks.language")
    with pytest.raises(ValueError, match=r"RTE/dev.tsv lacks the columns sentence2"):
        language.read_glue(tmp_path, language.GLUE["rte"], "dev.tsv")


def test_glue_trains(tmp_path: Path) -> None:
    save_model(tmp_path, "roberta")
    for name, header, row in (
        ("CoLA", "", "gj04\t{label}\t\t{text} one"),
        ("STS-B", "index\tsentence1\tsentence2\tscore\n", "0\t{text}\ttwo\t{label}"),
    ):
        (tmp_path / name).mkdir()
        rows = [row.format(label=i // 2 % 2, text="good" if i // 2 % 2 else "bad") for i in range(12)]
        for file in ("train.tsv", "dev.tsv"):
            (tmp_path / name / file).write_text(header + "\n".join(rows) + "\n")
    results = run("glue", tmp_path, tmp_path / "out", "psilora-glue", "--conditions", "cola", "stsb")
    assert len(results) == 4 and all(result.steps == 3 for result in results)
    assert all(-1 <= result.test.score <= 1 for result in results)


def test_glue_scores_against_values_worked_out_by_hand() -> None:
    score = module("tasks.language").glue_score
    predictions, labels = [1, 1, 0, 0], [1, 0, 1, 0]
    assert score("accuracy", predictions, labels) == 0.5 and score("matthews", predictions, labels) == 0
    assert score("f1", [1, 1, 0, 0], [1, 0, 0, 0]) == pytest.approx(2 / 3)
    assert score("pearson", [1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("predicted", "accepted", "expected"),
    [
        ("the alpha, beta", ["Alpha beta"], 1.0),
        ("alpha beta", ["alpha gamma"], 0.5),
        ("alpha", ["beta", "alpha"], 1.0),
        ("unanswerable", [], 1.0),
        ("alpha", [], 0.0),
        ("unanswerable", ["alpha"], 0.0),
    ],
)
def test_squad_f1(predicted: str, accepted: list[str], expected: float) -> None:
    assert module("tasks.language").answer_f1(predicted, accepted) == expected


def test_squad_reads_its_json_and_trains(tmp_path: Path) -> None:
    save_model(tmp_path, "t5")
    answered = {"question": "question one", "is_impossible": False, "answers": [{"text": "alpha", "answer_start": 0}]}
    impossible = {"question": "question two", "is_impossible": True, "answers": []}
    paragraphs = [{"context": "alpha beta gamma", "qas": [answered, impossible]}] * 4
    for name in ("train-v2.0.json", "dev-v2.0.json"):
        (tmp_path / name).write_text(
            json.dumps({"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]})
        )
    read = module("tasks.language").read_squad(tmp_path / "dev-v2.0.json")
    assert read[:2] == [
        ("question one", "alpha beta gamma", ["alpha"]),
        ("question two", "alpha beta gamma", []),
    ]
    (result,) = run("squad", tmp_path, tmp_path / "out")
    assert 0 <= result.test.score <= 1


def test_wikitext_is_cut_into_blocks_and_trains(tmp_path: Path) -> None:
    save_model(tmp_path, "gpt2")
    for name, words in (("train", 200), ("valid", 40), ("test", 40)):
        text = " ".join(WORDS[i % 7] for i in range(words))
        (tmp_path / f"wiki.{name}.tokens").write_text(text)
    session = module("tasks.language").make_wikitext("103", 4, 0, tmp_path)
    assert [len(session.data[name]) for name in ("train", "validation", "test")] == [12, 2, 2]
    assert all(len(e["input_ids"]) == 16 for e in session.data["train"])
    losses = [float(session.model(**session.collate([e])).loss.detach()) for e in session.data["test"]]
    with torch.no_grad():  # blocks of equal length weigh alike
        assert session.evaluate("test").loss == pytest.approx(sum(losses) / 2, rel=1e-5)
    run("wikitext", tmp_path, tmp_path / "out")
