"""The Improved-DDPM U-Net, written for speed in PyTorch; parameter names equal the reference's.

Tensors are (n, c, h, w), normally in channels_last memory. Three things can be switched after
construction with `UNet.configure`, because which one is faster must be measured:
  norm    'native' F.group_norm;  'nhwc' explicit mean/variance over a channels-last view;
          'sums' per-channel sums first, the affine map and scale-shift folded into one a*x + b
  linear  1x1 convolutions as F.linear on a channels-last view, or as convolutions
  batch_emb   all time projections as one matrix product
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

GROUPS, EPS = 32, 1e-5


@dataclass(frozen=True)
class Config:
    """Shape of one network. `attention` holds downsampling factors, not image sizes."""
    image_size: int
    model_channels: int
    num_res_blocks: int
    channel_mult: tuple
    attention: tuple
    in_channels: int = 3
    out_channels: int = 6
    dropout: float = 0.0
    num_heads: int = 4
    num_heads_upsample: int = -1
    scale_shift: bool = True
    num_classes: int | None = None
    conv_resample: bool = True
    gmac: float = 0.0  # counted forward multiply-adds per image, 1e9


CONFIGS = {
    "cifar10": Config(32, 128, 3, (1, 2, 2, 2), (2, 4), dropout=0.3, gmac=8.387),
    "imagenet64": Config(64, 128, 3, (1, 2, 3, 4), (4, 8), gmac=39.736),
    "imagenet64-cond": Config(64, 192, 3, (1, 2, 3, 4), (4, 8), num_classes=1000, gmac=89.086),
    "lsun256": Config(256, 128, 2, (1, 1, 2, 2, 4, 4), (16,), num_heads=1, scale_shift=False, gmac=248.740),
    "tiny": Config(32, 64, 2, (1, 2, 2, 2), (2, 4), in_channels=1, out_channels=2, gmac=1.624),
    "t0": Config(8, 32, 1, (1,), (1,), gmac=0.0097),
    "t1": Config(16, 32, 1, (1, 2), (2,), gmac=0.0667),
    "t2": Config(16, 32, 2, (1, 2, 2), (2,), gmac=0.0972),
    "t3": Config(32, 32, 1, (1, 2, 2), (2, 4), gmac=0.2886),
    "t4": Config(32, 32, 2, (1, 2, 2, 2), (2, 4), gmac=0.4306),
}


def group_norm(x, weight, bias, scale=None, shift=None, impl="native"):
    """GroupNorm with 32 groups, then optionally (1 + scale) y + shift; scale, shift: (n, c)."""
    n, c, h, w = x.shape
    if impl == "native":
        y = F.group_norm(x, GROUPS, weight, bias, EPS)
        if scale is not None:
            y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return y
    weight, bias = weight.float(), bias.float()
    xf = x.permute(0, 2, 3, 1).reshape(n, h * w, c).float()
    if impl == "nhwc":
        grouped = xf.view(n, h * w, GROUPS, c // GROUPS)
        var, mean = torch.var_mean(grouped, dim=(1, 3), correction=0)
    else:
        size = h * w * c // GROUPS
        mean = xf.sum(1).view(n, GROUPS, -1).sum(2) / size
        square = (xf * xf).sum(1).view(n, GROUPS, -1).sum(2) / size
        var = (square - mean * mean).clamp(min=0)
    rstd = torch.rsqrt(var + EPS)
    per_channel = lambda v: v[:, :, None].expand(n, GROUPS, c // GROUPS).reshape(n, c)
    a = per_channel(rstd) * weight
    b = bias - per_channel(mean) * a
    if scale is not None:
        gain = 1 + scale.float()
        a, b = a * gain, b * gain + shift.float()
    y = xf * a[:, None] + b[:, None]
    return y.view(n, h, w, c).permute(0, 3, 1, 2)


class Norm(nn.Module):
    """GroupNorm, its scale-shift and an optional SiLU."""
    impl = "native"

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x, scale=None, shift=None, silu=True):
        y = group_norm(x, self.weight, self.bias, scale, shift, self.impl)
        y = F.silu(y) if silu else y
        return y if self.impl == "native" else y.to(x.dtype)


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution that can run as a matrix product on a channels-last view."""
    linear = True

    def forward(self, x):
        if not self.linear:
            return super().forward(x)
        return F.linear(x.permute(0, 2, 3, 1), self.weight[:, :, 0, 0], self.bias).permute(0, 3, 1, 2)


