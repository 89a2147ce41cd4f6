"""The two sides of a comparison as processes that answer each line with the time of a block."""

import json
import os
import pathlib
import select
import subprocess
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent


BLOCK_S = 120  # seconds after which a block is given up
END_S = 30  # seconds to end in, once the input is closed


class Side:
    """One process. It prints a line when it is ready, then one for each line it reads."""

    def __init__(self, name, command, env):
        self.name, self.blocks, self.head = name, [], None
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
                                        text=True, env=env)

    def start(self, until=None):
        self.head = self.answer(until)

    def answer(self, until=None):
        """The next line as JSON. RuntimeError with the process's last words if it ended, or when the time is over."""
        if until is not None and not select.select([self.process.stdout], [], [], max(0, until - time.monotonic()))[0]:
            self.process.kill()
            raise RuntimeError("no time left")
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            lines = self.errors.read().strip().splitlines() or [f"ended with status {self.process.returncode}"]
            raise RuntimeError(lines[-1][:300])
        return json.loads(line)

    def block(self, watch=None):
        before, begin = processor_seconds(self.process.pid), time.monotonic()
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        block = self.answer(time.monotonic() + BLOCK_S)
        after = processor_seconds(self.process.pid)
        block["processor_s"] = (after - before) / block["calls"] if after else None
        if watch:
            block["sm_mhz"] = watch.clock(begin, time.monotonic())
        self.blocks.append(block)
        return block

    def stop(self):
        try:
            self.process.stdin.close()
        except BrokenPipeError:  # it has ended by itself
            pass
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()


def processor_seconds(pid):
    """Processor time of a process so far, all its threads together; 0 where the system does not tell."""
    total = 0
    for path in pathlib.Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[0])
        except OSError:  # a thread that has ended
            pass
    return total * 1e-9


def ours(o, workload):
    command = [o.binary, "bench", "serve", *o.our_device, "--config", workload["config"], "--batch-size", str(workload["batch"]),
               "--block-seconds", str(o.block_s)]
    command += ["--threads", str(o.threads)] if o.threads else []
    if workload["kind"] == "sample":
        command += ["--sampler", workload["sampler"]]
    return Side("iddpm", command, dict(os.environ))


def peer(o, name, options, workload):
    job = dict(options, kind=workload["kind"], config=workload["config"], batch=workload["batch"], device=o.peer_device,
               threads=o.threads, tiny=o.toy, block_s=o.block_s)
    if workload["kind"] == "sample":
        job["sampler"] = workload["sampler"]
        job.pop("opt", None)
    if o.toy and job.get("mode", "default") is not None:  # the tracer alone: the code generator takes minutes here
        job.update(mode="trace", graph=False)
    path = pathlib.Path(o.scratch, f"{len(os.listdir(o.scratch))}.json")
    path.write_text(json.dumps(job))
    return Side(name, [o.python, "-B", str(HERE / "worker.py"), "--serve", str(path)], peer_env(o))


def peer_env(o):
    env = dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(o.work / "compiler-cache"), TORCHINDUCTOR_FX_GRAPH_CACHE="1",
               TORCHINDUCTOR_AUTOGRAD_CACHE="1")
    return dict(env, OMP_NUM_THREADS=str(o.threads)) if o.threads else env
