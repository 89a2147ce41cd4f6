#!/usr/bin/env python3
"""Checks exports and imports against PyTorch, and against diffusers where it is installed.

    python3 scripts/check-torch.py CHECKPOINT [path of iddpm]

Writes a .pt, a .safetensors and a diffusers folder from CHECKPOINT into a temporary folder; loads each with the program
it is for; saves the state dict again with torch.save, in both containers, imports it and exports it once more. Every tensor
must be equal to the bit. With diffusers, also makes a network of the google/ddpm-* kind there, imports it, exports it and holds the
outputs of both against each other. Files optN.pt and modelN.pt beside CHECKPOINT (`iddpm train --reference-files` writes them)
go into torch.optim.AdamW. Prints one line per check; exit code 1 if one fails. Needs torch and safetensors.
"""

import json
import os
import subprocess
import sys
import tempfile

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


def flags(path):
    """The settings that a .pt does not hold, from the metadata of the .safetensors export."""
    with open(path, "rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    config = json.loads(header["__metadata__"]["iddpm_config"])
    model, diffusion = config["model"], config["diffusion"]
    found = {
        "image-size": model["image_size"],
        "num-heads": model["num_heads"],
        "num-heads-upsample": model["num_heads_upsample"],
        "num-head-channels": model["num_head_channels"] or -1,
        "use-new-attention-order": model["use_new_attention_order"],
        "diffusion-steps": diffusion["diffusion_steps"],
        "noise-schedule": diffusion["noise_schedule"],
        "rescale-timesteps": diffusion["rescale_timesteps"],
    }
    return [f"--{k}={v}" for k, v in found.items()]


def check_diffusers(folder):
    try:
        from diffusers import UNet2DModel
    except ImportError:
        print("skip  diffusers is not installed")
        return
    model, info = UNet2DModel.from_pretrained(folder, output_loading_info=True)
    report("diffusers: no tensor is missing or left over", not info["missing_keys"] and not info["unexpected_keys"])
    size, channels = model.config.sample_size, model.config.in_channels
    labels = torch.zeros(1, dtype=torch.long) if model.config.num_class_embeds else None
    with torch.no_grad():
        out = model(torch.zeros(1, channels, size, size), 1, class_labels=labels).sample
    report("diffusers: the network runs and gives finite numbers", bool(out.isfinite().all()))


def check_ddpm(iddpm, folder):
    """A small network as google/ddpm-cifar10-32 is one: there, here, and there again."""
    try:
        from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    except ImportError:
        return
    torch.manual_seed(0)
    settings = dict(flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6, downsample_padding=0, attention_head_dim=None)
    blocks = dict(
        block_out_channels=(32, 64), down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")
    )
    first = UNet2DModel(sample_size=8, layers_per_block=1, **blocks, **settings).eval()
    DDPMPipeline(first, DDPMScheduler(variance_type="fixed_large")).save_pretrained(os.path.join(folder, "ddpm"))
    path = lambda name: os.path.join(folder, name)
    run(iddpm, "import", path("ddpm"), "--to", path("ddpm.safetensors"))
    run(iddpm, "export", path("ddpm.safetensors"), "--to", path("ddpm-back"))
    second = UNet2DModel.from_pretrained(path("ddpm-back")).eval()
    report("google/ddpm-*: the settings come back", all(second.config[k] == first.config[k] for k in settings))
    report("google/ddpm-*: the tensors come back", same(first.state_dict(), second.state_dict()))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        report("google/ddpm-*: the outputs are equal", torch.equal(first(x, 9).sample, second(x, 9).sample))


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
    with tempfile.TemporaryDirectory() as folder:
        path = lambda name: os.path.join(folder, name)
        run(iddpm, "export", checkpoint, "--to", path("a.safetensors"))
        run(iddpm, "export", checkpoint, "--to", path("a.pt"))
        tensors = load_file(path("a.safetensors"))
        loaded = torch.load(path("a.pt"), weights_only=True)
        report(f"torch.load reads the .pt: {len(loaded)} tensors", same(loaded, tensors))
        for name, zipped in [("zip.pt", True), ("legacy.pt", False)]:
            torch.save(loaded, path(name), _use_new_zipfile_serialization=zipped)
            run(iddpm, "import", path(name), "--to", path(f"{name}.back.safetensors"), *flags(path("a.safetensors")))
            run(iddpm, "export", path(f"{name}.back.safetensors"), "--to", path(f"{name}.again.safetensors"))
            report(f"torch.save ({name}) is imported", same(load_file(path(f"{name}.again.safetensors")), tensors))
        done = subprocess.run([iddpm, "export", checkpoint, "--to", path("hf")], capture_output=True, text=True)
        if done.returncode == 0:
            check_diffusers(path("hf"))
        else:
            print(f"skip  diffusers: {done.stderr.strip()}")
        check_ddpm(iddpm, folder)
        beside = os.path.dirname(checkpoint) or "."
        names = [n for n in os.listdir(beside) if n.startswith("opt") and n.endswith(".pt")]
        for name in sorted(names) if os.path.isfile(checkpoint) else []:
            check_optimizer(os.path.join(beside, name), torch.load(os.path.join(beside, f"model{name[3:]}"), weights_only=True))
    sys.exit(failures > 0)


main()
