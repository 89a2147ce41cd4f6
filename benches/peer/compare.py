"""Both sides beside each other: this project's steps and PyTorch's, timed in turn within the same seconds.

Run it by scripts/compare.sh. For every workload one process per side is started and warmed up. Then a block of ours and a block
of one of PyTorch's variants are timed one after the other, about a quarter of a second each. A pair counts if nothing disturbed
it: on a processor, if nobody else used more than 6 % of the cores during either block; on a GPU, if the clock of its
multiprocessors was the same within 3 %. The ratio is the median over such pairs of (PyTorch's time / ours), for the variant where
it is smallest. It is given only if both sides ran the same network (parameter count), batch, precision and number of threads, at
least five pairs count, nobody else used the GPU before and after, the peer passes the golden vectors, and the losses of both
sides agree in a short training run. Otherwise the table says why not.

On a GPU the fastest variant, P3, is first looked for by a sweep (measure.py); what it tried is kept in --work and in the
record. A call ends within --limit-minutes; with --resume the next one keeps finished rows and goes on.

Exit status 3: nothing could be measured. On a machine that is never quiet, --processor-time compares the processor seconds
of one thread on each side, which others hardly change. --toy runs everything on the emulator and the processor, and compares nothing.
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

import gpu
import sides
import tiers
from load import QUIET, Load
from tables import markdown

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FEWEST = 5  # undisturbed blocks or pairs that a median is taken over
SAME_LOSS = 0.05  # share by which the loss curves of both sides may differ
PATIENCE_S = dict(cpu=1800, cuda=180)  # seconds that a check may take
LEAST_S = 45  # seconds left under which no workload is started on a GPU


def say(text):
    print(text, file=sys.stderr, flush=True)


def quiet(block):
    return block["foreign"] is None or block["foreign"] <= QUIET


def calm(seconds=0.3):
    """Whether others leave the cores alone just now."""
    before = Load()
    time.sleep(seconds)
    share = before.foreign(Load())
    return share is None or share <= QUIET


def wait(o, until):
    """Wait for a quiet machine, at most to the given time; only the processor's own time needs it."""
    while o.device == "cpu" and not o.processor_time and not calm() and time.monotonic() < until:
        time.sleep(1)


def counts(o, block):
    return o.device == "cuda" or o.processor_time or quiet(block)


def pair_counts(o, a, b):
    """Whether nothing disturbed two blocks that were taken one after the other."""
    if o.device != "cuda":
        return counts(o, a) and counts(o, b)
    return o.toy or (a["sm_mhz"] is not None and b["sm_mhz"] is not None and gpu.same_clock(a["sm_mhz"], b["sm_mhz"]))


def variants(o, workload):
    """Groups of PyTorch's variants that are timed together: all of them on a processor, one at a time on a GPU."""
    if not o.python:
        return []
    if o.device == "cpu":
        # The second differs from the first by the optimiser alone, which sampling does not have.
        names = [n for n in o.variants if workload["kind"] == "train" or n != "P0 eager, fused AdamW"]
        return [[(name, tiers.CPU[name]) for name in names]]
    known = tiers.named_tiers(workload["kind"])
    return [[(name, known.get(name))] for name in o.variants]


def run(o, workload):
    """All sides of one workload in turn; returns a row of the record."""
    label = " ".join(str(v) for v in workload.values())
    row = dict(workload, threads=o.threads, sides={}, notes={})
    why = gpu.in_use() if o.device == "cuda" and not o.toy else None
    if why:
        return dict(row, no_ratio=why, notes={"iddpm": f"not measured: {why}"})
    groups = variants(o, workload)
    if o.device == "cuda" and tiers.P3 in o.variants and o.python:
        row["p3"] = sweep(o, workload)
        groups = [[(n, row["p3"]["options"] if n == tiers.P3 else options) for n, options in g] for g in groups]
    begin, pairs, timed = time.monotonic(), {}, []
    ours = start(o, label, sides.ours(o, workload), row["notes"])
    for group in groups or [[]]:
        peers = [start(o, label, sides.peer(o, name, options, workload), row["notes"]) for name, options in group]
        peers = [p for p in peers if p]
        interleave(o, row, ours, peers, pairs, o.limit_s * len(group or [0]) / max(1, sum(map(len, groups))))
        for peer in peers:
            peer.stop()
        timed += peers
    if ours:
        ours.stop()
    for side in [ours, *timed]:
        if side and side.blocks:
            row["sides"][side.name] = dict(side.head, **summary(o, side.blocks))
    row["seconds"] = time.monotonic() - begin
    why = gpu.in_use() if o.device == "cuda" and not o.toy else None
    add_ratio(o, row, ours, timed, pairs, why)
    row["unfinished"] = any("no time left" in note or note.startswith("stopped") for note in row["notes"].values()) or \
        ("p3" in row and row["p3"]["tried"] < row["p3"]["of"])
    return row


