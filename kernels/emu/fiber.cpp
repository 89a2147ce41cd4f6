// Fibers: a stack each and a switch that saves the callee-saved registers (12 to 16 ns; ucontext takes 250).
#include <sys/mman.h>

#include "runtime.h"
#if defined(EMU_ASAN)
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(EMU_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#endif

extern "C" void emu_switch(void** save, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
.globl emu_switch
.hidden emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
.size emu_switch,.-emu_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.p2align 4
.globl emu_switch
.hidden emu_switch
.type emu_switch,%function
emu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  br x30
.size emu_switch,.-emu_switch
)");
#else
#error "the emulator's context switch knows x86-64 and aarch64"
#endif

namespace emu {
EMU_TLS Local local;
static constexpr uint64_t CANARY = 0x5AFE57AC5AFE57ACull;

static void prepare(Fiber* f, void (*entry)()) {
    // Stacks are page multiples apart: shifted tops spread the hot frames over the cache sets.
    uint8_t* top = f->stack + STACK - f->index % 32 * 704;
    for (int i = 0; i < 8; i++) memcpy(f->stack + 8 * i, &CANARY, 8);
#if defined(__x86_64__)
    void** s = reinterpret_cast<void**>(top) - 3;  // a null return address; rsp % 16 == 8 at entry
    s[0] = nullptr;
    *--s = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--s = nullptr;
#else
    uint64_t* s = reinterpret_cast<uint64_t*>(top) - 20;
    memset(s, 0, 160);
    s[11] = reinterpret_cast<uint64_t>(entry);
#endif
    f->sp = s;
    f->asan_fake = nullptr;
}

Fiber* fiber_new(unsigned index, void (*entry)()) {
    Fiber* f = new Fiber{};
    f->index = index;
    void* p = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        fprintf(stderr, "emulator: no memory for the stack of a thread\n");
        abort();
    }
    f->stack = static_cast<uint8_t*>(p);
    f->size = STACK;
    prepare(f, entry);
#ifdef EMU_TSAN
    f->tsan = __tsan_create_fiber(0);
#endif
    return f;
}

void fiber_reset(Fiber* f, void (*entry)()) {
#ifdef EMU_ASAN
    __asan_unpoison_memory_region(f->stack, STACK);
#endif
#ifdef EMU_TSAN
    __tsan_destroy_fiber(f->tsan);
    f->tsan = __tsan_create_fiber(0);
#endif
    prepare(f, entry);
}

bool fiber_overflowed(const Fiber* f) {
    uint64_t low;
    memcpy(&low, f->stack + 56, 8);
    return low != CANARY;
}

void fiber_switch(Fiber* from, Fiber* to) {
#ifdef EMU_ASAN
    __sanitizer_start_switch_fiber(&from->asan_fake, to->stack, to->size);
#endif
#ifdef EMU_TSAN
    __tsan_switch_to_fiber(to->tsan, 1);  // 1: a switch orders nothing; only our barriers do
#endif
    local.stack = reinterpret_cast<uintptr_t>(to->stack);
    emu_switch(&from->sp, to->sp);
#ifdef EMU_ASAN
    __sanitizer_finish_switch_fiber(from->asan_fake, nullptr, nullptr);
#endif
}

void fiber_adopt_thread(Fiber* main) {
    *main = {};
#ifdef EMU_TSAN
    main->tsan = __tsan_get_current_fiber();
#endif
#ifdef EMU_ASAN
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    void* stack;
    size_t size;
    pthread_attr_getstack(&attributes, &stack, &size);
    pthread_attr_destroy(&attributes);
    main->stack = static_cast<uint8_t*>(stack);
    main->size = size;
#endif
}

void fiber_entered() {
#ifdef EMU_ASAN
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

void edge_release([[maybe_unused]] void* p) {
#ifdef EMU_TSAN
    __tsan_release(p);
#endif
}

void edge_acquire([[maybe_unused]] void* p) {
#ifdef EMU_TSAN
    __tsan_acquire(p);
#endif
}
}  // namespace emu
