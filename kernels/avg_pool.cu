// Mean of 2x2 pixels, stride 2, and its gradient.   Reference: src/ops/avg_pool.rs
//   x, dx, add: (n, h, w, c); y, dy: (n, h/2, w/2, c), f32 or bf16. An odd last row or column is left out.
// Moves x and y once: memory bound. Vectors where c allows them; one rounding.
#include "elementwise.cuh"

template <class T> struct AvgPool {
    T* y;
    const T* x;
    int h, w, c;
    template <int N> DEV void at(int64_t i) const {
        Pixel to(i, h / 2, w / 2, c);
        const T* from = x + (int64_t(to.n * h + 2 * to.i) * w + 2 * to.j) * c + to.c;
        float v[N];
        load(v, from);
        add(v, from, c);
        add(v, from, int64_t(w) * c);
        add(v, from, int64_t(w) * c + c);
#pragma unroll
        for (int k = 0; k < N; k++) v[k] *= 0.25f;
        store(y + i, v);
    }
};

// A thread takes up to four pixels of dx, whose dy it reads once; i counts them as images of ceil(h/2) x ceil(w/2).
template <class T> struct AvgPoolBackward {
    T* dx;
    const T *dy, *more;
    int h, w, c;
    template <int N> DEV void at(int64_t i) const {
        Pixel from(i, (h + 1) / 2, (w + 1) / 2, c);
        float share[N] = {};
        if (from.i < h / 2 && from.j < w / 2) {
            load(share, dy + (int64_t(from.n * (h / 2) + from.i) * (w / 2) + from.j) * c + from.c);
        }
#pragma unroll
        for (int k = 0; k < N; k++) share[k] *= 0.25f;
        for (int pixel = 0; pixel < 4; pixel++) {
            int y = 2 * from.i + pixel / 2, x = 2 * from.j + pixel % 2;
            if (y >= h || x >= w) continue;
            int64_t at = (int64_t(from.n * h + y) * w + x) * c + from.c;
            float v[N];
#pragma unroll
            for (int k = 0; k < N; k++) v[k] = share[k];
            add(v, more, at);
            store(dx + at, v);
        }
    }
};

// len: elements of y.
extern "C" __global__ void __launch_bounds__(THREADS) avg_pool_f32(float* y, const float* x, int64_t len, int32_t h, int32_t w, int32_t c) {
    each<float>(len, vectors<float>(y, x, nullptr, c), AvgPool<float>{y, x, h, w, c});
}
extern "C" __global__ void __launch_bounds__(THREADS) avg_pool_bf16(bf16* y, const bf16* x, int64_t len, int32_t h, int32_t w, int32_t c) {
    each<bf16>(len, vectors<bf16>(y, x, nullptr, c), AvgPool<bf16>{y, x, h, w, c});
}
// len: n ceil(h/2) ceil(w/2) c.
extern "C" __global__ void __launch_bounds__(THREADS)
    avg_pool_backward_f32(float* dx, const float* dy, const float* add, int64_t len, int32_t h, int32_t w, int32_t c) {
    each<float>(len, vectors<float>(dx, dy, add, c), AvgPoolBackward<float>{dx, dy, add, h, w, c});
}
extern "C" __global__ void __launch_bounds__(THREADS)
    avg_pool_backward_bf16(bf16* dx, const bf16* dy, const bf16* add, int64_t len, int32_t h, int32_t w, int32_t c) {
    each<bf16>(len, vectors<bf16>(dx, dy, add, c), AvgPoolBackward<bf16>{dx, dy, add, h, w, c});
}
