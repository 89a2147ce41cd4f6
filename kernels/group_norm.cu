// Group norm, scale-shift, SiLU, dropout:  h = (x - mean) rstd, u = (h gamma + beta)(1 + scale) + shift, y = dropout(silu(u)).
//   x: (n, s, ca) and (n, s, cb), y: (n, s, ca + cb), f32 or bf16; gamma, beta f32; mean, rstd: (n, groups) f32. src/ops/group_norm.rs
//
// `apply` reads x once and writes y once: memory bound. It takes the statistics from those of parts of x, which the convolution
// that made x leaves behind, or else `sums`, which reads x once more. A block takes (image, slab of whole groups, chunk of rows)
// and finishes the statistics of its groups itself, so every part is read once per chunk.
// Parts are (mean, squared deviations from it), never plain sums of squares: a mean far from 0 costs nothing.
#include "group_norm.cuh"

constexpr int BATCH = 4;  // rows that a thread has under way

// u = (x - mean) gain + offset of the channels of a slab, in shared memory.
struct Affine {
    float *mean, *gain, *offset;
    DEV Affine(float* at, int slab) : mean(at), gain(at + slab), offset(at + 2 * slab) {}
    template <class T> DEV void fill(const Norm& p, const Statistics& s, int n, int c0, int count, T) const {
        for (int i = threadIdx.x; i < count; i += THREADS) {
            int g = i / p.width;
            float2 rows = scale_shift<T>(p, n, c0 + i);
            mean[i] = s.mean[g];
            gain[i] = s.rstd[g] * p.gamma[c0 + i] * rows.x;
            offset[i] = p.beta[c0 + i] * rows.x + rows.y - s.rest[g] * gain[i];
        }
    }
};

template <class T, int N> DEV void apply(T* y, const Norm& p) {
    SMEM_DYN(shared);
    SMEM(Statistics, statistics, [1]);
    Affine affine(shared.take<float>(3 * p.slab), p.slab);
    for (int64_t item = blockIdx.x; item < int64_t(p.n) * p.slabs * p.chunks; item += gridDim.x) {
        int chunk = int(item % p.chunks), slab = int(item / p.chunks % p.slabs), n = int(item / p.chunks / p.slabs);
        int c0 = slab * p.slab, count = min(p.slab, p.c() - c0);
        finish(statistics[0], p, n, c0 / p.width, count / p.width, chunk == 0);
        __syncthreads();
        affine.fill(p, statistics[0], n, c0, count, T());
        __syncthreads();
        int vectors = count / N, rows = THREADS / vectors, v = int(threadIdx.x) % vectors * N, c = c0 + v;
        int end = min(p.s, (chunk + 1) * p.chunk_rows), first = chunk * p.chunk_rows + int(threadIdx.x) / vectors;
        if (int(threadIdx.x) / vectors >= rows) first = end;
        float mean[N], gain[N], offset[N];
        fetch(mean, affine.mean + v), fetch(gain, affine.gain + v), fetch(offset, affine.offset + v);
        Mask mask(p, n);
        Column<T, N> from(p, p.x[0], p.x[1], n, c), to(p, y, n, c);
        for (int r = first; r < end; r += BATCH * rows) {
            Vec<T, N> in[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; i++)
                if (r + i * rows < end) in[i] = from.row(r + i * rows);
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                int row = r + i * rows;
                if (row >= end) break;
                float keep[N];
                mask.factors(keep, int64_t(row) * p.c() + c);
                Vec<T, N> out;
#pragma unroll
                for (int e = 0; e < N; e++) {
                    float u = fmaf(to_float(in[i][e]) - mean[e], gain[e], offset[e]);
                    if (p.silu) u *= sigmoid(u);
                    out[e] = from_float<T>(u * keep[e]);
                }
                to.row(row) = out;
            }
        }
        __syncthreads();  // what is in shared memory is overwritten next
    }
}

// Statistics of the parts of one source, (n, parts, 2, channels): mean and squared deviations from it, a block for each part and V
// vectors of channels. The sum is one of differences to the part's first row; the deviations are taken from registers.
template <class T, int N> DEV void sums(float* to, const T* x, const Parts& parts, int images, int channels) {
    constexpr int V = N == 1 ? 32 : 8, LANES = WARPS * (32 / V), ROWS = 128 / LANES, SLAB = V * N;
    SMEM(float, warps, [WARPS][SLAB]);
    SMEM(float, total, [SLAB]);
    int slabs = (channels + SLAB - 1) / SLAB;
    WarpRows lanes(V);
    // Adds v over the rows of the block.
    auto add_up = [&](float (&v)[N]) {
#pragma unroll
        for (int e = 0; e < N; e++) {
            float sum = lanes.sum(v[e]);
            if (lanes.row == 0) warps[threadIdx.x / 32][lanes.v * N + e] = sum;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < SLAB; i += THREADS) {
            float sum = 0.0f;
            for (int w = 0; w < WARPS; w++) sum += warps[w][i];
            total[i] = sum;
        }
        __syncthreads();
        fetch(v, total + lanes.v * N);
    };
    for (int64_t item = blockIdx.x; item < int64_t(images) * parts.parts * slabs; item += gridDim.x) {
        int slab = int(item % slabs), part = int(item / slabs % parts.parts), n = int(item / slabs / parts.parts);
        int c = slab * SLAB + lanes.v * N, count = c < channels ? parts.count(n, part) : 0;
        const T* from = x + (int64_t(n) * parts.grid + int64_t(part) * parts.rows) * channels + c;
        float v[ROWS][N], mean[N] = {}, squares[N] = {}, sample[N] = {};
        if (count > 0) {
            Vec<T, N> first = *reinterpret_cast<const Vec<T, N>*>(from);
#pragma unroll
            for (int e = 0; e < N; e++) sample[e] = to_float(first[e]);
        }
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            int r = lanes.first() + i * LANES;
            if (r < count) {
                Vec<T, N> in = *reinterpret_cast<const Vec<T, N>*>(from + int64_t(r) * channels);
#pragma unroll
                for (int e = 0; e < N; e++) v[i][e] = to_float(in[e]) - sample[e], mean[e] += v[i][e];
            }
        }
        add_up(mean);
#pragma unroll
        for (int e = 0; e < N; e++) mean[e] /= float(max(count, 1));
#pragma unroll
        for (int i = 0; i < ROWS; i++)
            if (lanes.first() + i * LANES < count) {
#pragma unroll
                for (int e = 0; e < N; e++) squares[e] += (v[i][e] - mean[e]) * (v[i][e] - mean[e]);
            }
        add_up(squares);
        if (threadIdx.x / 32 == 0 && lanes.row == 0 && count > 0) {
            float* at = to + (int64_t(n) * parts.parts + part) * 2 * channels + c;
#pragma unroll
            for (int e = 0; e < N; e++) at[e] = sample[e] + mean[e], at[channels + e] = squares[e];
        }
    }
}

#define NORM(T, NAME, N)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) group_norm_apply_##NAME(T* y, const __grid_constant__ Norm p) { \
        apply<T, N>(y, p);                                                                                          \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                           \
        group_norm_sums_##NAME(float* to, const T* x, const __grid_constant__ Parts parts, int32_t images, int32_t channels) { \
        sums<T, N>(to, x, parts, images, channels);                                                                 \
    }
NORM(bf16, bf16, 8)
NORM(float, f32, 4)
// Any number of channels.
NORM(bf16, bf16_any, 1)
NORM(float, f32_any, 1)
