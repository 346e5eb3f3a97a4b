#!/usr/bin/env bash
# Builds, tests and measures evc_fast on a machine with a GPU and no network, in less than ten minutes.
#
#   bash benchmarks/gpu.sh OUTDIR                     everything
#   bash benchmarks/gpu.sh OUTDIR --only "build encoder"
#   bash benchmarks/gpu.sh OUTDIR --cpu               a rehearsal: the same steps on a CPU, in small sizes
#
# It needs python3 with PyTorch for CUDA, Triton, pip, setuptools, rich, pytest, and nvcc; transformers and peft for the
# LLMs. What else is missing is left out and named. Nothing is installed: the package is built into a temporary folder.
# Parts run in the order of their value; one that fails, or for which no time is left, keeps none of the others.
#
# OUTDIR gets summary.md (also printed last), tables.md, results.json, logs.tar.gz, and efficiency.png where matplotlib
# is installed. Exit code: 0; 1 if a part failed or was not run; 2 on a wrong argument.
set -uo pipefail

usage() {
  sed -n '2,6p' "${BASH_SOURCE[0]}" >&2
  cat >&2 <<'END'
options:
  --only "PART ..."  these parts alone: ceilings build tests memcheck racecheck encoder training efficiency ops compiled
                     lora, and suite, the CPU tests of ops, encoder and kernels, which are not run otherwise
  --seconds N        all together, at most (default 570; of a rehearsal 1800)
  --cpu              rehearse on a CPU; EVC_FAST_GPU_DRY_RUN=1 does the same
  --installed        measure the evc_fast that python3 imports, build none
END
  exit 2
}

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BENCH=$ROOT/benchmarks PYTHON=${PYTHON:-python3}
OUT='' ONLY='' TOTAL='' CPU=${EVC_FAST_GPU_DRY_RUN:-0} INSTALLED=0
while (($#)); do
  case $1 in
    --only) (($# > 1)) || usage; ONLY=$2; shift ;;
    --seconds) [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || usage; TOTAL=$2; shift ;;
    --cpu) CPU=1 ;;
    --installed) INSTALLED=1 ;;
    -*) usage ;;
    *) [[ -z $OUT ]] || usage; OUT=$1 ;;
  esac
  shift
done
[[ -n $OUT && $CPU =~ ^[01]$ ]] || usage
DEFAULT='ceilings build tests memcheck racecheck encoder training efficiency ops compiled lora'
for part in $ONLY; do
  [[ " $DEFAULT suite " == *" $part "* ]] || { echo "gpu.sh: no part is named $part" >&2; usage; }
done
ONLY=${ONLY:-$DEFAULT}
TOTAL=${TOTAL:-$((CPU ? 1800 : 570))}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
mkdir "$WORK/logs" "$WORK/parts" "$WORK/results" "$WORK/site"
cd "$WORK" || exit 2 # away from the checkout, whose evc_fast would hide the one that is built
SITE=$WORK/site RESULTS=$WORK/results
if ((INSTALLED)); then BUILT=1; else BUILT=0; export PYTHONPATH=$SITE; fi
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 ROOT BENCH PYTHON SITE WORK CPU
if ((CPU)); then DEVICE=(--rehearse); else DEVICE=(--device cuda); fi

wanted() { [[ " $ONLY " == *" $1 "* ]]; }

# record NAME STATUS SECONDS NOTE: ok, failed, stopped, not run, or not measured
record() {
  printf '%s\t%s\t%s\t%s\n' "$@" >"$WORK/parts/$1"
  printf '[%3d s] %s: %s%s\n' "$SECONDS" "$1" "$2" "${4:+: $4}"
}

# part NAME LIMIT COMMAND...: runs it for LIMIT seconds at most, or for what is left, and records how it ended.
part() {
  local name=$1 limit=$2 left=$((TOTAL - SECONDS - 5)) begin=$SECONDS log=$WORK/logs/$1.txt code note
  shift 2
  wanted "$name" || return 0
  if ((left < 10)); then record "$name" 'not run' 0 "the $TOTAL s were used up"; return 0; fi
  ((limit > left)) && limit=$left
  printf '[%3d s] %s, %d s at most\n' "$SECONDS" "$name" "$limit"
  timeout -k 5 "$limit" "$@" >"$log" 2>&1 </dev/null
  code=$?
  note=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | tr '\t' ' ' | cut -c 1-200)
  if ((code == 3)) && grep -q '^not measured: ' "$log"; then
    record "$name" 'not measured' $((SECONDS - begin)) "$(grep -m 1 '^not measured: ' "$log" | cut -c 15-)"
    return 0
  fi
  case $code in
    0) [[ $name == tests || $name == suite || $name == *check ]] || note=''
       record "$name" ok $((SECONDS - begin)) "$note" ;;
    124 | 137) record "$name" stopped $((SECONDS - begin)) "after $limit s; last: $note" ;;
    *) record "$name" failed $((SECONDS - begin)) "exit code $code; last: $note" ;;
  esac
}