class ResBlock(nn.Module):
    def __init__(self, cin, cout, emb, cfg):
        super().__init__()
        self.scale_shift, self.dropout = cfg.scale_shift, cfg.dropout
        self.in_layers = nn.ModuleDict({"0": Norm(cin), "2": nn.Conv2d(cin, cout, 3, padding=1)})
        self.emb_layers = nn.ModuleDict({"1": nn.Linear(emb, cout * (2 if cfg.scale_shift else 1))})
        self.out_layers = nn.ModuleDict({"0": Norm(cout), "3": nn.Conv2d(cout, cout, 3, padding=1)})
        self.skip_connection = nn.Identity() if cin == cout else Conv1x1(cin, cout, 1)

    def forward(self, x, emb):
        """x: (n, cin, h, w); emb: this block's projected embedding, (n, cout) or (n, 2 cout)."""
        h = self.in_layers["2"](self.in_layers["0"](x))
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers["0"](h, scale, shift)
        else:
            h = self.out_layers["0"](h + emb[:, :, None, None].to(h.dtype))
        h = F.dropout(h, self.dropout, self.training) if self.dropout else h
        return self.skip_connection(x) + self.out_layers["3"](h)


class AttentionBlock(nn.Module):
    """Self-attention over pixels; the qkv channels are grouped by head first, then q, k, v."""
    linear = True

    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.norm = Norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        n, c, h, w = x.shape
        d, s = c // self.heads, h * w
        y = self.norm(x, silu=False)
        if self.linear:
            tokens = y.permute(0, 2, 3, 1).reshape(n, s, c)
            qkv = F.linear(tokens, self.qkv.weight[:, :, 0], self.qkv.bias)
            q, k, v = qkv.view(n, s, self.heads, 3, d).permute(3, 0, 2, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, s, c)
            y = F.linear(y, self.proj_out.weight[:, :, 0], self.proj_out.bias)
            return x + y.view(n, h, w, c).permute(0, 3, 1, 2)
        qkv = self.qkv(y.reshape(n, c, s)).view(n, self.heads, 3, d, s)
        q, k, v = qkv.permute(2, 0, 1, 4, 3).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(n, c, s)
        return x + self.proj_out(y).view(n, c, h, w)


class Upsample(nn.Module):
    def __init__(self, channels, cfg):
        super().__init__()
        if cfg.conv_resample:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.learned = cfg.conv_resample

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(x) if self.learned else x


class Downsample(nn.Module):
    def __init__(self, channels, cfg):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if cfg.conv_resample else nn.AvgPool2d(2)

    def forward(self, x):
        return self.op(x)


