// What the group norm kernels share: operands, the statistics of a group from those of its parts, the dropout mask, how a block's
// threads lie over a slab of channels, and sums over the rows of a block.   Reference: src/ops/group_norm.rs.
//
// x is one or two tensors (n, s, channels) side by side; a group may lie in both. A slab is a run of whole groups, cut so that
// its rows are whole sectors; a thread keeps N neighbouring channels of it (one 16-byte vector, or one channel) and walks over
// the rows (pixels), so what depends on the channel stays in registers.
#pragma once
#include "image.cuh"

constexpr int MAX_GROUPS = 256;  // of a slab
constexpr int WARPS = THREADS / 32;

// How the statistics of one source are cut: parts of `rows` pixels of a grid of `grid` pixels per image, `phase_parts` to a phase
// of an image. Flat parts are counted through all images together: the first and last of an image may be shared.
struct Parts {
    int32_t grid, rows, phase_parts, parts, flat, unused;
    // Pixels of image n in its part q; the part in the count through all images.
    DEV int count(int n, int q) const {
        int base = flat ? n * grid : 0, first = (base / rows + q % phase_parts) * rows;
        return min(first + rows, base + grid) - max(first, base);
    }
};

struct Norm {
    const void* x[2];
    const float* sums[2];      // (n, parts, 2, channels): mean of each part, sum of squared deviations from it
    const float* gamma;
    const float* beta;
    const void* scale_shift;   // scale of channel 0 of image 0, or null
    float* mean;               // (n, groups)
    float* rstd;
    const Control* control;    // with dropout, or null
    Parts parts[2];
    int32_t channels[2];
    int32_t n, s, groups, width;      // width: channels of a group
    int32_t row_stride, silu;         // of scale_shift
    int32_t slab, slabs, chunks, chunk_rows;
    float eps, keep;                  // keep: factor of an element that is not dropped, 1 without dropout
    uint32_t threshold, op, first_image, unused;
    double per_element;               // 1 / (s width)

    DEV int c() const { return channels[0] + channels[1]; }
};

// Scale, increased by 1, and shift of a channel.
template <class T> DEV float2 scale_shift(const Norm& p, int n, int c) {
    if (!p.scale_shift) return make_float2(1.0f, 0.0f);
    const T* row = static_cast<const T*>(p.scale_shift) + int64_t(n) * p.row_stride;
    return make_float2(1.0f + to_float(row[c]), to_float(row[p.c() + c]));
}

// N floats of shared memory, 16 bytes at a time.
template <int N> DEV void fetch(float (&to)[N], const float* from) {
    if constexpr (N == 1) {
        to[0] = from[0];
    } else {
#pragma unroll
        for (int e = 0; e < N; e += 4) {
            Vec<float, 4> quad = *reinterpret_cast<const Vec<float, 4>*>(from + e);
            for (int k = 0; k < 4; k++) to[e + k] = quad[k];
        }
    }
}

// N neighbouring channels of an image, from channel c on: those of pixel r begin at `at + r * stride`.
template <class T, int N> struct Column {
    T* at;
    int stride;
    // Of one tensor of all channels.
    DEV Column(const Norm& p, const void* y, int n, int c) : stride(p.c()) { at = first(y) + int64_t(n) * p.s * stride + c; }
    // Of two side by side; no address for no tensor.
    DEV Column(const Norm& p, const void* a, const void* b, int n, int c) {
        int source = c >= p.channels[0];
        stride = p.channels[source];
        at = first(source ? b : a);
        if (at) at += int64_t(n) * p.s * stride + c - (source ? p.channels[0] : 0);
    }
    DEV static T* first(const void* x) { return static_cast<T*>(const_cast<void*>(x)); }
    DEV Vec<T, N>& row(int r) const { return *reinterpret_cast<Vec<T, N>*>(at + int64_t(r) * stride); }
};

