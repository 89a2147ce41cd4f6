#!/usr/bin/env bash
# Installs NVIDIA's CUDA 13.0 compiler (about 270 MB) into ./.cuda from the vendor's Python wheels.
# Needs python3 with pip, and g++ for nvcc's preprocessor. Run it again at any time: an installed set is left alone.
#
#   scripts/setup-cuda.sh            nvcc and its parts
#   scripts/setup-cuda.sh --tools    also cuobjdump, nvdisasm and compute-sanitizer, into ./.cuda-tools
#
# All five versions are pinned: nvcc alone would pull a newer runtime and nvvm, whose output its own ptxas refuses.
set -euo pipefail
cd "$(dirname "$0")/.."

compiler="nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88
          nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85"
tools="nvidia-cuda-cuobjdump==13.2.78 nvidia-cuda-nvdisasm==13.2.78 nvidia-cuda-sanitizer-api==13.0.85"

# install FOLDER REQUIREMENTS: skipped when the folder already holds exactly these versions.
install() {
    local folder=$1 want
    want=$(echo $2)
    if [ "$(cat "$folder/installed" 2>/dev/null)" = "$want" ]; then
        echo "$folder: already there"
        return
    fi
    rm -rf "$folder"
    # shellcheck disable=SC2086
    python3 -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --target "$folder" $want
    echo "$want" > "$folder/installed"
}

command -v python3 > /dev/null || { echo "setup-cuda.sh: python3 was not found; install python3 and pip" >&2; exit 1; }
python3 -m pip --version > /dev/null 2>&1 || { echo "setup-cuda.sh: python3 has no pip; install python3-pip" >&2; exit 1; }
command -v g++ > /dev/null || echo "setup-cuda.sh: g++ was not found; nvcc needs it to preprocess (install g++)" >&2

install .cuda "$compiler"
if [ "${1:-}" = "--tools" ]; then
    install .cuda-tools "$tools"
fi
.cuda/nvidia/cu13/bin/nvcc --version | tail -2

# Cargo does not watch the compiler's folder: a build that had found no nvcc would otherwise stay as it is.
touch build.rs
