#!/usr/bin/env python3
"""Writes tests/data/nll_terms.npz: the terms of the bound that the reference computes, with the noise that we draw.

    python3 scripts/make-nll-fixture.py CHECKOUT_OF_IMPROVED_DIFFUSION

The network is tests/golden/11_pt/state_zip.pt, the images are a formula that the test repeats, and the noise of image i at t is
that of src/rng.rs: Philox of the seed and (element / 4, i, t, 7). Needs torch and numpy.
"""

import sys

import numpy as np
import torch

SEED, IMAGES, SIZE, CHANNELS, STEPS = 5, 6, 16, 3, "8"


def philox(counter, seed):
    """Philox4x32-10 of the rows of `counter`, (n, 4) uint64 below 2^32."""
    c, k = [counter[:, i].copy() for i in range(4)], [seed & 0xFFFFFFFF, seed >> 32]
    mask = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]), b & mask, (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]), a & mask]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return np.stack(c, 1)


def normals(n, image, step, op):
    """The first n normals of an image: Box-Muller on pairs of words."""
    counter = np.array([[quad, image, step, op] for quad in range(-(-n // 4))], dtype=np.uint64)
    words = philox(counter, SEED).astype(np.float32).astype(np.float64)
    u = (words * 2.0**-32 + 2.0**-33).astype(np.float32).astype(np.float64).reshape(-1, 2)
    radius, angle = np.sqrt(-2 * np.log(u[:, 0])), 2 * np.pi * u[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)[:n].astype(np.float32)


def pixels():
    """The bytes of the images, (n, h, w, c): a gradient with a pattern of its own in each image."""
    n, y, x, c = np.indices((IMAGES, SIZE, SIZE, CHANNELS))
    return ((n * 37 + y * (5 + n) + x * 11 + c * 60 + x * y * c) % 256).astype(np.uint8)


def main():
    sys.path.insert(0, sys.argv[1])
    from improved_diffusion import gaussian_diffusion
    from improved_diffusion.script_util import create_gaussian_diffusion
    from improved_diffusion.unet import UNetModel

    model = UNetModel(
        in_channels=3,
        model_channels=32,
        out_channels=6,
        num_res_blocks=1,
        attention_resolutions=(2,),
        channel_mult=(1, 1),
        num_heads=4,
        use_scale_shift_norm=True,
    )
    model.load_state_dict(torch.load("tests/golden/11_pt/state_zip.pt", weights_only=True))
    model.eval()
    diffusion = create_gaussian_diffusion(
        steps=1000,
        learn_sigma=True,
        noise_schedule="cosine",
        timestep_respacing=STEPS,
        rescale_timesteps=True,
        rescale_learned_sigmas=True,
    )
    x = torch.from_numpy(pixels().astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2).contiguous()
    drawn, calls = torch.randn_like, []

    def ours(like):
        t = diffusion.num_timesteps - 1 - len(calls)
        calls.append(t)
        eps = np.stack([normals(SIZE * SIZE * CHANNELS, i, t, 7) for i in range(IMAGES)])
        return torch.from_numpy(eps.reshape(IMAGES, SIZE, SIZE, CHANNELS)).permute(0, 3, 1, 2).contiguous()

    def bound(noise):
        gaussian_diffusion.th.randn_like = noise
        found = diffusion.calc_bpd_loop(model, x, clip_denoised=True)
        gaussian_diffusion.th.randn_like = drawn
        return {name: terms.numpy() for name, terms in found.items()}

    found = bound(ours)
    arrays = {name: found[name].mean(0) for name in ["vb", "mse", "xstart_mse"]}
    arrays |= {"total_bpd": found["total_bpd"], "prior_bpd": found["prior_bpd"]}
    torch.manual_seed(1)
    arrays["other_total_bpd"] = np.stack([bound(drawn)["total_bpd"] for _ in range(4)])
    np.savez("tests/data/nll_terms.npz", **arrays)
    print({name: np.round(values, 4) for name, values in arrays.items()})


main()
