// Class embedding: y[n] = x[n] + table[labels[n]], and dtable[k] = Σ dy[n] over the images of class k.   src/ops/embedding.rs
//   x, y, dy: (n, c) f32 or bf16; table, dtable: (classes, c) f32; labels: (n) i32.
// Memory bound. The gradient's sum is one thread's, over the images in their order: no atomics, the same bits on every grid.
#include "elementwise.cuh"

template <class T> struct Embedding {
    T* y;
    const T* x;
    const float* table;
    const int32_t* labels;
    int c;
    template <int N> DEV void at(int64_t i) const {
        int n = int(uint32_t(i) / uint32_t(c));
        float v[N];
        load(v, x + i);
        add(v, table, int64_t(labels[n]) * c + (i - int64_t(n) * c));
        store(y + i, v);
    }
};

template <class T> struct EmbeddingBackward {
    float* dtable;
    const T* dy;
    const int32_t* labels;
    int images, c, accumulate;
    template <int N> DEV void at(int64_t i) const {
        int label = int(uint32_t(i) / uint32_t(c)), column = int(i - int64_t(label) * c);
        float v[N] = {};
        if (accumulate) load(v, dtable + i);
        for (int n = 0; n < images; n++) {
            if (labels[n] == label) add(v, dy, int64_t(n) * c + column);
        }
        store(dtable + i, v);
    }
};

// len: elements of y.
extern "C" __global__ void __launch_bounds__(THREADS)
    embedding_f32(float* y, const float* x, const float* table, const int32_t* labels, int64_t len, int32_t c) {
    each<float>(len, vectors<float>(y, x, table, c), Embedding<float>{y, x, table, labels, c});
}
extern "C" __global__ void __launch_bounds__(THREADS)
    embedding_bf16(bf16* y, const bf16* x, const float* table, const int32_t* labels, int64_t len, int32_t c) {
    each<bf16>(len, vectors<bf16>(y, x, table, c), Embedding<bf16>{y, x, table, labels, c});
}
// len: elements of dtable.
extern "C" __global__ void __launch_bounds__(THREADS)
    embedding_backward_f32(float* dtable, const float* dy, const int32_t* labels, int64_t len, int32_t images, int32_t c, int32_t accumulate) {
    each<float>(len, vectors<float>(dtable, dy, nullptr, c), EmbeddingBackward<float>{dtable, dy, labels, images, c, accumulate});
}
extern "C" __global__ void __launch_bounds__(THREADS)
    embedding_backward_bf16(float* dtable, const bf16* dy, const int32_t* labels, int64_t len, int32_t images, int32_t c, int32_t accumulate) {
    each<bf16>(len, vectors<bf16>(dtable, dy, nullptr, c), EmbeddingBackward<bf16>{dtable, dy, labels, images, c, accumulate});
}
