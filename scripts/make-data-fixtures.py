#!/usr/bin/env python3
"""Makes tests/data: small images of every kind and what Pillow makes of them, and resized images as the reference
resizes them. Needs Pillow and numpy (made with Pillow 13.0.0, numpy 2.4.6):

    python3 scripts/make-data-fixtures.py tests/data
"""
import io, pathlib, struct, sys, zlib
import numpy as np
from PIL import Image

out = pathlib.Path(sys.argv[1])
(out / "images").mkdir(parents=True, exist_ok=True)


def noise(h, w, c, seed):
    """The test has the same generator: x <- 1664525 x + 1013904223 mod 2^32, byte = x >> 24; two of three rows smooth."""
    x, values = seed, np.zeros((h, w, c), np.uint8)
    for i in range(h):
        for j in range(w):
            for k in range(c):
                x = (1664525 * x + 1013904223) % 2**32
                values[i, j, k] = x >> 24 if i % 3 == 0 else (7 * i + 5 * j + 40 * k) % 256
    return values


def reference(image, size):
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    a = np.array(image)
    y, x = (a.shape[0] - size) // 2, (a.shape[1] - size) // 2
    return a[y : y + size, x : x + size]


def resized():
    cases = {}
    for h, w, c, size in [(37, 53, 1, 16), (64, 64, 3, 32), (31, 200, 3, 32), (211, 97, 3, 24), (16, 16, 1, 32),
                          (7, 5, 3, 20), (90, 61, 1, 60), (129, 128, 3, 64), (1, 9, 1, 4), (198, 97, 1, 40), (33, 34, 3, 33), (28, 28, 1, 32)]:
        a = noise(h, w, c, h * 1000 + w)
        cases[f"{h}x{w}x{c}_{size}"] = reference(Image.fromarray(a[:, :, 0] if c == 1 else a), size).reshape(size, size, c)
    for h, w, c, (h2, w2), name in [(40, 30, 3, (20, 15), "BOX"), (41, 31, 1, (17, 29), "BOX"), (100, 50, 3, (50, 25), "BICUBIC"), (100, 50, 3, (49, 25), "BICUBIC"),
                                    (20, 30, 3, (61, 11), "BICUBIC")]:
        a = noise(h, w, c, h * 1000 + w)
        image = Image.fromarray(a[:, :, 0] if c == 1 else a).resize((w2, h2), resample=getattr(Image, name))
        cases[f"{name}_{h}x{w}x{c}_{h2}x{w2}"] = np.array(image).reshape(h2, w2, c)
    np.savez_compressed(out / "resized.npz", **cases)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def interlaced(a):
    """An Adam7 PNG of an RGB array, which Pillow cannot write."""
    h, w, _ = a.shape
    raw = b""
    for y, x, dy, dx in [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]:
        part = a[y::dy, x::dx]
        if part.size:
            raw += b"".join(b"\0" + row.tobytes() for row in part)
    head = struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def deep(a):
    """A 16-bit RGB PNG, which Pillow cannot write: the high bytes are `a`, the low bytes all 200."""
    h, w, _ = a.shape
    wide = np.stack([a, np.full_like(a, 200)], -1)
    raw = b"".join(b"\0" + row.tobytes() for row in wide)
    head = struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def gif_part(canvas, frame, left, top):
    """A GIF whose only frame covers a part of the canvas; global palette of 4 colours."""
    buffer = io.BytesIO()
    palette = [10, 20, 30, 200, 0, 0, 0, 200, 0, 5, 6, 250]
    image = Image.fromarray(frame, "P")
    image.putpalette(palette)
    image.save(buffer, "GIF", optimize=False)
    data = bytearray(buffer.getvalue())
    data[6:10] = struct.pack("<HH", *canvas)
    at = data.index(b"\x2c", 13 + 3 * (2 << (data[10] & 7)))
    data[at + 1 : at + 5] = struct.pack("<HH", left, top)
    return bytes(data)


def images():
    rgb, grey = noise(13, 11, 3, 7), noise(13, 11, 1, 8)[:, :, 0]
    smooth = np.array(Image.fromarray(noise(6, 8, 3, 9)).resize((40, 30), Image.BICUBIC))
    files = {}

    def save(name, image, **options):
        buffer = io.BytesIO()
        image.save(buffer, pathlib.Path(name).suffix[1:].upper().replace("JPG", "JPEG"), **options)
        files[name] = buffer.getvalue()

    save("rgb.png", Image.fromarray(rgb))
    save("grey.png", Image.fromarray(grey))
    save("grey1.png", Image.fromarray(grey).convert("1"))
    save("grey4.png", Image.fromarray(grey >> 4 << 4), bits=4)
    save("grey_alpha.png", Image.merge("LA", [Image.fromarray(grey), Image.fromarray(grey.T.copy().reshape(13, 11))]))
    save("rgb_alpha.png", Image.merge("RGBA", [*Image.fromarray(rgb).split(), Image.fromarray(grey)]))
    save("grey16.png", Image.fromarray(grey.astype(np.uint16) * 256 + 77))
    save("palette.png", Image.fromarray(rgb).quantize(23))
    save("palette_clear.png", Image.fromarray(rgb).quantize(7), transparency=2)
    save("palette_grey.png", Image.fromarray(grey).quantize(9))
    save("animated.gif", Image.fromarray(rgb).quantize(40), save_all=True, append_images=[Image.fromarray(rgb[::-1].copy()).quantize(5)])
    save("interlaced.gif", Image.fromarray(rgb).quantize(50), interlace=1)
    save("grey.gif", Image.fromarray(grey))
    save("rgb.jpg", Image.fromarray(smooth), quality=95, subsampling=0)
    save("rgb_420.jpg", Image.fromarray(smooth), quality=90, subsampling=2)
    save("progressive.jpg", Image.fromarray(smooth), quality=90, progressive=True)
    save("grey.jpg", Image.fromarray(smooth[:, :, 1]), quality=90)
    save("cmyk.jpg", Image.fromarray(smooth).convert("CMYK"), quality=95)
    flat = Image.fromarray(rgb).convert("RGBA")
    flat.putalpha(Image.fromarray(grey))
    save("lossless.webp", Image.fromarray(rgb), lossless=True)
    save("lossless_alpha.webp", flat, lossless=True, exact=True)
    save("lossless_grey.webp", Image.fromarray(grey), lossless=True)
    save("lossy.webp", Image.fromarray(smooth), quality=90)
    save("lossy_alpha.webp", flat.resize((40, 30)), quality=80, exact=True)
    save("animated.webp", Image.fromarray(rgb), lossless=True, save_all=True, append_images=[Image.fromarray(rgb[::-1].copy())])
    files["interlaced.png"] = interlaced(rgb)
    files["rgb16.png"] = deep(rgb)
    files["part.gif"] = gif_part((9, 8), noise(4, 5, 1, 3)[:, :, 0] % 4, 2, 3)
    decoded = {}
    for name, data in files.items():
        (out / "images" / name).write_bytes(data)
        image = Image.open(io.BytesIO(data))
        image.load()
        # Pillow clips 16-bit grey to 255 on conversion; the high byte is what its 16-bit RGB gives.
        a = (np.array(image) >> 8).astype(np.uint8) if image.mode.startswith("I") else np.array(image.convert("RGB"))
        decoded[name] = np.repeat(a[:, :, None], 3, 2) if a.ndim == 2 else a
    np.savez(out / "decoded.npz", **decoded)


resized()
images()
