#include "runtime.h"
extern "C" int emu_tensor_map(void*, const void*) { return 1; }
