"""Both sides beside each other: this project's steps and PyTorch's, timed in turn within the same seconds.

Run it by scripts/compare.sh. For every workload one process per side is started and warmed up. Then, whenever others leave the
machine alone, a block of ours and a block of one of PyTorch's variants are timed one after the other, about a quarter of a
second each. A pair counts if nobody else used more than 6 % of the cores during either. The ratio is the median over such
pairs of (PyTorch's time / ours), for the variant where it is smallest; it is given only if both sides ran the same network
(parameter count), batch and number of threads, at least five pairs count, the peer passes the golden vectors, and the losses
of both sides agree in a short training run. Otherwise the table says why not. On a machine that is never quiet,
--processor-time compares the processor seconds of one thread on each side, which others hardly change.
"""

import argparse
import datetime
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

from load import QUIET, Load

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FEWEST = 5  # undisturbed blocks or pairs that a median is taken over

EAGER = dict(precision="fp32", mode=None, graph=False)
COMPILED = dict(precision="fp32", mode="default", graph=False)
NCHW, NHWC = dict(layout="nchw", linear=False), dict(layout="nhwc", linear=True)
VARIANTS = {
    "P0 eager": {**EAGER, **NCHW, "batch_emb": False, "opt": "foreach"},
    "P0 eager, fused AdamW": {**EAGER, **NCHW, "opt": "fused"},
    "P1 channels_last": {**EAGER, **NHWC, "opt": "fused"},
    "P2 torch.compile": {**COMPILED, **NCHW, "opt": "fused"},
    "P2 torch.compile, channels_last": {**COMPILED, **NHWC, "opt": "fused"},
}


class Side:
    """One process that answers each line with a block's time."""

    def __init__(self, name, command, env):
        self.name, self.blocks, self.head = name, [], None
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
                                        text=True, env=env)

    def start(self):
        self.head = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            lines = self.errors.read().strip().splitlines() or [f"ended with status {self.process.returncode}"]
            raise RuntimeError(lines[-1][:300])
        return json.loads(line)

    def block(self):
        before = processor_seconds(self.process.pid)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        block = self.answer()
        after = processor_seconds(self.process.pid)
        block["processor_s"] = (after - before) / block["calls"] if after else None
        self.blocks.append(block)
        return block

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


def processor_seconds(pid):
    """Processor time of a process so far, all its threads together; 0 where the system does not tell."""
    total = 0
    for path in pathlib.Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[0])
        except OSError:  # a thread that has ended
            pass
    return total * 1e-9


def peer_side(o, name, workload):
    job = dict(VARIANTS[name], kind=workload["kind"], config=workload["config"], batch=workload["batch"], device="cpu",
               threads=o.threads, tiny=False, block_s=o.block_s)
    if workload["kind"] == "sample":
        job["sampler"] = workload["sampler"]
        job.pop("opt")
    path = pathlib.Path(o.scratch, f"{len(os.listdir(o.scratch))}.json")
    path.write_text(json.dumps(job))
    env = dict(os.environ, OMP_NUM_THREADS=str(o.threads), TORCHINDUCTOR_CACHE_DIR=str(HERE / ".venv" / "compiled"))
    return Side(name, [o.python, "-B", str(HERE / "worker.py"), "--serve", str(path)], env)


def our_side(o, workload):
    command = [o.binary, "bench", "serve", "--config", workload["config"], "--batch-size", str(workload["batch"]),
               "--block-seconds", str(o.block_s), "--threads", str(o.threads)]
    if workload["kind"] == "sample":
        command += ["--sampler", workload["sampler"]]
    return Side("iddpm", command, dict(os.environ))


def quiet(block):
    return block["foreign"] is None or block["foreign"] <= QUIET


def calm(seconds=0.3):
    """Whether others leave the cores alone just now."""
    before = Load()
    time.sleep(seconds)
    share = before.foreign(Load())
    return share is None or share <= QUIET


def wait(o, until):
    """Wait for a quiet machine, at most to the given time; processor time needs none."""
    while not o.processor_time and not calm() and time.monotonic() < until:
        time.sleep(1)


