// Backward of group norm with scale-shift, SiLU and dropout. With dz = dy dropout silu'(u), k = gamma (1 + scale), h = (x - mean) rstd and
//   S1 = Σ_pixels dz, S2 = Σ_pixels dz h  of each (image, channel):
//   dx = rstd (k dz - mean_group(k dz) - h mean_group(k dz h)) + add: the means are Σ k S1 and Σ k S2 over the group's channels;
//   dscale = gamma S2 + beta S1, dshift = S1, dgamma = Σ_n (1 + scale) S2, dbeta = Σ_n (1 + scale) S1.   src/ops/group_norm.rs
//   x, dx, add: (n, s, ca) and (n, s, cb), dy: (n, s, ca + cb), f32 or bf16; totals: S1, S2 as (n, 2, c) f32.
//
// `resident` keeps a slab of x and dy in shared memory: x, dy (and add) are read once, dx written once. Larger images take two passes,
// `sums` and `apply`, and read x and dy twice. Every sum has one order, whatever the grid.
#include "group_norm.cuh"

constexpr int BATCH = 2;  // rows that a thread has under way

struct NormGradient {
    Norm f;
    const void* dy;
    void* dx[2];
    const void* add[2];  // or null
    float* totals;       // (n, 2, c)
    float* partial;      // (n, parts, 2, c)
    int32_t parts, part_rows;
};

// u = (x - mean) gain + offset, gain = rstd k, of the channels of a slab, in shared memory.
struct Slopes {
    float *mean, *rstd, *gain, *offset;
    DEV Slopes(float* at, int slab) : mean(at), rstd(at + slab), gain(at + 2 * slab), offset(at + 3 * slab) {}
    template <class T> DEV void fill(const Norm& p, int n, int c0, int count, T) const {
        for (int i = threadIdx.x; i < count; i += THREADS) {
            int64_t g = int64_t(n) * p.groups + (c0 + i) / p.width;
            float2 rows = scale_shift<T>(p, n, c0 + i);
            mean[i] = p.mean[g], rstd[i] = p.rstd[g];
            gain[i] = p.rstd[g] * p.gamma[c0 + i] * rows.x, offset[i] = p.beta[c0 + i] * rows.x + rows.y;
        }
    }
};

// Those of N channels.
template <int N> struct Slope {
    float mean[N], gain[N], offset[N];
    DEV Slope(const Slopes& s, int v) { fetch(mean, s.mean + v), fetch(gain, s.gain + v), fetch(offset, s.offset + v); }
    // From x - mean.
    DEV float dz(const Norm& p, int e, float d, float dy) const {
        if (!p.silu) return dy;
        float u = fmaf(d, gain[e], offset[e]), s = sigmoid(u);
        return dy * s * (1.0f + u * (1.0f - s));
    }
};

// dy of one vector with dropped elements 0, the factor of the others left out.
template <class T, int N> DEV void drop(Vec<T, N>& dy, const Norm& p, const Mask& mask, int row, int c) {
    if (!p.control) return;
    float keep[N];
    mask.factors(keep, int64_t(row) * p.c() + c);
#pragma unroll
    for (int e = 0; e < N; e++)
        if (keep[e] == 0.0f) dy[e] = from_float<T>(0.0f);
}

// rstd mean(k dz) and rstd² mean(k dz h), side by side, of the slab's groups, from `sums` (2, count) of its channels.
DEV void group_means(float* means, const Norm& p, const Slopes& slopes, const float* sums, int count) {
    for (int i = threadIdx.x; i < 2 * (count / p.width); i += THREADS) {
        float sum = 0.0f;
        for (int j = i / 2 * p.width; j < (i / 2 + 1) * p.width; j++) sum = fmaf(slopes.gain[j], sums[i % 2 * count + j], sum);
        means[i] = (i % 2 ? slopes.rstd[i / 2 * p.width] : 1.0f) * sum * float(p.per_element);
    }
}

// dx of one vector from x, dy with its dropped elements 0, and what is added.
template <class T, int N>
DEV Vec<T, N> gradient(const NormGradient& p, const Slope<N>& f, const float (&m)[2][N], const Vec<T, N>& x, const Vec<T, N>& dy,
                       const Vec<T, N>& add) {
    Vec<T, N> out;
#pragma unroll
    for (int e = 0; e < N; e++) {
        float d = to_float(x[e]) - f.mean[e], dz = f.dz(p.f, e, d, p.f.keep * to_float(dy[e]));
        out[e] = from_float<T>(fmaf(f.gain[e], dz, -fmaf(d, m[1][e], m[0][e])) + to_float(add[e]));
    }
    return out;
}

