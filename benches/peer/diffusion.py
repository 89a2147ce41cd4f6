"""Gaussian diffusion, its training loss, samplers and the optimiser step, without host reads.

Time indices are 0-based. Tables are computed in float64, stored as one float32 buffer (steps, 10)
and gathered once per batch, so every function here can be compiled or captured in a CUDA graph.
"""

import math

import numpy as np
import torch
from torch import nn


def make_betas(schedule, steps):
    if schedule == "linear":
        return np.linspace(0.1 / steps, 20 / steps, steps, dtype=np.float64)
    f = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.array([min(1 - f((i + 1) / steps) / f(i / steps), 0.999) for i in range(steps)])


def keep_evenly(steps, count):
    """The `count` time indices of one respaced section of `steps`."""
    stride, pos, kept = (steps - 1) / (count - 1), 0.0, []
    for _ in range(count):
        kept.append(round(pos))
        pos += stride
    return kept


class Diffusion(nn.Module):
    """variance: 'range' (learned), 'large' or 'small'; loss: 'rescaled_mse' (hybrid), 'mse' or 'kl'."""

    COLUMNS = ("sqrt_ab", "sqrt_1mab", "recip", "recipm1", "coef1", "coef2", "log_post", "log_max", "ab", "ab_prev")

    def __init__(self, schedule="cosine", steps=4000, respace=None, variance="range",
                 loss="rescaled_mse", rescale_timesteps=True):
        super().__init__()
        betas, kept = make_betas(schedule, steps), np.arange(steps)
        if respace:
            kept = np.array(keep_evenly(steps, respace))
            ab = np.cumprod(1 - betas)[kept]
            betas = 1 - ab / np.append(1.0, ab[:-1])
        ab = np.cumprod(1 - betas)
        prev = np.append(1.0, ab[:-1])
        post = betas * (1 - prev) / (1 - ab)
        post[0] = post[1]
        fixed = np.log(np.append(post[1], betas[1:])) if variance == "large" else np.log(post)
        table = np.stack([
            np.sqrt(ab), np.sqrt(1 - ab), np.sqrt(1 / ab), np.sqrt(1 / ab - 1),
            betas * np.sqrt(prev) / (1 - ab), (1 - prev) * np.sqrt(1 - betas) / (1 - ab),
            np.log(post), np.log(betas) if variance == "range" else fixed, ab, prev], axis=1)
        times = kept.astype(np.float32) * np.float32(1000 / steps) if rescale_timesteps else kept
        self.steps, self.variance, self.loss_kind = len(betas), variance, loss
        self.register_buffer("table", torch.tensor(table, dtype=torch.float32))
        self.register_buffer("times", torch.tensor(times))

    def gather(self, t):
        """The table's columns at t, each shaped (n, 1, 1, 1)."""
        rows = self.table[t][:, :, None, None, None]
        return dict(zip(self.COLUMNS, rows.unbind(1)))

    def q_sample(self, x_0, t, eps):
        k = self.gather(t)
        return k["sqrt_ab"] * x_0 + k["sqrt_1mab"] * eps

    def log_variance(self, k, v):
        """v: the network's variance half (learned) or None."""
        if self.variance != "range":
            return k["log_max"]
        frac = (v + 1) / 2
        return frac * k["log_max"] + (1 - frac) * k["log_post"]

    def vb_terms(self, k, x_0, x_t, t, eps, v):
        """One term of the variational bound in bits per dimension, (n); at t = 0 the decoder's NLL."""
        true_mean = k["coef1"] * x_0 + k["coef2"] * x_t
        mean = k["coef1"] * (k["recip"] * x_t - k["recipm1"] * eps) + k["coef2"] * x_t
        logvar = self.log_variance(k, v).expand_as(mean)
        kl = 0.5 * (-1 + logvar - k["log_post"] + torch.exp(k["log_post"] - logvar)
                    + (true_mean - mean) ** 2 * torch.exp(-logvar))
        nll = -discretized_log_likelihood(x_0, mean, 0.5 * logvar)
        flat = lambda a: a.flatten(1).mean(1) / math.log(2)
        return torch.where(t == 0, flat(nll), flat(kl))

    def training_loss(self, net, x_0, t, eps, y=None):
        """Per-image loss, mse and vb, each (n); vb is detached from the mean half of the output."""
        k, c = self.gather(t), x_0.shape[1]
        x_t = k["sqrt_ab"] * x_0 + k["sqrt_1mab"] * eps
        out = net(x_t, self.times[t], y) if y is not None else net(x_t, self.times[t])
        eps_hat, v = (out[:, :c], out[:, c:]) if self.variance == "range" else (out, None)
        if self.loss_kind == "kl":
            vb = self.vb_terms(k, x_0, x_t, t, eps_hat, v)
            return {"loss": vb, "vb": vb}
        mse = ((eps - eps_hat) ** 2).flatten(1).mean(1)
        if v is None:
            return {"loss": mse, "mse": mse}
        vb = self.vb_terms(k, x_0, x_t, t, eps_hat.detach(), v)
        vb = vb * (self.steps / 1000) if self.loss_kind == "rescaled_mse" else vb
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def loss_from_bytes(self, net, images):
        """Mean loss of a uint8 batch with fresh times and noise drawn on the device."""
        x_0 = images.float() / 127.5 - 1
        t = torch.randint(self.steps, (images.shape[0],), device=images.device)
        return self.training_loss(net, x_0, t, torch.randn_like(x_0))["loss"].mean()

    def p_sample(self, x, t, out, noise):
        """One ancestral step from the network's output; x_0 is clipped to [-1, 1]."""
        k, c = self.gather(t), x.shape[1]
        x_0 = (k["recip"] * x - k["recipm1"] * out[:, :c]).clamp(-1, 1)
        mean = k["coef1"] * x_0 + k["coef2"] * x
        sigma = torch.exp(0.5 * self.log_variance(k, out[:, c:]))
        return mean + (t != 0)[:, None, None, None] * sigma * noise

    def ddim_step(self, x, t, out, noise=None, eta=0.0):
        """One DDIM step; without noise it is the deterministic one, eta = 0."""
        k, c = self.gather(t), x.shape[1]
        x_0 = (k["recip"] * x - k["recipm1"] * out[:, :c]).clamp(-1, 1)
        eps = (k["recip"] * x - x_0) / k["recipm1"]
        ab, prev = k["ab"], k["ab_prev"]
        sigma = eta * torch.sqrt((1 - prev) / (1 - ab)) * torch.sqrt(1 - ab / prev)
        mean = x_0 * torch.sqrt(prev) + torch.sqrt(1 - prev - sigma**2) * eps
        return mean if noise is None else mean + (t != 0)[:, None, None, None] * sigma * noise


