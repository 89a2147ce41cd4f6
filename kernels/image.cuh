// What the kernels over images share: clean images gathered from bytes, noise, tiles and the sums over them.
//
// An image is cut into tiles of `tile` neighbouring elements (whole pixels, a multiple of 8 elements); a block takes tile after
// tile. The partition is a function of the image's size alone, a tile is summed in a fixed tree, and the tiles of an
// image are added in their order by whoever finishes last: results do not depend on the grid.
#pragma once
#include "common.cuh"
#include "gaussian.cuh"
#include "rng.cuh"

#define THREADS 256
#define TILE 2048  // largest tile; src/ops/table.rs knows it too

// What the host tells a run: src/ops/mod.rs Control.
struct Control {
    uint64_t seed;
    uint32_t step, t;
    float lr, bias1, bias2;
    uint32_t first;  // number of the image that the data begins with
    uint32_t reserved[8];
};

// The clean images of a batch, where they lie: src/ops/q_sample.rs ImagesArg.
struct Images {
    const uint8_t* data;     // (N, h, w, c)
    const int32_t* index;    // (n)
    const Control* control;
    int64_t size;            // elements of one image
    int32_t w, c;
    uint32_t first_image;    // position in the batch of the microbatch's first image
    int32_t flip;            // mirror the images whose random bit is set
};

// Where eps comes from: src/ops/q_sample.rs NoiseArg.
enum NoiseKind : int32_t { NOISE_DRAWN = 0, NOISE_PER_IMAGE = 1, NOISE_F32 = 2, NOISE_BF16 = 3 };

// How n images fall into tiles: src/ops/table.rs Tiling.
struct Tiling {
    int64_t size;   // elements of one image
    int32_t n, tile, tiles, channels, stride;  // stride: channels of the network's output
    int32_t unused;
};

// One image of the batch.
struct Image {
    const uint8_t* bytes;
    int row, c;  // elements of a row, of a pixel
    bool mirrored;

    DEV Image(const Images& all, int n) : row(all.w * all.c), c(all.c), mirrored(false) {
        bytes = all.data + all.index[n] * all.size;
        if (all.flip) {
            uint4 word = philox(make_uint4(0, all.first_image + uint32_t(n), all.control->step, RNG_FLIP), all.control->seed);
            mirrored = word.x >> 31;
        }
    }
    // x_0 of element i.
    DEV float at(int64_t i) const {
        if (mirrored) {
            int64_t line = i / row;
            int j = int(i - line * row), pixel = j / c;
            i = line * row + row - (pixel + 1) * c + (j - pixel * c);
        }
        return to_unit(bytes[i]);
    }
};

// The counter and key of an image's noise.
struct Stream {
    uint32_t image, step, use;
    uint64_t seed;

    DEV Stream(uint32_t image, uint32_t step, uint32_t use, uint64_t seed) : image(image), step(step), use(use), seed(seed) {}
    DEV Stream(const Images& all, int kind, int n, int t)
        : image(kind == NOISE_PER_IMAGE ? all.control->first + uint32_t(all.index[n]) : all.first_image + uint32_t(n)),
          step(kind == NOISE_PER_IMAGE ? uint32_t(t) : all.control->step),
          use(kind == NOISE_PER_IMAGE ? RNG_NLL : RNG_Q_SAMPLE),
          seed(all.control->seed) {}
    // Normals of elements 4 quad .. 4 quad + 4.
    DEV float4 normals(int64_t quad) const { return rng_normals(philox(make_uint4(uint32_t(quad), image, step, use), seed)); }
};

// Draws the normals of elements first .. first + count of a stream into shared memory; first is a multiple of 4.
DEV void draw(float* eps, const Stream& stream, int64_t first, int count) {
#pragma unroll 1
    for (int quad = threadIdx.x; 4 * quad < count; quad += THREADS) {
        reinterpret_cast<float4*>(eps)[quad] = stream.normals(first / 4 + quad);
    }
}

// Copies stored noise, elements first .. first + count of image n.
template <class T> DEV void fetch(float* eps, const T* stored, int64_t at, int count) {
    for (int i = threadIdx.x; i < count; i += THREADS) eps[i] = to_float(stored[at + i]);
}

// eps of elements first .. first + count of image n into shared memory.
DEV void noise(float* eps, const void* stored, int kind, const Images& images, int n, int t, int64_t first, int count) {
    int64_t at = n * images.size + first;
    if (kind == NOISE_F32) fetch(eps, static_cast<const float*>(stored), at, count);
    else if (kind == NOISE_BF16) fetch(eps, static_cast<const bf16*>(stored), at, count);
    else draw(eps, Stream(images, kind, n, t), first, count);
}

// Copies count neighbouring elements between global and shared memory, 16 bytes at a time where the address allows.
template <class T> DEV void copy_tile(T* to, const T* from, int count) {
    constexpr int N = 16 / sizeof(T);
    int wide = aligned(to) && aligned(from) ? count / N : 0;
    for (int i = threadIdx.x; i < wide; i += THREADS) {
        reinterpret_cast<Vec<T, N>*>(to)[i] = reinterpret_cast<const Vec<T, N>*>(from)[i];
    }
    for (int i = wide * N + threadIdx.x; i < count; i += THREADS) to[i] = from[i];
}

// Where element i of a tile lies in a tile of the network's output (pixels, stride); advances by THREADS elements.
struct Cursor {
    int pixel, channel, channels, stride;

    DEV Cursor(const Tiling& g) : channels(g.channels), stride(g.stride) {
        pixel = threadIdx.x / channels;
        channel = threadIdx.x % channels;
    }
    DEV int at() const { return pixel * stride + channel; }
    DEV void next() {
        pixel += THREADS / channels;
        channel += THREADS % channels;
        if (channel >= channels) {
            channel -= channels;
            pixel++;
        }
    }
};

// Adds v over the block in a fixed tree; the sum is in thread 0. sums: N * THREADS/32 floats.
template <int N> DEV void block_sum(float (&v)[N], float* sums) {
#pragma unroll
    for (int k = 0; k < N; k++) {
#pragma unroll
        for (int mask = 16; mask > 0; mask >>= 1) v[k] += __shfl_xor_sync(FULL_MASK, v[k], mask);
        if (threadIdx.x % 32 == 0) sums[k * (THREADS / 32) + threadIdx.x / 32] = v[k];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll
        for (int k = 0; k < N; k++) {
            v[k] = 0.0f;
            for (int w = 0; w < THREADS / 32; w++) v[k] += sums[k * (THREADS / 32) + w];
        }
    }
}

// Thread 0 hands in the sums of tile `tile` of image n. True for the last tile of the image to arrive, with the sums of all in
// their order. partials: (n, tiles, N); arrived: (n), 0 at rest.
template <int N>
DEV bool add_tiles(double (&total)[N], const float (&v)[N], float* partials, uint32_t* arrived, int n, int tile, int tiles) {
    if (tiles == 1) {
        for (int k = 0; k < N; k++) total[k] = v[k];
        return true;
    }
    float* mine = partials + (int64_t(n) * tiles + tile) * N;
    for (int k = 0; k < N; k++) mine[k] = v[k];
    __threadfence();
    if (atomicAdd(arrived + n, 1u) != uint32_t(tiles - 1)) return false;
    __threadfence();
    for (int k = 0; k < N; k++) total[k] = 0.0;
    for (int i = 0; i < tiles; i++) {
        for (int k = 0; k < N; k++) total[k] += __ldcg(partials + (int64_t(n) * tiles + i) * N + k);
    }
    arrived[n] = 0;
    return true;
}
