#!/usr/bin/env python3
"""Checks exports and imports against PyTorch, and against diffusers where it is installed.

    python3 scripts/check-torch.py CHECKPOINT [path of iddpm]

Writes a .safetensors, a .pt and a diffusers folder from CHECKPOINT into a temporary folder and loads each with the program it
is for; saves the state dict again with torch.save, in both containers, imports it and exports it once more. Every tensor must
be equal to the bit. With diffusers, runs three steps of DDIM backwards over random images (`iddpm encode`) with its network and
holds both results against each other; and makes a network of the google/ddpm-* kind there, on which it does the same.
Files optN.pt and modelN.pt beside CHECKPOINT (`iddpm train --reference-files` writes them) go into torch.optim.AdamW.
Prints one line per check; exit code 1 if one fails. Needs torch, numpy and safetensors.
"""

import json
import os
import subprocess
import sys
import tempfile

import numpy
import torch
from safetensors.torch import load_file

failures = 0


def report(what, good):
    global failures
    failures += not good
    print(("ok    " if good else "FAIL  ") + what)


def same(a, b):
    return set(a) == set(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def run(*args):
    done = subprocess.run(args, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(args)}\n{done.stderr}")
    return done.stdout


def configuration(path):
    """Every setting, from the metadata of a .safetensors export."""
    with open(path, "rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    return json.loads(header["__metadata__"]["iddpm_config"])


def flags(config):
    """The settings that a .pt does not hold."""
    model, diffusion = config["model"], config["diffusion"]
    found = {
        "image-size": model["image_size"],
        "small-size": model["low_res"] or -1,
        "null-class": model["null_class"],
        "num-heads": model["num_heads"],
        "num-heads-upsample": model["num_heads_upsample"],
        "num-head-channels": model["num_head_channels"] or -1,
        "use-new-attention-order": model["use_new_attention_order"],
        "diffusion-steps": diffusion["diffusion_steps"],
        "noise-schedule": diffusion["noise_schedule"],
        "rescale-timesteps": diffusion["rescale_timesteps"],
    }
    return [f"--{k}={v}" for k, v in found.items()]


def check_pt(iddpm, checkpoint, config, tensors, path):
    """The .pt in PyTorch, and what PyTorch saves here."""
    run(iddpm, "export", checkpoint, "--to", path("a.pt"))
    loaded = torch.load(path("a.pt"), weights_only=True)
    report(f"torch.load reads the .pt: {len(loaded)} tensors", same(loaded, tensors))
    for name, zipped in [("zip.pt", True), ("legacy.pt", False)]:
        torch.save(loaded, path(name), _use_new_zipfile_serialization=zipped)
        run(iddpm, "import", path(name), "--to", path(f"{name}.back.safetensors"), *flags(config))
        run(iddpm, "export", path(f"{name}.back.safetensors"), "--to", path(f"{name}.again.safetensors"))
        report(f"torch.save ({name}) is imported", same(load_file(path(f"{name}.again.safetensors")), tensors))


def open_unet(folder):
    from diffusers import UNet2DModel

    settings = dict(output_loading_info=True, low_cpu_mem_usage=False)
    model, info = UNet2DModel.from_pretrained(folder, **settings)
    whole = not info["missing_keys"] and not info["unexpected_keys"]
    report("diffusers: no tensor is missing or left over", whole)
    return model.eval()


def check_numbers(iddpm, checkpoint, config, model, path):
    """x_0 = (x - b eps)/a, then a x_0 + b eps of the next noisier step: three steps with the network `model` and here."""
    m, d = config["model"], config["diffusion"]
    size, c, n, steps = m["image_size"], m["in_channels"], 2, 3
    if c not in (1, 3) or d["mean_type"] != "epsilon" or d["noise_schedule"] != "cosine" and d["noise_schedule"] != "linear":
        return print("skip  diffusers: numbers, for images of 1 or 3 channels, eps, and the schedules linear and cosine")
    pixels = numpy.random.default_rng(0).integers(0, 256, (n, size, size, c), dtype=numpy.uint8)
    labels = numpy.arange(n) % (m["num_classes"] or 1)
    numpy.savez(path("images.npz"), pixels, labels)
    line = ["encode", "--model-path", checkpoint, "--data-dir", path("images.npz"), "--timestep-respacing", str(steps)]
    run(iddpm, *line, "--clip-denoised=False", "--ema-rate", "0", "--out", path("latents"))
    ours = numpy.load(path(f"latents/latents_{n}x{size}x{size}x{c}.npz"))["arr_0"]

    total = d["diffusion_steps"]
    if d["noise_schedule"] == "linear":
        betas = numpy.linspace(0.1 / total, 20 / total, total, dtype=numpy.float64)
    else:
        bar = lambda u: numpy.cos((u + 0.008) / 1.008 * numpy.pi / 2) ** 2
        at = numpy.arange(total, dtype=numpy.float64)
        betas = numpy.minimum(1 - bar((at + 1) / total) / bar(at / total), 0.999)
    # Evenly spaced, the first and the last among them, as in the reference's space_timesteps.
    used = [round(i * (total - 1) / (steps - 1)) for i in range(steps)]
    alpha_bar = numpy.append(numpy.cumprod(1 - betas)[used], 0.0)
    scale = 1000 / total if d["rescale_timesteps"] else 1
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    classes = torch.from_numpy(labels) if m["num_classes"] else None
    for i, t in enumerate(used):
        (a, b), (next_a, next_b) = ((ab**0.5, (1 - ab) ** 0.5) for ab in alpha_bar[i : i + 2])
        with torch.no_grad():
            eps = model(x, torch.full((n,), t * scale), class_labels=classes).sample[:, :c]
        x = next_a * (x - b * eps) / a + next_b * eps
    theirs = x.permute(0, 2, 3, 1).numpy()
    error = float(numpy.abs(ours - theirs).max() / numpy.abs(theirs).max())
    # Three networks one after the other, each within 1e-5.
    report(f"diffusers: three steps of DDIM backwards differ by {error:.1e} of the largest value", error < 1e-4)


def check_ddpm(iddpm, path):
    """A small network as google/ddpm-cifar10-32 is one: there, here, and there again."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    settings = dict(flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6, downsample_padding=0, attention_head_dim=None)
    blocks = dict(
        block_out_channels=(32, 64), down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")
    )
    first = UNet2DModel(sample_size=8, layers_per_block=1, **blocks, **settings).eval()
    DDPMPipeline(first, DDPMScheduler(variance_type="fixed_large")).save_pretrained(path("ddpm"))
    run(iddpm, "import", path("ddpm"), "--to", path("ddpm.safetensors"))
    run(iddpm, "export", path("ddpm.safetensors"), "--to", path("ddpm-back"))
    second = open_unet(path("ddpm-back"))
    report("google/ddpm-*: the settings come back", all(second.config[k] == first.config[k] for k in settings))
    report("google/ddpm-*: the tensors come back", same(first.state_dict(), second.state_dict()))
    config = configuration(path("ddpm-back/diffusion_pytorch_model.safetensors"))
    check_numbers(iddpm, path("ddpm.safetensors"), config, first, path)


def check_optimizer(path, tensors):
    """optNNNNNN.pt beside modelNNNNNN.pt, loaded into AdamW over the same tensors."""
    state = torch.load(path, weights_only=True)
    parameters = [torch.nn.Parameter(t) for t in tensors.values()]
    optimizer = torch.optim.AdamW(parameters)
    optimizer.load_state_dict(state)
    good = all(optimizer.state[p]["exp_avg"].shape == p.shape for p in parameters)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    steps = {float(optimizer.state[p]["step"]) for p in parameters}
    report(f"torch.optim.AdamW takes {os.path.basename(path)}", good and len(steps) == 1)


def main():
    checkpoint = sys.argv[1]
    iddpm = sys.argv[2] if len(sys.argv) > 2 else "target/release/iddpm"
    try:
        import diffusers

        diffusers.utils.logging.disable_progress_bar()
    except ImportError:
        diffusers = None
    with tempfile.TemporaryDirectory() as folder:
        path = lambda name: os.path.join(folder, name)
        # The live weights: a run of a few steps has no other that differ from the start.
        run(iddpm, "export", checkpoint, "--to", path("a.safetensors"), "--ema-rate", "0")
        run(iddpm, "import", path("a.safetensors"), "--to", path("model.safetensors"))
        config, tensors = configuration(path("a.safetensors")), load_file(path("a.safetensors"))
        model = config["model"]
        if (model["freq_shift"], model["norm_eps"], model["downsample_padding"]) == (0, 1e-5, 1):
            check_pt(iddpm, path("model.safetensors"), config, tensors, path)
        else:
            print("skip  .pt: it has no place for the frequency shift, norm epsilon or padding of this network")
        done = subprocess.run([iddpm, "export", path("model.safetensors"), "--to", path("hf")], capture_output=True, text=True)
        if done.returncode != 0:
            print(f"skip  diffusers: {done.stderr.strip()}")
        elif not diffusers:
            print("skip  diffusers is not installed")
        else:
            unet = open_unet(path("hf"))
            if model["low_res"]:
                print("skip  diffusers: numbers, as this network enlarges small images")
            else:
                check_numbers(iddpm, path("model.safetensors"), config, unet, path)
        if diffusers:
            check_ddpm(iddpm, path)
        beside = os.path.dirname(checkpoint) or "."
        names = [n for n in os.listdir(beside) if n.startswith("opt") and n.endswith(".pt")]
        for name in sorted(names) if os.path.isfile(checkpoint) else []:
            check_optimizer(os.path.join(beside, name), torch.load(os.path.join(beside, f"model{name[3:]}"), weights_only=True))
    sys.exit(failures > 0)


main()
