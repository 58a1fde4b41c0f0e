"""What is built: the package page, the metadata, a wheel without its extension, a whole source distribution."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import psilora

ROOT = Path(__file__).parents[1]
#: What a build reads, without the build folders of this checkout.
SOURCES = ("psilora", "triton_kernels", "csrc", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
SOURCES += ("CHANGELOG.md", "CITATION.cff", "SECURITY.md", "tests/conftest.py")


def checkout(folder: Path) -> Path:
    """A copy of what a build reads."""
    for name in SOURCES:
        for path in [ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"):
            if path.is_file() and path.suffix not in (".so", ".pyc"):
                target = folder / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    return folder


def build(folder: Path, command: str, **environment: str) -> tuple[Path, str]:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", command, "--dist-dir", "out"],
        cwd=folder,
        env={**os.environ, "PSILORA_BUILD_EXT": "0", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (made,) = (folder / "out").iterdir()
    return made, done.stderr


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def relative_links(text: str) -> list[str]:
    return [target for target in re.findall(r"\]\(([^)]+)\)", text) if not re.match(r"[a-z]+:|#", target)]


def test_the_package_page_has_no_link_that_leads_nowhere(tmp_path: Path) -> None:
    folder = checkout(tmp_path)
    wheel, _ = build(folder, "bdist_wheel")
    assert wheel.name.endswith("-py3-none-any.whl")
    page = str(metadata(wheel).get_payload())
    assert relative_links((ROOT / "README.md").read_text()) and not relative_links(page)
    assert "# psilora" in page and "docs/img" not in page and "arxiv.org" in page
    text = (folder / "pyproject.toml").read_text()
    (folder / "pyproject.toml").write_text(
        text.replace("[project.urls]\n", '[project.urls]\nRepository = "https://example.org/a/b"\n')
    )
    wheel.unlink()
    page = str(metadata(build(folder, "bdist_wheel")[0]).get_payload())
    assert "](https://example.org/a/b/blob/main/docs/choosing.md)" in page
    assert "](https://example.org/a/b/raw/main/docs/img/rates.png)" in page


def test_version_changelog_and_citation_agree() -> None:
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    dated = re.findall(r"^## \[([\d.]+)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text()
    assert version == psilora.__version__ == dated[0][0]
    assert f"\nversion: {version}\n" in citation and f'\ndate-released: "{dated[0][1]}"\n' in citation


def test_the_source_distribution_holds_what_a_build_needs_and_no_test(tmp_path: Path) -> None:
    made, _ = build(checkout(tmp_path), "sdist")
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path / "unpacked", filter="data")
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert sources | {"triton_kernels/xv.py", "psilora/py.typed", "CHANGELOG.md", "CITATION.cff"} <= names
    assert not any(name.startswith("tests") for name in names)
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel, _ = build(unpacked, "bdist_wheel")
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
        assert "psilora/triton_kernels/xv.py" in archive.namelist()
    assert tops == {"psilora", f"psilora-{psilora.__version__}.dist-info"}


@pytest.mark.skipif(os.name == "nt", reason="the extension is not built on Windows")
def test_a_native_build_that_fails_leaves_a_pure_wheel(tmp_path: Path) -> None:
    """The trap: a wheel named after one Python and platform, with nothing in it that needs them."""
    folder = checkout(tmp_path)
    compiler = tmp_path / "broken-compiler"
    compiler.write_text("#!/bin/sh\necho 'this compiler is broken' >&2\nexit 1\n")
    compiler.chmod(0o755)
    broken = {"CXX": str(compiler), "CC": str(compiler), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    wheel, said = build(folder, "bdist_wheel", PSILORA_BUILD_EXT="auto", **broken)
    assert wheel.name.endswith("-py3-none-any.whl") and "native extension NOT built" in said
    with zipfile.ZipFile(wheel) as archive:
        assert not any(name.endswith(".so") for name in archive.namelist())
        (record,) = (n for n in archive.namelist() if n.endswith("/WHEEL"))
        assert b"Root-Is-Purelib: true" in archive.read(record)
    failed = subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel"],
        cwd=folder,
        env={**os.environ, "PSILORA_BUILD_EXT": "1", **broken},
        capture_output=True,
        timeout=300,
    )
    assert failed.returncode != 0


NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo 'Cuda compilation tools, release {release}, V{release}.61' ;;
  *) echo 'this nvcc is broken' >&2; exit 1 ;;
esac
"""
MISMATCH = "mismatches the version that was used to compile"
BROKEN = "Error compiling objects|nvcc' failed"  # with ninja and without
#: A torch without CUDA does not look for CUDA_HOME.
CUDA_TORCH = """
import os, torch, torch.utils.cpp_extension
torch.version.cuda = "12.8"
torch.utils.cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"]
"""


@pytest.mark.skipif(os.name == "nt", reason="the extension is not built on Windows")
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("release", "reason"),
    [("11.2", MISMATCH), ("12.8", BROKEN)],
    ids=["another CUDA", "it compiles nothing"],
)
def test_a_cuda_half_that_does_not_build_leaves_the_cpu_half(release: str, reason: str, tmp_path: Path) -> None:
    """A torch that says it is of CUDA 12.8, and an nvcc of another release, or one that compiles nothing."""
    folder = checkout(tmp_path / "checkout")
    shutil.rmtree(folder / "csrc")
    for name, text in {
        "csrc/cpu/half.cpp": 'extern "C" __attribute__((visibility("default"))) int psilora_half() { return 17; }\n',
        "csrc/cuda/half.cu": "__global__ void half() {}\n",
        "path/sitecustomize.py": CUDA_TORCH,
        "cuda/bin/nvcc": NVCC.format(release=release),
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "cuda/bin/nvcc").chmod(0o755)
    path = os.pathsep.join([str(folder / "path"), *filter(None, [os.environ.get("PYTHONPATH")])])
    fake = {"PYTHONPATH": path, "CUDA_HOME": str(folder / "cuda"), "CXX": "c++", "CC": "c++"}
    wheel, said = build(folder, "bdist_wheel", PSILORA_BUILD_EXT="auto", **fake)
    assert "building the native extension (CPU and CUDA" in said
    assert "CUDA half NOT built" in said and re.search(reason, said) and "native extension NOT built" not in said
    assert not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".so"))
        archive.extract(name, tmp_path)
        (record,) = (n for n in archive.namelist() if n.endswith("/WHEEL"))
        assert b"Root-Is-Purelib: false" in archive.read(record)
    assert ctypes.CDLL(str(tmp_path / name)).psilora_half() == 17
    if reason == BROKEN:
        return  # told to build it, either is an error in the same way
    failed = subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel"],
        cwd=folder,
        env={**os.environ, "PSILORA_BUILD_EXT": "1", **fake},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert failed.returncode != 0 and re.search(reason, failed.stderr)


def test_the_workflows_call_what_there_is() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    called = set()
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = path.read_text()
        assert "\t" not in text and text.startswith("#") and "\npermissions:\n  contents: read\n" in text
        called |= set(re.findall(r"run: make ([\w-]+)", text))
    assert called == {"lint", "test", "test-matrix", "docs", "test-all"} and called <= targets


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_pattern_of_the_recorded_gates_reaches_them() -> None:
    """The trap: make takes the "$)" of a regular expression for a variable, and leaves it out."""
    (given,) = re.findall(
        r'^`ARGS="(.* --record docs/gates.json)"`', (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE
    )
    command = ["make", "-n", "gates", "TRITON=triton==3.6.0", f"ARGS={given}"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"kernel_gates.py {given}\n" in said  # not at the end: a make inside another says which folder it leaves
