#!/bin/sh
# What a card shows of moa, in five minutes: `benchmarks/gpu.sh`, or some parts of it: `benchmarks/gpu.sh training profile`.
# Needs Python with torch, transformers, peft, safetensors and pytest, and no network. Table and JSON lie in $OUT.
cd "$(dirname "$0")/.." || exit 1
if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=python3; fi
PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" exec "$python" benchmarks/gpu.py "$@"
