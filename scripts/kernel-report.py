#!/usr/bin/env python3
"""What the compiler makes of the kernels: the figures of docs/kernels.md, without a GPU.

    scripts/setup-cuda.sh --tools               nvcc and cuobjdump, into folders of the project
    scripts/kernel-report.py                    every kernel: registers and spilled bytes on each architecture
    scripts/kernel-report.py conv2d attention   these files, also the loops of tensor-core products, from the machine code

A loop is a row: HMMA, LDSM and LDGSTS are its products, loads of fragments and asynchronous copies; `all` counts its instructions, `usual`
those outside of blocks of 20 or more that a branch may pass over and that copy nothing. Figures with a slash are of sm_80 / sm_90a.
"""
import collections, pathlib, re, subprocess, sys, tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
NVCC = ROOT / ".cuda/nvidia/cu13/bin/nvcc"
DUMP = ROOT / ".cuda-tools/nvidia/cu13/bin/cuobjdump"
ARCHS = ["sm_80", "sm_90a", "sm_100f", "sm_120f"]
BLOCK = 20


def compiled(file, arch, to):
    """Registers and spilled bytes of each kernel of a file; leaves the machine code in `to`."""
    command = [NVCC, f"-I{ROOT}/kernels", "-O3", "-std=c++17", "-cubin", f"-arch={arch}", "-Xptxas", "-v", "-o", to, ROOT / f"kernels/{file}.cu"]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    found, kernel = {}, None
    for line in report.splitlines():
        if m := re.search(r"Compiling entry function '(\S+)'", line):
            kernel = m[1]
        elif m := re.search(r"(\d+) bytes spill stores", line):
            spilled = int(m[1])
        elif m := re.search(r"Used (\d+) registers", line):
            found[kernel] = (int(m[1]), spilled)
    return found


def machine_code(cubin):
    """[(address, opcode, target of a branch)] of each kernel."""
    text = subprocess.run([DUMP, "-sass", cubin], check=True, capture_output=True, text=True).stdout
    kernels = {}
    for line in text.splitlines():
        if m := re.search(r"Function : (\S+)", line):
            code = kernels.setdefault(m[1], [])
        elif m := re.match(r"\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9!@]+)(.*)", line):
            target = re.search(r"BRA.* 0x([0-9a-f]+)", line.split("/* 0x")[0])
            code.append((int(m[1], 16), m[2], int(target[1], 16) if target else None))
    return kernels


def loops(code):
    """(HMMA, LDSM, LDGSTS, all, usual) of the innermost loops with products, in their order."""
    place = {address: i for i, (address, _, _) in enumerate(code)}
    back = [(place[to], i) for i, (at, _, to) in enumerate(code) if to in place and to < at]
    back = [(a, b) for a, b in back if any(op == "HMMA" for _, op, _ in code[a : b + 1])]
    rows = []
    for a, b in back:
        if any((c, d) != (a, b) and a <= c and d <= b for c, d in back):
            continue
        count, usual, i = collections.Counter(op for _, op, _ in code[a : b + 1]), 0, a
        while i <= b:
            usual += 1
            to = place.get(code[i][2], 0)
            passed = [op for _, op, _ in code[i + 1 : to]] if i < to <= b else []
            i = to if len(passed) >= BLOCK and "LDGSTS" not in passed else i + 1
        rows.append((count["HMMA"], count["LDSM"], count["LDGSTS"], b - a + 1, usual))
    return rows


def main(files):
    for tool in [NVCC, DUMP]:
        if not tool.exists():
            sys.exit(f"kernel-report.py: {tool.relative_to(ROOT)} was not found: run scripts/setup-cuda.sh --tools")
    known = sorted(path.stem for path in (ROOT / "kernels").glob("*.cu"))
    if unknown := set(files) - set(known):
        sys.exit(f"kernel-report.py: no kernels/{unknown.pop()}.cu; there are {', '.join(known)}")
    for file in files or known:
        with tempfile.TemporaryDirectory() as folder:
            cubin = {arch: pathlib.Path(folder) / arch for arch in ARCHS}
            resources = {arch: compiled(file, arch, cubin[arch]) for arch in ARCHS}
            code = {arch: machine_code(cubin[arch]) for arch in ARCHS[:2]} if files else {}
        for kernel in sorted(resources["sm_80"]):
            registers, spilled = zip(*(resources[arch][kernel] for arch in ARCHS))
            print(f"{kernel}: {' / '.join(map(str, registers))} registers, {' / '.join(map(str, spilled))} bytes spilled ({', '.join(ARCHS)})")
            pair = [loops(code[arch][kernel]) for arch in code]
            for old, new in zip(*pair) if pair else []:
                print(f"    HMMA {new[0]}, LDSM {new[1]}, LDGSTS {new[2]}, all {old[3]} / {new[3]}, usual {old[4]} / {new[4]}")


main(sys.argv[1:])