def run(o, workload):
    """All sides of one workload in turn; returns a row of the record."""
    label = " ".join(str(v) for v in workload.values())
    names = ["iddpm"]
    # The same as the next variant but for the optimiser, which sampling does not have.
    names += [n for n in o.variants if o.python and (workload["kind"] == "train" or n != "P0 eager, fused AdamW")]
    notes = {}
    ready = []
    for name in names:
        print(f"{label}: starting {name}", file=sys.stderr, flush=True)
        wait(o, time.monotonic() + o.limit_s / len(names))
        side = our_side(o, workload) if name == "iddpm" else peer_side(o, name, workload)
        try:
            side.start()
            ready.append(side)
        except (RuntimeError, json.JSONDecodeError) as error:
            notes[side.name] = f"not measured: {error}"
    ours = ready[0] if ready and ready[0].name == "iddpm" else None
    peers = [side for side in ready if side is not ours]
    row = dict(workload, threads=o.threads, sides={}, notes=notes)
    begin, rounds, pairs = time.monotonic(), 0, {side.name: [] for side in peers}
    # A round is, for each of PyTorch's variants, a block of ours and one of the variant's, in changing order.
    while ready and (rounds < FEWEST or time.monotonic() - begin < o.limit_s):
        for pair in [[ours, peer] for peer in peers] if ours and peers else [ready]:
            wait(o, begin + o.limit_s)
            blocks = {side.name: side.block() for side in (pair if rounds % 2 else pair[::-1])}
            if len(blocks) == 2 and all(map(o.counts, blocks.values())):
                pairs[pair[1].name].append(blocks[pair[1].name][o.clock] / blocks["iddpm"][o.clock])
        rounds += 1
        done = pairs.values() if pairs and ours else [[b for b in side.blocks if o.counts(b)] for side in ready]
        if all(len(x) >= o.rounds for x in done):
            break
    for side in ready:
        side.stop()
        row["sides"][side.name] = dict(side.head, **summary(o, side.blocks))
    row["rounds"] = rounds
    add_ratio(o, row, ours, peers, pairs)
    return row


def summary(o, blocks):
    """Milliseconds over the undisturbed blocks; over all of them, marked busy, if those are too few."""
    used = [b for b in blocks if o.counts(b)]
    busy = len(used) < FEWEST
    used = blocks if busy else used
    seconds, foreign = [b[o.clock] for b in used], [b["foreign"] for b in used if b["foreign"] is not None]
    median = statistics.median(seconds)
    return dict(ms=1e3 * median, min_ms=1e3 * min(seconds), max_ms=1e3 * max(seconds), spread=(max(seconds) - min(seconds)) / median,
                blocks=len(used), blocks_taken=len(blocks), busy=busy, foreign=statistics.median(foreign) if foreign else None)


def add_ratio(o, row, ours, peers, pairs):
    """The ratio to the fastest variant whose pairs count, or why there is none."""
    reason = o.no_ratio
    known = [side for side in peers if len(pairs[side.name]) >= FEWEST]
    if not ours:
        reason = row["notes"].get("iddpm", "our side did not run")
    elif not peers:
        reason = reason or "no variant of the peer ran"
    elif len(known) < len(peers):
        missing = [f"{s.name} ({len(pairs[s.name])})" for s in peers if s not in known]
        reason = reason or f"busy machine: fewer than {FEWEST} undisturbed pairs of blocks with {', '.join(missing)}"
    else:
        for side in peers:
            for what in ("params", "batch", "threads"):
                if side.head[what] != ours.head[what]:
                    reason = f"{side.name}: {side.head[what]} {what}, ours {ours.head[what]}"
    if reason:
        row["no_ratio"] = reason
        return
    ratios = {name: statistics.median(values) for name, values in pairs.items()}
    best = min(ratios, key=ratios.get)
    row.update(best_peer=best, ratio=ratios[best], ratios=ratios, pairs=len(pairs[best]), ratio_low=min(pairs[best]),
               ratio_high=max(pairs[best]))


def check_peer(o):
    """The golden vectors on the peer; returns (passed, last lines)."""
    out = subprocess.run([o.python, "-B", str(HERE / "check.py"), "--norm", "native"], capture_output=True, text=True,
                         env=dict(os.environ, OMP_NUM_THREADS="1"))
    return out.returncode == 0, out.stdout.strip().splitlines() or out.stderr.strip().splitlines()[-1:]


