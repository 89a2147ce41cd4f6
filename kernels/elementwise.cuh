// What the element-wise kernels share: a loop over n elements in vectors of 16 bytes.
//
// Work is a struct with `template <int N> void at(int64_t i)`, which computes elements i .. i + N. Vectors where `wide` says that every
// address allows them; the tail, or everything, one element at a time. No result depends on the grid.
#pragma once
#include "common.cuh"

#define THREADS 256

// Elements of T in 16 bytes.
template <class T> constexpr int WIDE = 16 / int(sizeof(T));

template <class T, class Work> DEV void each(int64_t n, bool wide, Work work) {
    int64_t stride = int64_t(gridDim.x) * THREADS, start = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    int64_t vectors = wide ? n / WIDE<T> : 0;
    for (int64_t i = start; i < vectors; i += stride) work.template at<WIDE<T>>(i * WIDE<T>);
    for (int64_t i = vectors * WIDE<T> + start; i < n; i += stride) work.template at<1>(i);
}

// Whether a row of c elements is whole vectors and every address allows them.
template <class T> DEV bool vectors(const void* a, const void* b, const void* other, int c) {
    return c % WIDE<T> == 0 && aligned(a) && aligned(b) && aligned(other);
}

// v = p[0 .. N], which is aligned; f32 beside bf16 takes two accesses.
template <int N, class T> DEV void load(float (&v)[N], const T* p) {
    constexpr int M = N < WIDE<T> ? N : WIDE<T>;
#pragma unroll
    for (int first = 0; first < N; first += M) {
        Vec<T, M> part = *reinterpret_cast<const Vec<T, M>*>(p + first);
#pragma unroll
        for (int k = 0; k < M; k++) v[first + k] = to_float(part[k]);
    }
}

// v += p[i .. i + N], where there is a p.
template <int N, class T> DEV void add(float (&v)[N], const T* p, int64_t i) {
    if (!p) return;
    float more[N];
    load(more, p + i);
#pragma unroll
    for (int k = 0; k < N; k++) v[k] += more[k];
}

template <int N, class T> DEV void store(T* p, const float (&v)[N]) {
    constexpr int M = N < WIDE<T> ? N : WIDE<T>;
#pragma unroll
    for (int first = 0; first < N; first += M) {
        Vec<T, M> part;
#pragma unroll
        for (int k = 0; k < M; k++) part[k] = from_float<T>(v[first + k]);
        *reinterpret_cast<Vec<T, M>*>(p + first) = part;
    }
}

// Where element i of an image tensor (n, h, w, c) lies.
struct Pixel {
    int n, i, j, c;
    DEV Pixel(int64_t at, int h, int w, int channels) {
        uint32_t pixel = uint32_t(at) / uint32_t(channels);
        c = int(uint32_t(at) - pixel * uint32_t(channels));
        uint32_t row = pixel / uint32_t(w);
        j = int(pixel - row * uint32_t(w)), n = int(row / uint32_t(h)), i = int(row - uint32_t(n) * uint32_t(h));
    }
};
