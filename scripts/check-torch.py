#!/usr/bin/env python3
"""Checks exports and imports against PyTorch, and against diffusers where it is installed.

    python3 scripts/check-torch.py CHECKPOINT [path of iddpm]

Writes a .pt, a .safetensors and a diffusers folder from CHECKPOINT into a temporary folder; loads each with the program
it is for; saves the state dict again with torch.save, in both containers, imports it and exports it once more. Every tensor
must be equal to the bit. Prints one line per check; exit code 1 if one fails. Needs torch and safetensors.
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
    sys.exit(failures > 0)


main()
