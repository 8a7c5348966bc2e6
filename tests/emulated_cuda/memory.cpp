// Memory. What the device has is poisoned when it is new, guarded on both sides, and kept for a while when it
// is freed, so that what was never written, written beyond its end or written too late shows.
#include "emulator.h"

#include <cstdlib>
#include <cstring>

namespace emulated {

static constexpr size_t kGuard = 256;
static constexpr size_t kFreedBytes = 64u << 20;
static constexpr int kNew = 0xFF, kBeyond = 0xA7, kOld = 0xDD;

static size_t rounded(size_t size) { return (size + kGuard - 1) / kGuard * kGuard; }

static bool all_bytes(const char* first, const char* last, int byte) {
    for (; first < last; ++first)
        if (static_cast<unsigned char>(*first) != byte) return false;
    return true;
}

static std::map<uintptr_t, Allocation>::iterator holding(const void* address) {
    auto& memory = state().memory;
    auto found = memory.upper_bound(reinterpret_cast<uintptr_t>(address));
    if (found == memory.begin()) return memory.end();
    --found;
    const uintptr_t last = found->first + rounded(found->second.size) + kGuard;
    return reinterpret_cast<uintptr_t>(address) < last ? found : memory.end();
}

Where where(const void* address, size_t size) {
    const auto found = holding(address);
    if (found == state().memory.end()) return Where::pageable;
    const uintptr_t offset = reinterpret_cast<uintptr_t>(address) - found->first;
    if (offset + size > found->second.size) return Where::wild;
    return found->second.device ? Where::device : Where::pinned;
}

bool inside_known_memory(const void* address, size_t size) {
    const Where place = where(address, size);
    return place == Where::device || place == Where::pinned;
}

CUresult allocate(size_t size, bool device, void** address) {
    State& s = state();
    if (size == 0) return CUDA_ERROR_INVALID_VALUE;
    if (unsafe_now()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (device && s.used_bytes + size > static_cast<size_t>(s.settings["total_memory_bytes"]))
        return CUDA_ERROR_OUT_OF_MEMORY;
    const size_t whole = rounded(size) + 2 * kGuard;
    char* block = static_cast<char*>(std::aligned_alloc(kGuard, whole));
    if (!block) return CUDA_ERROR_OUT_OF_MEMORY;
    std::memset(block, kBeyond, whole);
    std::memset(block + kGuard, kNew, size);
    s.memory[reinterpret_cast<uintptr_t>(block + kGuard)] = {size, device, block};
    if (device) s.used_bytes += size;
    *address = block + kGuard;
    return CUDA_SUCCESS;
}

static void check_guard(uintptr_t address, const Allocation& allocation) {
    const char* begin = reinterpret_cast<const char*>(address);
    const char* end = begin + allocation.size;
    const char* last = allocation.block + rounded(allocation.size) + 2 * kGuard;
    if (!all_bytes(allocation.block, begin, kBeyond) || !all_bytes(end, last, kBeyond))
        violation(0, "something is written beyond an allocation of " + std::to_string(allocation.size) + " bytes");
}

static void check_freed(const char* block, size_t size) {
    if (!all_bytes(block, block + size, kOld)) violation(0, "freed memory is written");
}

CUresult release(void* address, bool device) {
    State& s = state();
    if (unsafe_now()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    ++s.counts["host_syncs"];
    if (CUresult error = run_everything()) return error;
    const auto found = s.memory.find(reinterpret_cast<uintptr_t>(address));
    if (found == s.memory.end() || found->second.device != device)
        return violation(CUDA_ERROR_INVALID_VALUE, "memory is freed that is not allocated");
    check_guard(found->first, found->second);
    const Allocation allocation = found->second;
    s.memory.erase(found);
    if (device) s.used_bytes -= allocation.size;
    const size_t whole = rounded(allocation.size) + 2 * kGuard;
    std::memset(allocation.block, kOld, whole);
    s.freed[allocation.block] = whole;
    s.freed_bytes += whole;
    while (s.freed_bytes > kFreedBytes) {
        const auto oldest = s.freed.begin();
        check_freed(oldest->first, oldest->second);
        s.freed_bytes -= oldest->second;
        std::free(oldest->first);
        s.freed.erase(oldest);
    }
    return CUDA_SUCCESS;
}

void check_guards() {
    for (const auto& [address, allocation] : state().memory) check_guard(address, allocation);
    for (const auto& [block, size] : state().freed) check_freed(block, size);
}

void free_everything() {
    State& s = state();
    for (const auto& item : s.memory) std::free(item.second.block);
    for (const auto& item : s.freed) std::free(item.first);
    s.memory.clear();
    s.freed.clear();
    s.used_bytes = s.freed_bytes = 0;
}

CUresult run_copy(const Copy& copy) {
    const char* from = copy.staged.empty() ? copy.source : copy.staged.data();
    for (size_t z = 0; z < copy.depth; ++z)
        for (size_t y = 0; y < copy.height; ++y) {
            const char* source = from + z * copy.source_slice + y * copy.source_pitch;
            char* target = copy.target + z * copy.target_slice + y * copy.target_pitch;
            if (where(target, copy.width) == Where::wild ||
                (copy.staged.empty() && where(source, copy.width) == Where::wild))
                return violation(CUDA_ERROR_ILLEGAL_ADDRESS, "a copy goes beyond an allocation");
            std::memmove(target, source, copy.width);
        }
    return CUDA_SUCCESS;
}

CUresult run_fill(const Fill& fill) {
    for (size_t y = 0; y < fill.height; ++y) {
        char* row = fill.target + y * fill.pitch;
        if (where(row, fill.width * fill.element) != Where::device)
            return violation(CUDA_ERROR_ILLEGAL_ADDRESS, "what is not device memory is filled");
        for (size_t x = 0; x < fill.width; ++x) std::memcpy(row + x * fill.element, &fill.value, fill.element);
    }
    return CUDA_SUCCESS;
}

static CUresult describe_end(const MemcpyEnd& end, const char** address, size_t* pitch, size_t* slice) {
    if (end.array || end.type == CU_MEMORYTYPE_ARRAY) return CUDA_ERROR_NOT_SUPPORTED;
    if (end.type < CU_MEMORYTYPE_HOST || end.type > CU_MEMORYTYPE_UNIFIED) return CUDA_ERROR_INVALID_VALUE;
    const char* base = end.type == CU_MEMORYTYPE_HOST ? static_cast<const char*>(end.host)
                                                      : reinterpret_cast<const char*>(end.device);
    *pitch = end.pitch;
    *slice = end.pitch * end.height;
    *address = base + end.x_bytes + end.y * *pitch + end.z * *slice;
    const Where place = where(*address, 1);
    const bool host = place == Where::pageable || place == Where::pinned;
    if (end.type == CU_MEMORYTYPE_DEVICE && place == Where::pageable) return CUDA_ERROR_INVALID_VALUE;
    if (end.type == CU_MEMORYTYPE_HOST && !host) return CUDA_ERROR_INVALID_VALUE;
    return CUDA_SUCCESS;
}

CUresult describe_copy(const CUDA_MEMCPY3D& given, Copy* copy) {
    const char* target = nullptr;
    copy->width = given.width_bytes;
    copy->height = given.height;
    copy->depth = given.depth;
    if (!copy->width || !copy->height || !copy->depth) return CUDA_ERROR_INVALID_VALUE;
    if (CUresult error = describe_end(given.source, &copy->source, &copy->source_pitch, &copy->source_slice))
        return error;
    if (CUresult error = describe_end(given.target, &target, &copy->target_pitch, &copy->target_slice))
        return error;
    copy->target = const_cast<char*>(target);
    copy->given = given;
    copy->pageable = where(copy->source, 1) == Where::pageable || where(target, 1) == Where::pageable;
    return CUDA_SUCCESS;
}

static MemcpyEnd plain_end(const void* address, size_t size, bool host) {
    MemcpyEnd end{};
    end.type = host ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
    (host ? end.host : *reinterpret_cast<const void**>(&end.device)) = address;
    end.pitch = size;
    return end;
}

// A plain copy: to or from host memory, or neither.
static CUresult plain_copy(void* target, const void* source, size_t size, bool to_host, bool from_host,
                           void* handle) {
    Stream* stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (size == 0) return CUDA_SUCCESS;
    const Where to = where(target, size), from = where(source, size);
    if ((to == Where::device) == to_host || (from == Where::device) == from_host || to == Where::wild ||
        from == Where::wild)
        return violation(CUDA_ERROR_INVALID_VALUE, "a copy's memory is not what the copy says");
    auto node = std::make_unique<Node>(NODE_MEMCPY);
    const CUDA_MEMCPY3D given = {plain_end(source, size, from_host), plain_end(target, size, to_host), size, 1, 1};
    if (CUresult error = describe_copy(given, &node->copy)) return error;
    const bool captured = stream->capture != nullptr;
    if (from == Where::pageable && !captured)
        node->copy.staged.assign(node->copy.source, node->copy.source + size);
    if (CUresult error = submit(stream, std::move(node))) return error;
    if (to != Where::pageable || captured) return CUDA_SUCCESS;
    ++state().counts["host_syncs"];  // a copy to pageable memory returns when it is done
    return run_stream(stream);
}

static CUresult copy_and_wait(void* target, const void* source, size_t size, bool to_host, bool from_host) {
    if (unsafe_now()) return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    if (CUresult error = plain_copy(target, source, size, to_host, from_host, nullptr)) return error;
    ++state().counts["host_syncs"];
    return run_stream(stream_of(nullptr));
}

static void* pointer(CUdeviceptr address) { return reinterpret_cast<void*>(address); }

static CUresult plain_fill(CUdeviceptr target, unsigned int value, unsigned int element, size_t count, void* handle) {
    Stream* stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (count == 0) return CUDA_SUCCESS;
    if (target % element || where(pointer(target), count * element) != Where::device) return CUDA_ERROR_INVALID_VALUE;
    auto node = std::make_unique<Node>(NODE_MEMSET);
    node->fill.target = static_cast<char*>(pointer(target));
    node->fill.value = value;
    node->fill.element = element;
    node->fill.width = count;
    return submit(stream, std::move(node));
}

}  // namespace emulated

using namespace emulated;

extern "C" {

CUresult cuMemGetInfo_v2(size_t* free, size_t* total) {
    EMULATED_CALL("cuMemGetInfo");
    *total = static_cast<size_t>(state().settings["total_memory_bytes"]);
    *free = *total - state().used_bytes;
    return CUDA_SUCCESS;
}

CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t size) {
    EMULATED_CALL("cuMemAlloc");
    return allocate(size, true, reinterpret_cast<void**>(address));
}

CUresult cuMemFree_v2(CUdeviceptr address) {
    EMULATED_CALL("cuMemFree");
    return address ? release(pointer(address), true) : CUDA_SUCCESS;
}

CUresult cuMemAllocHost_v2(void** address, size_t size) {
    EMULATED_CALL("cuMemAllocHost");
    return allocate(size, false, address);
}

CUresult cuMemHostAlloc(void** address, size_t size, unsigned int) {
    EMULATED_CALL("cuMemHostAlloc");
    return allocate(size, false, address);
}

CUresult cuMemFreeHost(void* address) {
    EMULATED_CALL("cuMemFreeHost");
    return release(address, false);
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr target, const void* source, size_t size, void* stream) {
    EMULATED_CALL("cuMemcpyHtoDAsync");
    return plain_copy(pointer(target), source, size, false, true, stream);
}

CUresult cuMemcpyDtoHAsync_v2(void* target, CUdeviceptr source, size_t size, void* stream) {
    EMULATED_CALL("cuMemcpyDtoHAsync");
    return plain_copy(target, pointer(source), size, true, false, stream);
}

CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr target, CUdeviceptr source, size_t size, void* stream) {
    EMULATED_CALL("cuMemcpyDtoDAsync");
    return plain_copy(pointer(target), pointer(source), size, false, false, stream);
}

CUresult cuMemcpyHtoD_v2(CUdeviceptr target, const void* source, size_t size) {
    EMULATED_CALL("cuMemcpyHtoD");
    return copy_and_wait(pointer(target), source, size, false, true);
}

CUresult cuMemcpyDtoH_v2(void* target, CUdeviceptr source, size_t size) {
    EMULATED_CALL("cuMemcpyDtoH");
    return copy_and_wait(target, pointer(source), size, true, false);
}

CUresult cuMemsetD8Async(CUdeviceptr target, unsigned char value, size_t count, void* stream) {
    EMULATED_CALL("cuMemsetD8Async");
    return plain_fill(target, value, 1, count, stream);
}

CUresult cuMemsetD32Async(CUdeviceptr target, unsigned int value, size_t count, void* stream) {
    EMULATED_CALL("cuMemsetD32Async");
    return plain_fill(target, value, 4, count, stream);
}

}  // extern "C"
