#!/usr/bin/env bash
# Times this project and PyTorch beside each other on the same machine, in the same minutes, and writes one Markdown
# table and one JSON record under benches/record/.
#
#   scripts/compare.sh --device cpu                     everything, about 20 minutes on a quiet machine of 2 cores
#   scripts/compare.sh --device cpu --configs t1 --sample-configs t1 --variants P0,P1      a quick look
#   scripts/compare.sh --device cuda --resume           nine minutes; again and again until its table is complete
#   scripts/compare.sh --device cuda --configs cifar10 --sample-configs ''                  one row
#
# PyTorch is installed into benches/peer/.venv if it is not there; IDDPM_PEER_PYTHON names another Python that has it.
# IDDPM_BINARY names a built program; otherwise cargo builds one. Further flags are those of benches/peer/compare.py --help.
# Exit status 3: nothing could be measured, and the last line says why.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

command -v python3 >/dev/null || { echo "compare: python3 is needed; without it: iddpm bench step" >&2; exit 3; }
for flag in "$@"; do
    [[ $flag != -h && $flag != --help ]] || exec python3 -B "$root/benches/peer/compare.py" --help
done
binary=${IDDPM_BINARY:-$root/target/release/iddpm}
if [[ -z ${IDDPM_BINARY:-} ]]; then
    command -v cargo >/dev/null || { echo "compare: cargo is needed to build the program, or IDDPM_BINARY naming one" >&2; exit 3; }
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
