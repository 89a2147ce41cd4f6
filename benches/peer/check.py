"""Check the peer against the golden vectors in float32: networks with all gradients, losses, samplers, AdamW with averages.

    python check.py [DIR] [--norm native nhwc sums]

DIR holds index.json and the vector files; default: $IDDPM_GOLDEN, else tests/golden of the project. Every file of the
kinds below is checked; cases that the peer has no code for are counted and named. Exit status 1 if anything differs.
"""

import argparse
import json
import os
import pathlib
import sys
from collections import Counter

import torch
from safetensors import safe_open

from diffusion import Diffusion, FlatOptimizer, FusedOptimizer
from unet import Config, UNet

HERE = pathlib.Path(__file__).resolve().parent


class VectorFile:
    """Tensors, settings and cases of one file, and the rules of its index entry."""

    def __init__(self, path, rules):
        f = safe_open(path, "pt")
        self.tensors = {k: f.get_tensor(k) for k in f.keys()}
        meta = f.metadata()
        self.settings, self.cases = (json.loads(meta.get(k, "null")) for k in ("settings", "cases"))
        self.name, self.rules = path.name, rules

    def __getitem__(self, name):
        return self.tensors[name]

    def get(self, name):
        return self.tensors.get(name)


class Comparison:
    """Counts tensors and remembers the worst error as a fraction of its tolerance."""

    def __init__(self, file):
        self.file, self.count, self.worst, self.failed = file, 0, (0.0, ""), []

    def check(self, name, value):
        rule, expected = self.file.rules[name], self.file[name]
        expected = torch.zeros_like(expected) if rule.get("zero") else expected
        ratio = self.error(rule["tol"], value.detach(), expected).max().item()
        self.count += 1
        self.worst = max(self.worst, (ratio, name))
        if not ratio <= 1:
            self.failed.append(name)

    def error(self, tol, value, expected):
        """|value - expected| as a fraction of what the rule allows, element by element."""
        difference = (value - expected).abs()
        mode = tol["mode"]
        if mode in ("abs", "axis0"):
            allowed = torch.tensor(tol["atol"]).reshape(-1, *[1] * (expected.dim() - 1)) if mode == "axis0" else tol["atol"]
        elif mode == "rel":
            allowed = tol["rtol"] * expected.abs() + tol["atol"]
        elif mode == "elementwise":
            allowed = self.file[tol["tensor"]]
        else:
            raise ValueError(f"{self.file.name}: tolerance mode {mode!r} is unknown here")
        return torch.where(difference == 0, 0.0, difference / allowed)


def build(settings):
    c = settings["config"]
    cfg = Config(image_size=0, model_channels=c["model_channels"], num_res_blocks=c["num_res_blocks"],
                 channel_mult=tuple(c["channel_mult"]), attention=tuple(c["attention_resolutions"]),
                 in_channels=c["in_channels"], out_channels=c["out_channels"],
                 num_heads=c.get("num_heads", 1), num_heads_upsample=c.get("num_heads_upsample", -1),
                 scale_shift=c.get("use_scale_shift_norm", False), num_classes=c.get("num_classes"),
                 conv_resample=c.get("conv_resample", True))
    s = settings["loss"]
    diffusion = Diffusion(s["schedule"], s["T"], int(s["spec"]) if s["spec"] else None, s["var"],
                          s["loss_type"], s["rescale_timesteps"])
    return UNet(cfg), diffusion


