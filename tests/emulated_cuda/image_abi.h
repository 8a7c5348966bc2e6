// What a kernel image (kernels compiled for the CPU) and the emulated driver agree on.
#pragma once
#include <cstddef>
#include <cstdint>

struct EmulatedIndex {
    unsigned int x, y, z;
};

// What a kernel sees as threadIdx, blockIdx, blockDim and gridDim.
struct EmulatedRegisters {
    EmulatedIndex thread, block, block_size, grid_size;
};

// What a kernel asks of the driver.
struct EmulatedHost {
    void (*synchronize)(int line);
    void (*set_conditional)(uint64_t handle, unsigned int value);
    void (*access)(const void* address, size_t size, bool store);
    void (*fault)(int error, const char* what);
};

struct EmulatedKernel {
    const char* name;
    const size_t* sizes;  // of its parameters
    size_t parameters;
    void (*invoke)(void** arguments);
};

// Exported by an image as `emulated_image`.
struct EmulatedImage {
    const EmulatedHost* host;  // set when the image is loaded
    EmulatedRegisters* registers;
    const EmulatedKernel* kernels;
    size_t kernel_count;
    char* shared_begin;  // all __shared__ variables
    char* shared_end;
};
