// Counter-based random numbers: Philox4x32-10 and Box-Muller, the port of src/rng.rs.
//
// Same words, and the same correctly rounded operations in the same order (no contraction, no fast forms), so that a number
// is the same on the CPU, on the emulator and on the device; see src/rng.rs for what key and counter mean.
#pragma once
#include "common.cuh"

// What a random number is for: src/rng.rs `op`.
enum RandomUse : uint32_t { RNG_TIMESTEP = 1, RNG_Q_SAMPLE = 2, RNG_FLIP = 3, RNG_P_SAMPLE = 4, RNG_NLL = 7 };

// Four words from the counter (quad, image, step, use) and a seed.
DEV uint4 philox(uint4 c, uint64_t seed) {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
    for (int i = 0; i < 10; i++) {
        uint32_t a_hi = __umulhi(c.x, 0xD2511F53u), a_lo = c.x * 0xD2511F53u;
        uint32_t b_hi = __umulhi(c.z, 0xCD9E8D57u), b_lo = c.z * 0xCD9E8D57u;
        c = make_uint4(b_hi ^ c.y ^ k0, b_lo, a_hi ^ c.w ^ k1, a_lo);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

// Uniform number in (0, 1].
DEV float rng_uniform(uint32_t bits) { return __fmaf_rn(__uint2float_rn(bits), 0x1p-32f, 0x1p-33f); }

// ln u for a normal u > 0.
DEV float rng_ln(float u) {
    uint32_t bits = __float_as_uint(u);
    uint32_t e = (bits - 0x3F2AAAABu) & 0xFF800000u;
    float m = __fsub_rn(__uint_as_float(bits - e), 1.0f);
    float k = __fmul_rn(__int2float_rn(int(e)), 0x1p-23f);
    float r = 0.11330632f;
    r = __fmaf_rn(r, m, -0.12422217f);
    r = __fmaf_rn(r, m, 0.10915653f);
    r = __fmaf_rn(r, m, -0.12288719f);
    r = __fmaf_rn(r, m, 0.14291868f);
    r = __fmaf_rn(r, m, -0.16673316f);
    r = __fmaf_rn(r, m, 0.19999948f);
    r = __fmaf_rn(r, m, -0.24999945f);
    r = __fmaf_rn(r, m, 0.33333334f);
    r = __fmaf_rn(r, m, -0.5f);
    r = __fmaf_rn(r, __fmul_rn(m, m), m);
    return __fmaf_rn(k, 0.6931472f, r);
}

// (sin 2 pi u, cos 2 pi u) for u in [0, 1].
DEV float2 rng_sincos_turns(float u) {
    const float ROUND = 12582912.0f, TAU = 6.28318530717958647692f;
    float shifted = __fmaf_rn(u, 4.0f, ROUND);
    uint32_t quadrant = __float_as_uint(shifted);
    float r = __fmaf_rn(__fsub_rn(shifted, ROUND), -0.25f, u);
    float z = __fmul_rn(r, r);
    float s = __fmaf_rn(41.589542f, z, -76.70129f);
    s = __fmaf_rn(s, z, 81.60523f);
    s = __fmaf_rn(s, z, -41.3417f);
    s = __fmaf_rn(s, z, -1.7484555e-7f);
    float turn = __fmul_rn(r, TAU);
    s = __fadd_rn(__fmaf_rn(s, r, __fmaf_rn(r, TAU, -turn)), turn);
    float c = __fmaf_rn(59.424107f, z, -85.44882f);
    c = __fmaf_rn(c, z, 64.93937f);
    c = __fmaf_rn(c, z, -19.739208f);
    c = __fmaf_rn(c, z, 1.0f);
    float sin = quadrant & 1 ? c : s, cos = quadrant & 1 ? s : c;
    uint32_t sin_sign = quadrant << 30 & 0x80000000u, cos_sign = (quadrant + 1) << 30 & 0x80000000u;
    return make_float2(__uint_as_float(__float_as_uint(sin) ^ sin_sign), __uint_as_float(__float_as_uint(cos) ^ cos_sign));
}

DEV float2 rng_normal_pair(uint32_t a, uint32_t b) {
    float radius = __fsqrt_rn(__fmul_rn(-2.0f, rng_ln(rng_uniform(a))));
    float2 angle = rng_sincos_turns(rng_uniform(b));
    return make_float2(__fmul_rn(radius, angle.y), __fmul_rn(radius, angle.x));
}

// The four standard normals of one Philox call.
DEV float4 rng_normals(uint4 bits) {
    float2 a = rng_normal_pair(bits.x, bits.y), b = rng_normal_pair(bits.z, bits.w);
    return make_float4(a.x, a.y, b.x, b.y);
}
