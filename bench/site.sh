#!/usr/bin/env bash
# Installs this checkout into FOLDER/site, away from the environment, and fails unless that copy, kernels and all, is what
# PYTHON -P imports afterwards with PYTHONPATH=FOLDER/site. Without -P `python -m` puts the checkout first, where there is
# a psilora without kernels.
#
#   bash bench/site.sh FOLDER         PYTHON (python3) and PSILORA_BUILD_EXT (auto) may be set
#   bash bench/site.sh --check FOLDER
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bench/gpu.sh needs Python 3.11 or later, for -P")'

if [ "$1" = --check ]; then
  exec "$PYTHON" -P -c '
import importlib, os, sys
from psilora import native
from psilora.backends.triton import backend as triton_backend
if triton_backend.unavailable_reason() is not None:
    sys.exit(f"the kernels cannot run: {triton_backend.unavailable_reason()}")
site = os.path.realpath(sys.argv[1] + "/site")
for name in ("psilora", "psilora.triton_kernels"):
    where = os.path.realpath(importlib.import_module(name).__file__)
    if not where.startswith(site + os.sep):
        sys.exit(f"{name} is imported from {where}, not from {site}")
    print(where)
print("native spd_solve:", native.unavailable_reason() or "active")
' "$2"
fi

folder=$1
mkdir -p "$folder/source" "$folder/site"
cp -r setup.py pyproject.toml MANIFEST.in README.md LICENSE psilora triton_kernels csrc "$folder/source"
rm -f "$folder"/source/psilora/*.so
PSILORA_BUILD_EXT=${PSILORA_BUILD_EXT:-auto} "$PYTHON" -m pip install --quiet --no-index --no-deps \
  --no-build-isolation --target "$folder/site" "$folder/source"
cp -r bench "$folder/site/bench"
PYTHONPATH="$folder/site" exec bash bench/site.sh --check "$folder"
