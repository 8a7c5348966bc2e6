// The calls that g++ puts into a kernel image; included after the kernels, once.
#pragma once
#include "kernel_shim.h"

extern "C" {

__attribute__((weak, visibility("hidden"))) extern char __start_emulated_shared[];
__attribute__((weak, visibility("hidden"))) extern char __stop_emulated_shared[];

EmulatedImage emulated_image = {
    nullptr,
    &emulated_registers,
    emulated_kernels,
    sizeof(emulated_kernels) / sizeof(emulated_kernels[0]),
    __start_emulated_shared,
    __stop_emulated_shared,
};

#define EMULATED_HOOK __attribute__((no_sanitize("kernel-address", "undefined"), used)) void

EMULATED_HOOK cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned int value) {
    emulated_image.host->set_conditional(handle, value);
}

EMULATED_HOOK emulated_synchronize(int line) { emulated_image.host->synchronize(line); }

#define EMULATED_ACCESS(size)                                                                       \
    EMULATED_HOOK __asan_load##size##_noabort(void* p) { emulated_image.host->access(p, size, false); } \
    EMULATED_HOOK __asan_store##size##_noabort(void* p) { emulated_image.host->access(p, size, true); }
EMULATED_ACCESS(1)
EMULATED_ACCESS(2)
EMULATED_ACCESS(4)
EMULATED_ACCESS(8)
EMULATED_ACCESS(16)
EMULATED_HOOK __asan_loadN_noabort(void* p, size_t size) { emulated_image.host->access(p, size, false); }
EMULATED_HOOK __asan_storeN_noabort(void* p, size_t size) { emulated_image.host->access(p, size, true); }
EMULATED_HOOK __asan_handle_no_return() {}

EMULATED_HOOK __ubsan_handle_type_mismatch_v1(void*, void* address) {
    const bool none = address == nullptr;
    emulated_image.host->fault(none ? 700 : 716, none ? "a null pointer is used" : "a misaligned address is used");
}
EMULATED_HOOK __ubsan_handle_out_of_bounds(void*, void*) {
    emulated_image.host->fault(700, "an index is beyond an array");
}
}