// f(pixels, mean, squares) for the parts of group g of image n: those of this lane.
template <class F> DEV void each_part(const Norm& p, int n, int g, F f) {
    for (int source = 0; source < 2; source++) {
        int before = source ? p.channels[0] : 0, first = max(g * p.width - before, 0);
        int count = min((g + 1) * p.width - before, p.channels[source]) - first;
        const Parts& parts = p.parts[source];
        const float* sums = p.sums[source] + int64_t(n) * parts.parts * 2 * p.channels[source] + first;
#pragma unroll 4
        for (int i = threadIdx.x % 32; i < count * parts.parts; i += 32) {
            int part = i / count, rows = parts.count(n, part);
            const float* at = sums + int64_t(part) * 2 * p.channels[source] + i % count;
            if (rows > 0) f(rows, at[0], at[p.channels[source]]);
        }
    }
}

DEV double warp_sum(double v) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) v += __shfl_xor_sync(FULL_MASK, v, mask);
    return v;
}

struct Statistics {
    float mean[MAX_GROUPS], rest[MAX_GROUPS], rstd[MAX_GROUPS];  // the mean is mean + rest
};

// Statistics of `count` groups of image n from those of their parts, a warp for each; in f64 a mean of 10^4 deviations costs 10^-8.
DEV void finish(Statistics& to, const Norm& p, int n, int first, int count, bool keep) {
    for (int i = threadIdx.x / 32; i < count; i += WARPS) {
        double sum = 0.0, squares = 0.0;
        each_part(p, n, first + i, [&](double rows, double mean, double part) {
            sum = fma(rows, mean, sum);
            squares += fma(rows * mean, mean, part);
        });
        double mean = warp_sum(sum) * p.per_element, square = warp_sum(squares) * p.per_element;
        float rstd = 1.0f / sqrtf(float(max(square - mean * mean, 0.0)) + p.eps);
        if (threadIdx.x % 32 == 0) {
            to.mean[i] = float(mean), to.rest[i] = float(mean - double(float(mean))), to.rstd[i] = rstd;
            if (keep) p.mean[int64_t(n) * p.groups + first + i] = float(mean), p.rstd[int64_t(n) * p.groups + first + i] = rstd;
        }
    }
}

// Dropout of one image.
struct Mask {
    const Norm& p;
    uint64_t seed = 0;
    uint32_t step = 0, image;
    DEV Mask(const Norm& p, int n) : p(p), image(p.first_image + uint32_t(n)) {
        if (p.control) seed = p.control->seed, step = p.control->step;
    }
    // What elements i .. i + N of the image are multiplied by: 0 or p.keep, 1 without dropout; i is a multiple of N.
    template <int N> DEV void factors(float (&f)[N], int64_t i) const {
        if (!p.control) {
#pragma unroll
            for (int e = 0; e < N; e++) f[e] = 1.0f;
            return;
        }
#pragma unroll
        for (int e = 0; e < N; e += 4) {
            uint4 word = philox(make_uint4(uint32_t((i + e) / 4), image, step, p.op), seed);
            uint32_t words[4] = {word.x, word.y, word.z, word.w};
            if constexpr (N == 1) {
                uint32_t one = i & 2 ? (i & 1 ? words[3] : words[2]) : (i & 1 ? words[1] : words[0]);
                f[0] = one >= p.threshold ? p.keep : 0.0f;
            } else {
#pragma unroll
                for (int k = 0; k < 4; k++) f[e + k] = words[k] >= p.threshold ? p.keep : 0.0f;
            }
        }
    }
};

DEV float sigmoid(float u) { return __fdividef(1.0f, 1.0f + __expf(-u)); }

// How the lanes of each warp lie over `vectors` (at most 32) vectors of a row: whole rows, the lanes left over idle.
struct WarpRows {
    int vectors, rows, v, row;  // rows of a warp; this lane's vector and row
    bool active;
    DEV explicit WarpRows(int vectors) : vectors(vectors), rows(32 / vectors) {
        int lane = threadIdx.x % 32;
        v = lane % vectors, row = lane / vectors;
        active = row < rows;
    }
    // This lane's first row of the block, and from one to the next.
    DEV int first() const { return threadIdx.x / 32 * rows + row; }
    DEV int step() const { return WARPS * rows; }
    // The sum over the rows of the warp, for the lanes of its first.
    DEV float sum(float x) const {
#pragma unroll
        for (int by = 16; by > 0; by >>= 1) {
            if (by >= rows) continue;
            float other = __shfl_down_sync(FULL_MASK, x, by * vectors);
            if (row + by < rows) x += other;
        }
        return x;
    }
};