def start(o, label, side, notes):
    """The side once it has answered, or None with a note why it did not."""
    say(f"{label}: starting {side.name}")
    wait(o, time.monotonic() + o.limit_s / 4)
    try:
        side.start(o.end)
        return side
    except (RuntimeError, json.JSONDecodeError) as error:
        notes[side.name] = f"not measured: {error}"
        side.process.kill()
        side.process.wait()
        return None


def interleave(o, row, ours, peers, pairs, limit_s):
    """Rounds of blocks in changing order: for each peer a block of ours and one of its own; or of whichever side there is."""
    ready = [side for side in [ours, *peers] if side]
    pairs.update({peer.name: [] for peer in peers})
    begin, rounds = time.monotonic(), 0
    until = min(begin + limit_s, o.end or math.inf)
    # Nothing depends on a time in a toy run.
    fewest, wanted = (2, 2) if o.toy else (FEWEST, o.rounds)
    while ready and (rounds < fewest or time.monotonic() < until):
        for pair in [[ours, peer] for peer in peers] if ours and peers else [ready]:
            wait(o, until)
            blocks = taken(o, row, pair if rounds % 2 else pair[::-1])
            if blocks is None:
                return
            if ours and peers:
                mine, theirs = blocks["iddpm"], blocks[pair[1].name]
                if pair_counts(o, mine, theirs):
                    pairs[pair[1].name].append(None if o.toy else theirs[o.clock] / mine[o.clock])
        rounds += 1
        done = [pairs[peer.name] for peer in peers] if ours and peers else [[b for b in s.blocks if counts(o, b)] for s in ready]
        if all(len(x) >= wanted for x in done):
            break
    row["rounds"] = row.get("rounds", 0) + rounds


def taken(o, row, pair):
    """A block of each side, or None with a note about the side that gave none."""
    blocks = {}
    for side in pair:
        try:
            blocks[side.name] = side.block(o.watch)
        except (RuntimeError, BrokenPipeError, json.JSONDecodeError) as error:
            row["notes"][side.name] = f"stopped: {error}"
            return None
    return blocks


def summary(o, blocks):
    """Milliseconds over the undisturbed blocks; over all of them, marked busy, if those are too few. No time in a toy run."""
    used = [b for b in blocks if counts(o, b)]
    busy = len(used) < FEWEST
    used = blocks if busy else used
    clocks = [b["sm_mhz"] for b in blocks if b.get("sm_mhz")]
    common = dict(blocks=len(used), blocks_taken=len(blocks), sm_mhz=[min(clocks), max(clocks)] if clocks else None)
    if o.toy:
        return dict(common, ms=None, busy=False)
    seconds, foreign = [b[o.clock] for b in used], [b["foreign"] for b in used if b["foreign"] is not None]
    median = statistics.median(seconds)
    return dict(common, ms=1e3 * median, min_ms=1e3 * min(seconds), max_ms=1e3 * max(seconds),
                spread=(max(seconds) - min(seconds)) / median, busy=busy,
                foreign=statistics.median(foreign) if foreign else None)