// Rows r .. r + BATCH step of what is added, 0 if nothing is.
template <class T, int N> DEV void addends(Vec<T, N> (&v)[BATCH], const Column<T, N>& add, int r, int step, int end) {
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
#pragma unroll
        for (int e = 0; e < N; e++) v[i][e] = from_float<T>(0.0f);
        if (add.at && r + i * step < end) v[i] = add.row(r + i * step);
    }
}

template <class T, int N> DEV void resident(const NormGradient& p) {
    SMEM_DYN(shared);
    const Norm& f = p.f;
    Vec<T, N>* xs = shared.take<Vec<T, N>>(size_t(f.s) * f.slab / N);
    Vec<T, N>* ds = shared.take<Vec<T, N>>(size_t(f.s) * f.slab / N);
    float* warps = shared.take<float>(WARPS * 2 * f.slab);
    float* means = shared.take<float>(2 * f.slab / f.width);
    Slopes slopes(shared.take<float>(4 * f.slab), f.slab);
    for (uint32_t item = blockIdx.x; item < uint32_t(f.n) * f.slabs; item += gridDim.x) {
        int slab = int(item % f.slabs), n = int(item / f.slabs), c0 = slab * f.slab, count = min(f.slab, f.c() - c0);
        slopes.fill(f, n, c0, count, T());
        __syncthreads();
        WarpRows lanes(count / N);
        int c = c0 + lanes.v * N, first = lanes.active ? lanes.first() : f.s, step = lanes.step();
        Slope<N> slope(slopes, lanes.v * N);
        Mask mask(f, n);
        Column<T, N> x(f, f.x[0], f.x[1], n, c), dy(f, p.dy, n, c), dx(f, p.dx[0], p.dx[1], n, c), add(f, p.add[0], p.add[1], n, c);
        float s1[N] = {}, s2[N] = {};
        for (int r = first; r < f.s; r += BATCH * step) {
            Vec<T, N> a[BATCH], b[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; i++)
                if (r + i * step < f.s) a[i] = x.row(r + i * step), b[i] = dy.row(r + i * step);
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                int row = r + i * step;
                if (row >= f.s) break;
                drop(b[i], f, mask, row, c);
                xs[row * lanes.vectors + lanes.v] = a[i], ds[row * lanes.vectors + lanes.v] = b[i];
#pragma unroll
                for (int e = 0; e < N; e++) {
                    float d = to_float(a[i][e]) - slope.mean[e], dz = slope.dz(f, e, d, f.keep * to_float(b[i][e]));
                    s1[e] += dz, s2[e] = fmaf(dz, d, s2[e]);
                }
            }
        }
#pragma unroll
        for (int e = 0; e < N; e++) {
            float sum1 = lanes.sum(s1[e]), sum2 = lanes.sum(s2[e]);
            if (lanes.row == 0) {
                float* mine = warps + threadIdx.x / 32 * 2 * count + lanes.v * N + e;
                mine[0] = sum1, mine[count] = sum2;
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < 2 * count; i += THREADS) {
            float sum = 0.0f;
            for (int w = 0; w < WARPS; w++) sum += warps[w * 2 * count + i];
            if (i >= count) sum *= slopes.rstd[i - count];
            warps[i] = sum;  // no other thread reads this place
            p.totals[(int64_t(n) * 2 + i / count) * f.c() + c0 + i % count] = sum;
        }
        __syncthreads();
        group_means(means, f, slopes, warps, count);
        __syncthreads();
        float m[2][N];
#pragma unroll
        for (int e = 0; e < N; e++)
            for (int k = 0; k < 2; k++) m[k][e] = means[2 * ((c + e - c0) / f.width) + k];
        // Each thread reads what it wrote itself.
        for (int r = first; r < f.s; r += BATCH * step) {
            Vec<T, N> more[BATCH];
            addends(more, add, r, step, f.s);
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                int row = r + i * step, at = row * lanes.vectors + lanes.v;
                if (row >= f.s) break;
                Vec<T, N> a = xs[at], b = ds[at];
                dx.row(row) = gradient(p, slope, m, a, b, more[i]);
            }
        }
    }
}

