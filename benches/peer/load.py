"""How much of the processor others use while a time is taken, as src/bench/load.rs has it: foreign = (busy - own) / (wall cores)."""

import os
import time

QUIET = 0.06  # blocks with more foreign load do not count


class Load:
    """Processor time used so far by everybody (stolen time included) and by this process."""

    def __init__(self):
        self.at, self.own = time.perf_counter(), time.process_time()
        try:
            with open("/proc/stat") as f:
                lines = f.read().splitlines()
            n = [int(v) for v in lines[0].split()[1:9]]
            self.busy = (sum(n[:3]) + sum(n[5:8])) / os.sysconf("SC_CLK_TCK")
            self.cores = sum(line.startswith("cpu") for line in lines) - 1
        except OSError:
            self.busy = None

    def foreign(self, later):
        """Share of the cores that others used between self and later; None where the system does not tell."""
        if self.busy is None or later.busy is None:
            return None
        used = (later.busy - self.busy) - (later.own - self.own)
        return max(0.0, used / ((later.at - self.at) * self.cores))


def peak_memory():
    """The most memory this process has held, in bytes; None where the system does not tell."""
    try:
        with open("/proc/self/status") as f:
            line = next(line for line in f if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    except (OSError, StopIteration):
        return None
