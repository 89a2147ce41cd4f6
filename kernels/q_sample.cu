// Forward noising: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, x_0 = byte/127.5 - 1.   src/ops/q_sample.rs
//   data: (N, h, w, c) u8, x_t: (n, h, w, c) f32 or bf16; store: eps as f32 or bf16, or null; rows: (T) coefficients.
// Moves 1 + 2 bytes per element in bf16 (+ 2 when eps is stored). A thread makes 8 elements: two Philox calls, one 16-byte store.
// Error: the sum of two products rounded once more, 1e-7 |x_t|, even where the products cancel; bf16 rounds to 2^-9.
// Stored noise is rounded to its type first and x_t made of what is stored.
#include "image.cuh"

struct QSampleRow {
    Split a, b;  // sqrt(alpha_bar), sqrt(1 - alpha_bar)
};

constexpr int EACH = TILE / THREADS;

template <class T> DEV void store(T* to, const float (&v)[EACH], int count) {
    constexpr int N = 16 / sizeof(T);
    if (count == EACH && aligned(to)) {
#pragma unroll
        for (int k = 0; k < EACH / N; k++) {
            Vec<T, N> out;
#pragma unroll
            for (int i = 0; i < N; i++) out[i] = from_float<T>(v[k * N + i]);
            reinterpret_cast<Vec<T, N>*>(to)[k] = out;
        }
    } else {
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (i < count) to[i] = from_float<T>(v[i]);
    }
}

template <class T> DEV void load(float (&v)[EACH], const T* from, int count) {
    constexpr int N = 16 / sizeof(T);
    if (count == EACH && aligned(from)) {
#pragma unroll
        for (int k = 0; k < EACH / N; k++) {
            Vec<T, N> in = reinterpret_cast<const Vec<T, N>*>(from)[k];
#pragma unroll
            for (int i = 0; i < N; i++) v[k * N + i] = to_float(in[i]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (i < count) v[i] = to_float(from[i]);
    }
}

// x_0 of elements i .. i + count.
DEV void clean(float (&x_0)[EACH], const Image& image, int64_t i, int count) {
    const uint8_t* from = image.bytes + i;
    if (count == EACH && !image.mirrored && (reinterpret_cast<uintptr_t>(from) & 7) == 0) {
        Vec<uint8_t, EACH> in = *reinterpret_cast<const Vec<uint8_t, EACH>*>(from);
#pragma unroll
        for (int k = 0; k < EACH; k++) x_0[k] = to_unit(in[k]);
    } else {
#pragma unroll
        for (int k = 0; k < EACH; k++)
            if (k < count) x_0[k] = image.at(i + k);
    }
}

// x_t of elements i .. i + count of image n.
template <class T>
DEV void noised(T* x_t, void* stored, int kind, int store_type, const Images& images, int n, int t, const QSampleRow& row,
                int64_t i, int count) {
    float x_0[EACH] = {}, eps[EACH] = {}, x[EACH];
    int64_t at = n * images.size + i;
    clean(x_0, Image(images, n), i, count);
    if (kind == NOISE_F32) {
        load(eps, static_cast<const float*>(stored) + at, count);
    } else if (kind == NOISE_BF16) {
        load(eps, static_cast<const bf16*>(stored) + at, count);
    } else {
        Stream stream(images, kind, n, t);
#pragma unroll
        for (int quad = 0; quad < EACH / 4; quad++) {
            float4 e = stream.normals(i / 4 + quad);
            eps[4 * quad] = e.x, eps[4 * quad + 1] = e.y, eps[4 * quad + 2] = e.z, eps[4 * quad + 3] = e.w;
        }
        if (store_type == NOISE_F32) {
            store(static_cast<float*>(stored) + at, eps, count);
        } else if (store_type == NOISE_BF16) {
#pragma unroll
            for (int k = 0; k < EACH; k++) eps[k] = to_float(from_float<bf16>(eps[k]));
            store(static_cast<bf16*>(stored) + at, eps, count);
        }
    }
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        Split sum = dot(row.a, x_0[k], row.b, eps[k]);
        x[k] = sum.hi + sum.lo;
    }
    store(x_t + at, x, count);
}

template <class T>
DEV void q_sample(T* x_t, void* stored, int kind, int store_type, const Images& images, const int32_t* t,
                  const QSampleRow* rows, const Tiling& g) {
    for (int64_t item = blockIdx.x; item < int64_t(g.n) * g.tiles; item += gridDim.x) {
        int n = int(item / g.tiles);
        int64_t tile = item % g.tiles, i = tile * g.tile + threadIdx.x * EACH;
        int64_t end = min(g.size, (tile + 1) * g.tile);
        if (i < end) noised(x_t, stored, kind, store_type, images, n, t[n], rows[t[n]], i, int(min(end - i, int64_t(EACH))));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    q_sample_f32(float* x_t, void* stored, int32_t kind, int32_t store_type, const Images images, const int32_t* t,
                 const QSampleRow* rows, const Tiling g) {
    q_sample(x_t, stored, kind, store_type, images, t, rows, g);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    q_sample_bf16(bf16* x_t, void* stored, int32_t kind, int32_t store_type, const Images images, const int32_t* t,
                  const QSampleRow* rows, const Tiling g) {
    q_sample(x_t, stored, kind, store_type, images, t, rows, g);
}