def add_ratio(o, row, ours, peers, pairs, used_after):
    """The ratio to the fastest variant of the same precision, or why there is none."""
    row["precisions"] = {side.name: side.head["precision"] for side in [ours, *peers] if side}
    same = [p for p in peers if ours and p.head["precision"] == ours.head["precision"]]
    few = [f"{p.name} ({len(pairs[p.name])})" for p in same if len(pairs[p.name]) < FEWEST]
    reason = o.no_ratio or used_after
    if not ours or "iddpm" in row["notes"]:
        reason = row["notes"].get("iddpm", "our side did not run")
    elif not same:
        reason = reason or "no variant of the peer ran" + (f" in {ours.head['precision']}" if peers else "")
    elif missing := [n for n in row["notes"] if o.device == "cuda" and not n.startswith("P0")]:
        reason = reason or f"{missing[0]} was not measured"
    elif few and not o.toy:
        what = "the clock changed or is not known" if o.device == "cuda" else "busy machine"
        reason = reason or f"{what}: fewer than {FEWEST} undisturbed pairs of blocks with {', '.join(few)}{clock_range(row)}"
    else:
        for side in same:
            for what in ("params", "batch") + (("threads",) if o.device == "cpu" else ()):
                if side.head[what] != ours.head[what]:
                    reason = f"{side.name}: {side.head[what]} {what}, ours {ours.head[what]}"
    if reason:
        row["no_ratio"] = reason
        return
    ratios = {p.name: statistics.median(pairs[p.name]) for p in same}
    best = min(ratios, key=ratios.get)
    row.update(best_peer=best, ratio=ratios[best], ratios=ratios, pairs=len(pairs[best]), ratio_low=min(pairs[best]),
               ratio_high=max(pairs[best]))


def clock_range(row):
    ranges = [s["sm_mhz"] for s in row["sides"].values() if s["sm_mhz"]]
    return f" ({min(r[0] for r in ranges):.0f} to {max(r[1] for r in ranges):.0f} MHz)" if ranges else ""


def sweep(o, workload):
    """Looks for the fastest variant by measure.py, at most --sweep-minutes and half of what is left, in the folder --work."""
    kind, config, batch = workload["kind"], workload["config"], workload["batch"]
    tables = o.work / "results.json"
    have = lambda: tiers.best_of_sweep(json.loads(tables.read_text()) if tables.exists() else {}, kind, config, batch)
    found = have()
    seconds = min(60 * o.sweep_minutes, (o.end - time.monotonic()) / 2 if o.end else math.inf)
    if found["tried"] < found["of"] and seconds > 10:
        say(f"{kind} {config} {batch}: looking for the fastest variant, {seconds:.0f} s at most")
        command = [o.python, "-B", str(HERE / "measure.py"), "--stage", kind, "--configs", config, "--batches", str(batch),
                   "--sweep-only", "--budget", str(seconds), "--out", str(o.work), "--device", o.peer_device]
        finished(command + (["--tiny"] if o.toy else []), seconds + 30)
        found = have()
    return found


