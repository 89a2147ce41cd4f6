#!/usr/bin/env python3
"""Writes tests/data/ddpm_tiny.safetensors: what diffusers computes with a small network of the google/ddpm-* kind.

    python3 scripts/make-diffusers-fixture.py

Sines before cosines, frequency shift 1, norm epsilon 1e-6, padding behind the image alone where it is halved, one
attention head of any width, q, k and v apart. The weights are a formula of name and number (`values`), which the test
repeats, so that the file holds names and sizes, an input, the output, and gradients of sum(output * cotangent). Needs torch, diffusers
and safetensors.
"""

import json
import zlib

import numpy as np
import torch
from diffusers import UNet2DModel
from safetensors.torch import save_file

CONFIG = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [32, 64],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 8,
    "time_embedding_type": "positional",
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
GRADIENTS = [
    "conv_in.weight",
    "time_embedding.linear_1.weight",
    "down_blocks.0.downsamplers.0.conv.weight",
    "mid_block.attentions.0.to_k.weight",
    "conv_norm_out.weight",
]


def values(name, n):
    """n numbers in -1..1 that look random: a hash of the checksum of `name` and the position."""
    x = (zlib.crc32(name.encode()) + np.arange(n, dtype=np.uint64) * 2654435761) % 2**32
    for _ in range(2):
        x = (x ^ (x >> np.uint64(16))) * 0x45D9F3B % 2**32
    x = x ^ (x >> np.uint64(16))
    return x.astype(np.float64) / 2**31 - 1.0


def weights(name, dims):
    """Norms near 1, small biases, matrices that keep the size of what they multiply."""
    v = values(name, int(np.prod(dims)))
    if len(dims) == 1:
        v = 1.0 + 0.25 * v if "norm" in name and name.endswith("weight") else 0.25 * v
    else:
        v = v * np.sqrt(3.0 / np.prod(dims[1:]))
    return torch.from_numpy(v.astype(np.float32).reshape(dims))


def main():
    model = UNet2DModel(**CONFIG)
    tensors = {name: list(p.shape) for name, p in model.state_dict().items()}
    model.load_state_dict({name: weights(name, dims) for name, dims in tensors.items()})
    size = [2, CONFIG["in_channels"], CONFIG["sample_size"], CONFIG["sample_size"]]
    x = torch.from_numpy(values("x", int(np.prod(size))).astype(np.float32).reshape(size))
    cotangent = torch.from_numpy(values("cotangent", int(np.prod(size))).astype(np.float32).reshape(size))
    t = torch.tensor([7, 901])
    out = model(x, t).sample
    (out * cotangent).sum().backward()
    found = {"x": x, "t": t.to(torch.float32), "out": out.detach(), "cotangent": cotangent}
    found |= {f"grad/{name}": dict(model.named_parameters())[name].grad.clone() for name in GRADIENTS}
    # The same in float64: how much of a difference is rounding.
    model = model.double()
    exact = model(x.double(), t).sample
    print("largest output", out.abs().max().item(), "f32 against f64", (exact - out).abs().max().item())
    text = json.dumps(CONFIG | {"_class_name": "UNet2DModel"})
    metadata = {"config": text, "tensors": json.dumps(tensors)}
    save_file({k: v.contiguous() for k, v in found.items()}, "tests/data/ddpm_tiny.safetensors", metadata)


main()