class UNet(nn.Module):
    batch_emb = True

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        ch, emb = cfg.model_channels, 4 * cfg.model_channels
        up_heads = cfg.num_heads if cfg.num_heads_upsample == -1 else cfg.num_heads_upsample
        half = ch // 2
        freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        self.register_buffer("freqs", freqs, persistent=False)
        self.time_embed = nn.ModuleDict({"0": nn.Linear(ch, emb), "2": nn.Linear(emb, emb)})
        if cfg.num_classes:
            self.label_emb = nn.Embedding(cfg.num_classes, emb)

        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(cfg.in_channels, ch, 3, padding=1)])])
        skips, ds, last = [ch], 1, len(cfg.channel_mult) - 1
        for level, mult in enumerate(cfg.channel_mult):
            for _ in range(cfg.num_res_blocks):
                block = [ResBlock(ch, mult * cfg.model_channels, emb, cfg)]
                ch = mult * cfg.model_channels
                if ds in cfg.attention:
                    block.append(AttentionBlock(ch, cfg.num_heads))
                self.input_blocks.append(nn.ModuleList(block))
                skips.append(ch)
            if level != last:
                self.input_blocks.append(nn.ModuleList([Downsample(ch, cfg)]))
                skips.append(ch)
                ds *= 2

        self.middle_block = nn.ModuleList(
            [ResBlock(ch, ch, emb, cfg), AttentionBlock(ch, cfg.num_heads), ResBlock(ch, ch, emb, cfg)])

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(cfg.channel_mult))):
            for i in range(cfg.num_res_blocks + 1):
                block = [ResBlock(ch + skips.pop(), mult * cfg.model_channels, emb, cfg)]
                ch = mult * cfg.model_channels
                if ds in cfg.attention:
                    block.append(AttentionBlock(ch, up_heads))
                if level and i == cfg.num_res_blocks:
                    block.append(Upsample(ch, cfg))
                    ds //= 2
                self.output_blocks.append(nn.ModuleList(block))
        self.out = nn.ModuleDict({"0": Norm(ch), "2": nn.Conv2d(ch, cfg.out_channels, 3, padding=1)})
        self.zero_last()

    def _last_layers(self):
        for m in self.modules():
            if isinstance(m, ResBlock):
                yield m.out_layers["3"]
            elif isinstance(m, AttentionBlock):
                yield m.proj_out
        yield self.out["2"]

    @torch.no_grad()
    def zero_last(self):
        """Zero the layers that the reference zeroes at initialisation."""
        for m in self._last_layers():
            m.weight.zero_()
            m.bias.zero_()

    @torch.no_grad()
    def randomise_last(self):
        """Give those layers ordinary weights: for timing, so that no operand is all zeros."""
        for m in self._last_layers():
            m.reset_parameters()

    def configure(self, norm="native", linear=True, batch_emb=True):
        """Choose among equivalent formulations; see the head of this file."""
        self.batch_emb = batch_emb
        for m in self.modules():
            if isinstance(m, Norm):
                m.impl = norm
            elif isinstance(m, (Conv1x1, AttentionBlock)):
                m.linear = linear
        return self

    def cast(self, dtype):
        """Cast the parameters only: the table of frequencies stays float32."""
        for p in self.parameters():
            p.data = p.data.to(dtype)
        return self

    def embedding(self, t, y=None):
        """Sinusoids (cosines first), the time MLP, plus the label's row: (n, 4 model_channels)."""
        args = t[:, None].float() * self.freqs[None]
        e = torch.cat([args.cos(), args.sin()], dim=1)
        e = self.time_embed["0"](e.to(self.time_embed["0"].weight.dtype))
        e = self.time_embed["2"](F.silu(e))
        return e if y is None else e + self.label_emb(y)

    def _projections(self, emb):
        layers = [m.emb_layers["1"] for m in self.modules() if isinstance(m, ResBlock)]
        act = F.silu(emb)
        if not self.batch_emb:
            return iter([layer(act) for layer in layers])
        weight = torch.cat([layer.weight for layer in layers])
        bias = torch.cat([layer.bias for layer in layers])
        return iter(F.linear(act, weight, bias).split([layer.out_features for layer in layers], dim=1))

    def forward(self, x, t, y=None):
        """x: (n, c, h, w) float; t: (n) times as the network expects them; returns float32."""
        proj = self._projections(self.embedding(t, y))

        def run(block, h):
            for layer in block:
                h = layer(h, next(proj)) if isinstance(layer, ResBlock) else layer(h)
            return h

        h, skips = x.to(self.input_blocks[0][0].weight.dtype), []
        for block in self.input_blocks:
            h = run(block, h)
            skips.append(h)
        h = run(self.middle_block, h)
        for block in self.output_blocks:
            h = run(block, torch.cat([h, skips.pop()], dim=1))
        return self.out["2"](self.out["0"](h)).float()


def without_dropout(cfg):
    return replace(cfg, dropout=0.0)
