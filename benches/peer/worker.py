"""One training or sampling variant in its own process: `python worker.py JOB.json RESULT.json`, or `python worker.py --serve JOB.json`,
which answers every line of its input with the time of a block: one side of an interleaved comparison.

A job names a config, a batch and one variant (see TRAIN and SAMPLE defaults below); the result
holds ms, img/s, TFLOP/s, compile seconds, peak memory, or the first line of the exception.
Kinds: train, sample (one reverse step), startup (the first steps), curve (losses while training on real images).
"""

import contextlib
import json
import sys
import time
import warnings

import torch

from bench import block, calls_per_block, captured, first_line, kernel_table, measure, sync
from load import peak_memory
from diffusion import Diffusion, FlatOptimizer, FusedOptimizer
from unet import CONFIGS, UNet

warnings.filterwarnings("ignore")
TRAIN = dict(precision="bf16w", layout="nhwc", norm="native", linear=True, batch_emb=True, mode="default",
             graph=True, opt="flat", inductor={})
SAMPLE = dict(precision="bf16w", layout="nhwc", norm="native", linear=True, batch_emb=True, mode="default",
              graph=True, inductor={}, inference=False, sampler="ancestral")


def prepare(job, training):
    """Global settings, the network and the diffusion for one variant."""
    if job.get("threads"):
        torch.set_num_threads(job["threads"])
    import torch._inductor.config as inductor
    for key, value in job["inductor"].items():
        target, *path = inductor, *key.split(".")
        for part in path[:-1]:
            target = getattr(target, part)
        setattr(target, path[-1], value)
    torch.backends.cudnn.benchmark = True
    if job["device"] == "cuda":
        inductor.triton.unique_kernel_names = bool(job.get("kernels"))
        torch.backends.cudnn.benchmark_limit = 0
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    torch.manual_seed(0)
    cfg = CONFIGS[job["config"]]
    net = UNet(cfg).configure(job["norm"], job["linear"], job["batch_emb"])
    net.randomise_last()
    net.to(job["device"]).train(training)
    if job["precision"] == "bf16w":
        net.cast(torch.bfloat16)
    if job["layout"] == "nhwc":
        net.to(memory_format=torch.channels_last)
    return cfg, net, Diffusion().to(job["device"])


# What a variant computes in, in words that both sides share.
PRECISIONS = {"cpu": {"fp32": "f32", "autocast": "bf16", "bf16w": "bf16"},
              "cuda": {"fp32": "f32 (TF32)", "autocast": "bf16", "bf16w": "bf16"}}


def precision(job):
    if job["precision"] == "autocast":
        return torch.autocast(job["device"], dtype=torch.bfloat16)
    return contextlib.nullcontext()


def compiled(fn, mode):
    """`mode` None: eager; 'trace': the tracer without the code generator (for quick CPU tests)."""
    if mode is None:
        return fn
    if mode == "trace":
        return torch.compile(fn, fullgraph=True, dynamic=False, backend="aot_eager")
    return torch.compile(fn, fullgraph=True, dynamic=False, mode=mode)


def laid_out(x, job):
    return x.contiguous(memory_format=torch.channels_last) if job["layout"] == "nhwc" else x


def labels(cfg):
    assert cfg.num_classes is None, "the timed configurations are unconditional"


def training(job):
    """One training step as a function, its first run's seconds, the configuration, the network and the last loss."""
    cfg, net, diffusion = prepare(job, True)
    device, n = job["device"], job["batch"]
    labels(cfg)
    images = laid_out(torch.randint(0, 256, (n, cfg.in_channels, cfg.image_size, cfg.image_size), device=device), job)
    images = images.to(torch.uint8)
    if job["opt"] == "flat":
        opt = FlatOptimizer(net.parameters(), compiled=job["mode"] not in (None, "trace"))
    else:
        opt = FusedOptimizer(net.parameters(), master=job["precision"] == "bf16w", fused=job["opt"] == "fused")
    loss_fn = compiled(lambda x: diffusion.loss_from_bytes(net, x), job["mode"])
    last = torch.zeros((), device=device)

    def step():
        if job["mode"] in ("reduce-overhead", "max-autotune"):
            torch.compiler.cudagraph_mark_step_begin()
        for p in net.parameters():
            p.grad = None
        with precision(job):
            loss = loss_fn(images)
        loss.backward()
        last.copy_(loss.detach())
        opt.step()

    return step, first_run(step, device), cfg, net, last


def first_run(step, device):
    start = time.perf_counter()
    step()
    sync(device)
    return time.perf_counter() - start


def train(job):
    step, first, cfg, net, last = training(job)
    device, n = job["device"], job["batch"]
    if job.get("compile_only"):
        return {"compile_s": first}
    for _ in range(3 if job["tiny"] else 11):
        step()
    sync(device)
    run = captured([step], device) if job["graph"] else step
    result = measure(run, device, warmup=2 if job["tiny"] else 20, **effort(job))
    out = {**times(result), "img_s": n / result["s"], "tflops": 6e9 * cfg.gmac * n / result["s"] / 1e12,
           "compile_s": first, "loss": last.item(), "params": count(net)}
    if used := used_bytes(device):
        out["peak_gb"] = used / 1e9
    if job.get("kernels"):
        out["kernels"] = kernel_table(run, device)
    return out