def finished(command, seconds, **more):
    """A process that has ended; one that does not end in time is ended, with status 124 and that as its last word."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds, **more)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer within {seconds:.0f} s")


def check_peer(o):
    """The golden vectors on the peer; returns (passed, last lines)."""
    out = finished([o.python, "-B", str(HERE / "check.py"), "--norm", "native"], PATIENCE_S[o.device],
                   env=dict(os.environ, OMP_NUM_THREADS="1" if o.device == "cpu" else "8"))
    return out.returncode == 0, out.stdout.strip().splitlines() or out.stderr.strip().splitlines()[-1:]


def curves(o):
    """Losses of a short training run on the same images on both sides, means of ten steps, and whether they agree.

    The two sides draw other weights, times and noise. On a processor one thread each: nothing is timed.
    """
    one, images = ["--threads", "1"] if o.device == "cpu" else [], str(pathlib.Path(o.scratch, "images.npz"))
    command = [o.binary, "bench", "curve", *o.our_device, "--config", o.curve_config, "--steps", str(o.curve_steps), *one,
               "--images", images]
    done = finished(command + (["--batch-size", "1"] if o.toy else []), PATIENCE_S[o.device])
    if done.returncode:
        return dict(agree=False, why=f"our side ended with {(done.stderr.strip().splitlines() or ['nothing'])[-1][:200]}")
    ours = json.loads(done.stdout)
    job = dict(kind="curve", config=o.curve_config, batch=ours["batch"], steps=o.curve_steps, lr=ours["lr"], seed=0,
               device=o.peer_device, threads=1 if o.device == "cpu" else None,
               precision="autocast" if ours["precision"] == "bf16" and not o.toy else "fp32", data=images)
    source, target = pathlib.Path(o.scratch, "curve.json"), pathlib.Path(o.scratch, "losses.json")
    source.write_text(json.dumps(job))
    done = finished([o.python, "-B", str(HERE / "worker.py"), str(source), str(target)], PATIENCE_S[o.device])
    theirs = json.loads(target.read_text()) if target.exists() else {}
    if "losses" not in theirs:
        return dict(agree=False, why=theirs.get("note", (done.stderr.strip().splitlines() or ["the peer gave no losses"])[-1][:200]))
    return dict(agreement(ours["losses"], theirs["losses"]), config=o.curve_config, steps=o.curve_steps, precision=ours["precision"])


def agreement(ours, theirs):
    """Whether two loss curves, each of means of ten steps, agree: the middle of their ratios lies within 5 % of 1.

    The middle, because one image at a small t can multiply the mean loss of its ten steps.
    """
    ratios = sorted(b / a for a, b in zip(ours, theirs))
    middle, quartiles = statistics.median(ratios), [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]]
    return dict(agree=abs(middle - 1) <= SAME_LOSS, middle=middle, quartiles=quartiles, losses=dict(ours=ours, peer=theirs))


def machine():
    model = "unknown"
    try:
        with open("/proc/cpuinfo") as f:
            model = next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return dict(cpu=model, cores=os.cpu_count(), system=f"{platform.machine()} {platform.system()}", python=platform.python_version())


def commit():
    if "IDDPM_COMMIT" in os.environ:
        return os.environ["IDDPM_COMMIT"]
    git = lambda *a: subprocess.run(["git", "-C", str(ROOT), *a], capture_output=True, text=True)
    try:
        head = git("rev-parse", "--short=12", "HEAD")
        if head.returncode:
            return "unknown"
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", "src", "kernels", "Cargo.toml", "Cargo.lock", "build.rs").stdout
        return head.stdout.strip() + ("-dirty" if dirty.strip() else "")
    except OSError:
        return "unknown"


def workloads(o):
    for config in o.configs:
        yield dict(kind="train", config=config, batch=o.train_batch)
    for config in o.sample_configs:
        for batch in o.batches:
            for sampler in o.samplers:
                yield dict(kind="sample", config=config, batch=batch, sampler=sampler)


def refusal(o):
    """Why nothing at all can be measured here, or None."""
    if o.device == "cpu" or o.toy:
        return None
    if not o.python:
        return f"the peer cannot be measured: {o.peer_missing}"
    if not gpu.describe():
        return "no device: nvidia-smi shows no GPU"
    if why := gpu.in_use():
        return why
    return peer_refuses(o) or we_refuse(o)


def peer_refuses(o):
    probe = "import torch; assert torch.cuda.is_available(), 'PyTorch sees no GPU'; print(torch.cuda.get_device_capability()[0])"
    done = finished([o.python, "-c", probe], PATIENCE_S[o.device])
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["PyTorch does not start"])[-1]
    older = f"compute capability {done.stdout.strip()}.x: both sides compute in bf16, which needs 8.0"
    return older if int(done.stdout) < 8 else None


def we_refuse(o):
    command = [o.binary, "bench", "serve", *o.our_device, "--config", "t0", "--batch-size", "1", "--block-seconds", "0"]
    done = finished(command, PATIENCE_S[o.device], stdin=subprocess.DEVNULL)
    return (done.stderr.strip().splitlines() or ["the program does not run"])[-1] if done.returncode else None


def measure(o):
    record = dict(name=o.name, date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
                  commit=o.commit or commit(), machine=machine(), device=o.device, threads=o.threads, block_s=o.block_s, quiet=QUIET,
                  clock="processor" if o.processor_time else "wall", toy=o.toy, rows=[])
    if o.device == "cuda":
        record["gpu"] = None if o.toy else gpu.describe()
    with tempfile.TemporaryDirectory() as o.scratch:
        o.no_ratio = "a toy run compares nothing" if o.toy else None
        if o.python:
            version = finished([o.python, "-c", "import torch; print(torch.__version__)"], PATIENCE_S[o.device])
            record["peer"] = f"PyTorch {version.stdout.strip()}"
            earlier = earlier_record(o, record)
            record["golden"] = earlier.get("golden") or golden(o)
            record["curves"] = earlier.get("curves") or losses(o)
            if not record["golden"]["passed"]:
                o.no_ratio = o.no_ratio or "the peer fails the golden vectors"
            elif not record["curves"]["agree"]:
                o.no_ratio = o.no_ratio or "the losses of both sides were not shown to agree"
        else:
            record["peer"], o.no_ratio, earlier = f"peer not measured: {o.peer_missing}", o.peer_missing, {}
        o.watch = gpu.Watch() if o.device == "cuda" and not o.toy else None
        # What can be gone on from is kept after each row: a call may be cut off.
        keep = (lambda done: write(o, dict(record, rows=done))) if o.resume else (lambda done: None)
        keep(earlier.get("rows", []))
        record["rows"] = rows(o, earlier.get("rows", []), keep)
        record["gpu_range"] = o.watch.stop() if o.watch else None
    return record


def rows(o, earlier, keep):
    """A row for each workload: an earlier one if it was finished, else measured now, those first that have none yet."""
    wanted, done = list(workloads(o)), list(earlier)
    find = lambda workload: next((r for r in done if all(r.get(k) == v for k, v in workload.items())), None)
    for workload in sorted(wanted, key=lambda w: find(w) is not None):
        old = find(workload)
        if old and not old["unfinished"]:
            continue
        if o.end and o.end - time.monotonic() < LEAST_S:
            new = old or dict(workload, sides={}, notes={}, no_ratio="no time left: call again with --resume", unfinished=True)
        else:
            new = run(o, workload)
        done = in_order(o, [r for r in done if r is not old] + [new])
        keep(done)
    return in_order(o, done)


def in_order(o, done):
    place = {json.dumps(w): i for i, w in enumerate(workloads(o))}
    key = lambda r: (r["kind"] != "train", place.get(json.dumps({k: r[k] for k in ("kind", "config", "batch", "sampler") if k in r}), -1))
    return sorted(done, key=key)


def golden(o):
    say("peer: golden vectors")
    passed, lines = check_peer(o)
    return dict(passed=passed, output=lines)


def losses(o):
    say("both sides: losses of a short training run")
    return curves(o) if o.curve_steps else dict(agree=False, why="--curve-steps 0")


def earlier_record(o, record):
    """What --resume goes on from: the record of the same program, PyTorch and GPU; else nothing."""
    path = o.out / f"{o.name}.json"
    if not o.resume or not path.exists():
        return {}
    earlier = json.loads(path.read_text())
    for key in ("commit", "peer", "gpu", "toy", "block_s"):
        if earlier.get(key) != record.get(key):
            say(f"--resume: {path} has {key} {earlier.get(key)}, now it is {record.get(key)}: starting anew")
            return {}
    return earlier


def words(text):
    return [w for w in text.split(",") if w]


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--binary", default=str(ROOT / "target" / "release" / "iddpm"))
    p.add_argument("--commit", help="what the program was built from, if not the working folder's commit")
    p.add_argument("--python", default="", help="a Python with PyTorch; empty: the peer is not measured")
    p.add_argument("--peer-missing", default="no PyTorch", help="why the peer is not measured")
    p.add_argument("--threads", type=int, help="on a processor [default: 2]")
    p.add_argument("--precision", choices=["bf16", "f32"], default="bf16", help="of our side on a GPU")
    p.add_argument("--configs", type=words, help="training steps, comma-separated [t1,t2,t3,t4; GPU: cifar10,tiny,imagenet64]")
    p.add_argument("--sample-configs", type=words, help="reverse steps [t1,t3; GPU: cifar10,imagenet64]")
    p.add_argument("--batches", type=lambda t: [int(w) for w in words(t)], help="of reverse steps [1,16; GPU: 128,16,1]")
    p.add_argument("--samplers", type=words, default=["ancestral"], help="ancestral,ddim")
    p.add_argument("--variants", type=words, help="tiers of the peer [P0,P1,P2; GPU: P0,P1,P2,P3]")
    p.add_argument("--rounds", type=int, default=11, help="undisturbed pairs wanted with each variant")
    p.add_argument("--processor-time", action="store_true",
                   help="for a machine that is never quiet: one thread on each side, processor seconds instead of the clock's")
    p.add_argument("--limit-s", type=float, default=60, help="seconds per workload after which no round starts")
    p.add_argument("--limit-minutes", type=float, help="end of the whole call [GPU: 9]")
    p.add_argument("--sweep-minutes", type=float, default=4, help="of each workload's search for P3, on a GPU")
    p.add_argument("--resume", action="store_true", help="keep what an earlier call with the same program finished")
    p.add_argument("--work", type=pathlib.Path, help="folder of the compiler's cache and the sweeps [benches/peer/.work]")
    p.add_argument("--block-s", type=float)
    p.add_argument("--curve-steps", type=int, help="of the short training run; 0: none, and no ratios [300]")
    p.add_argument("--out", type=pathlib.Path, default=ROOT / "benches" / "record")
    p.add_argument("--name", help="name of the record's files [cpu, cuda]")
    p.add_argument("--toy", action="store_true", help=argparse.SUPPRESS)
    return p


def defaults(o, error):
    """Fills in what depends on the device."""
    cuda = o.device == "cuda"
    pick = lambda value, cpu, gpu_, toy: value if value is not None else (toy if o.toy else gpu_ if cuda else cpu)
    o.configs = pick(o.configs, ["t1", "t2", "t3", "t4"], ["cifar10", "tiny", "imagenet64"], ["t0"])
    o.sample_configs = pick(o.sample_configs, ["t1", "t3"], ["cifar10", "imagenet64"], ["t0"])
    o.batches = pick(o.batches, [1, 16], [128, 16, 1], [1])
    o.variants = pick(o.variants, ["P0", "P1", "P2"], ["P0", "P1", "P2", "P3"], ["P0", "P1", "P2", "P3"])
    o.train_batch, o.curve_config = pick(None, 16, 128, 1), pick(None, "t1", "tiny", "t0")
    o.curve_steps, o.block_s = pick(o.curve_steps, 300, 300, 40), pick(o.block_s, 0.25, 0.4, 0.0)
    o.threads = pick(o.threads, min(2, os.cpu_count() or 1), None, 1)
    o.name, o.work = o.name or ("toy" if o.toy else o.device), (o.work or HERE / ".work").absolute()
    o.limit_minutes = pick(o.limit_minutes, None, 9.0, None)
    o.end = time.monotonic() + 60 * o.limit_minutes if o.limit_minutes else None
    known = [*tiers.CUDA, tiers.P3] if cuda else list(tiers.CPU)
    if unknown := [w for w in o.variants if w not in {n.split()[0] for n in known}]:
        error(f"--variants {','.join(unknown)}: on this device there are {', '.join(dict.fromkeys(n.split()[0] for n in known))}")
    if 0 < o.curve_steps < 40:
        error(f"--curve-steps {o.curve_steps}: at least 40 steps show something; 0 leaves the check out, and all ratios")
    o.variants = [n for n in known if n.split()[0] in o.variants]
    o.clock, o.threads = ("processor_s", 1) if o.processor_time else ("s", o.threads)
    o.our_device = ["--device", "emulated" if o.toy else "cuda", "--precision", o.precision] if cuda else []
    o.peer_device = "cuda" if cuda and not o.toy else "cpu"
    return o


def write(o, record):
    """Writes the record and its table, each beside and then renamed; returns the table."""
    o.out.mkdir(parents=True, exist_ok=True)
    text = markdown(record)
    for suffix, content in (("json", json.dumps(record, indent=1) + "\n"), ("md", text)):
        part = o.out / f".{o.name}.{suffix}.part"
        part.write_text(content)
        part.replace(o.out / f"{o.name}.{suffix}")
    return text


def main():
    parser = arguments()
    o = parser.parse_args()
    if o.toy and o.device != "cuda":
        parser.error("--toy belongs to --device cuda")
    o = defaults(o, parser.error)
    if why := refusal(o):
        say(f"compare: nothing is measured: {why}")
        sys.exit(3)
    o.work.mkdir(parents=True, exist_ok=True)
    record = measure(o)
    print(write(o, record))
    sys.exit(0 if any(row["sides"] for row in record["rows"]) else 3)


if __name__ == "__main__":
    main()
