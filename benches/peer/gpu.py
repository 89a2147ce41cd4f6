"""What nvidia-smi says of the GPU: what it is, who uses it, and its clock while something is timed."""

import os
import subprocess
import threading
import time

QUIET_UTILISATION = 5  # percent that a GPU may show with nothing running
STEADY = 0.03  # two blocks count as a pair if the clocks under them differ by less
PATIENCE_S = 4  # for the load to fall after a process of ours has ended
IDLE = 1  # the bit of the reasons for a lower clock that means: nothing to do


def smi(query, which="gpu"):
    """Rows of one query as lists of text; None where nvidia-smi is missing or fails."""
    command = ["nvidia-smi", f"--query-{which}={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run([*command, *device()], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    return [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def device():
    """The GPU that CUDA calls 0, as nvidia-smi names it."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    return ["--id", first or "0"]


def reasons_field():
    """The name of the reasons for a lower clock, which changed with driver 535."""
    return next((name for name in ("clocks_event_reasons.active", "clocks_throttle_reasons.active") if smi(name)),
                "clocks_event_reasons.active")


def describe():
    """Name, driver, compute capability, clocks and memory of the GPU; None if there is none."""
    fields = ["name", "driver_version", "compute_cap", "clocks.max.sm", "clocks.max.mem", "memory.total", "power.limit"]
    rows = smi(",".join(fields))
    return dict(zip(fields, rows[0])) if rows and len(rows[0]) == len(fields) else None


def in_use():
    """Why the GPU is not free, or None. To be asked while nothing of ours runs on it; waits a little for its load to fall."""
    until = time.monotonic() + PATIENCE_S
    while True:
        why = used_by()
        if why is None or time.monotonic() > until:
            return why
        time.sleep(0.5)


def used_by():
    apps, load = smi("pid,process_name,used_memory", "compute-apps"), smi("utilization.gpu")
    if apps is None or not load:
        return "nvidia-smi does not tell who uses the GPU"
    if apps:
        return "busy GPU: " + ", ".join(f"process {app[0]} ({app[1]}) holds {app[-1]} MiB" for app in apps[:3])
    if not load[0][0].isdigit() or int(load[0][0]) > QUIET_UTILISATION:
        return f"busy GPU: its utilisation is {load[0][0]} % with nothing of ours running"
    return None


class Watch:
    """Clock, power, temperature and reasons for a lower clock, ten times a second until it is stopped."""

    def __init__(self):
        self.samples, self.child = [], None
        fields = ["clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", reasons_field()]
        command = ["nvidia-smi", "--query-gpu=" + ",".join(fields), "--format=csv,noheader,nounits", "--loop-ms=100"]
        try:
            self.child = subprocess.Popen([*command, *device()], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            return
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.child.stdout:
            fields = [f.strip() for f in line.split(",")]
            try:
                numbers, reasons = [float(f) for f in fields[:4]], int(fields[4], 16)
            except (ValueError, IndexError):
                continue
            self.samples.append((time.monotonic(), *numbers, reasons))

    def clock(self, begin, end):
        """MHz of the multiprocessors between two moments, the middle of the answers; None without an answer."""
        busy = sorted(s[1] for s in list(self.samples) if begin <= s[0] <= end and not s[5] & IDLE)
        return busy[len(busy) // 2] if busy else None

    def stop(self):
        """Ends the watch; returns the range of each figure over the answers at which the GPU was not idle."""
        if self.child:
            self.child.kill()
            self.child.wait()
        busy = [s for s in self.samples if not s[5] & IDLE]
        if not busy:
            return None
        names = ("sm_mhz", "memory_mhz", "power_w", "temperature_c")
        ranges = {name: [min(s[i + 1] for s in busy), max(s[i + 1] for s in busy)] for i, name in enumerate(names)}
        reasons = 0
        for s in busy:
            reasons |= s[5]
        return dict(ranges, reasons=hex(reasons), samples=len(busy))


def same_clock(a, b):
    return abs(a - b) <= STEADY * max(a, b)
