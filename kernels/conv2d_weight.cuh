// Gradient of a convolution with respect to its weights as GEMM over pixels:
//
//   dw[o, tap, c] = Σ_pixels dy[pixel + y tap, o] x[pixel + x tap, c]        sums[segment, o] = Σ_pixels dy[pixel, o]
//
// The pixels of the grid (images, gh, gw) are cut into segments, a whole number per image and each a whole number of runs of
// 16 (beyond the image's end they count as 0); a block of row blockIdx.y takes `segments_per_split` of them and writes its partial
// sum. Segments depend on the shape alone, and partial sums are added in order: the same bits on every run.
// blockIdx.x counts tiles (o, column), column tiles first. A column tile lies within one tap and one source of x; `flat`,
// for few channels and a dy that is the same under all taps, counts columns through taps and channels.
#pragma once
#include "conv2d.cuh"

struct WeightTap {
    int8_t ydy, ydx, xdy, xdx;
    int16_t slot;  // row sums are taken under this tap, into this slot; -1: not
    int16_t unused;
};

struct ConvWeight {
    const void* dy;
    const void* x[2];
    float* dw;             // or partial sums, split_stride apart
    float* sums;           // (slots, segments, oc), or null
    int64_t split_stride;
    int32_t oc, x_channels[2];
    int32_t yh, yw, y_step, xh, xw, x_step;
    int32_t pixels;        // gh * gw
    int32_t segments, segments_per_split;
    int32_t columns;       // taps * channels: length of a row of dw
    int32_t tiles_n, tiles_a, tiles_tap;  // column tiles in all, of the first source under one tap, of both
    int32_t flat, accumulate;
    FastDiv by_runs, by_parts, by_width, by_channels;  // runs per segment; segments per image; gw; channels
    WeightTap taps[MAX_TAPS];
};

// The columns of dw that a tile holds.
struct Columns {
    int tap, s, c0, first, count;  // tap and source if not flat; first channel; first column of dw; columns here
    DEV Columns(const ConvWeight& p, int tile, int width) {
        tap = s = 0;
        if (p.flat) {
            c0 = first = tile * width, count = p.columns - first;
            return;
        }
        tap = tile / p.tiles_tap;
        int rest = tile % p.tiles_tap;
        s = rest >= p.tiles_a;
        c0 = (rest - (s ? p.tiles_a : 0)) * width;
        first = tap * (p.x_channels[0] + p.x_channels[1]) + (s ? p.x_channels[0] : 0) + c0;
        count = p.x_channels[s] - c0;
    }
    // Are the row sums of dy this tile's to take?
    DEV bool takes_sums(const ConvWeight& p) const { return p.sums && s == 0 && c0 == 0 && p.taps[tap].slot >= 0; }
};

// Pixel of the grid at place `row` of a run of 16; image -1 beyond the end.
struct GridPixel {
    int image, i, j;
    DEV GridPixel(const ConvWeight& p, int first_segment, int last_segment, int run, int row) {
        int segment = first_segment + p.by_runs.div(run);
        image = p.by_parts.div(segment);
        int part = segment - image * int(p.by_parts.divisor);
        int pixel = (part * int(p.by_runs.divisor) + p.by_runs.mod(run)) * 16 + row;
        i = p.by_width.div(pixel), j = pixel - i * int(p.by_width.divisor);
        if (segment >= last_segment || pixel >= p.pixels) image = -1;
    }
    // Index in dy or x, or -1 where that reads as 0.
    DEV int y(const ConvWeight& p, WeightTap t) const {
        int y = i * p.y_step + t.ydy, x = j * p.y_step + t.ydx;
        return image >= 0 && inside(y, x, p.yh, p.yw) ? (image * p.yh + y) * p.yw + x : -1;
    }
    DEV int x(const ConvWeight& p, WeightTap t) const {
        int y = i * p.x_step + t.xdy, x = j * p.x_step + t.xdx;
        return image >= 0 && inside(y, x, p.xh, p.xw) ? (image * p.xh + y) * p.xw + x : -1;
    }
};

// Elements of the operands, for any number of channels.
template <class T> DEV T gradient_at(const ConvWeight& p, int pixel, int o) {
    return pixel < 0 || o >= p.oc ? from_float<T>(0.0f) : static_cast<const T*>(p.dy)[int64_t(pixel) * p.oc + o];
}
template <class T> DEV T input_at(const ConvWeight& p, const GridPixel& at, const Columns& cols, int column) {
    int s = cols.s, c = cols.c0 + column, tap = cols.tap;
    if (column >= cols.count) return from_float<T>(0.0f);
    if (p.flat) {
        tap = p.by_channels.div(c), c = p.by_channels.mod(c), s = c >= p.x_channels[0];
        if (s) c -= p.x_channels[0];
    }
    int pixel = at.x(p, p.taps[tap]);
    return pixel < 0 ? from_float<T>(0.0f) : static_cast<const T*>(p.x[s])[int64_t(pixel) * p.x_channels[s] + c];
}

// Segments of this block's split, and the runs of 16 pixels in them.
struct Split {
    int first, last, runs;
    DEV explicit Split(const ConvWeight& p) {
        first = int(blockIdx.y) * p.segments_per_split;
        last = min(first + p.segments_per_split, p.segments);
        runs = (last - first) * int(p.by_runs.divisor);
    }
};

// Row sums of output channel o over the segment that ends with `run`.
DEV float* sums_at(const ConvWeight& p, const Split& split, int run, int slot, int o) {
    return p.sums + (int64_t(slot) * p.segments + split.first + p.by_runs.div(run)) * p.oc + o;
}
DEV bool ends_segment(const ConvWeight& p, int run) { return p.by_runs.mod(run + 1) == 0; }

// Writes, or adds, N neighbouring elements of dw; the caller knows that N = 2 are aligned and both columns or none.
template <int N> DEV void put_weights(const ConvWeight& p, const Columns& cols, int o, int column, const Vec<float, N>& v) {
    if (o >= p.oc || column >= cols.count) return;
    auto* to = reinterpret_cast<Vec<float, N>*>(p.dw + blockIdx.y * p.split_stride + int64_t(o) * p.columns + cols.first + column);
    Vec<float, N> sum = v;
    if (p.accumulate) {
        Vec<float, N> old = *to;
#pragma unroll
        for (int e = 0; e < N; e++) sum[e] += old[e];
    }
    *to = sum;
}