# What needs the package runs only where there is one.
measure() {
  if ((BUILT)); then part "$@"; elif wanted "$1"; then record "$1" 'not run' 0 'there is no build'; fi
}

# After every part, so that whoever ends this script has what was found so far.
collect() {
  local flags=()
  ((CPU)) && flags=(--rehearsal)
  "$PYTHON" -S "$BENCH/_gpu_summary.py" "$WORK" "$OUT" "${flags[@]}" && tar -czf "$OUT/logs.tar.gz" -C "$WORK" logs
}

machine() {
  uname -a
  for tool in nvidia-smi nvcc compute-sanitizer; do
    command -v "$tool" || echo "no $tool"
  done
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit --format=csv
  fi
  "$PYTHON" "$BENCH/ceilings.py" "$@" --out "$WORK/results"
}

build() {
  mkdir "$WORK/source"
  tar -C "$ROOT" --exclude='*.so' --exclude=__pycache__ -cf - \
    csrc evc_fast export kernels setup.py pyproject.toml MANIFEST.in README.md LICENSE | tar -C "$WORK/source" -xf -
  if ((CPU)); then
    export EVC_FAST_CUDA=0
  else
    EVC_FAST_CUDA_ARCHS=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return 1
    export EVC_FAST_CUDA=1 EVC_FAST_CUDA_ARCHS
  fi
  "$PYTHON" -m pip install --no-build-isolation --no-deps --no-compile --no-index --target "$SITE" \
    "$WORK/source" || return 1
  "$PYTHON" -P -m evc_fast
}

# The checkout's settings ask for a pytest as new as CI's: these are what the tests need of them.
tests() {
  printf '[pytest]\naddopts = --import-mode=importlib\nmarkers = slow: left out here\n' >"$WORK/pytest.ini"
  local workers=()
  if ! ((CPU)) && "$PYTHON" -c 'import xdist' 2>/dev/null; then workers=(-n 10); fi
  "$PYTHON" -P -m pytest -c "$WORK/pytest.ini" --rootdir "$ROOT" -p no:cacheprovider -v --tb=short -rfE -m 'not slow' \
    "${workers[@]}" "$@"
}

# compute-sanitizer over a script that runs every CUDA kernel; kernels that are not ours are left unwatched.
sanitize() {
  set -o pipefail
  local tool=$1 sanitizer cuobjdump filter=(--kernel-name kns=evc) code
  canary() {
    local nvcc
    nvcc=$(PATH=$PATH:/usr/local/cuda/bin command -v nvcc) && "$nvcc" -x cu -o "$WORK/canary-$tool" - <<'END'
namespace evc { __global__ void stray(int* p) { p[threadIdx.x << 24] = 1; } }
int main() { int* p; cudaMalloc(&p, 4); evc::stray<<<1, 32>>>(p); return cudaDeviceSynchronize() != cudaSuccess; }
END
  }
  if ((CPU)); then
    "$PYTHON" "$BENCH/every_kernel.py" --rehearse
    return
  fi
  sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer) ||
    { echo 'not measured: needs compute-sanitizer'; return 3; }
  if cuobjdump=$(PATH=$PATH:/usr/local/cuda/bin command -v cuobjdump) && "$cuobjdump" -res-usage \
    "$("$PYTHON" -P -c 'import evc_fast.ops._cuda as c; print(c.LIBRARY_PATH)')" |
    grep -o 'Function [^:]*' | grep -qv evc; then
    filter=() # a kernel of ours outside namespace evc: then all are watched
  fi
  # A filter that matches nothing finds no error either, nor does one that is misspelt: unless a kernel of the same
  # namespace that writes out of bounds is found with it, all kernels are watched.
  if canary >"$WORK/canary-$tool.cu.txt" 2>&1 &&
    ! "$sanitizer" --tool memcheck "${filter[@]}" "$WORK/canary-$tool" 2>&1 | grep -q 'Invalid __global__ write'; then
    echo 'the filter by name does not work here: every kernel is watched'
    filter=()
  fi
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 "${filter[@]}" \
    "$PYTHON" "$BENCH/every_kernel.py" --device cuda 2>&1 | tee "$WORK/$tool.txt"
  code=$?
  if grep -q 'Device not supported' "$WORK/$tool.txt"; then
    echo 'not measured: compute-sanitizer does not support this device'
    return 3
  fi
  return "$code"
}
export -f machine build tests sanitize

