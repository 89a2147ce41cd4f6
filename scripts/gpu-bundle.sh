#!/usr/bin/env bash
# Packs what a machine with a GPU needs to test, measure and train with this commit, into one folder under 40 MiB: run.sh, and
# payload.tgz, which it unpacks: the program, the test and bench binaries (built here, stripped), the golden vectors and the
# PyTorch peer. There it needs the NVIDIA driver, glibc 2.34 or newer, and Python with PyTorch for the comparison; no Rust, no CUDA
# toolkit, no network.
#
#   scripts/gpu-bundle.sh [FOLDER]        default FOLDER: target/gpu-bundle
#
# IDDPM_BUNDLE_FEATURES: cargo features (default: emulator). IDDPM_CUDA=off packs a program without CUDA kernels, on purpose;
# otherwise a missing nvcc is an error. IDDPM_GOLDEN: the folder of vectors (default: tests/golden).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-target/gpu-bundle}
limit=$((40 * 1024 * 1024))
features=${IDDPM_BUNDLE_FEATURES-emulator}
golden=${IDDPM_GOLDEN:-tests/golden}

command -v python3 >/dev/null || { echo "gpu-bundle: python3 is needed to read cargo's messages" >&2; exit 3; }
export IDDPM_CUDA=${IDDPM_CUDA:-require}

# build KIND FLAGS...: lines "bin|tests|benches <file> <name>" for every program cargo made.
build() {
    cargo "$@" ${features:+--features "$features"} --no-run --message-format=json-render-diagnostics | python3 -c '
import json, sys
for line in sys.stdin:
    m = json.loads(line)
    if m.get("reason") != "compiler-artifact" or not m.get("executable"):
        continue
    kind = "benches" if "bench" in m["target"]["kind"] else "tests" if m["profile"]["test"] else "bin"
    print(kind, m["executable"], m["target"]["name"] + ("-lib" if "lib" in m["target"]["kind"] else ""))
'
}
programs=$(build test --release; build bench)
program=$(cargo build --release ${features:+--features "$features"} --message-format=json-render-diagnostics |
    python3 -c 'import json, sys; print([m["executable"] for m in map(json.loads, sys.stdin) if m.get("executable")][-1])')

inside=$(mktemp -d)
trap 'rm -rf "$inside"' EXIT
mkdir -p "$inside"/{bin,test-programs,bench-programs,tests,benches/peer,fuzz}
cp "$program" "$inside/bin/iddpm"
while read -r kind file name; do
    case $kind-$name in
        # Empty, or of the processor alone and the same on every machine: allocations counted, bytes metered by the emulator.
        tests-iddpm | tests-allocation | benches-iddpm* | benches-emulated_traffic) ;;
        tests-*) install -m 755 "$file" "$inside/test-programs/$name" ;;
        benches-*) install -m 755 "$file" "$inside/bench-programs/$name" ;;
    esac
done <<<"$programs"
# Test binaries come stripped by the profile; a profile that changes must not swell the bundle.
find "$inside" -type f -exec strip {} + 2>/dev/null || true

cp -r "$golden" "$inside/tests/golden"
cp -r tests/data "$inside/tests/"
cp -r src assets "$inside/" # a test reads which module uses which
cp -r fuzz/corpus "$inside/fuzz/"
cp benches/peer/*.py benches/peer/README.md "$inside/benches/peer/"
chmod -R u+w "$inside"
commit=$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
[[ $commit == unknown || -z $(git status --porcelain --untracked-files=no) ]] || commit+=-dirty
{
    echo "commit $commit"
    echo "features ${features:-none}"
    echo "cuda $([[ $IDDPM_CUDA == off ]] && echo off || echo built)"
    echo "archs ${IDDPM_CUDA_ARCHS:-all}"
} >"$inside/BUNDLE"
rm -rf "$out"
mkdir -p "$out"
cp scripts/bundle/run.sh "$inside/BUNDLE" "$out/"
tar -C "$inside" --sort=name --owner=0 --group=0 -cf - . | gzip -9 >"$out/payload.tgz"

size=$(du -sb "$out" | cut -f1)
echo "$out: $((size / 1024 / 1024)) MiB, commit $commit, features ${features:-none}; unpacked:"
(cd "$inside" && du -sb */* | sort -rn | head -8 | awk '{printf "  %6.1f MiB  %s\n", $1 / 1048576, $2}')
if ((size > limit)); then
    echo "gpu-bundle: $size bytes are more than the 40 MiB a bundle may have: narrow IDDPM_CUDA_ARCHS or IDDPM_GOLDEN" >&2
    exit 1
fi
