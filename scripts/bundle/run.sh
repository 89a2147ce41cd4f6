#!/usr/bin/env bash
# Runs one stage of the bundle that scripts/gpu-bundle.sh packs; each ends within nine minutes in one summary table.
#
#   ./run.sh check|bench|peer|compare|train RESULTS [--minutes M] [--work FOLDER] [--python PYTHON] [--data IMAGES] [-- FLAGS]
#
#   check     every test of kernels on the GPU, each in a process of its own; then under compute-sanitizer's memcheck and racecheck
#   bench     ceilings, gaps, caches and clocks; training steps, ops, sampling, start-up, memory
#   peer      PyTorch's parts: ceilings, cuDNN's convolutions, attention, group norm, loss, optimiser, start-up
#   compare   both sides in turn: call it again until its table is complete
#   train     a training run with samples (IMAGES: any set that `iddpm train --data-dir` takes; default: built-in digits)
#
# RESULTS gets STAGE.txt, the summary, and STAGE.tgz, all logs and records, both written anew after each part and every 20
# seconds, so that a call that is killed leaves what it had. --minutes: the length of this call (9). FOLDER keeps what later calls
# go on from (~/.cache/iddpm-bundle); on a new machine `compare` goes on from the compare.tgz, and the compiler-cache.tgz where it
# is small enough, that it finds in RESULTS or beside this file.
# peer and compare need a PYTHON with torch (python3). FLAGS go to benches/peer/compare.py, or to `iddpm train`.
# Without a GPU every stage does what it can on the processor, at toy sizes. Order of a first day: docs/performance.md.
# Exit status: 0 all well, 1 something failed, 2 wrong use, 3 no device, or not measured: what needs none ran.
set -uo pipefail
usage() { sed -n '2,19s/^# \{0,1\}//p' "$0" >&2; exit 2; }
stage=${1:-} results=${2:-}
[[ $stage =~ ^(check|bench|peer|compare|train)$ && -n $results && $results != -* ]] || usage
shift 2
python=python3 data=() minutes=9 work=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/iddpm-bundle
while (($#)); do
    case $1 in
        --python) python=${2:?--python needs a program}; shift 2 ;;
        --data) data=(--data-dir "$(realpath "${2:?--data needs a path}")"); shift 2 ;;
        --minutes) minutes=${2:?--minutes needs a number}; shift 2 ;;
        --work) work=${2:?--work needs a folder}; shift 2 ;;
        --) shift; break ;;
        *) usage ;;
    esac
