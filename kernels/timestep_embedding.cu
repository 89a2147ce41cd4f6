// y[n] = [cos(t f_k), sin(t f_k)], an odd dim ending with a zero column.   Reference: src/ops/timestep_embedding.rs
//   t: (n) f32, frequencies f: (dim/2) f32, y: (n, dim) f32 or bf16. A thread per element: some thousands a step.
// The angle is an f32 product; cosine and sine are f64, so that every device rounds the same number.
#include "elementwise.cuh"

template <class T> DEV void timestep_embedding(T* y, const float* t, const float* frequencies, int64_t len, int dim) {
    int half = dim / 2;
    int64_t stride = int64_t(gridDim.x) * THREADS;
    for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < len; i += stride) {
        int n = int(uint32_t(i) / uint32_t(dim)), column = int(i - int64_t(n) * dim);
        bool sine = column >= half;
        float v = 0.0f;
        if (column < 2 * half) {
            double angle = double(__fmul_rn(t[n], frequencies[column - (sine ? half : 0)]));
            v = float(sine ? sin(angle) : cos(angle));
        }
        y[i] = from_float<T>(v);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    timestep_embedding_f32(float* y, const float* t, const float* frequencies, int64_t len, int32_t dim) {
    timestep_embedding(y, t, frequencies, len, dim);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    timestep_embedding_bf16(bf16* y, const float* t, const float* frequencies, int64_t len, int32_t dim) {
    timestep_embedding(y, t, frequencies, len, dim);
}
