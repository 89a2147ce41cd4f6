// y = a + b.   All (n) f32 or bf16, rounded once.   Reference: src/ops/add.rs
// Moves 3 n elements: memory bound.
#include "elementwise.cuh"

template <class T> struct Sum {
    T* y;
    const T *a, *b;
    template <int N> DEV void at(int64_t i) const {
        float v[N];
        load(v, a + i);
        add(v, b, i);
        store(y + i, v);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) add_f32(float* y, const float* a, const float* b, int64_t n) {
    each<float>(n, aligned(y) && aligned(a) && aligned(b), Sum<float>{y, a, b});
}
extern "C" __global__ void __launch_bounds__(THREADS) add_bf16(bf16* y, const bf16* a, const bf16* b, int64_t n) {
    each<bf16>(n, aligned(y) && aligned(a) && aligned(b), Sum<bf16>{y, a, b});
}
