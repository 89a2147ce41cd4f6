// Forward and data gradient of a convolution as implicit GEMM: D[m, n] = Σ_k A[m, k] B[n, k].
//
//   m  a pixel of the grid (images, gh, gw); it is written to pixel (i·out_step + py, j·out_step + px) of the output
//   n  a channel of the output, which may be two tensors side by side
//   k  (tap, channel) of the gathered image, which may be two tensors side by side: no concatenation is ever written
//   B  weights (o, w_taps, w_channels): as they are forward (n = o, k contiguous), transposed backward (n = channel)
//
// Epilogue: + bias[n] + shift[image, n] + add, then one rounding. blockIdx.x counts tiles, those of one m first; blockIdx.z
// is the phase (py, px) where out_step is 2: each phase has its own taps.   Reference: src/ops/conv2d.rs.
#pragma once
#include "conv2d.cuh"

struct Tap {
    int8_t dy, dx;
    int16_t w;  // tap of the weights
};

struct ConvGemm {
    const void* a[2];
    const void* w;
    void* out[2];
    const void* add[2];     // shaped as out, or null
    const void* shift;      // rows of shift_stride, one per image, or null
    const float* bias;      // or null
    float* sums;            // statistics of parts of the output, (images, parts, 2, channels), or null; forward only
    int32_t a_channels[2], out_channels[2];
    int32_t rows;           // images * gh * gw
    int32_t ah, aw, a_step; // gathered image
    int32_t oh, ow, out_step;
    int32_t w_taps, w_channels, shift_stride, tiles_n;
    int32_t first_tap[5];   // of each phase
    FastDiv by_grid, by_width, by_channels;  // gh * gw; gw; channels of a
    Tap taps[MAX_TAPS];
    int32_t phase_parts;    // parts of one phase of an image
};

// A row of the tile as its loader sees it: first pixel of the image, and the pixel under tap (0, 0).
struct GridRow {
    int base, y, x;
    GridRow() = default;
    DEV GridRow(const ConvGemm& p, int m) {
        if (m >= p.rows) {
            base = 0, y = x = -(1 << 20);  // every tap falls outside
            return;
        }
        int image = p.by_grid.div(m), rest = m - image * int(p.by_grid.divisor), i = p.by_width.div(rest);
        base = image * p.ah * p.aw, y = i * p.a_step, x = (rest - i * int(p.by_width.divisor)) * p.a_step;
    }
    // Index of the pixel under `tap`, or -1 outside the image.
    DEV int pixel(const ConvGemm& p, Tap tap) const {
        int iy = y + tap.dy, ix = x + tap.dx;
        return inside(iy, ix, p.ah, p.aw) ? base + iy * p.aw + ix : -1;
    }
};

// Element (row, k) of A and (n, k) of B with k = tap * channels + channel counted through: any number of channels.
template <class T> DEV T gathered(const ConvGemm& p, const GridRow& row, int k, int first, int last) {
    int tap = first + p.by_channels.div(k), c = p.by_channels.mod(k);
    if (tap >= last) return from_float<T>(0.0f);
    int pixel = row.pixel(p, p.taps[tap]), s = c >= p.a_channels[0];
    if (pixel < 0) return from_float<T>(0.0f);
    return static_cast<const T*>(p.a[s])[int64_t(pixel) * p.a_channels[s] + c - (s ? p.a_channels[0] : 0)];
}
template <class T, bool TRANSPOSED> DEV T weight(const ConvGemm& p, int n, int k, int first, int last) {
    int tap = first + p.by_channels.div(k), c = p.by_channels.mod(k);
    if (tap >= last || n >= p.out_channels[0] + p.out_channels[1]) return from_float<T>(0.0f);
    int o = TRANSPOSED ? c : n, i = TRANSPOSED ? n : c;
    return static_cast<const T*>(p.w)[(int64_t(o) * p.w_taps + p.taps[tap].w) * p.w_channels + i];
}

// Where row m of the grid is written, and to which image it belongs; pixel -1 if nowhere.
struct Target {
    int pixel, image;
    DEV Target(const ConvGemm& p, int m, int phase) {
        pixel = -1, image = 0;
        if (m >= p.rows) return;
        image = p.by_grid.div(m);
        if (p.out_step == 1) {
            pixel = m;
            return;
        }
        int rest = m - image * int(p.by_grid.divisor), i = p.by_width.div(rest), j = rest - i * int(p.by_width.divisor);
        int y = i * p.out_step + (phase >> 1), x = j * p.out_step + (phase & 1);
        if (inside(y, x, p.oh, p.ow)) pixel = (image * p.oh + y) * p.ow + x;
    }
};