done
flags=("$@")
[[ $minutes =~ ^[1-9][0-9]*$ ]] || { echo "run.sh: --minutes $minutes: a whole number of minutes is needed" >&2; exit 2; }
deadline=$((SECONDS + 60 * minutes - 10))
mkdir -p "$results" "$work" || exit 1
results=$(realpath "$results") work=$(realpath "$work")
[[ $python != */* ]] || python=$(realpath -s "$python")
here=$(realpath "$(dirname "$0")") log=$work/$stage
root=$work/bundle-$(cksum <"$here/payload.tgz" | cut -d' ' -f1)
if [[ ! -d $root ]]; then
    rm -rf "$work"/bundle-*
    mkdir "$root.part" && tar -xzf "$here/payload.tgz" -C "$root.part" && mv "$root.part" "$root" || exit 1
fi
cd "$root" || exit 1
export CARGO_MANIFEST_DIR=$root CARGO_BIN_EXE_iddpm=$root/bin/iddpm CRITERION_HOME=$work/criterion PYTHONUNBUFFERED=1
IDDPM_COMMIT=$(sed -n 's/^commit //p' BUNDLE)
export IDDPM_COMMIT root
[[ $stage == compare ]] || rm -rf "$log"
if [[ ! -d $log ]]; then
    for earlier in "$results" "$here"; do
        [[ $stage == compare && -f $earlier/compare.tgz ]] || continue
        tar -xzf "$earlier/compare.tgz" -C "$work"
        [[ ! -f $earlier/compiler-cache.tgz ]] || tar -xzf "$earlier/compiler-cache.tgz" -C "$work"
        break
    done
fi
mkdir -p "$log"
names=() states=() times=() notes=()
failed=0 unmeasured= device=none

# ---- what comes back ----

summary() {
    echo
    echo "stage $stage, $(date -u +%Y-%m-%dT%H:%M:%SZ), $(tr '\n' ',' <BUNDLE | sed 's/,$//; s/,/, /g')"
    echo "device: $device"
    printf '%-34s %-8s %6s  %s\n' step state s note
    for i in "${!names[@]}"; do
        printf '%-34s %-8s %6s  %s\n' "${names[i]}" "${states[i]}" "${times[i]}" "${notes[i]}"
    done
}

# Everything but checkpoints and what the compiler keeps; written beside, then renamed, so that a kill leaves a whole file.
pack() {
    tar -czf "$work/$stage.part" -C "$work" --exclude=compiler-cache --exclude='*.safetensors' "$stage" 2>/dev/null
    cp "$work/$stage.part" "$results/.$stage.part" && mv "$results/.$stage.part" "$results/$stage.tgz"
}

record() {
    names+=("$1") states+=("$2") times+=("$3") notes+=("${4:0:110}")
    summary >"$results/$stage.txt"
    pack
}

skip() { record "$1" "not run" 0 "$2"; }

# finish STATUS [LAST LINE]
finish() {
    { summary; [[ -z ${2:-} ]] || echo "$2"; } | tee "$results/$stage.txt"
    pack
    exit "$1"
}

# Packs every 20 seconds while a part runs.
packing() { while sleep 20; do pack; done; }
packer= child=
quit() { kill $packer 2>/dev/null; }
trap quit EXIT
trap 'kill $child 2>/dev/null; finish 1 "stopped by a signal"' TERM INT HUP

# ---- parts ----

# step NAME LIMIT COMMAND...: runs it into its own log, at most LIMIT seconds and not beyond the deadline.
step() {
    local name=$1 limit=$2 left=$((deadline - SECONDS)) start=$SECONDS state note status
    shift 2
    if ((left < 5)); then
        record "$name" skipped 0 "no time left"
        return 1
    fi
    echo "== $name" >&2
    packing &
    packer=$!
    timeout --kill-after=5 "$((limit < left ? limit : left))" "$@" >"$log/$name.txt" 2>&1 </dev/null &
    child=$!
    wait $child
    status=$?
    quit
    note=$(grep -aE '^test result|^error|panicked|nothing is measured' "$log/$name.txt" | tail -1)
    case $status in
        0) state=ok ;;
        3) state="not run" unmeasured=${note:-$name} ;;
        124 | 137) state=stopped note="after $((SECONDS - start)) s" failed=1 ;;
        *) state=FAILED note="${note:-$(tail -1 "$log/$name.txt")}" failed=1 ;;
    esac
    record "$name" "$state" $((SECONDS - start)) "$note"
    return $status
}

# one_test TEST FOLDER LIMIT END COMMAND...: one line of the states: ok, FAILED, found (by the sanitizer), stopped or late.
one_test() {
    local test=$1 out=$2/${1//::/.}.txt limit=$3 left=$(($4 - $(date +%s))) state=ok folder=$2
    shift 4
    ((left >= limit)) || limit=$left
    if ((limit < 5)); then
        state=late
    else
        timeout --kill-after=3 "$limit" "$@" "$root/test-programs/suite" --exact "$test" --test-threads=1 >"$out" 2>&1 </dev/null
        case $? in 0) ;; 124 | 137) state=stopped ;; 99) state=found ;; *) state=FAILED ;; esac
    fi
    # A GPU reports an error late: once more, waiting after each launch, to name the kernel.
    if [[ $state == FAILED && ${IDDPM_TEST_DEVICE:-} == cuda && $# == 0 ]]; then
        { echo; echo "---- again with IDDPM_SYNC=1"; } >>"$out"
        IDDPM_SYNC=1 timeout --kill-after=3 "$limit" "$root/test-programs/suite" --exact "$test" --test-threads=1 >>"$out" 2>&1 </dev/null
    fi
    [[ $state == ok || $state == late ]] || echo "   $state $test" >&2
    echo "$state $test" >>"$folder/states"
}
export -f one_test

# tests NAME LIMIT SECONDS COMMAND...: the tests named on standard input, each in a process of its own and several at a time, so
# that a crash, a hang or a GPU that is lost costs one of them. LIMIT seconds for one, SECONDS for all.
tests() {
    local name=$1 limit=$2 left=$((deadline - SECONDS)) start=$SECONDS folder=$log/$1 counts state=ok first
    local seconds=$(($3 < left ? $3 : left))
    shift 3
    mkdir -p "$folder"
    cat >"$folder/list"
    : >"$folder/states"
    echo "== $name" >&2
    packing &
    packer=$!
    xargs -a "$folder/list" -d '\n' -P "$jobs" -I{} bash -c 'one_test "$@"' _ {} "$folder" "$limit" $(($(date +%s) + seconds)) "$@" &
    child=$!
    wait $child
    quit
    count() { grep -c "^$1 " "$folder/states"; }
    counts="$(count ok) ok, $(count FAILED) failed, $(count stopped) stopped, $(count late) without time"
    [[ $(count found) == 0 ]] || counts+=", $(count found) with a report"
    if first=$(grep -m1 -E '^(FAILED|found) ' "$folder/states"); then
        state=FAILED failed=1 counts+="; first: ${first#* }"
    elif (($(count ok) == 0)); then
        state=FAILED failed=1
    elif (($(count stopped) > 0)); then
        state=stopped
        [[ $# != 0 ]] || failed=1 # under a sanitizer a long test is no wonder
    fi
    grep -vE '^(ok|late) ' "$folder/states" >"$folder/failures"
    record "$name" "$state" $((SECONDS - start)) "$counts"
}

# ---- the device: what the driver shows, and whether this program can use it ----

why=
if ! command -v nvidia-smi >/dev/null; then
    why="no device: nvidia-smi was not found, so there is no NVIDIA driver here"
elif ! device=$(timeout 30 nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,memory.total --format=csv,noheader 2>&1 | head -1) ||
    [[ -z $device || $device == *[Ff]ailed* || $device == *"No devices"* ]]; then
    why="no device: nvidia-smi says: ${device:-nothing}" device=none
elif ! timeout 90 bin/iddpm bench serve --device cuda --config t0 --batch-size 1 --block-seconds 0 >"$log/device.txt" 2>&1 </dev/null; then
    why="no device for this program: $(tail -1 "$log/device.txt")"
fi
gpu=0
[[ -n $why ]] || gpu=1
where=cpu
((gpu == 0)) || where=cuda
cores=$(nproc)

# needs_torch: ends the stage where the Python has no PyTorch.
needs_torch() {
    python_path=$(command -v "$python") && timeout 120 "$python" -c 'import torch, numpy, safetensors' 2>"$log/torch.txt" </dev/null ||
        finish 3 "not measured: $python has no torch, numpy or safetensors, or is not there: name another with --python"
}

# The tests that run kernels, on the device that IDDPM_TEST_DEVICE names; those that only the emulator's meter can tell are left out.
all_tests() { test-programs/suite --list --format terse 2>/dev/null | sed -n 's/: test$//p'; }
kernel_tests() {
    all_tests |
        grep -E '^(driver::(warp|hopper)::|driver::launches::(copy|fills|graphs)|cuda_|golden::|steps::|diffusers::the_network|diffusion::solvers::the_kernel|train::|network::|runs::(images|a_run|a_failed|a_guarded))' |
        grep -vE 'traffic|moves?_what|reads_its_input_once|refused|planted|keeps_its_promises|weights_are_rounded_once|declares_what' |
        awk '{ print (/^driver/ ? 0 : /^cuda_(ops|small)/ ? 1 : /^cuda_(norm|conv|attention)/ ? 2 : /^golden/ ? 3 : 4), $0 }' | sort -s -n -k1,1 | cut -d' ' -f2
}

sanitizer() {
    command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer /usr/local/cuda*/compute-sanitizer/compute-sanitizer \
        /opt/nvidia/*/compute-sanitizer /opt/cuda/bin/compute-sanitizer 2>/dev/null | head -1
}

case $stage in
check)
    step doctor 30 bin/iddpm doctor
    if ((gpu)); then
        jobs=$((cores < 8 ? cores : 8))
        export IDDPM_TEST_DEVICE=cuda RAYON_NUM_THREADS=2
        tests cuda-suite 60 240 < <(kernel_tests)
        tool=$(sanitizer)
        for check in memcheck racecheck; do
            if [[ -n $tool ]]; then
                seconds=$((deadline - SECONDS))
                [[ $check == racecheck ]] || seconds=$((seconds / 2))
                tests "cuda-$check" 90 $seconds "$tool" --tool $check --error-exitcode 99 --print-limit 10 \
                    < <(kernel_tests | grep -E '^(driver|cuda_)')
            else
                skip "cuda-$check" "compute-sanitizer was not found: no part of this was checked"
            fi
        done
    else
        skip cuda-suite "$why"
        skip cuda-memcheck "no device"
        skip cuda-racecheck "no device"
        jobs=$cores
        export IDDPM_TEST_DEVICE=cpu RAYON_NUM_THREADS=1
        step cpu-library 120 test-programs/iddpm-lib
        tests cpu-suite 120 500 < <(all_tests)
    fi
    ;;
bench)
    configs=(t1 t3)
    ((gpu == 0)) || configs=(cifar10 imagenet64 tiny imagenet64-cond lsun256)
    first=${configs[0]}
    step "$where-ceilings" 60 bin/iddpm bench ceilings --device $where --json "$log/ceilings.json"
    for config in "${configs[@]:0:3}"; do
        step "$where-step-$config" 60 bin/iddpm bench step --device $where --config "$config" --json "$log/step-$config.json"
    done
    step "$where-kernels-$first" 60 bin/iddpm bench kernels --device $where --config "$first" --json "$log/kernels-$first.json"
    step "$where-sample-$first" 100 bin/iddpm bench sample --device $where --config "$first" --limit-seconds 3 --json "$log/sample-$first.json"
    step "$where-startup" 60 bin/iddpm bench startup --device $where --config "$first" --blocks 3 --json "$log/startup.json"
    step "$where-memory" 60 bin/iddpm bench memory --device $where --config "$first" --json "$log/memory.json"
    if ((gpu)); then
        for config in "${configs[@]:3}"; do
            step "cuda-step-$config" 60 bin/iddpm bench step --device cuda --config "$config" --json "$log/step-$config.json"
        done
        step cuda-kernels-imagenet64 60 bin/iddpm bench kernels --device cuda --config imagenet64 --batch-size 64 \
            --json "$log/kernels-imagenet64.json"
        step cuda-sample-imagenet64 100 bin/iddpm bench sample --device cuda --config imagenet64 --limit-seconds 2 --json "$log/sample-imagenet64.json"
    else
        for program in bench-programs/*; do
            step "$(basename "$program")" 100 "$program" --bench --warm-up-time 0.3 --measurement-time 0.5 --sample-size 10
        done
    fi
    ;;
peer)
    needs_torch
    toy=()
    ((gpu)) || toy=(--device cpu --tiny)
    step peer-golden 120 "$python" -B benches/peer/check.py --norm native
    step peer-ceilings-conv 240 "$python" -B benches/peer/measure.py --stage ceilings conv "${toy[@]}" --budget 230 --out "$log"
    step peer-parts 180 "$python" -B benches/peer/measure.py --stage micro "${toy[@]}" --budget 170 --out "$log"
    step peer-startup 120 "$python" -B benches/peer/measure.py --stage startup "${toy[@]}" --budget 110 --out "$log"
    ;;
compare)
    left_minutes() { local tenths=$(((deadline - SECONDS - 20) * 10 / 60)); echo "$((tenths / 10)).$((tenths % 10))"; }
    needs_torch
    if ((gpu)); then
        [[ -d $log/work/compiler-cache ]] ||
            step peer-warm 150 "$python" -B benches/peer/measure.py --stage warm --configs cifar10 --budget 140 --out "$log/work"
        step cuda-both 3600 "$python" -B benches/peer/compare.py --device cuda --binary bin/iddpm --python "$python_path" --resume \
            --limit-minutes "$(left_minutes)" --work "$log/work" --out "$log" "${flags[@]}"
        cat "$log/cuda.md" 2>/dev/null
        tar -czf "$work/cache.part" -C "$work" compare/work/compiler-cache 2>/dev/null &&
            (($(stat -c %s "$work/cache.part") < 15 << 20)) && cp "$work/cache.part" "$results/compiler-cache.tgz"
    else
        step cpu-both 3600 "$python" -B benches/peer/compare.py --binary bin/iddpm --python "$python_path" --configs t1,t3 \
            --sample-configs t1 --batches 16 --variants P0,P1 --limit-s 40 --limit-minutes "$(left_minutes)" --work "$log/work" --out "$log" "${flags[@]}"
        cat "$log/cpu.md" 2>/dev/null
    fi
    ;;
train)
    train=$((minutes > 2 ? minutes - 2 : 1))
    step "$where-train" $((60 * train + 45)) bin/iddpm train --device $where "${data[@]}" --minutes $train --out "$log/run" "${flags[@]}"
    step "$where-sample" 60 bin/iddpm sample --device $where --model-path "$log/run" --num-samples 16 --use-ddim \
        --timestep-respacing 50 --out "$log/samples"
    ;;
esac

((failed == 0)) || finish 1
((gpu)) || finish 3 "$why"
[[ -z $unmeasured ]] || finish 3 "$unmeasured"
finish 0
