#!/usr/bin/env bash
# Everything that needs a CUDA device, from a bare checkout and with what its Python already has: builds the package,
# runs the gpu tests, compute-sanitizer on a small case, then the benches. Under 9 minutes; JSON and logs in $OUT.
#
#   bash bench/gpu.sh                 OUT (bench/results) and PYTHON (python3) may be set
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=$(mkdir -p "${OUT:-bench/results}" && cd "${OUT:-bench/results}" && pwd)
PYTHON=${PYTHON:-python3}
commit=$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
failed=0

# run SECONDS NAME COMMAND…: log to $OUT/NAME.log, remember a failure, go on
run() {
  local limit=$1 name=$2 began=$SECONDS status=0
  shift 2
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1 || status=$?
  tail -n 12 "$OUT/$name.log"
  echo "== $name: exit $status after $((SECONDS - began)) s"
  [ "$status" -eq 0 ] || failed=1
}

"$PYTHON" -c 'import torch, sys; print(torch.__version__, torch.cuda.get_device_name()) if torch.cuda.is_available() else sys.exit("no CUDA device")' || exit 1

# The package goes to a folder of its own, so that nothing in the environment changes and the checkout stays clean.
cp -r . "$scratch/source"
run 150 build env PSILORA_BUILD_EXT=auto "$PYTHON" -m pip install --quiet --no-index --no-deps --no-build-isolation \
  --target "$scratch/site" "$scratch/source"
export PYTHONPATH="$scratch/site"

run 150 tests "$PYTHON" -m pytest -m gpu tests -q -p no:cacheprovider -W default
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    run 60 "sanitizer-$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" -m psilora.doctor --self-test
  done
else
  echo "== compute-sanitizer is not installed: not run"
fi
cp -r bench "$scratch/site/bench"
cd "$scratch"  # so that the installed package is measured, not the checkout
# Each suite is saved as it ends, so what the limit cuts off is only the rest.
run 150 bench "$PYTHON" -m bench gpu --seconds 2 --commit "$commit" --out "$OUT/gpu"
exit "$failed"
