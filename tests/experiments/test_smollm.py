"""The SmolLM2 task on a tiny random model: its data, its scores, its training, and bfloat16 for every task."""

from __future__ import annotations

import ast
import importlib
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the task needs psilora[llm]")
pytest.importorskip("peft", reason="the task needs psilora[llm]")
pytest.importorskip("pytorch_optimizer", reason="the experiments need psilora[experiments]")

pytestmark = pytest.mark.usefixtures("checkout_on_path")

SOURCE = '''
"""{name}: a module."""

def one_{name}(x):
    """Return one of {name}.

    A second paragraph.
    """
    return x

class C:
    async def two(self):
        """Two in {name}."""
        pass

    def bare(self):
        """No body besides, in {name}."""
'''


def module(name: str) -> ModuleType:
    return importlib.import_module(f"experiments.{name}")


@pytest.fixture
def smollm(checkout_on_path: None, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The task on twelve packages of one small file, and licences of one line."""
    smollm = module("tasks.smollm")
    trees = {name: [ast.parse(SOURCE.format(name=name))] for name in "abcdefghijkl"}
    monkeypatch.setattr(smollm, "packages", lambda: trees)
    monkeypatch.setattr(smollm, "licence_texts", lambda: ["The licence of a thing. " * 12])
    monkeypatch.setattr(smollm, "LENGTH", 200)
    smollm.examples.cache_clear()
    yield smollm
    smollm.examples.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base of two layers, whose tokens are bytes and the two marks of a turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|im_start|>", "<|im_end|>", *alphabet])}
    words = Tokenizer(models.BPE(vocabulary, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "smollm2")
    tokenizer.save_pretrained(tmp_path / "smollm2")
    return tmp_path


def trained(condition: str, folder: Path, lr: float = 0.05, bf16: bool = False) -> Any:
    training = module("training")
    key = training.Key("smollm", condition, 2, "spectral", lr, 0)
    where = training.Where(torch.device("cpu"), bf16)
    return training.run(module("tasks").get_task("smollm"), key, folder, where)


@pytest.mark.parametrize(
    ("generated", "reference", "expected"),
    [
        ("Return the first line", "return the first line", 1.0),
        ("return a first value", "return the first", 2 * 2 / (4 + 3)),
        ("b a", "a b", 0.5),
        ("", "a", 0.0),
        ("x y", "a b", 0.0),
    ],
)
def test_rouge_l(checkout_on_path: None, generated: str, reference: str, expected: float) -> None:
    assert module("tasks.smollm").rouge_l(generated, reference) == pytest.approx(expected)


def test_functions_come_without_their_docstring_and_docstrings_by_paragraph(smollm: ModuleType) -> None:
    tree = smollm.packages()["a"][0]
    assert list(smollm.functions(tree)) == [
        ("def one_a(x):\n    return x", "Return one of a."),
        ("async def two(self):\n    pass", "Two in a."),
    ]
    assert [text.split()[0] for text in smollm.docstrings(tree)] == ["a:", "Return", "Two", "No"]


def test_packages_are_split_and_prompts_carry_no_loss(smollm: ModuleType, folder: Path) -> None:
    data = smollm.examples(folder, "docstrings")
    tokenizer = smollm.base_tokenizer(folder)
    seen: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        seen[split] = {e["reference"].rstrip(".")[-1] for e in data[split]}
        for example in data[split]:
            prompt = len(example["prompt"])
            assert example["labels"][:prompt] == [-100] * prompt
            assert example["labels"][prompt:] == example["input_ids"][prompt:]
            assert tokenizer.decode(example["labels"][prompt:]) == example["reference"] + "<|im_end|>"
            assert len(example["input_ids"]) <= smollm.LENGTH
    assert seen == {split: {p for p in "abcdefghijkl" if smollm.split_of(p) == split} for split in seen}
    assert all(seen.values())


def test_running_text_is_cut_into_whole_blocks(smollm: ModuleType, folder: Path) -> None:
    tokenizer = smollm.base_tokenizer(folder)
    parts = smollm.blocks(tokenizer, ["x" * 250, "y" * 350])
    assert [len(part["input_ids"]) for part in parts] == [200, 200, 200]
    assert tokenizer.decode(parts[1]["input_ids"]) == "x" * 50 + "<|im_end|>" + "y" * 149
    assert all(part["labels"] == part["input_ids"] for part in parts)


def test_the_layers_around_the_middle(checkout_on_path: None) -> None:
    middle = module("tasks.smollm").middle
    assert middle(30, 4) == [13, 14, 15, 16] and middle(30, 30) == list(range(30)) and middle(5, 2) == [1, 2]
    with pytest.raises(ValueError, match="8 layers to adapt: the model has 2"):
        middle(2, 8)


def test_only_the_named_projections_of_the_named_layers_are_trained(smollm: ModuleType, folder: Path) -> None:
    session = smollm.make("text-qv-1x3", 2, 0, folder)
    names = {name for name, p in session.model.named_parameters() if p.requires_grad}
    assert len(names) == 4 and all("layers.0.self_attn." in n and ("q_proj" in n or "v_proj" in n) for n in names)
    assert len(list(session.batches())) == session.steps == 3


@pytest.mark.parametrize("kind", ["text", "docstrings"])
def test_training_is_scored_with_what_it_forgot(smollm: ModuleType, folder: Path, kind: str) -> None:
    result = trained(f"{kind}-all-2x3", folder, 0.2)
    session = smollm.make(f"{kind}-all-2x3", 2, 0, folder)
    with torch.no_grad():  # B = 0: the base itself
        (general,) = session.data["general"]
        ids = torch.tensor([general["input_ids"]])
        logits = session.model.eval()(input_ids=ids).logits
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    assert result.general_before.loss == pytest.approx(float(expected), rel=1e-4)
    assert math.isfinite(result.general_after.loss) and result.general_after != result.general_before
    assert result.steps == 3 and result.validation.loss < result.train_loss[0] + 0.1
    if kind == "text":
        assert result.test.score is None
    else:
        assert 0 <= result.test.score <= 1


def test_answers_do_not_depend_on_the_padding(smollm: ModuleType, folder: Path) -> None:
    session = smollm.make("docstrings-qv-2x1", 2, 0, folder)
    session.model.eval()
    prompts = [session.tokenizer(text)["input_ids"] for text in ("abc", "a much longer prompt than that")]
    together = smollm.generate(session, prompts)
    assert together == [smollm.generate(session, [prompt])[0] for prompt in prompts]
    assert any(together)


def test_bfloat16_rounds_the_forward_pass_and_leaves_the_adapters(smollm: ModuleType, folder: Path) -> None:
    full, half = (trained("text-all-2x3", folder, bf16=bf16) for bf16 in (False, True))
    assert half.test.loss != full.test.loss and half.test.loss == pytest.approx(full.test.loss, rel=0.02)
    assert half.state_bytes == full.state_bytes


@pytest.mark.parametrize("task", ["digits", "bytelm"])
def test_bfloat16_runs_are_a_task_of_their_own(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    monkeypatch.setattr(module("tasks.digits"), "STEPS", 4)
    condition = {"digits": "classes-lenet", "bytelm": "topics-tiny"}[task]
    arguments = [task, "--conditions", condition, "--optimizers", "spectral", "--lrs", "0.05", "--seeds", "0"]
    for dtype in ("float32", "bfloat16"):
        module("__main__").main([*arguments, "--dtype", dtype, "--quiet", "--out", str(tmp_path)])
    found = {key.task: result for key, result in module("store").load(tmp_path)}
    assert set(found) == {task, f"{task}-bf16"}
    full, half = found[task], found[f"{task}-bf16"]
    assert half.train_loss != full.train_loss and half.test.loss == pytest.approx(full.test.loss, rel=0.1)
    assert full.device == "cpu" and full.general_before is None


@pytest.mark.gpu
@pytest.mark.parametrize("task", ["digits", "bytelm", "minilm"])
def test_tasks_run_on_a_gpu(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    condition = {"digits": "classes-lenet", "bytelm": "topics-tiny", "minilm": "short"}[task]
    arguments = [task, "--conditions", condition, "--optimizers", "spectral", "adamw", "--lrs", "0.01", "--seeds", "0"]
    module("__main__").main([*arguments, "--device", "cuda", "--quiet", "--out", str(tmp_path)])
    results = [result for _, result in module("store").load(tmp_path)]
    assert len(results) == 2 and all(math.isfinite(r.test.loss) and r.device != "cpu" for r in results)


@pytest.mark.gpu
def test_smollm_runs_on_a_gpu(smollm: ModuleType, folder: Path) -> None:
    training = module("training")
    key = training.Key("smollm", "docstrings-all-2x3", 2, "spectral", 0.05, 0)
    where = training.Where(torch.device("cuda"), True)
    result = training.run(module("tasks").get_task("smollm"), key, folder, where)
    assert math.isfinite(result.test.loss) and 0 <= result.test.score <= 1


def test_batches_are_moved_whole(checkout_on_path: None) -> None:
    batch = ({"a": torch.zeros(2)}, [torch.ones(1)], 3)
    moved = module("tasks").moved(batch, torch.device("meta"))
    assert moved[0]["a"].device.type == moved[1][0].device.type == "meta" and moved[2] == 3