def check_unet(file, norm, linear, channels_last):
    """Output, every gradient of a random scalar, training loss and its gradients, in one formulation of the network."""
    net, diffusion = build(file.settings)
    prefix = "param/"
    net.load_state_dict({k[len(prefix):]: v for k, v in file.tensors.items() if k.startswith(prefix)})
    net.configure(norm=norm, linear=linear, batch_emb=linear)
    if channels_last:
        net.to(memory_format=torch.channels_last)
    result = Comparison(file)

    x = file["in/x"].requires_grad_()
    out = net(x, file["in/timesteps"], file.get("in/y"))
    result.check("out", out)
    result.check("emb", net.embedding(file["in/timesteps"], file.get("in/y")))
    x.grad = None
    (out * file["in/cotangent"]).sum().backward()
    result.check("vjp/in/x", x.grad)
    for name, p in net.named_parameters():
        result.check(f"vjp/param/{name}", p.grad)

    net.zero_grad()
    terms = diffusion.training_loss(net, file["loss/x_start"], file["loss/t"], file["loss/noise"], file.get("loss/y"))
    for name in ("loss", "mse", "vb"):
        if file.get(f"loss/{name}") is not None:
            result.check(f"loss/{name}", terms[name])
    terms["loss"].mean().backward()
    for name, p in net.named_parameters():
        if file.get(f"loss/grad/param/{name}") is not None:
            result.check(f"loss/grad/param/{name}", p.grad)
    return result


def check_losses(file):
    """Loss, its parts and its gradient for a given network output: mean type eps, learned range or fixed variance."""
    result, left = Comparison(file), Counter()
    for case, s in file.cases.items():
        for group in sorted({n.split("/")[1] for n in file.tensors if n.startswith(f"{case}/") and n.count("/") >= 3}):
            mean, variance = group.split(".")
            for kind in sorted({n.split("/")[2] for n in file.tensors if n.startswith(f"{case}/{group}/")} - {"model_output"}):
                if mean != "eps" or kind not in ("mse", "rescaled_mse", "kl") or variance == "learned":
                    left[f"{mean}.{variance} {kind}"] += 1
                    continue
                diffusion = Diffusion(s["schedule"], s["T"], int(s["spec"]) if s["spec"] else None, variance, kind,
                                      s["rescale_timesteps"])
                out = file[f"{case}/{group}/model_output"].clone().requires_grad_()
                terms = diffusion.training_loss(lambda x, t: out, file[f"{case}/x_start"], file[f"{case}/t"],
                                                file[f"{case}/noise"])
                terms["loss"].mean().backward()
                for name, value in {**terms, "grad": out.grad}.items():
                    if file.get(f"{case}/{group}/{kind}/{name}") is not None:
                        result.check(f"{case}/{group}/{kind}/{name}", value)
    return result, left


def check_samplers(file):
    """Whole trajectories of the ancestral and the DDIM sampler with an affine stand-in for the network."""
    result, left = Comparison(file), Counter()
    for case, s in file.cases.items():
        spec = s["spec"]
        known = s["mean"] == "eps" and s["var"] != "learned" and s["clip_denoised"] and not s["denoised_fn"]
        if not known or s["kind"] not in ("ancestral", "ddim") or (spec and not spec.isdigit()):
            left[f"{s['kind']} {s['mean']} {s['var']}{' respaced' if spec else ''}"] += 1
            continue
        diffusion = Diffusion(s["schedule"], s["T"], int(spec) if spec else None, s["var"], "mse", s["rescale_timesteps"])
        m = {k: file[f"{case}/model.{k}"] for k in "ABbs"}

        def net(x, t):
            tau = (t / s["tdiv"]).float()
            weight = m["A"][None] + tau[:, None, None] * m["B"][None]
            bias = m["b"][None] + tau[:, None] * m["s"][None]
            return torch.einsum("noc,nchw->nohw", weight, x) + bias[:, :, None, None]

        x, steps, xs = file[f"{case}/x_init"], [], []
        for k, i in enumerate(reversed(range(diffusion.steps))):
            t = torch.full((x.shape[0],), i)
            out, noise = net(x, diffusion.times[t]), file.get(f"{case}/noise")
            noise = torch.zeros_like(x) if noise is None else noise[k]
            if s["kind"] == "ancestral":
                x = diffusion.p_sample(x, t, out, noise)
            else:
                x = diffusion.ddim_step(x, t, out, noise, s["eta"])
            xs.append(x)
        result.check(f"{case}/x", torch.stack(xs))
    return result, left


