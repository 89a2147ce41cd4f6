// Runs one planted bug of bugs.cu: `bugs NAME [blocks] [order] [copies]`. For scripts/sanitize.sh, which links it with the
// kernels under a sanitizer. Prints "clean" and ends with 0 when neither the emulator nor the sanitizer found anything; ends with
// 3 and the message when the emulator did.
#include <dlfcn.h>

#include "../emu/ptx_emu.h"
#include "../emu/runtime.h"

struct EmuLaunch {
    const emu::Kernel* kernel;
    void* const* args;
    uint3 grid, block;
    uint32_t shared_bytes, cluster;
    int32_t order, copies;
    uint64_t seed;
    uint32_t workers, metered;
};
struct MapSpec {
    uint64_t address, dims[5], strides[4];
    uint32_t sizes[5], element_strides[5], rank, element_bytes, swizzle, im2col;
    int32_t lower[2], upper[2];
    uint32_t channels, pixels;
};
extern "C" {
void* emu_alloc(size_t);
int emu_launch(const EmuLaunch*, emu::Traffic*, char*, size_t);
int emu_tensor_map(void*, const MapSpec*);
}

int main(int argc, char** argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: bugs NAME [blocks] [order] [copies]\n");
        return 2;
    }
    std::string name = argv[1];
    auto number = [&](int i, int otherwise) { return argc > i ? atoi(argv[i]) : otherwise; };
    auto* kernel = static_cast<const emu::Kernel*>(dlsym(RTLD_DEFAULT, ("emu_kernel_" + name).c_str()));
    if (!kernel) {
        fprintf(stderr, "no kernel %s\n", name.c_str());
        return 2;
    }
    const bool tile = kernel->param_count == 2;
    const int elements = name.rfind("waste", 0) == 0 ? 1024 : 128;
    float* in = static_cast<float*>(emu_alloc(size_t(elements) * 4));
    float* out = static_cast<float*>(emu_alloc(tile ? 48 * 64 * 4 : size_t(elements) * 4));
    uint16_t* rows = static_cast<uint16_t*>(emu_alloc(48 * 64 * 2));
    for (int i = 0; i < elements; i++) in[i] = float(i + 1), out[i] = 0;
    for (int i = 0; i < 48 * 64; i++) rows[i] = 0x3f80;
    TensorMap map;
    MapSpec spec{};
    spec.address = reinterpret_cast<uintptr_t>(rows);
    for (int i = 0; i < 5; i++) spec.dims[i] = spec.sizes[i] = spec.element_strides[i] = 1;
    spec.dims[0] = 64, spec.dims[1] = 48, spec.strides[0] = 128, spec.sizes[0] = 64, spec.sizes[1] = 8;
    spec.rank = 2, spec.element_bytes = 2, spec.swizzle = name == "bug_wrong_swizzle" ? 3 : 0;
    if (emu_tensor_map(&map, &spec) != 0) return 2;
    int n = elements;
    void* plain[] = {&out, &in, &n};
    void* bulk[] = {&out, &map};
    EmuLaunch launch{kernel, tile ? bulk : plain, {unsigned(number(2, 1)), 1, 1}, {std::min(kernel->max_threads, 256u), 1, 1},
                     name == "bug_dynamic_shared_not_given" ? 0u : 4096u, 1, number(3, 0), number(4, 1), 1, 2, 0};
    emu::Traffic traffic;
    char error[2048];
    if (emu_launch(&launch, &traffic, error, sizeof error) != 0) {
        printf("emulator: %s\n", error);
        return 3;
    }
    printf("clean\n");
    return 0;
}
