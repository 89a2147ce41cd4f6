// Nearest-neighbour enlargement by 2, and its gradient, the sum over 2x2 pixels.   Reference: src/ops/upsample.rs
//   x, dx, add: (n, h, w, c); y, dy: (n, 2h, 2w, c), f32 or bf16.
// Moves x and y once, each element of x by one thread: memory bound. Vectors where c allows them; one rounding.
#include "elementwise.cuh"

// Element i of x as the first of its four in y.
DEV int64_t first_of_four(int64_t i, int h, int w, int c) {
    Pixel at(i, h, w, c);
    return (int64_t(at.n * h + at.i) * 4 * w + 2 * at.j) * c + at.c;
}

template <class T> struct Upsample {
    T* y;
    const T* x;
    int h, w, c;
    template <int N> DEV void at(int64_t i) const {
        Vec<T, N> v = *reinterpret_cast<const Vec<T, N>*>(x + i);
        T* to = y + first_of_four(i, h, w, c);
#pragma unroll
        for (int k = 0; k < 4; k++) *reinterpret_cast<Vec<T, N>*>(to + int64_t(k / 2) * 2 * w * c + k % 2 * c) = v;
    }
};

template <class T> struct UpsampleBackward {
    T* dx;
    const T *dy, *more;
    int h, w, c;
    template <int N> DEV void at(int64_t i) const {
        const T* from = dy + first_of_four(i, h, w, c);
        float v[N];
        load(v, from);
        add(v, from, c);
        add(v, from, int64_t(2) * w * c);
        add(v, from, int64_t(2) * w * c + c);
        add(v, more, i);
        store(dx + i, v);
    }
};

// len: elements of x.
extern "C" __global__ void __launch_bounds__(THREADS) upsample_f32(float* y, const float* x, int64_t len, int32_t h, int32_t w, int32_t c) {
    each<float>(len, vectors<float>(y, x, nullptr, c), Upsample<float>{y, x, h, w, c});
}
extern "C" __global__ void __launch_bounds__(THREADS) upsample_bf16(bf16* y, const bf16* x, int64_t len, int32_t h, int32_t w, int32_t c) {
    each<bf16>(len, vectors<bf16>(y, x, nullptr, c), Upsample<bf16>{y, x, h, w, c});
}
extern "C" __global__ void __launch_bounds__(THREADS)
    upsample_backward_f32(float* dx, const float* dy, const float* add, int64_t len, int32_t h, int32_t w, int32_t c) {
    each<float>(len, vectors<float>(dx, dy, add, c), UpsampleBackward<float>{dx, dy, add, h, w, c});
}
extern "C" __global__ void __launch_bounds__(THREADS)
    upsample_backward_bf16(bf16* dx, const bf16* dy, const bf16* add, int64_t len, int32_t h, int32_t w, int32_t c) {
    each<bf16>(len, vectors<bf16>(dx, dy, add, c), UpsampleBackward<bf16>{dx, dy, add, h, w, c});
}