def used_bytes(device):
    """The most memory held: by tensors on a GPU, by the process on the CPU."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory()


def count(net):
    return sum(p.numel() for p in net.parameters())


def effort(job):
    """How long to measure: the job's own figures on the CPU, fixed ones on a GPU."""
    if "effort" in job:
        return job["effort"]
    return dict(blocks=3 if job["tiny"] else 5, block_s=job["block_s"])


def times(result):
    ms = {k: 1e3 * result[v] for k, v in (("ms", "s"), ("min_ms", "min_s"), ("max_ms", "max_s"))}
    return {**ms, **{k: result[k] for k in ("spread", "blocks", "calls", "busy", "foreign")}}


def sampling(job):
    """One reverse step as a function, its first run's seconds, the configuration and the network."""
    cfg, net, diffusion = prepare(job, False)
    device, n = job["device"], job["batch"]
    labels(cfg)
    x = laid_out(torch.randn(n, cfg.in_channels, cfg.image_size, cfg.image_size, device=device), job)
    t = torch.full((n,), diffusion.steps - 1, device=device)

    def reverse(x, t):
        out = net(x, diffusion.times[t])
        if job["sampler"] == "ddim":
            return diffusion.ddim_step(x, t, out), (t - 1).clamp(min=0)
        return diffusion.p_sample(x, t, out, torch.randn_like(x)), (t - 1).clamp(min=0)

    reverse = compiled(reverse, job["mode"])

    @(torch.inference_mode() if job["inference"] else torch.no_grad())
    def step():
        if job["mode"] in ("reduce-overhead", "max-autotune"):
            torch.compiler.cudagraph_mark_step_begin()
        with precision(job):
            x_next, t_next = reverse(x, t)
        x.copy_(x_next)
        t.copy_(t_next)

    return step, first_run(step, device), cfg, net


def sample(job):
    step, first, cfg, net = sampling(job)
    device, n = job["device"], job["batch"]
    for _ in range(2 if job["tiny"] else 11):
        step()
    run = captured([step], device) if job["graph"] else step
    result = measure(run, device, warmup=2 if job["tiny"] else 10, **effort(job))
    return {**times(result), "img_steps_s": n / result["s"], "tflops": 2e9 * cfg.gmac * n / result["s"] / 1e12,
            "compile_s": first, "params": count(net)}


def serve(job):
    """Answer every line of the input with the time of a block of steps."""
    step, first, cfg, net = (training(job)[:4] if job["kind"] == "train" else sampling(job))
    for _ in range(11 if job["device"] == "cuda" else 1 if job["tiny"] else 3):
        step()
    run = captured([step], job["device"]) if job["graph"] else step
    calls = calls_per_block(run, job["device"], job["block_s"])
    print(json.dumps({"ready": True, "params": count(net), "batch": job["batch"], "threads": torch.get_num_threads(),
                      "precision": PRECISIONS[job["device"]][job["precision"]], "used_bytes": used_bytes(job["device"]),
                      "torch": torch.__version__, "compile_s": first, "options": job}), flush=True)
    for _ in sys.stdin:
        seconds, foreign = block(run, job["device"], calls)
        print(json.dumps({"s": seconds, "calls": calls, "foreign": foreign}), flush=True)


def startup(job):
    """Wall seconds from nothing to the first finished training step (the import is timed by the caller)."""
    marks, start = {}, time.perf_counter()
    cfg, net, diffusion = prepare(job, True)
    opt = FusedOptimizer(net.parameters(), master=job["precision"] == "bf16w")
    sync(job["device"])
    marks["build_s"] = time.perf_counter() - start
    loss_fn = compiled(lambda x: diffusion.loss_from_bytes(net, x), job["mode"])
    images = torch.zeros(job["batch"], cfg.in_channels, cfg.image_size, cfg.image_size, dtype=torch.uint8,
                         device=job["device"])
    for name in ("first_step_s", "second_step_s"):
        start = time.perf_counter()
        with precision(job):
            loss = loss_fn(images)
        loss.backward()
        opt.step()
        sync(job["device"])
        marks[name] = time.perf_counter() - start
    return marks


def curve(job):
    """Mean loss of every ten steps of training from the reference's initialisation on the images of job['data']."""
    from data import load_images
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    cfg = CONFIGS[job["config"]]
    images = load_images(job["data"], cfg.in_channels, cfg.image_size, 50_000)
    net, diffusion = UNet(cfg).to(job["device"]), Diffusion().to(job["device"])
    opt, losses = FusedOptimizer(net.parameters(), lr=job["lr"]), []
    for _ in range(job["steps"]):
        for p in net.parameters():
            p.grad = None
        with precision(job):
            loss = diffusion.loss_from_bytes(net, images[torch.randint(len(images), (job["batch"],))].to(job["device"]))
        loss.backward()
        opt.step()
        losses.append(loss.detach())
    losses = torch.stack(losses).tolist()
    return {"losses": [sum(losses[i:i + 10]) / 10 for i in range(0, len(losses), 10)]}


def main():
    serving = sys.argv[1] == "--serve"
    job = json.load(open(sys.argv[2 if serving else 1]))
    job = {**(SAMPLE if job["kind"] == "sample" else TRAIN), **job}
    if serving:
        return serve(job)
    try:
        result = {"train": train, "sample": sample, "startup": startup, "curve": curve}[job["kind"]](job)
    except Exception as error:
        result = {"note": first_line(error)}
    json.dump(result, open(sys.argv[2], "w"))


if __name__ == "__main__":
    main()
