#!/usr/bin/env python3
"""Makes the built-in set from MNIST: the first N training images, padded to 32x32 with zeros, each 2x2 block averaged
(rounded half up) to 16x16, written as gzip idx files. Standard library only; the output is the same on every run.

    python3 scripts/make-digits.py <folder with train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz> assets
"""
import gzip, io, pathlib, struct, sys

N, SIDE, PAD, OUT = 10_000, 28, 2, 16


def read(path, words):
    data = gzip.decompress(path.read_bytes())
    return struct.unpack(f">{words}I", data[: 4 * words]), data[4 * words :]


def write(path, header, body):
    buffer = io.BytesIO()
    with gzip.GzipFile("", "wb", 9, buffer, mtime=0) as file:
        file.write(struct.pack(f">{len(header)}I", *header) + body)
    path.write_bytes(buffer.getvalue())


def reduced(image):
    rows = [bytes(PAD) + image[y * SIDE : (y + 1) * SIDE] + bytes(PAD) for y in range(SIDE)]
    rows = [bytes(SIDE + 2 * PAD)] * PAD + rows + [bytes(SIDE + 2 * PAD)] * PAD
    for y in range(0, 2 * OUT, 2):
        a, b = rows[y], rows[y + 1]
        yield bytes((a[x] + a[x + 1] + b[x] + b[x + 1] + 2) >> 2 for x in range(0, 2 * OUT, 2))


source, target = map(pathlib.Path, sys.argv[1:3])
(magic, _, h, w), pixels = read(source / "train-images-idx3-ubyte.gz", 4)
(_, _), labels = read(source / "train-labels-idx1-ubyte.gz", 2)
assert (magic, h, w) == (0x803, SIDE, SIDE)
images = (pixels[i * SIDE * SIDE : (i + 1) * SIDE * SIDE] for i in range(N))
body = b"".join(row for image in images for row in reduced(image))
write(target / "digits-images-idx3-ubyte.gz", (0x803, N, OUT, OUT), body)
write(target / "digits-labels-idx1-ubyte.gz", (0x801, N), labels[:N])