// S1 and S2 of the parts of each image, (n, parts, 2, c): a block for each part and V vectors of channels.
template <class T, int N> DEV void sums(const NormGradient& p) {
    constexpr int V = N == 1 ? 32 : 8, SLAB = V * N;
    SMEM(float, warps, [WARPS][2 * SLAB]);
    SMEM(float, of_channels, [4 * SLAB]);
    const Norm& f = p.f;
    Slopes slopes(of_channels, SLAB);
    int slabs = (f.c() + SLAB - 1) / SLAB;
    WarpRows lanes(V);
    for (int64_t item = blockIdx.x; item < int64_t(f.n) * p.parts * slabs; item += gridDim.x) {
        int slab = int(item % slabs), part = int(item / slabs % p.parts), n = int(item / slabs / p.parts);
        int c0 = slab * SLAB, count = min(SLAB, f.c() - c0), v = min(lanes.v * N, count - N), c = c0 + v, step = lanes.step();
        int end = min(f.s, (part + 1) * p.part_rows), first = lanes.v * N < count ? part * p.part_rows + lanes.first() : end;
        slopes.fill(f, n, c0, count, T());
        __syncthreads();
        Slope<N> slope(slopes, v);
        Mask mask(f, n);
        Column<T, N> x(f, f.x[0], f.x[1], n, c), dy(f, p.dy, n, c);
        float s1[N] = {}, s2[N] = {};
        for (int r = first; r < end; r += BATCH * step) {
            Vec<T, N> a[BATCH], b[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; i++)
                if (r + i * step < end) a[i] = x.row(r + i * step), b[i] = dy.row(r + i * step);
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                int row = r + i * step;
                if (row >= end) break;
                drop(b[i], f, mask, row, c);
#pragma unroll
                for (int e = 0; e < N; e++) {
                    float d = to_float(a[i][e]) - slope.mean[e], dz = slope.dz(f, e, d, f.keep * to_float(b[i][e]));
                    s1[e] += dz, s2[e] = fmaf(dz, d, s2[e]);
                }
            }
        }
#pragma unroll
        for (int e = 0; e < N; e++) {
            float sum1 = lanes.sum(s1[e]), sum2 = lanes.sum(s2[e]);
            if (lanes.row == 0) warps[threadIdx.x / 32][lanes.v * N + e] = sum1, warps[threadIdx.x / 32][SLAB + lanes.v * N + e] = sum2;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < 2 * SLAB; i += THREADS) {
            if (i % SLAB >= count) continue;
            float sum = 0.0f;
            for (int w = 0; w < WARPS; w++) sum += warps[w][i];
            if (i >= SLAB) sum *= slopes.rstd[i - SLAB];
            p.partial[((int64_t(n) * p.parts + part) * 2 + i / SLAB) * f.c() + c0 + i % SLAB] = sum;
        }
        __syncthreads();  // the sums of the warps are overwritten next
    }
}

// dx from S1 and S2 of the parts: a block for each (image, slab of whole groups, chunk of rows).
template <class T, int N> DEV void apply(const NormGradient& p) {
    SMEM_DYN(shared);
    const Norm& f = p.f;
    float* totals = shared.take<float>(2 * f.slab);
    float* means = shared.take<float>(2 * f.slab / f.width);
    Slopes slopes(shared.take<float>(4 * f.slab), f.slab);
    for (int64_t item = blockIdx.x; item < int64_t(f.n) * f.slabs * f.chunks; item += gridDim.x) {
        int chunk = int(item % f.chunks), slab = int(item / f.chunks % f.slabs), n = int(item / f.chunks / f.slabs);
        int c0 = slab * f.slab, count = min(f.slab, f.c() - c0);
        slopes.fill(f, n, c0, count, T());
        for (int i = threadIdx.x; i < 2 * count; i += THREADS) {
            const float* from = p.partial + (int64_t(n) * p.parts * 2 + i / count) * f.c() + c0 + i % count;
            float sum = 0.0f;
#pragma unroll 8
            for (int part = 0; part < p.parts; part++) sum += from[int64_t(part) * 2 * f.c()];
            totals[i] = sum;
            if (chunk == 0) p.totals[(int64_t(n) * 2 + i / count) * f.c() + c0 + i % count] = sum;
        }
        __syncthreads();
        group_means(means, f, slopes, totals, count);
        __syncthreads();
        int vectors = count / N, rows = THREADS / vectors, v = int(threadIdx.x) % vectors * N, c = c0 + v;
        int end = min(f.s, (chunk + 1) * f.chunk_rows), first = chunk * f.chunk_rows + int(threadIdx.x) / vectors;
        if (int(threadIdx.x) / vectors >= rows) first = end;
        Slope<N> slope(slopes, v);
        Mask mask(f, n);
        Column<T, N> x(f, f.x[0], f.x[1], n, c), dy(f, p.dy, n, c), dx(f, p.dx[0], p.dx[1], n, c), add(f, p.add[0], p.add[1], n, c);
        float m[2][N];
#pragma unroll
        for (int e = 0; e < N; e++)
            for (int k = 0; k < 2; k++) m[k][e] = means[2 * ((c + e - c0) / f.width) + k];
        for (int r = first; r < end; r += BATCH * rows) {
            Vec<T, N> a[BATCH], b[BATCH], more[BATCH];
            addends(more, add, r, rows, end);
#pragma unroll
            for (int i = 0; i < BATCH; i++)
                if (r + i * rows < end) a[i] = x.row(r + i * rows), b[i] = dy.row(r + i * rows);
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                int row = r + i * rows;
                if (row >= end) break;
                drop(b[i], f, mask, row, c);
                dx.row(row) = gradient(p, slope, m, a[i], b[i], more[i]);
            }
        }
        __syncthreads();  // what is in shared memory is overwritten next
    }
}

