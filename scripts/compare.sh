#!/usr/bin/env bash
# Times this project and PyTorch beside each other on the same machine, in the same minutes, and writes one Markdown
# table and one JSON record under benches/record/.
#
#   scripts/compare.sh --device cpu                     everything, about 15 minutes on a quiet machine
#   scripts/compare.sh --device cpu --configs t1 --sample-configs t1 --variants P0,P1      a quick look
#
# PyTorch is installed into benches/peer/.venv if it is not there; IDDPM_PEER_PYTHON names another Python that has it.
# IDDPM_BINARY names a built program; otherwise cargo builds one. Further flags are those of benches/peer/compare.py --help.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

device=cpu
if [[ ${1:-} == --device ]]; then
    device=${2:?--device needs cpu or cuda}
    shift 2
fi
case $device in
    cpu) ;;
    cuda)
        echo "compare: the program has no CUDA device yet, so nothing of ours can be timed there;" \
            "PyTorch alone: benches/peer/measure.py" >&2
        exit 3
        ;;
    *) echo "compare: --device $device: there are cpu and cuda" >&2; exit 2 ;;
esac

command -v python3 >/dev/null || { echo "compare: python3 is needed; without it: iddpm bench step" >&2; exit 3; }
binary=${IDDPM_BINARY:-$root/target/release/iddpm}
if [[ -z ${IDDPM_BINARY:-} ]]; then
    cargo build --release --quiet --manifest-path "$root/Cargo.toml"
fi

python=${IDDPM_PEER_PYTHON:-} missing=
if [[ -z $python ]]; then
    if "$root/benches/peer/setup.sh"; then
        python=$root/benches/peer/.venv/bin/python
    else
        missing="PyTorch could not be installed"
    fi
elif ! "$python" -c 'import torch, numpy, safetensors' 2>/dev/null; then
    missing="$python lacks torch, numpy or safetensors" python=
fi
exec python3 -B "$root/benches/peer/compare.py" --binary "$binary" --python "$python" ${missing:+--peer-missing "$missing"} "$@"
