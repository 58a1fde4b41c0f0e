"""Build script: package layout and the optional native extension; all metadata is in pyproject.toml.

The folder `triton_kernels/` is installed as `psilora.triton_kernels`: a distribution of the bare name exists
and other libraries import it, so nothing here may ever install a top-level `triton_kernels`.

The native extension is compiled against the torch that is installed, so it is only built with
`--no-build-isolation`. `PSILORA_BUILD_EXT` decides: 0 never; 1 always, any obstacle being an error; auto, the
default, where torch and a C++ compiler are there. Under auto a failure leaves out the CUDA half (as where nvcc is of
another version than torch's CUDA), then the extension: the wheel is then a pure one, py3-none-any.

The package page shows README.md, where links to the repository's files lead nowhere: they are made absolute by the
address "Repository" of [project.urls], and become plain text, without pictures, while there is none.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

KERNELS = "triton_kernels"
#: A compile flag only: the symbols come from the OpenMP runtime that torch loads. A second one would bring a
#: second thread pool, deaf to torch.set_num_threads.
OPENMP_FLAGS = ["-fopenmp"] if sys.platform == "linux" else []
CXX_FLAGS = ["-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi", *OPENMP_FLAGS]
NVCC_FLAGS = ["-O3"]
#: Targets where there is no GPU to ask, unless TORCH_CUDA_ARCH_LIST says otherwise; newer ones run the PTX.
CUDA_TARGETS = "8.0;8.9;9.0+PTX"


def build_mode() -> str:
    """Return PSILORA_BUILD_EXT after checking it."""
    mode = os.environ.get("PSILORA_BUILD_EXT", "auto").strip().lower() or "auto"
    if mode not in {"0", "1", "auto"}:
        raise SystemExit(f"Invalid PSILORA_BUILD_EXT={mode!r}. Must be 0, 1 or auto.")
    return mode


def obstacle() -> str | None:
    """Return why the extension cannot be compiled here, or None."""
    if os.name == "nt":
        return "the extension is not built on Windows"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except Exception as error:  # a broken torch must not break the installation
        return f"torch cannot be imported in the build environment ({error}); use --no-build-isolation"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler!r} is not on PATH"
    return None


def say(message: str) -> None:
    """Print a build message where pip -v and plain builds show it."""
    print(f"psilora: {message}", file=sys.stderr, flush=True)


def cuda_wanted() -> bool:
    """Whether both halves of a CUDA build are there: a CUDA torch and nvcc."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    return torch.version.cuda is not None and CUDA_HOME is not None and Path(CUDA_HOME, "bin/nvcc").exists()


def extension_options() -> dict[str, Any]:
    """Return the ext_modules and cmdclass arguments of setup()."""
    mode = build_mode()
    if mode == "0":
        return {}
    reason = obstacle()
    if reason is not None:
        if mode == "1":
            raise SystemExit(f"psilora: PSILORA_BUILD_EXT=1 but {reason}")
        say(f"native extension skipped: {reason}")
        return {}

    import torch
    from setuptools.command.bdist_wheel import bdist_wheel
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):  # type: ignore[misc, unused-ignore]
        """Compile the extension; under auto what fails is reported and left out."""

        def build_extensions(self) -> None:
            try:
                try:
                    super().build_extensions()
                except (Exception, SystemExit) as error:
                    if mode == "1" or kind is not CUDAExtension:
                        raise
                    say(f"CUDA half NOT built: {error}")
                    vars(self.extensions[0]).update(vars(without_cuda))  # what setuptools has noted on it stays
                    super().build_extensions()
            except (Exception, SystemExit) as error:
                if mode == "1":
                    raise
                say(f"native extension NOT built, psilora works without it: {error}")
                say("set PSILORA_BUILD_EXT=1 to make this an error, 0 to skip the attempt")
                self.extensions = []
                self.distribution.ext_modules = []

    class Wheel(bdist_wheel):
        """Build before the wheel is named: one without its extension is for every platform."""

        def run(self) -> None:
            self.run_command("build")
            self.skip_build = True
            if not self.distribution.ext_modules:
                self.root_is_pure = True
            super().run()

    sources = sorted(str(path) for path in Path("csrc").glob("*.cpp")) + sorted(
        str(path) for path in Path("csrc/cpu").glob("*.cpp")
    )
    flags = {"cxx": CXX_FLAGS}
    without_cuda = CppExtension("psilora._C", sources=list(sources), extra_compile_args={"cxx": CXX_FLAGS})
    kind = CppExtension
    if cuda_wanted():
        kind = CUDAExtension
        sources += sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))
        flags["nvcc"] = NVCC_FLAGS
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_TARGETS)
    halves = "CPU and CUDA" if kind is CUDAExtension else "CPU"
    say(f"building the native extension ({halves}, {platform.machine()})")
    extension = kind("psilora._C", sources=sources, extra_compile_args=flags)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build, "bdist_wheel": Wheel}}


def package_page() -> str:
    """Return README.md with links that work away from the repository."""
    text = Path("README.md").read_text(encoding="utf-8")
    known = re.search(r'^Repository = "([^"]+?)/?"$', Path("pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)

    def absolute(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        if known is not None:
            return f"{picture}[{words}]({known[1]}/{'raw' if picture else 'blob'}/main/{target})"
        return "" if picture else words

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", absolute, text)


kernel_packages = [f"psilora.{KERNELS}"] + [f"psilora.{KERNELS}.{name}" for name in find_packages(KERNELS)]

setup(
    packages=[*find_packages(include=["psilora", "psilora.*"]), *kernel_packages],
    package_dir={f"psilora.{KERNELS}": KERNELS},
    long_description=package_page(),
    long_description_content_type="text/markdown",
    **extension_options(),
)
