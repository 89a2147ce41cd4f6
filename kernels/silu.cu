// y = x s, s = 1 / (1 + exp(-x));   dx = dy s (1 + x (1 - s)) + add.   All (n) f32 or bf16.   Reference: src/ops/silu.rs
// Moves 2 n elements, the gradient 3 n or, with an addend, 4 n: memory bound. The addend may be absent (null).
#include "elementwise.cuh"

template <class T> struct Silu {
    T* y;
    const T* x;
    template <int N> DEV void at(int64_t i) const {
        float v[N];
        load(v, x + i);
#pragma unroll
        for (int k = 0; k < N; k++) v[k] = v[k] / (1.0f + expf(-v[k]));
        store(y + i, v);
    }
};

template <class T> struct SiluBackward {
    T* dx;
    const T *dy, *x, *more;
    template <int N> DEV void at(int64_t i) const {
        float v[N], d[N];
        load(v, x + i);
        load(d, dy + i);
#pragma unroll
        for (int k = 0; k < N; k++) {
            float s = 1.0f / (1.0f + expf(-v[k]));
            d[k] *= s * (1.0f + v[k] * (1.0f - s));
        }
        add(d, more, i);
        store(dx + i, d);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) silu_f32(float* y, const float* x, int64_t n) {
    each<float>(n, aligned(y) && aligned(x), Silu<float>{y, x});
}
extern "C" __global__ void __launch_bounds__(THREADS) silu_bf16(bf16* y, const bf16* x, int64_t n) {
    each<bf16>(n, aligned(y) && aligned(x), Silu<bf16>{y, x});
}
// Six blocks: the compiler of sm_80 aims at eight, and spills.
extern "C" __global__ void __launch_bounds__(THREADS, 6)
    silu_backward_f32(float* dx, const float* dy, const float* x, const float* add, int64_t n) {
    each<float>(n, aligned(dx) && aligned(dy) && aligned(x) && aligned(add), SiluBackward<float>{dx, dy, x, add});
}
extern "C" __global__ void __launch_bounds__(THREADS)
    silu_backward_bf16(bf16* dx, const bf16* dy, const bf16* x, const bf16* add, int64_t n) {
    each<bf16>(n, aligned(dx) && aligned(dy) && aligned(x) && aligned(add), SiluBackward<bf16>{dx, dy, x, add});
}