// v += from[0 .. 4], of which `count` exist: one access where the address allows it.
template <class T> DEV void add_quad(float (&v)[4], const T* from, int count) {
    if (count >= 4 && reinterpret_cast<uintptr_t>(from) % sizeof(Vec<T, 4>) == 0) {
        Vec<T, 4> quad = *reinterpret_cast<const Vec<T, 4>*>(from);
#pragma unroll
        for (int e = 0; e < 4; e++) v[e] += to_float(quad[e]);
    } else {
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (e < count) v[e] += to_float(from[e]);
    }
}

// Columns n .. n + 4 of one pixel of the output: how many there are, and whether all lie in one tensor, at an address of four.
struct Quad {
    int pixel, image, n, count, s;
    bool whole;
    Quad() = default;
    DEV Quad(const ConvGemm& p, const Target& to, int n)
        : pixel(to.pixel), image(to.image), n(n), count(to.pixel < 0 ? 0 : p.out_channels[0] + p.out_channels[1] - n),
          s(n >= p.out_channels[0]), whole((p.out_channels[0] % 4 | p.out_channels[1] % 4) == 0) {}
    // Element e of tensor `source` of the output and of its addend.
    DEV int64_t at(const ConvGemm& p, int source, int e) const {
        return int64_t(pixel) * p.out_channels[source] + n + e - (source ? p.out_channels[0] : 0);
    }
    // What the epilogue adds: bias, shift, addend.
    template <class T> DEV void add(const ConvGemm& p, float (&v)[4]) const {
        if (count <= 0) return;
        if (p.bias) add_quad(v, p.bias + n, count);
        if (p.shift) add_quad(v, static_cast<const T*>(p.shift) + int64_t(image) * p.shift_stride + n, count);
        if (whole) {
            if (p.add[s]) add_quad(v, static_cast<const T*>(p.add[s]) + at(p, s, 0), 4);
            return;
        }
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int source = n + e >= p.out_channels[0];
            if (e < count && p.add[source]) v[e] += to_float(static_cast<const T*>(p.add[source])[at(p, source, e)]);
        }
    }
    // Writes them; leaves in v what was written.
    template <class T> DEV void write(const ConvGemm& p, float (&v)[4]) const {
        if (count <= 0) return;
        Vec<T, 4> out;
#pragma unroll
        for (int e = 0; e < 4; e++) out[e] = from_float<T>(v[e]), v[e] = to_float(out[e]);
        if (whole) {
            static_cast<Vec<T, 4>*>(p.out[s])[at(p, s, 0) >> 2] = out;  // an index of quads: else the compiler splits the store
            return;
        }
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int source = n + e >= p.out_channels[0];
            if (e < count) static_cast<T*>(p.out[source])[at(p, source, e)] = out[e];
        }
    }
};

// Statistics of column n over rows m .. m + PART_ROWS of the grid, of each image apart: mean and squared deviations from it, the form
// that kernels/group_norm.cuh puts together. value(i) is what was written for row m + i. The last part of an image also
// clears those of its places that stay empty: an image touches one part more or less as it lies to the cuts.
constexpr int PART_ROWS = 32;
template <class F> DEV void part_sums(const ConvGemm& p, int phase, int m, int n, F value) {
    int channels = p.out_channels[0], grid = int(p.by_grid.divisor), start = m, end = min(m + PART_ROWS, p.rows);
    if (n >= channels) return;
    while (m < end) {
        int image = p.by_grid.div(m), last = min(end, (image + 1) * grid), part = start / PART_ROWS - image * grid / PART_ROWS;
        float sample = value(m - start), mean = 0.0f, squares = 0.0f;
#pragma unroll 8
        for (int i = m - start; i < last - start; i++) mean += value(i) - sample;
        mean = sample + mean / float(last - m);
#pragma unroll 8
        for (int i = m - start; i < last - start; i++) squares = fmaf(value(i) - mean, value(i) - mean, squares);
        float* at = p.sums + ((int64_t(image) * p.out_step * p.out_step + phase) * p.phase_parts + part) * 2 * channels + n;
        at[0] = mean, at[channels] = squares;
        if (last == (image + 1) * grid) {
            for (part++; part < p.phase_parts; part++) at += 2 * channels, at[0] = at[channels] = 0.0f;
        }
        m = last;
    }
}