def curves(o):
    """Losses of a short training run on the same images on both sides, and whether they agree.

    The means over the second half must lie within four standard errors of each other, which are taken from the
    scatter of the means of ten steps: the two sides draw other weights, times and noise. One thread each: nothing is timed.
    """
    command = [o.binary, "bench", "curve", "--config", "t1", "--steps", str(o.curve_steps), "--threads", "1"]
    ours = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    job = dict(kind="curve", config="t1", batch=ours["batch"], steps=o.curve_steps, lr=ours["lr"], seed=0, device="cpu",
               threads=1, data=str(ROOT / "assets" / "digits-images-idx3-ubyte.gz"))
    source, target = pathlib.Path(o.scratch, "curve.json"), pathlib.Path(o.scratch, "losses.json")
    source.write_text(json.dumps(job))
    subprocess.run([o.python, "-B", str(HERE / "worker.py"), str(source), str(target)], check=True, capture_output=True)
    theirs = json.loads(target.read_text())
    if "losses" not in theirs:
        return dict(agree=False, why=theirs.get("note", "no losses"))
    halves = [x["losses"][len(x["losses"]) // 2:] for x in (ours, theirs)]
    means = [statistics.mean(h) for h in halves]
    error = math.sqrt(sum(statistics.variance(h) / len(h) for h in halves))
    return dict(agree=abs(means[0] - means[1]) <= 4 * error, steps=o.curve_steps, ours=means[0], peer=means[1],
                standard_error=error, losses=dict(ours=ours["losses"], peer=theirs["losses"]))


def machine():
    model = "unknown"
    try:
        with open("/proc/cpuinfo") as f:
            model = next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return dict(cpu=model, cores=os.cpu_count(), system=f"{platform.machine()} {platform.system()}", python=platform.python_version())


def commit():
    git = lambda *a: subprocess.run(["git", "-C", str(ROOT), *a], capture_output=True, text=True)
    try:
        head = git("rev-parse", "--short=12", "HEAD")
        if head.returncode:
            return "unknown"
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", "src", "Cargo.toml", "Cargo.lock", "build.rs").stdout
        return head.stdout.strip() + ("-dirty" if dirty.strip() else "")
    except OSError:
        return "unknown"


def markdown(record):
    """The record as Markdown: one table of training steps, one of reverse steps."""
    m, lines = record["machine"], []
    lines.append(f"{record['date']}, commit {record['commit']}, {m['cpu']} ({record['threads']} thread{'s' if record['threads'] > 1 else ''} of {m['cores']} cores, "
                 f"{m['system']}), {record['peer']}.")
    lines.append("")
    clock = "milliseconds, median over undisturbed blocks"
    if record["clock"] == "processor":
        clock = "milliseconds of one thread's processor time (the machine was shared), median over blocks"
    for kind, title in (("train", "Training step"), ("sample", "One reverse step")):
        rows = [r for r in record["rows"] if r["kind"] == kind]
        if not rows:
            continue
        names = list(dict.fromkeys(n for r in rows for n in [*r["sides"], *r["notes"]] if n != "iddpm"))
        head = ["config", "batch"] + (["sampler"] if kind == "sample" else []) + ["iddpm ms"] + [f"{n} ms" for n in names]
        head += ["ratio to the fastest", "range over pairs", "pairs"]
        lines += [f"**{title}**, {clock} (fastest in brackets), f32 on both sides", ""]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for r in rows:
            cell = lambda n: milliseconds(r["sides"].get(n))
            cells = [r["config"], str(r["batch"])] + ([r["sampler"]] if kind == "sample" else []) + [cell("iddpm")]
            cells += [cell(n) for n in names]
            if "ratio" in r:
                cells += [f"**{r['ratio']:.2f}**", f"{r['ratio_low']:.2f} to {r['ratio_high']:.2f}", str(r["pairs"])]
            else:
                cells += ["none", r["no_ratio"], "-"]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
        lines += [f"{r['config']}, {n}: {note}" for r in rows for n, note in r["notes"].items()]
    if record.get("golden"):
        lines.append(f"Peer against the golden vectors: {'passed' if record['golden']['passed'] else 'FAILED'}.")
    c = record.get("curves")
    if c and "ours" in c:
        lines.append(f"Mean loss over the second half of {c['steps']} steps of t1 on the same images: ours {c['ours']:.4f}, peer "
                     f"{c['peer']:.4f}, standard error of the difference {c['standard_error']:.4f}: "
                     f"{'they agree' if c['agree'] else 'they DISAGREE'}.")
    elif c:
        lines.append(f"Losses were not compared: {c['why']}.")
    return "\n".join(lines).rstrip() + "\n"


def milliseconds(side):
    if side is None:
        return "-"
    return f"{side['ms']:.3g} ({side['min_ms']:.3g}){' busy' if side['busy'] else ''}"


def workloads(o):
    for config in o.configs:
        yield dict(kind="train", config=config, batch=16)
    for config in o.sample_configs:
        for batch in o.batches:
            for sampler in o.samplers:
                yield dict(kind="sample", config=config, batch=batch, sampler=sampler)


def words(text):
    return [w for w in text.split(",") if w]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--binary", default=str(ROOT / "target" / "release" / "iddpm"))
    p.add_argument("--commit", help="what the program was built from, if not the working folder's commit")
    p.add_argument("--python", default="", help="a Python with PyTorch; empty: the peer is not measured")
    p.add_argument("--peer-missing", default="no PyTorch", help="why the peer is not measured")
    p.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    p.add_argument("--configs", type=words, default=["t1", "t2", "t3", "t4"], help="training steps, comma-separated")
    p.add_argument("--sample-configs", type=words, default=["t1", "t3"], help="reverse steps")
    p.add_argument("--batches", type=lambda t: [int(w) for w in words(t)], default=[1, 16])
    p.add_argument("--samplers", type=words, default=["ancestral"], help="ancestral,ddim")
    p.add_argument("--variants", type=words, default=["P0", "P1", "P2"], help="tiers of the peer")
    p.add_argument("--rounds", type=int, default=11, help="undisturbed pairs wanted with each variant")
    p.add_argument("--processor-time", action="store_true",
                   help="for a machine that is never quiet: one thread on each side, processor seconds instead of the clock's")
    p.add_argument("--limit-s", type=float, default=60, help="seconds per workload after which no round starts")
    p.add_argument("--block-s", type=float, default=0.25)
    p.add_argument("--curve-steps", type=int, default=300, help="of the short training run; 0: none, and no ratios")
    p.add_argument("--out", type=pathlib.Path, default=ROOT / "benches" / "record")
    p.add_argument("--name", default="cpu", help="name of the record's files")
    o = p.parse_args()
    if unknown := [w for w in o.variants if w not in ("P0", "P1", "P2")]:
        p.error(f"--variants {','.join(unknown)}: there are P0, P1, P2")
    o.clock, o.counts = ("processor_s", lambda block: True) if o.processor_time else ("s", quiet)
    o.threads = 1 if o.processor_time else o.threads
    o.variants = [n for n in VARIANTS if n.split()[0] in o.variants]
    record = measure(o)
    text = markdown(record)
    print(text)
    o.out.mkdir(parents=True, exist_ok=True)
    (o.out / f"{o.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (o.out / f"{o.name}.md").write_text(text)


def measure(o):
    record = dict(name=o.name, date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
                  commit=o.commit or commit(), machine=machine(), threads=o.threads, block_s=o.block_s, quiet=QUIET,
                  clock="processor" if o.processor_time else "wall", rows=[])
    with tempfile.TemporaryDirectory() as o.scratch:
        o.no_ratio = None
        if o.python:
            version = subprocess.run([o.python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True)
            record["peer"] = f"PyTorch {version.stdout.strip()}"
            print("peer: golden vectors", file=sys.stderr, flush=True)
            passed, lines = check_peer(o)
            record["golden"] = dict(passed=passed, output=lines)
            print("both sides: losses of a short training run", file=sys.stderr, flush=True)
            record["curves"] = curves(o) if o.curve_steps else dict(agree=False, why="--curve-steps 0")
            if not passed:
                o.no_ratio = "the peer fails the golden vectors"
            elif not record["curves"]["agree"]:
                o.no_ratio = "the losses of both sides were not shown to agree"
        else:
            record["peer"], o.no_ratio = f"peer not measured: {o.peer_missing}", o.peer_missing
        for workload in workloads(o):
            record["rows"].append(run(o, workload))
    return record


if __name__ == "__main__":
    main()
