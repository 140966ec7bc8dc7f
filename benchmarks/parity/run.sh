#!/usr/bin/env bash
# kvthrift's choices beside those of kvpress, each in an environment of its own: makes that of kvpress, the models and the
# text, and writes the page. `make parity` calls it; kvthrift's environment is that of `make venv`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

build=build/parity
page=${1:-$build/parity.md}
theirs=$build/venv/bin/python

export HF_HUB_OFFLINE=1
if [ ! -e "$build/venv/.installed" ]; then
  "${PYTHON:-python3}" -m venv "$build/venv"
  "$theirs" -m pip install --quiet torch==2.13.0 # first: no later step replaces it by a larger build
  "$theirs" -m pip install --quiet --constraint constraints/parity.txt kvpress
  touch "$build/venv/.installed"
fi
.venv/bin/python benchmarks/parity/prepare.py "$build"
"$theirs" benchmarks/parity/theirs.py "$build"
.venv/bin/python benchmarks/parity/ours.py "$build" --out "$page"
