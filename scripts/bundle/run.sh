#!/usr/bin/env bash
# Runs one stage of the bundle that scripts/gpu-bundle.sh packs; each ends within nine minutes in one summary table.
#
#   ./run.sh check|bench|peer|compare|train RESULTS [--python PYTHON] [--data IMAGES] [-- FLAGS]
#
#   check     every test on the GPU, compute-sanitizer (memcheck, racecheck) where it is installed, then on the processor
#   bench     ceilings, gaps, caches and clocks; training step, ops, sampling, start-up, memory
#   peer      PyTorch's parts: ceilings, cuDNN's convolutions, attention, group norm, loss, optimiser, start-up
#   compare   both sides in turn: call it again until its table is complete; FLAGS are those of benches/peer/compare.py
#   train     a training run with samples (IMAGES: any set that `iddpm train --data-dir` takes; default: built-in digits)
#
# Everything is written to RESULTS; peer and compare need a PYTHON with torch (default: python3).
# Exit status: 0 all well, 1 something failed, 2 wrong use, 3 no device, or not measured: what needs none ran.
set -uo pipefail
usage() { sed -n '4,14s/^# \{0,1\}//p' "$0" >&2; exit 2; }
stage=${1:-} results=${2:-}
[[ $stage =~ ^(check|bench|peer|compare|train)$ && -n $results ]] || usage
shift 2
python=python3 data=()
while (($#)); do
    case $1 in
        --python) python=${2:?--python needs a program}; shift 2 ;;
        --data) data=(--data-dir "$(realpath "${2:?--data needs a path}")"); shift 2 ;;
        --) shift; break ;;
        *) usage ;;
    esac