part ceilings 60 bash -c 'machine "$@"' _ "${DEVICE[@]}"
collect
if ! ((INSTALLED)); then
  part build "$((CPU ? 900 : 200))" bash -c build
  if [[ -e $WORK/parts/build ]] && grep -q $'\tok\t' "$WORK/parts/build"; then BUILT=1; fi
  collect
fi
# Nothing is timed here, so that these three run side by side.
if ((CPU)); then export EVC_FAST_GPU_REHEARSAL=1; fi
TESTS=("$ROOT"/tests/test_on_gpu*.py)
if ! ((CPU)); then # of these what runs the library itself, not its emulation
  TESTS+=("$ROOT"/tests/test_cuda_{ops,emulation,folded}.py
    -k 'gpu or replays or current_stream or several_streams or own_device or fastest')
fi
measure tests 150 bash -c 'tests "$@"' _ "${TESTS[@]}" &
measure memcheck 150 bash -c 'sanitize memcheck' &
measure racecheck 150 bash -c 'sanitize racecheck' &
wait
unset EVC_FAST_GPU_REHEARSAL
collect

if ((CPU)); then
  ENCODER=(--batch 1 256 --seconds 0 --no-compile --threads 1) TRAINING=(--seconds 0 --no-compile --threads 1)
  EFFICIENCY=(--quick --repeats 1 --threads 1 --dtype fp32 --decoder flan-t5-xl)
  OPS=(--seconds 0 --no-compile --threads 1 --batch 1)
  LORA=(--batch 2 --seconds 0 --threads 1) COMPILED=(--batch 1 --seconds 0 --threads 1 --rows eager ours)
else
  ENCODER=(--batch 1 256 32 8 --seconds 5 --no-compile) TRAINING=(--seconds 4 --dropout 0.1 0.0 --compile-dropout 0.0)
  EFFICIENCY=(--device cuda --batch 4 --seconds 5 --decoder flan-t5-xl,opt-2.7b)
  OPS=(--seconds 1 --no-compile --batch 1 32) LORA=(--seconds 2)
  COMPILED=(--batch 1 --seconds 5 --rows eager torch.compile ours ours-bf16)
fi
measure encoder 150 "$PYTHON" "$BENCH/encoder.py" "${DEVICE[@]}" "${ENCODER[@]}" --out "$RESULTS"
collect
measure training 120 "$PYTHON" "$BENCH/training.py" "${DEVICE[@]}" "${TRAINING[@]}" --batch 32 --out "$RESULTS"
collect
measure efficiency 200 "$PYTHON" "$BENCH/efficiency.py" "${EFFICIENCY[@]}" --out "$RESULTS"
collect
measure ops 100 "$PYTHON" "$BENCH/ops.py" "${DEVICE[@]}" "${OPS[@]}" --dtype float32 bfloat16 \
  --op entropy_calibration emotion_attention routing_aggregation --out "$RESULTS"
collect
# torch.compile may take minutes: here it can stop nothing else.
measure compiled 120 bash -c '"$PYTHON" "$BENCH/encoder.py" "$@" --out "$WORK/compiled" &&
  for end in json md; do mv "$WORK/compiled/encoder.$end" "$WORK/results/compiled.$end"; done' _ "${DEVICE[@]}" "${COMPILED[@]}"
measure lora 90 "$PYTHON" "$BENCH/lora.py" "${DEVICE[@]}" "${LORA[@]}" --out "$RESULTS"
measure suite 500 bash -c 'tests "$@"' _ "$ROOT"/tests/test_{ops,folded,encoder,triton,cuda,graphed,packed}*.py
collect

echo
cat "$OUT/summary.md"
! cut -f 2 "$WORK"/parts/* | grep -qvxE 'ok|not measured'
