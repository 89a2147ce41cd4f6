// Random numbers as the kernels see them: words, uniforms and normals of elements 0 .. n of one image. Reference: src/rng.rs.
#include "rng.cuh"

extern "C" __global__ void test_rng(uint4* words, float* uniforms, float* normals, uint64_t seed, uint32_t image, uint32_t step,
                                    uint32_t use, int quads) {
    int i = int(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= quads) return;
    uint4 w = philox(make_uint4(uint32_t(i), image, step, use), seed);
    words[i] = w;
    reinterpret_cast<float4*>(uniforms)[i] = make_float4(rng_uniform(w.x), rng_uniform(w.y), rng_uniform(w.z), rng_uniform(w.w));
    reinterpret_cast<float4*>(normals)[i] = rng_normals(w);
}