done
flags=("$@")
mkdir -p "$results" || exit 1
results=$(realpath "$results")
cd "$(dirname "$0")" || exit 1
root=$PWD
export CARGO_MANIFEST_DIR=$root CARGO_BIN_EXE_iddpm=$root/bin/iddpm CRITERION_HOME=$results/criterion
IDDPM_COMMIT=$(sed -n 's/^commit //p' BUNDLE)
export IDDPM_COMMIT
chmod +x bin/* test-programs/* bench-programs/* 2>/dev/null

deadline=$((SECONDS + 530))
log=$results/$stage
mkdir -p "$log"
names=() states=() times=() notes=()
failed=0 unmeasured=

# step NAME LIMIT COMMAND...: runs it into its own log, at most LIMIT seconds and not beyond the deadline.
step() {
    local name=$1 limit=$2 left=$((deadline - SECONDS)) start=$SECONDS state note
    shift 2
    if ((left < 5)); then
        record "$name" skipped 0 "no time left"
        return 1
    fi
    echo "== $name" >&2
    timeout --kill-after=5 "$((limit < left ? limit : left))" "$@" >"$log/$name.txt" 2>&1 </dev/null
    local status=$?
    note=$(grep -E '^test result|^error|panicked|ERROR SUMMARY|nothing is measured' "$log/$name.txt" | tail -1)
    case $status in
        0) state=ok ;;
        3) state="not run" unmeasured=$note ;;
        124 | 137) state=stopped note="after $((SECONDS - start)) s" failed=1 ;;
        *) state=FAILED note="${note:-$(tail -1 "$log/$name.txt")}" failed=1 ;;
    esac
    record "$name" "$state" $((SECONDS - start)) "$note"
    return $status
}

record() { names+=("$1") states+=("$2") times+=("$3") notes+=("${4:0:100}"); }
skip() { record "$1" "not run" 0 "$2"; }

# finish STATUS: the summary, on the terminal and in RESULTS.
finish() {
    {
        echo
        echo "stage $stage, $(date -u +%Y-%m-%dT%H:%M:%SZ), $(tr '\n' ',' <BUNDLE | sed 's/,$//; s/,/, /g')"
        echo "device: $device"
        printf '%-34s %-8s %6s  %s\n' step state s note
        for i in "${!names[@]}"; do
            printf '%-34s %-8s %6s  %s\n' "${names[i]}" "${states[i]}" "${times[i]}" "${notes[i]}"
        done
        [[ -z ${2:-} ]] || echo "$2"
    } | tee "$log/summary.txt"
    exit "$1"
}

# The device: what the driver shows, and whether this program can use it.
device=none why=
if ! command -v nvidia-smi >/dev/null; then
    why="no device: nvidia-smi was not found, so there is no NVIDIA driver here"
elif ! device=$(nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,memory.total --format=csv,noheader 2>&1 | head -1) ||
    [[ -z $device || $device == *[Ff]ailed* || $device == *"No devices"* ]]; then
    why="no device: nvidia-smi says: ${device:-nothing}" device=none
elif ! bin/iddpm bench serve --device cuda --config t0 --batch-size 1 --block-seconds 0 >"$log/device.txt" 2>&1 </dev/null; then
    why="no device for this program: $(tail -1 "$log/device.txt")"
fi
gpu=0
[[ -n $why ]] || gpu=1
where=cpu
((gpu == 0)) || where=cuda
python_path=$(command -v "$python") || python_path=
# PyTorch's version; empty without it.
torch=$("$python" -c 'import torch, numpy, safetensors; print(torch.__version__)' 2>/dev/null)

# The tests whose kernels run on the device that IDDPM_TEST_DEVICE names.
device_tests=(driver cuda_ golden)

case $stage in
check)
    if ((gpu)); then
        step cuda-suite 240 env IDDPM_TEST_DEVICE=cuda test-programs/suite --test-threads=1 "${device_tests[@]}"
        sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
        for tool in memcheck racecheck; do
            if [[ -n $sanitizer ]]; then
                step "cuda-$tool" 100 env IDDPM_TEST_DEVICE=cuda "$sanitizer" --tool "$tool" --error-exitcode 1 \
                    test-programs/suite --test-threads=1 "${device_tests[@]}"
            else
                skip "cuda-$tool" "compute-sanitizer was not found"
            fi
        done
    else
        skip cuda-suite "$why"
    fi
    for program in test-programs/*; do
        step "cpu-$(basename "$program")" 500 env IDDPM_TEST_DEVICE=cpu "$program"
    done
    ;;
bench)
    configs=t1,t3
    ((gpu == 0)) || configs=cifar10,imagenet64,tiny
    first=${configs%%,*}
    step "$where-ceilings" 60 bin/iddpm bench ceilings --device $where --json "$log/ceilings.json"
    step "$where-step" 120 bin/iddpm bench step --device $where --config $configs --json "$log/step.json"
    step "$where-kernels" 90 bin/iddpm bench kernels --device $where --config "$first" --json "$log/kernels.json"
    step "$where-sample" 120 bin/iddpm bench sample --device $where --config "$first" --limit-seconds 4 --json "$log/sample.json"
    step "$where-startup" 60 bin/iddpm bench startup --device $where --config "$first" --blocks 3 --json "$log/startup.json"
    step "$where-memory" 60 bin/iddpm bench memory --device $where --config $configs --json "$log/memory.json"
    if ((gpu == 0)); then
        for program in bench-programs/*; do
            step "$(basename "$program")" 100 "$program" --bench --warm-up-time 0.3 --measurement-time 0.5 --sample-size 10
        done
    fi
    ;;
peer)
    [[ -n $torch ]] || finish 3 "not measured: $python has no torch, numpy or safetensors: name another with --python"
    toy=()
    ((gpu)) || toy=(--device cpu --tiny)
    step peer-golden 120 "$python" -B benches/peer/check.py --norm native
    step peer-ceilings-conv 190 "$python" -B benches/peer/measure.py --stage ceilings conv "${toy[@]}" --budget 180 --out "$log"
    step peer-parts 170 "$python" -B benches/peer/measure.py --stage micro "${toy[@]}" --budget 160 --out "$log"
    step peer-startup 120 "$python" -B benches/peer/measure.py --stage startup "${toy[@]}" --budget 110 --out "$log"
    ;;
compare)
    [[ -n $torch ]] || finish 3 "not measured: $python has no torch, numpy or safetensors: name another with --python"
    if ((gpu)); then
        [[ -d $log/work/compiler-cache ]] ||
            step peer-warm 150 "$python" -B benches/peer/measure.py --stage warm --configs cifar10 --budget 140 --out "$log/work"
        minutes=$(((deadline - SECONDS - 20) * 10 / 60))
        step cuda-both 520 "$python" -B benches/peer/compare.py --device cuda --binary bin/iddpm --python "$python_path" --resume \
            --limit-minutes "${minutes%?}.${minutes: -1}" --work "$log/work" --out "$log" "${flags[@]}"
        cat "$log/cuda.md" 2>/dev/null
    else
        step cpu-both 520 "$python" -B benches/peer/compare.py --binary bin/iddpm --python "$python_path" --configs t1,t3 \
            --sample-configs t1 --variants P0,P1 --limit-s 40 --work "$log/work" --out "$log" "${flags[@]}"
        cat "$log/cpu.md" 2>/dev/null
    fi
    ;;
train)
    step "$where-train" 480 bin/iddpm train --device $where "${data[@]}" --minutes 7 --out "$log/run"
    step "$where-sample" 60 bin/iddpm sample --device $where --model-path "$log/run" --num-samples 16 --use-ddim \
        --timestep-respacing 50 --out "$log/samples"
    ;;
esac

((failed == 0)) || finish 1
((gpu)) || finish 3 "$why"
[[ -z $unmeasured ]] || finish 3 "$unmeasured"
finish 0