def check_adamw(file):
    """AdamW with weight decay, and one average per rate, over steps with given gradients: p (steps, n), ema (steps, rates, n)."""
    result = Comparison(file)
    for case, s in file.cases.items():
        runs = []
        for rate in s["ema_rates"]:
            p = torch.nn.Parameter(file[f"{case}/p0"].clone())
            opt, run = FusedOptimizer([p], lr=s["lr"], decay=s["weight_decay"], ema_rate=rate), []
            for k in range(s["steps"]):
                if s["anneal_steps"]:
                    opt.adamw.param_groups[0]["lr"] = s["lr"] * (1 - k / s["anneal_steps"])
                p.grad = file[f"{case}/grad"][k].clone()
                opt.step()
                run.append(torch.stack([p.detach(), opt.ema[0]]))
            runs.append(torch.stack(run))
        result.check(f"{case}/p", runs[0][:, 0])
        result.check(f"{case}/ema", torch.stack([run[:, 1] for run in runs], 1))
    return result, Counter()


def check_optimizers():
    """Both optimiser forms give the same weights and averages after five steps."""
    results = []
    for kind in (FusedOptimizer, lambda p, **kw: FlatOptimizer(p, compiled=False, **kw)):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 2, 1)).to(memory_format=torch.channels_last)
        opt = kind(net.parameters(), lr=1e-2, decay=0.05, ema_rate=0.9)
        for _ in range(5):
            net.zero_grad()
            net(torch.randn(2, 3, 8, 8)).square().sum().backward()
            opt.step()
        ema = opt.ema if isinstance(opt.ema, list) else [
            opt.ema.as_strided(p.shape, p.stride(), p.storage_offset()) for p in net.parameters()]
        results.append([p.detach().clone() for p in net.parameters()] + [e.clone() for e in ema])
    return max((a - b).abs().max().item() for a, b in zip(*results))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = pathlib.Path(os.environ.get("IDDPM_GOLDEN", HERE.parent.parent / "tests" / "golden"))
    parser.add_argument("golden", type=pathlib.Path, nargs="?", default=default)
    parser.add_argument("--norm", nargs="+", default=["native", "nhwc", "sums"])
    args = parser.parse_args()
    index_path = args.golden / "index.json"
    if not index_path.exists():
        sys.exit(f"{index_path}: no such file; give the folder of the golden vectors, or set IDDPM_GOLDEN")
    index = {f["file"]: {t["name"]: t for t in f["tensors"]} for f in json.loads(index_path.read_text())["files"]
             if "tensors" in f}
    load = lambda name: VectorFile(args.golden / name, index[name])
    present = sorted(name for name in index if (args.golden / name).exists())
    bad = networks = 0

    def report(label, r, left=()):
        nonlocal bad
        bad += len(r.failed)
        skipped = f"; {sum(left.values())} groups the peer has no code for: {', '.join(sorted(left))}" if left else ""
        print(f"{label}: {r.count} tensors, worst {r.worst[0]:.3f} of tolerance ({r.worst[1]}) "
              f"{'ok' if not r.failed else f'{len(r.failed)} FAIL: ' + r.failed[0]}{skipped}", flush=True)

    for name in present:
        if name.startswith("10_unet_"):
            networks += 1
            for norm in args.norm:
                for linear, last in ((True, True), (False, False)):
                    report(f"{name} norm={norm} linear={linear} channels_last={last}",
                           check_unet(load(name), norm, linear, last))
        elif name.startswith("04_losses"):
            report(name, *check_losses(load(name)))
        elif name.startswith("06_samplers"):
            report(name, *check_samplers(load(name)))
        elif name.startswith("10_adamw_ema"):
            report(name, *check_adamw(load(name)))
    gap = check_optimizers()
    print(f"optimisers: largest difference between the fused and the flat form {gap:.1e}")
    if not networks:
        print(f"{args.golden}: holds no network (10_unet_*): nothing says that the peer computes the same")
    sys.exit(1 if bad or gap > 1e-5 or not networks else 0)


if __name__ == "__main__":
    main()
