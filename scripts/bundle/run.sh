#!/usr/bin/env bash
# Runs one stage of the bundle that scripts/gpu-bundle.sh packs; each ends within nine minutes in one summary table.
#
#   ./run.sh check|bench|compare|train RESULTS [--python PYTHON] [--data IMAGES]
#
#   check     every test, on the processor and on the GPU, and compute-sanitizer (memcheck, racecheck) where it is installed
#   bench     ceilings, training step, ops, sampling, start-up, memory
#   compare   the same steps beside PyTorch's (PYTHON: one with torch; default python3)
#   train     a training run with samples (IMAGES: any set that `iddpm train --data-dir` takes; default: built-in digits)
#
# Everything is written to RESULTS. Exit status: 0 all well, 1 something failed, 2 wrong use, 3 no device: what needs none ran.
set -uo pipefail
usage() { sed -n '4,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
stage=${1:-} results=${2:-}
[[ $stage =~ ^(check|bench|compare|train)$ && -n $results ]] || usage
shift 2
python=python3 data=()
while (($#)); do
    case $1 in
        --python) python=${2:?--python needs a program}; shift 2 ;;
        --data) data=(--data-dir "$(realpath "${2:?--data needs a path}")"); shift 2 ;;
        *) usage ;;
    esac
done
mkdir -p "$results" || exit 1
results=$(realpath "$results")
cd "$(dirname "$0")" || exit 1
root=$PWD
export CARGO_MANIFEST_DIR=$root CARGO_BIN_EXE_iddpm=$root/bin/iddpm CRITERION_HOME=$results/criterion
chmod +x bin/* test-programs/* bench-programs/* 2>/dev/null

deadline=$((SECONDS + 530))
log=$results/$stage
mkdir -p "$log"
names=() states=() times=() notes=()
failed=0

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
    note=$(grep -E '^test result|^error|panicked|ERROR SUMMARY' "$log/$name.txt" | tail -1)
    case $status in
        0) state=ok ;;
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

# The device: what the driver shows, and whether this program can use one.
device=none why=
if ! command -v nvidia-smi >/dev/null; then
    why="no device: nvidia-smi was not found, so there is no NVIDIA driver here"
elif ! device=$(nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,memory.total --format=csv,noheader 2>&1 | head -1) ||
    [[ -z $device || $device == *[Ff]ailed* || $device == *"No devices"* ]]; then
    why="no device: nvidia-smi says: ${device:-nothing}" device=none
elif ! bin/iddpm bench step --help 2>&1 | grep -A8 -- '--device' | grep -q cuda; then
    why="no device for this program: it was built without --device cuda, so nothing of it runs on $device"
fi
gpu=0
[[ -n $why ]] || gpu=1
clock() { nvidia-smi --query-gpu=clocks.sm,temperature.gpu,power.draw,clocks_throttle_reasons.active,utilization.gpu --format=csv >>"$log/clocks.txt" 2>&1; }
where=cpu
((gpu == 0)) || where=cuda
((gpu == 0)) || clock

# Python's place and whether it has PyTorch; empty if not.
torch() { "$python" -c 'import torch, numpy, safetensors; print(torch.__version__)' 2>/dev/null; }

case $stage in
check)
    for program in test-programs/*; do
        step "cpu-$(basename "$program")" 240 env IDDPM_TEST_DEVICE=cpu "$program" --test-threads=2
    done
    if grep -q '^features.*emulator' BUNDLE; then
        step emulated-golden 200 env IDDPM_TEST_DEVICE=emulated test-programs/suite --test-threads=2 golden
    fi
    if ((gpu)); then
        step cuda-suite 300 env IDDPM_TEST_DEVICE=cuda test-programs/suite --test-threads=1
        sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
        for tool in memcheck racecheck; do
            if [[ -n $sanitizer ]]; then
                step "cuda-$tool" 120 env IDDPM_TEST_DEVICE=cuda "$sanitizer" --tool "$tool" --error-exitcode 1 \
                    test-programs/suite --test-threads=1 golden
            else
                skip "cuda-$tool" "compute-sanitizer was not found"
            fi
        done
    else
        skip cuda-suite "$why"
    fi
    ;;
bench)
    configs=t1,t3
    ((gpu == 0)) || configs=cifar10,imagenet64
    step "$where-step" 150 bin/iddpm bench step --device $where --config $configs --json "$log/step.json"
    step "$where-kernels" 150 bin/iddpm bench kernels --device $where --config ${configs%%,*} --json "$log/kernels.json"
    step "$where-sample" 150 bin/iddpm bench sample --device $where --config ${configs%%,*} --limit-seconds 8 --json "$log/sample.json"
    step "$where-startup" 60 bin/iddpm bench startup --device $where --config ${configs%%,*} --blocks 3 --json "$log/startup.json"
    step "$where-memory" 60 bin/iddpm bench memory --device $where --config ${configs%%,*} --json "$log/memory.json"
    for program in bench-programs/*; do
        step "criterion-$(basename "$program")" 60 "$program" --bench --warm-up-time 0.3 --measurement-time 0.5 --sample-size 10
    done
    ;;
compare)
    version=$(torch)
    if [[ -z $version ]]; then
        skip peer "$python has no torch, numpy or safetensors: name another with --python"
        finish 3 "not measured: there is no PyTorch to compare with"
    fi
    echo "PyTorch $version" >"$log/torch.txt"
    step peer-golden 120 "$python" -B benches/peer/check.py --norm native
    if ((gpu)); then
        step peer-ceilings-conv 160 "$python" -B benches/peer/measure.py --stage ceilings conv --budget 150 --out "$log/peer"
        clock
        step ours-step 60 bin/iddpm bench step --device cuda --config cifar10 --json "$log/step-before.json"
        step peer-train 200 "$python" -B benches/peer/measure.py --stage train --configs A --budget 190 --out "$log/peer"
        step ours-step-again 60 bin/iddpm bench step --device cuda --config cifar10 --json "$log/step-after.json"
        clock
    else
        step cpu-both 500 "$python" -B benches/peer/compare.py --binary bin/iddpm --python "$(command -v "$python")" \
            --configs t1,t3 --sample-configs t1 --variants P0,P1 --limit-s 40 --out "$log"
    fi
    ;;
train)
    step "$where-train" 480 bin/iddpm train --device $where "${data[@]}" --minutes 7 --out "$log/run"
    step "$where-sample" 60 bin/iddpm sample --device $where --model-path "$log/run" --num-samples 16 --use-ddim \
        --timestep-respacing 50 --out "$log/samples"
    ;;
esac

((gpu == 0)) || clock
((failed == 0)) || finish 1
((gpu)) || finish 3 "$why"
finish 0
