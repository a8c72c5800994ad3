#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under nine minutes: scripts/gpu_check.sh OUT_DIR
# Needs a plain python3 with torch and transformers (and pydantic, numpy, numba, rich, typer, pytest); nothing is installed.
# Writes OUT_DIR/gpu_check.json, what its tests print, engine_*.json of `copyspec bench engine`, steps_*.svg (with
# matplotlib) and demo_float32.json. For figures that count, add --transcripts FILE... --tokenizer FOLDER.
# Exit code: 0 all is well, 1 something differs or fails, 2 there is no GPU or a package is missing.
set -euo pipefail
if [ $# -lt 1 ]; then
    echo "Usage: scripts/gpu_check.sh OUT_DIR [--device cuda|cpu] [--help]" >&2
    exit 2
fi
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" scripts/gpu_check.py "$@"
