"""The documentation: links lead somewhere, code blocks run, tables are where the reports put them."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MLP, mse, peft_mlp, plain_mlp
from scripts import ROOT, load
from tiny import SENTENCES, adapted, byte_tokenizer, tiny_llama, token_rows, tokens
from torch import nn

from psilora import PSILoRA

PAGES = sorted((ROOT / "docs").glob("*.md"))
BESIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "examples/README.md", "experiments/README.md")
DOCUMENTS = [*PAGES, *(ROOT / name for name in BESIDE), ROOT / "experiments/NOTES.md", ROOT / "bench/NOTES.md"]


HOOKS = load("hooks")


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in headings]
    return {re.sub(r"\s+", "-", heading) for heading in plain}


def broken(path: Path) -> list[str]:
    """What a document's links do not find in a checkout."""
    text = re.sub(r"^```.*?^```|`[^`\n]+`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    wrong = []
    for _, _, target, anchor in HOOKS.LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        there = (path.parent / target).resolve() if target else path
        if not there.exists() or (anchor and anchor[1:] not in anchors(there)):
            wrong.append(f"{target}{anchor}")
    return wrong


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    assert broken(path) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Here it is\n[a](page.md#here-it-is) [b](gone.md) [c](#gone) `[d](code.md)` [e](https://x)\n")
    assert broken(page) == ["gone.md", "#gone"]


def test_links_are_resolved_for_the_site() -> None:
    """The trap: links that hold in a checkout and lead nowhere in the site, or the other way round."""
    text = "[n](../experiments/NOTES.md#a) [s](../setup.py) ![p](img/x.png) [c](choosing.md) `[q](../setup.py)`"
    expected = "[n](experiments/NOTES.md#a) s ![p](img/x.png) [c](choosing.md) `[q](../setup.py)`"
    assert HOOKS.resolved(text, "docs/faq.md") == expected
    assert HOOKS.resolved("[r](results/report.md) [c](../docs/choosing.md)", "experiments/README.md") == (
        "[r](results/report.md) [c](../choosing.md)"
    )


def test_the_readme_is_short_and_holds_what_is_generated() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.split()) < 1200
    for name, marker in (("README.md", "support"), ("docs/results.md", "quality"), ("docs/benchmarks.md", "bench")):
        text = (ROOT / name).read_text()
        between = text.partition(f"<!-- {marker}:begin -->")[2].partition(f"<!-- {marker}:end -->")[0]
        assert between.count("\n|") > 3, name


def test_every_figure_is_shown_and_made_by_a_function() -> None:
    source = (ROOT / "docs" / "figures.py").read_text()
    shown = "".join(path.read_text() for path in DOCUMENTS)
    for path in (ROOT / "docs" / "img").iterdir():
        assert f'_save(figure, "{path.stem}")' in source and f"img/{path.name})" in shown


def language_model(tmp_path: Path) -> dict[str, Any]:
    """What the quick start takes for granted."""
    datasets = pytest.importorskip("datasets", reason="TRL is an extra: psilora[loops]")
    return {
        "model": adapted(B_zero=True),
        "base_model": tiny_llama(),
        "batches": [tokens(seed=i) for i in range(2)],
        "loss_of": lambda model, batch: model(**batch).loss,
        "data": token_rows(8),
        "texts": datasets.Dataset.from_dict({"text": list(SENTENCES)}),
        "tokenizer": byte_tokenizer(),
        "output": str(tmp_path),
    }


class WithHead(nn.Module):
    """Its layers, a norm and a head that trains in full."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = plain_mlp(dtype=torch.float32), nn.LayerNorm(6), nn.Linear(6, 6)


def regression(tmp_path: Path) -> dict[str, Any]:
    """What the questions take for granted."""
    model = peft_mlp(dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(24, 6, generator=generator)
    inputs = [torch.randn(64, 24, generator=generator) for _ in range(4)]
    return {
        "model": model,
        "optimizer_of_model": PSILoRA(model, 0.05),
        "late": model.base_model.model.l2.base_layer.bias,
        "model_with_head": WithHead(),
        "unet": plain_mlp(),
        "encoder": plain_mlp(),
        "batches": [(x, x @ target / 5) for x in inputs],
        "loss_of": mse,
        "output": str(tmp_path),
        "MLP": MLP,
    }


def classifier(tmp_path: Path) -> dict[str, Any]:
    """What the README takes for granted."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=259, num_labels=2, **sizes))
    data = [{"input_ids": row["input_ids"], "labels": torch.tensor(i % 2)} for i, row in enumerate(token_rows(8))]
    return {"model": model, "data": data}


def blocks(path: Path) -> list[str]:
    """The Python blocks of a document, without those that are taken from an example, which tests run elsewhere."""
    found = re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [block for block in found if "--8<--" not in block]


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")  # without an accelerator, where the default is True
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("name", "given", "least"),
    [
        ("README.md", classifier, 1),
        ("docs/index.md", classifier, 1),
        ("docs/quickstart.md", language_model, 3),
        ("docs/faq.md", regression, 8),
    ],
)
def test_code_blocks_run(
    name: str, given: Callable[[Path], dict[str, Any]], least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "docs/quickstart.md":
        pytest.importorskip("trl", reason="TRL is an extra: psilora[loops]")
    torch.manual_seed(0)
    found, names = blocks(ROOT / name), given(tmp_path)
    assert len(found) >= least
    for block in found:
        exec(compile(block, f"{name}: {block[:60]}", "exec"), names)


def test_one_import_brings_the_names_of_the_readme() -> None:
    """What is no module to be imported by that name is there after `import psilora`."""
    names = re.findall(r"`psilora\.([\w.]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    code = """
import importlib, operator, sys, psilora
for name in sys.argv[1:]:
    try:
        operator.attrgetter(name)(psilora)
    except AttributeError:
        importlib.import_module(f"psilora.{name}")
"""
    assert {"LoRALinear", "checkpoint", "functional.step", "lr_find"} <= set(names)
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_other_pages_hold_no_code_that_is_not_run() -> None:
    for path in PAGES:
        if path.name not in ("index.md", "quickstart.md", "faq.md"):
            assert not blocks(path), path.name


def test_snippets_are_parts_of_examples() -> None:
    """The site's build fails on a part that is missing; this says so without building it."""
    for path in PAGES:
        for file, part in re.findall(r'--8<-- "([^":]+):(\w+)"', path.read_text(encoding="utf-8")):
            text = (ROOT / file).read_text()
            assert f"--8<-- [start:{part}]" in text and f"--8<-- [end:{part}]" in text
            assert file.startswith("examples/")


@pytest.mark.parametrize("name", ["optimizer", "adapters", "loops", "tensors", "baselines"])
def test_the_reference_names_what_there_is(name: str) -> None:
    for dotted in re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api" / f"{name}.md").read_text(), re.MULTILINE):
        module, _, attribute = dotted.rpartition(".")
        importlib.import_module(dotted) if dotted == "psilora.baselines" else getattr(
            importlib.import_module(module), attribute
        )
