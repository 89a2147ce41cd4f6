#!/usr/bin/env bash
# Installs PyTorch and what the peer needs into benches/peer/.venv (about 5 GB with the CUDA libraries that PyTorch's
# Linux package brings; set PIP_INDEX_URL or PIP_EXTRA_INDEX_URL to an index with CPU builds for a smaller one).
# With an environment that already has PyTorch, name its Python instead: IDDPM_PEER_PYTHON=/path/to/python.
set -euo pipefail
cd "$(dirname "$0")"

if [[ -x .venv/bin/python ]] && .venv/bin/python -c 'import torch, numpy, safetensors' 2>/dev/null; then
    exit 0
fi
python=$(command -v python3) || { echo "peer: python3 is not installed: PyTorch cannot be measured" >&2; exit 3; }
need=8000 # MB while the packages are unpacked
free=$(df -Pm . | awk 'NR == 2 {print $4}')
if ((free < need)); then
    echo "peer: $free MB are free in $PWD, PyTorch needs about $need: it cannot be measured" >&2
    exit 3
fi
echo "peer: installing PyTorch into $PWD/.venv" >&2
"$python" -m venv .venv || { echo "peer: python3 -m venv failed: install the venv module (python3-venv)" >&2; exit 3; }
.venv/bin/pip install --quiet --no-cache-dir torch numpy safetensors pillow >&2 ||
    { echo "peer: pip could not install PyTorch (see above): it cannot be measured" >&2; exit 3; }
.venv/bin/python -c 'import torch; print("peer: torch", torch.__version__)' >&2
