#!/usr/bin/env bash
# What needs a CUDA device, from a bare checkout and with what its Python already has (3.11 or later). Builds the package
# into a folder of its own and goes through the stages; each stays below 10 minutes and leaves logs and JSON in OUT.
#
#   bash bench/gpu.sh [first|tests|sanitize|bench|all]      all (the default) takes up to forty minutes
#
#   first      the default step alone: it compiles and passes its check, waits for nothing, repeats bit for bit a hundred
#              times, lives in a graph; then its launches and the host's time beside AdamW, and Nsight Compute where it is
#   tests      the gpu tests, tests/test_gpu*.py first; in parallel with pytest-xdist
#   sanitize   compute-sanitizer's tools over the doctor's self-test of the kernels, which compiles them before
#   bench      `python -m bench gpu`
#
# Variables: OUT (bench/results); PYTHON (python3); TOOLS of compute-sanitizer (memcheck racecheck initcheck synccheck),
# which share the 8 minutes of their stage with compiling: what is left out, their logs say; WORKERS of pytest-xdist (8).
# Kernels once compiled stay in Triton's cache, so a second run of a stage gets further.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stage=${1:-all}
case $stage in
  first | tests | sanitize | bench) stages=$stage ;;
  all) stages="first tests sanitize bench" ;;
  *) echo "usage: bash bench/gpu.sh [first|tests|sanitize|bench|all]" >&2 && exit 2 ;;
esac
OUT=$(mkdir -p "${OUT:-bench/results}" && cd "${OUT:-bench/results}" && pwd)
export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export PSILORA_BUILD_EXT=0  # no step on CUDA uses the extension
python=("$PYTHON" -P)  # see site.sh
read -ra tools <<<"${TOOLS:-memcheck racecheck initcheck synccheck}"
commit=$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=0

# run SECONDS NAME COMMAND…: log to $OUT/NAME.log, remember a failure, go on
run() {
  local limit=$1 name=$2 began=$SECONDS status=0
  shift 2
  timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1 || status=$?
  tail -n 12 "$OUT/$name.log"
  echo "== $name: exit $status after $((SECONDS - began)) s"
  [ "$status" -eq 0 ] || failed=1
  return "$status"
}

first() {
  # In the order of the file, one at a time: what fails first says most.
  run 330 first "${python[@]}" -m pytest -m gpu tests/test_gpu_default.py -v -rs --durations 10 -p no:cacheprovider \
    -p no:xdist -W default
  run 100 host "${python[@]}" -m bench host --device cuda --models llama-3-8b --seconds 3 --commit "$commit" \
    --out "$OUT/gpu"
  if ! command -v ncu >/dev/null; then
    echo "== ncu is not installed: not run"
    return
  fi
  run 150 ncu ncu --kernel-name 'regex:gram|roots|moments|collect|tangent|finish|apply' --launch-skip 8 --launch-count 8 \
    "${python[@]}" -m pytest -m gpu tests/test_gpu_default.py -q -p no:cacheprovider -p no:xdist -W default \
    -k 'agree and float32 and 16'
}

tests() {
  local parallel=()
  if "${python[@]}" -c 'import xdist' 2>/dev/null; then
    parallel=(-n "${WORKERS:-8}" --maxschedchunk 1)
  else
    echo "== pytest-xdist is not installed: one test at a time"
  fi
  # By files and folders, since pytest would drop the one before a folder that holds it.
  run 400 tests "${python[@]}" -m pytest -m gpu tests/test_gpu*.py tests/test_*.py tests/[a-z]*/ -q --durations 10 \
    -p no:cacheprovider -W default "${parallel[@]}"
}

sanitize() {
  if ! command -v compute-sanitizer >/dev/null; then
    echo "== compute-sanitizer is not installed: not run"
    return
  fi
  local end=$((SECONDS + 480)) left=${#tools[@]} tool limit
  local test=("${python[@]}" -m psilora.doctor --self-test --backend triton)
  run 240 self-test "${test[@]}" --seconds 200
  for tool in "${tools[@]}"; do
    limit=$(((end - SECONDS) / left--))
    # Without torch's pool every tensor is an allocation of its own, whose bounds and first writes a tool can see.
    local pool=(env)
    case $tool in memcheck | initcheck) pool=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1) ;; esac
    run "$limit" "sanitizer-$tool" "${pool[@]}" \
      compute-sanitizer --tool "$tool" --error-exitcode 1 "${test[@]}" --seconds $((limit / 2))
  done
}

bench() {
  # Each suite is saved as it ends, so what the limit cuts off is only the rest.
  run 400 bench "${python[@]}" -m bench gpu --seconds 2 --commit "$commit" --out "$OUT/gpu"
}

"$PYTHON" -c 'import torch, sys; print(torch.__version__, torch.cuda.get_device_name()) if torch.cuda.is_available() else sys.exit("no CUDA device")' || exit 1
run 160 build bash bench/site.sh "$scratch" || exit 1
export PYTHONPATH="$scratch/site"
for stage in $stages; do
  "$stage"
done
exit "$failed"
