"""What the package imports without asking is what it declares."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Imported where the user has chosen the library, or behind the guard of `_compat`.
ASKED = {("integrations", "transformers"), ("triton_kernels", "triton")}


def unconditional(source: str) -> set[str]:
    """The packages that a module imports whenever it is imported."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"psilora"}


def test_every_unconditional_import_is_a_declared_dependency() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = set(re.findall(r'"([A-Za-z_]+)', re.search(r"^dependencies = \[(.*?)\]", text, re.M | re.S)[1]))
    missing, seen = [], set()
    for folder in ("psilora", "triton_kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for name in unconditional(path.read_text(encoding="utf-8")):
                seen.add(name)
                if name not in declared and (path.parent.name, name) not in ASKED:
                    missing.append(f"{path.relative_to(ROOT)}: {name}")
    assert {"torch", "numpy"} <= seen and not missing


def test_without_numpy_the_reference_backend_works_and_the_reason_is_told() -> None:
    code = """
import sys
sys.modules["numpy"] = None
import warnings
warnings.simplefilter("ignore")
import torch
from psilora import LoRALinear, PSILoRA
from psilora.backends.triton.backend import unavailable_reason
assert "numpy cannot be imported" in unavailable_reason(), unavailable_reason()
model = LoRALinear(torch.nn.Linear(6, 5), 2)
before = model.lora_B.weight.detach().clone()
optimizer = PSILoRA(model, 0.1)
model(torch.ones(3, 6)).square().sum().backward()
optimizer.step()
assert not torch.equal(before, model.lora_B.weight)
try:
    PSILoRA(model, 0.1, backend="triton")
except ValueError as error:
    assert "numpy cannot be imported" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
