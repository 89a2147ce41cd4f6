"""Timing, budgets and reports shared by all stages."""

import json
import pathlib
import statistics
import subprocess
import time

import torch

import gpu
from load import QUIET, Load


class Budget:
    def __init__(self, seconds):
        self.end = time.monotonic() + seconds

    def left(self):
        return self.end - time.monotonic()


class Report:
    """Rows by table, written after every row as results.json and results.md; earlier rows are kept."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "results.json"
        self.tables = json.loads(path.read_text()) if path.exists() else {}

    def row(self, table, **cells):
        self.tables.setdefault(table, []).append(cells)
        print(f"[{table}] " + "  ".join(f"{k}={short(v)}" for k, v in cells.items()), flush=True)
        self.save()

    def try_row(self, table, fn, budget=None, need=0.0, **cells):
        """Add the cells and those that fn() returns; a failure or a skip becomes a row too."""
        if budget and budget.left() < need:
            return self.row(table, **cells, note="skipped: no time left")
        try:
            self.row(table, **cells, **fn())
        except Exception as error:
            self.row(table, **cells, note=first_line(error))

    def save(self):
        (self.folder / "results.json").write_text(json.dumps(self.tables, indent=1))
        out = []
        for name, rows in self.tables.items():
            keys = list(dict.fromkeys(k for r in rows for k in r))
            out += [f"## {name}", "", "| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
            out += ["| " + " | ".join(short(r.get(k, "")) for k in keys) + " |" for r in rows] + [""]
        (self.folder / "results.md").write_text("\n".join(out))


def short(v):
    if isinstance(v, float):
        return f"{v:.4g}" if abs(v) < 1e4 else f"{v:.0f}"
    return str(v).replace("|", "/").replace("\n", " ")


def first_line(error):
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


def clocks(report, when):
    """Log clocks, power, temperature and throttle reasons as the driver reports them."""
    fields = "name,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu," + gpu.reasons_field()
    try:
        text = subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
                              capture_output=True, text=True, timeout=20).stdout.strip()
        report.row("clocks", when=when, **dict(zip(fields.split(","), text.split(", "))))
    except Exception as error:
        report.row("clocks", when=when, note=first_line(error))


def sync(device):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_per_call(fn, device, iters):
    """One block: device time per call by CUDA events, or wall time on the CPU."""
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(iters):
            fn()
        return (time.perf_counter() - start) / iters
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(iters):
        fn()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / iters


def calls_per_block(fn, device, block_s, most=2000):
    return max(1, min(most, round(block_s / max(seconds_per_call(fn, device, 2), 1e-7))))


def block(fn, device, calls):
    """Seconds per call over one block, and the share of the cores that others used meanwhile (CPU only)."""
    before = Load()
    seconds = seconds_per_call(fn, device, calls)
    return seconds, before.foreign(Load()) if device != "cuda" else None


FEWEST = 3  # blocks that a median is taken over


def measure(fn, device, blocks=5, block_s=0.2, warmup=3, max_iters=2000, limit_s=None):
    """Seconds per call: median, fastest and slowest of the blocks that count, and their relative spread.

    On the CPU a block counts if others used less than 6 % of the cores meanwhile; blocks are taken until `blocks`
    of them count or `limit_s` seconds have passed (default: as many blocks as asked). With fewer than three such
    blocks all count, and the result says `busy`.
    """
    for _ in range(warmup):
        fn()
    sync(device)
    iters = calls_per_block(fn, device, block_s, max_iters)
    taken, begin = [], time.monotonic()
    while len(quiet := [b for b in taken if b[1] is None or b[1] <= QUIET]) < blocks:
        enough = len(taken) >= blocks if limit_s is None else time.monotonic() - begin > limit_s
        if len(taken) >= FEWEST and enough:
            break
        taken.append(block(fn, device, iters))
    busy = len(quiet) < FEWEST
    used = taken if busy else quiet
    times, foreign = [b[0] for b in used], [b[1] for b in used if b[1] is not None]
    median = statistics.median(times)
    return {"s": median, "min_s": min(times), "max_s": max(times), "spread": (max(times) - min(times)) / median,
            "blocks": len(used), "calls": iters, "busy": busy,
            "foreign": statistics.median(foreign) if foreign else None}


def captured(fns, device, warmup=3):
    """One CUDA graph holding every function of `fns` in order; on the CPU a plain loop."""
    def run():
        for fn in fns:
            fn()
    if device != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def graph_time(fns, device, **kw):
    """Seconds per function when the list runs as one graph: launches cost nothing on the host."""
    result = measure(captured(fns, device), device, **kw)
    return {"s": result["s"] / len(fns), "spread": result["spread"]}


def activities(device):
    kind = torch.profiler.ProfilerActivity
    return [kind.CPU, kind.CUDA] if device == "cuda" else [kind.CPU]


def kernel_count(fn, device):
    """Number of device kernels (CPU: dispatched operators) that one call runs."""
    fn()
    sync(device)
    with torch.profiler.profile(activities=activities(device)) as prof:
        fn()
        sync(device)
    if device == "cuda":
        return sum(1 for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return sum(1 for e in prof.events() if e.name.startswith("aten::"))


def kernel_table(fn, device, rows=25):
    """The longest kernels of one call: (name, calls, microseconds)."""
    with torch.profiler.profile(activities=activities(device)) as prof:
        fn()
        sync(device)
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = sorted(prof.key_averages(), key=lambda e: -getattr(e, key))[:rows]
    return [(e.key[:120], e.count, getattr(e, key)) for e in events]