def discretized_log_likelihood(x, mean, log_scale):
    """ln P of an 8-bit value under a Gaussian; the cdf is the tanh approximation."""
    cdf = lambda u: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    inv = torch.exp(-log_scale)
    upper, lower = cdf(inv * (x - mean + 1 / 255)), cdf(inv * (x - mean - 1 / 255))
    log = lambda p: torch.log(p.clamp(min=1e-12))
    return torch.where(x < -0.999, log(upper), torch.where(x > 0.999, log(1 - lower), log(upper - lower)))


class FusedOptimizer:
    """torch's fused AdamW + foreach moving average; with `master`, float32 copies of low-precision weights."""

    def __init__(self, params, lr=1e-4, decay=0.0, ema_rate=0.9999, master=False, fused=True):
        self.params, self.rate, self.master = list(params), ema_rate, master
        self.weights = [p.detach().float().clone().requires_grad_() for p in self.params] if master else self.params
        cuda = self.params[0].is_cuda
        kind = dict(fused=True, capturable=cuda) if fused else dict(foreach=True, capturable=cuda)
        self.adamw = torch.optim.AdamW(self.weights, lr=lr, weight_decay=decay, **kind)
        self.ema = [w.detach().clone() for w in self.weights]
        if master:
            for w in self.weights:
                w.grad = torch.zeros_like(w)

    @torch.no_grad()
    def step(self):
        if self.master:
            torch._foreach_copy_([w.grad for w in self.weights], [p.grad for p in self.params])
        self.adamw.step()
        torch._foreach_lerp_(self.ema, [w.detach() for w in self.weights], 1 - self.rate)
        if self.master:
            torch._foreach_copy_([p.detach() for p in self.params], [w.detach() for w in self.weights])


def flat_update(p, m, v, ema, grad, count, low, lr, decay, rate, b1=0.9, b2=0.999, eps=1e-8):
    """AdamW, moving average and low-precision copy of all weights in one pass over flat buffers."""
    count.add_(1)
    g = grad.float()
    m.copy_(b1 * m + (1 - b1) * g)
    v.copy_(b2 * v + (1 - b2) * g * g)
    denom = torch.sqrt(v) / torch.sqrt(1 - b2**count) + eps
    p.copy_(p * (1 - lr * decay) - lr / (1 - b1**count) * m / denom)
    ema.copy_(rate * ema + (1 - rate) * p)
    if low is not None:
        low.copy_(p)


class FlatOptimizer:
    """All weights as views of one buffer, so that the update is a single (compiled) pass."""

    def __init__(self, params, lr=1e-4, decay=0.0, ema_rate=0.9999, compiled=True):
        self.params = list(params)
        self.args = (lr, decay, ema_rate)
        sizes = [(p.numel() + 63) // 64 * 64 for p in self.params]  # 128-byte aligned pieces
        first = self.params[0]
        new = lambda dtype: torch.zeros(sum(sizes), dtype=dtype, device=first.device)
        self.p, self.m, self.v = new(torch.float32), new(torch.float32), new(torch.float32)
        self.grad = new(first.dtype)
        self.low = new(first.dtype) if first.dtype != torch.float32 else None
        self.count = torch.zeros((), device=first.device)
        views = lambda flat: [piece[:p.numel()].as_strided(p.shape, p.stride(), piece.storage_offset())
                              for p, piece in zip(self.params, flat.split(sizes))]
        self.grads = views(self.grad)
        with torch.no_grad():
            torch._foreach_copy_(views(self.p), [p.detach() for p in self.params])
        if self.low is not None:
            self.low.copy_(self.p)
        for p, view in zip(self.params, views(self.p if self.low is None else self.low)):
            p.data = view
        self.ema = self.p.clone()
        self.update = torch.compile(flat_update, dynamic=False) if compiled else flat_update

    @torch.no_grad()
    def step(self):
        torch._foreach_copy_(self.grads, [p.grad for p in self.params])
        self.update(self.p, self.m, self.v, self.ema, self.grad, self.count, self.low, *self.args)
