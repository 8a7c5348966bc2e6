// Lets g++ compile CUDA C++ of the subset that kernels.cu keeps to, for the emulated driver. Every access to
// memory, and every misaligned or out-of-bounds one in particular, is reported: g++ is told to call for it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <utility>

#include "image_abi.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cudart_builtin__
#define CUDARTAPI
#define __shared__ static __attribute__((section("emulated_shared")))

typedef unsigned long long cudaGraphConditionalHandle;
typedef EmulatedIndex uint3;
typedef EmulatedIndex dim3;
struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { unsigned int x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) ulonglong2 { unsigned long long x, y; };

static EmulatedRegisters emulated_registers;
extern "C" EmulatedImage emulated_image;

#define threadIdx emulated_registers.thread
#define blockIdx emulated_registers.block
#define blockDim emulated_registers.block_size
#define gridDim emulated_registers.grid_size
#define __syncthreads() emulated_synchronize(__LINE__)

template <typename T> static inline T min(T a, T b) { return b < a ? b : a; }
template <typename T> static inline T max(T a, T b) { return a < b ? b : a; }

extern "C" void emulated_synchronize(int line);
extern "C" void cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned int value);

// A parameter list, unpacked from the array of pointers that a launch has.
template <typename... T> struct EmulatedSizes {
    static constexpr size_t count = sizeof...(T);
    static constexpr size_t values[sizeof...(T) + 1] = {sizeof(T)..., 0};
};
template <typename... T> constexpr EmulatedSizes<T...> emulated_sizes(void (*)(T...)) { return {}; }

template <typename... T, size_t... I>
__attribute__((no_sanitize("kernel-address", "undefined"))) static void emulated_call(
    void (*kernel)(T...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<T*>(arguments[I])...);
}
template <typename... T> static void emulated_invoke(void (*kernel)(T...), void** arguments) {
    emulated_call(kernel, arguments, std::index_sequence_for<T...>());
}

#define EMULATED_KERNEL(name)                                                      \
    {#name, decltype(emulated_sizes(name))::values, decltype(emulated_sizes(name))::count, \
     [](void** arguments) { emulated_invoke(name, arguments); }}