// Parameter gradients from S1 and S2. A block of 32 x 8 threads takes 32 channels: eight threads share the images and are added in order.
template <class T> DEV void parameters(float* dgamma, float* dbeta, T* dscale_shift, const NormGradient& p, int stride, int accumulate) {
    SMEM(float, sums, [2][8][32]);
    const Norm& f = p.f;
    int c = blockIdx.x * 32 + threadIdx.x;
    constexpr int EACH = 4;  // images that a thread has under way
    float dg = 0.0f, db = 0.0f;
    for (int first = threadIdx.y; c < f.c() && first < f.n; first += 8 * EACH) {
        float s1[EACH], s2[EACH], scale[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int n = min(first + 8 * i, f.n - 1);
            s1[i] = p.totals[int64_t(n) * 2 * f.c() + c], s2[i] = p.totals[(int64_t(n) * 2 + 1) * f.c() + c];
            scale[i] = scale_shift<T>(f, n, c).x;
        }
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int n = first + 8 * i;
            if (n >= f.n) break;
            dg = fmaf(scale[i], s2[i], dg), db = fmaf(scale[i], s1[i], db);
            if (dscale_shift) {
                T* row = dscale_shift + int64_t(n) * stride;
                row[c] = from_float<T>(fmaf(f.gamma[c], s2[i], f.beta[c] * s1[i])), row[f.c() + c] = from_float<T>(s1[i]);
            }
        }
    }
    sums[0][threadIdx.y][threadIdx.x] = dg, sums[1][threadIdx.y][threadIdx.x] = db;
    __syncthreads();
    if (threadIdx.y > 1 || c >= f.c()) return;
    float* to = (threadIdx.y ? dbeta : dgamma) + c;
    float sum = accumulate ? *to : 0.0f;
    for (int i = 0; i < 8; i++) sum += sums[threadIdx.y][i][threadIdx.x];
    *to = sum;
}

#define NORM_BACKWARD(T, NAME, N)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) group_norm_backward_resident_##NAME(const __grid_constant__ NormGradient p) { \
        resident<T, N>(p);                                                                                                         \
    }                                                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) group_norm_backward_sums_##NAME(const __grid_constant__ NormGradient p) { \
        sums<T, N>(p);                                                                                                             \
    }                                                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) group_norm_backward_apply_##NAME(const __grid_constant__ NormGradient p) { \
        apply<T, N>(p);                                                                                                            \
    }
NORM_BACKWARD(bf16, bf16, 8)
NORM_BACKWARD(float, f32, 4)
// Any number of channels.
NORM_BACKWARD(bf16, bf16_any, 1)
NORM_BACKWARD(float, f32_any, 1)

#define NORM_PARAMETERS(T, NAME)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(256) group_norm_parameters_##NAME(                                                \
        float* dgamma, float* dbeta, T* dscale_shift, const __grid_constant__ NormGradient p, int32_t stride, int32_t accumulate) { \
        parameters<T>(dgamma, dbeta, dscale_shift, p, stride, accumulate);                                                         \
    }
NORM_PARAMETERS(bf16, bf16)
NORM_PARAMETERS(float, f32)
