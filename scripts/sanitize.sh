#!/usr/bin/env bash
# Runs the emulated kernels under AddressSanitizer + UndefinedBehaviourSanitizer, and under ThreadSanitizer.
#
#   scripts/sanitize.sh [address|thread|all] [test filter]
#
# 1. The kernels and the emulator are compiled again with the sanitizer, into a shared library.
# 2. Each planted bug of kernels/test/bugs.cu that is this sanitizer's to find runs in a process of its own: not found = failure.
# 3. The tests of the crate run as they are, with IDDPM_EMULATOR_LIB naming that library. The filter picks tests; without one
#    all that launch kernels run.
# Needs g++ with its sanitizer libraries (Debian: in g++ itself). Objects are kept in target/sanitize.
set -euo pipefail
cd "$(dirname "$0")/.."
mode=${1:-all}
filter=${2:-}
case $mode in
    all) "$0" address "$filter"; exec "$0" thread "$filter" ;;
    address | thread) ;;
    *) echo "usage: scripts/sanitize.sh [address|thread|all] [test filter]" >&2; exit 2 ;;
esac
cxx=${CXX:-g++}
out=target/sanitize/$mode
mkdir -p "$out"

# ---- where Cargo put the test program and the wrapper of each kernel file ----
messages=$(cargo test --release --features emulator --test suite --no-run --message-format=json 2> "$out/cargo.log") || {
    cat "$out/cargo.log" >&2
    exit 1
}
suite=$(grep -o '"executable":"[^"]*/suite-[^"]*"' <<< "$messages" | tail -1 | cut -d'"' -f4)
wrappers=$(grep '"reason":"build-script-executed"' <<< "$messages" | grep -o '"out_dir":"[^"]*/iddpm-[^"]*"' | tail -1 | cut -d'"' -f4)/emulator

# ---- the kernels and the runtime under the sanitizer; the runtime itself is not watched for races, it reports for the kernels ----
flags="-std=c++20 -O1 -g -fPIC -DIDDPM_EMULATOR -Ikernels -fno-strict-aliasing -ffp-contract=off -fno-exceptions -w -Wno-psabi"
[ "$(uname -m)" = x86_64 ] && grep -qw avx2 /proc/cpuinfo && flags="$flags -march=x86-64-v3"
if [ "$mode" = address ]; then
    kernel_flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
    runtime_flags=$kernel_flags
    link_flags=$kernel_flags
    preload=$($cxx -print-file-name=libasan.so)
else
    kernel_flags="-fsanitize=thread -DEMU_TSAN"
    runtime_flags="-DEMU_TSAN"
    link_flags="-fsanitize=thread"
    preload=$($cxx -print-file-name=libtsan.so)
fi
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 UBSAN_OPTIONS=print_stacktrace=1
# The test program is not instrumented, so ThreadSanitizer does not see what orders its threads: only kernels are judged.
export TSAN_OPTIONS=halt_on_error=1:report_signal_unsafe=0:ignore_noninstrumented_modules=1

headers=$(cat kernels/*.cuh kernels/emu/*.h | cksum)
compile() { # source, flags: once per content
    local source=$1 content object
    content=$(cat "$source" "$(sed -n 's/^#include "\(.*\.cu\)"$/\1/p' "$source" | grep . || echo /dev/null)" | cksum)
    object=$out/$(basename "$source").$(echo "$headers $content $flags $2" | cksum | cut -d' ' -f1).o
    [ -e "$object" ] || { $cxx $flags $2 -c "$source" -o "$object.part" && mv "$object.part" "$object"; } || return 1
    echo "$object"
}
export -f compile
export cxx flags out headers
objects=$({ printf '%s\n' "$wrappers"/*.cpp | sed "s|\$|\t$kernel_flags|"
            printf '%s\n' kernels/emu/*.cpp kernels/test/bugs_main.cpp | sed "s|\$|\t$runtime_flags|"; } |
    xargs -d '\n' -P "$(nproc)" -I{} bash -c 'IFS=$'"'\\t'"' read -r source f <<< "$1"; compile "$source" "$f"' _ {})
main=$(grep bugs_main <<< "$objects")
rest=$(grep -v bugs_main <<< "$objects")
# -Bsymbolic: the library uses its own emulator, not the one linked into the test program.
$cxx -shared -Wl,-Bsymbolic $rest $link_flags -ldl -o "$out/libiddpm_emulator.so"
$cxx -rdynamic $main $rest $link_flags -ldl -o "$out/bugs"

# ---- planted bugs: name, blocks, order (0 forward, 1 reverse), copies (0 eager, 1 lazy), what the report must hold ----
if [ "$mode" = address ]; then
    planted="bug_global_read_past_end     1 0 1 AddressSanitizer
             bug_global_write_past_end    1 0 1 AddressSanitizer
             bug_shared_read_past_end     1 0 1 AddressSanitizer|out.of.bounds
             bug_dynamic_shared_past_end  1 0 1 AddressSanitizer
             bug_misaligned_vector        1 0 1 misaligned
             bug_shift_too_far            1 0 1 shift.exponent
             bug_exit_before_barrier      1 0 1 deadlock"
else
    planted="bug_missing_barrier          1 0 1 data.race
             bug_missing_second_barrier   1 0 1 data.race
             bug_missing_syncwarp         1 0 1 data.race
             bug_race_between_blocks      2 0 1 data.race
             bug_stage_released_early     1 0 1 data.race
             bug_divergent_barrier        1 0 1 divergent.barrier"
fi
failed=0
while read -r name blocks order copies expect; do
    report=$(timeout 120 "$out/bugs" "$name" "$blocks" "$order" "$copies" 2>&1) || true
    if grep -qE "$expect" <<< "$report"; then
        echo "found     $name ($mode)"
    else
        echo "NOT FOUND $name ($mode): $(head -3 <<< "$report" | tr '\n' ' ')"
        failed=1
    fi
done <<< "$planted"
report=$("$out/bugs" waste_none 1 0 1 2>&1) && [ "$report" = clean ] || { echo "a clean kernel is reported: $report"; failed=1; }

# ---- the tests; those that plant bugs or read the traffic meter have no meaning here ----
echo "tests under the $mode sanitizer:"
LD_PRELOAD=$preload IDDPM_EMULATOR_LIB=$PWD/$out/libiddpm_emulator.so "$suite" --test-threads=1 -q "${filter:-driver::}" \
    --skip driver::bugs --skip driver::traffic --skip driver::launches::errors_name --skip driver::launches::parallel_launches || failed=1
exit $failed
