// How a program finds the driver's functions, and how a test looks at the driver and disturbs it.
#include <dlfcn.h>

#include <algorithm>
#include <cstring>

#include "emulator.h"

using namespace emulated;

namespace {

struct Entry {
    const char* name;
    int version;  // of CUDA, from which on the function has this form
    const char* symbol;
};

const Entry kEntries[] = {
    {"cuInit", 2000, "cuInit"},
    {"cuDriverGetVersion", 2020, "cuDriverGetVersion"},
    {"cuDeviceGet", 2000, "cuDeviceGet"},
    {"cuDeviceGetCount", 2000, "cuDeviceGetCount"},
    {"cuDeviceGetName", 2000, "cuDeviceGetName"},
    {"cuDeviceTotalMem", 3020, "cuDeviceTotalMem_v2"},
    {"cuDeviceGetAttribute", 2000, "cuDeviceGetAttribute"},
    {"cuDevicePrimaryCtxRetain", 7000, "cuDevicePrimaryCtxRetain"},
    {"cuDevicePrimaryCtxRelease", 11000, "cuDevicePrimaryCtxRelease_v2"},
    {"cuCtxPushCurrent", 4000, "cuCtxPushCurrent_v2"},
    {"cuCtxPopCurrent", 4000, "cuCtxPopCurrent_v2"},
    {"cuCtxSetCurrent", 4000, "cuCtxSetCurrent"},
    {"cuCtxGetCurrent", 4000, "cuCtxGetCurrent"},
    {"cuCtxGetDevice", 2000, "cuCtxGetDevice"},
    {"cuCtxSynchronize", 2000, "cuCtxSynchronize"},
    {"cuMemGetInfo", 3020, "cuMemGetInfo_v2"},
    {"cuMemAlloc", 3020, "cuMemAlloc_v2"},
    {"cuMemFree", 3020, "cuMemFree_v2"},
    {"cuMemAllocHost", 3020, "cuMemAllocHost_v2"},
    {"cuMemHostAlloc", 2020, "cuMemHostAlloc"},
    {"cuMemFreeHost", 2000, "cuMemFreeHost"},
    {"cuMemcpyHtoDAsync", 3020, "cuMemcpyHtoDAsync_v2"},
    {"cuMemcpyDtoHAsync", 3020, "cuMemcpyDtoHAsync_v2"},
    {"cuMemcpyDtoDAsync", 3020, "cuMemcpyDtoDAsync_v2"},
    {"cuMemcpyHtoD", 3020, "cuMemcpyHtoD_v2"},
    {"cuMemcpyDtoH", 3020, "cuMemcpyDtoH_v2"},
    {"cuMemsetD8Async", 3020, "cuMemsetD8Async"},
    {"cuMemsetD32Async", 3020, "cuMemsetD32Async"},
    {"cuMemAllocAsync", 11020, "cuMemAllocAsync"},
    {"cuMemFreeAsync", 11020, "cuMemFreeAsync"},
    {"cuStreamCreate", 2000, "cuStreamCreate"},
    {"cuStreamCreateWithPriority", 5050, "cuStreamCreateWithPriority"},
    {"cuStreamDestroy", 4000, "cuStreamDestroy_v2"},
    {"cuStreamSynchronize", 2000, "cuStreamSynchronize"},
    {"cuStreamQuery", 2000, "cuStreamQuery"},
    {"cuStreamBeginCapture", 10010, "cuStreamBeginCapture_v2"},
    {"cuStreamEndCapture", 10000, "cuStreamEndCapture"},
    {"cuStreamIsCapturing", 10000, "cuStreamIsCapturing"},
    {"cuStreamWaitEvent", 3020, "cuStreamWaitEvent"},
    {"cuEventCreate", 2000, "cuEventCreate"},
    {"cuEventDestroy", 4000, "cuEventDestroy_v2"},
    {"cuEventRecord", 2000, "cuEventRecord"},
    {"cuEventSynchronize", 2000, "cuEventSynchronize"},
    {"cuEventQuery", 2000, "cuEventQuery"},
    {"cuEventElapsedTime", 12080, "cuEventElapsedTime_v2"},
    {"cuModuleLoadData", 2000, "cuModuleLoadData"},
    {"cuModuleGetFunction", 2000, "cuModuleGetFunction"},
    {"cuModuleUnload", 2000, "cuModuleUnload"},
    {"cuLaunchKernel", 4000, "cuLaunchKernel"},
    {"cuLaunchHostFunc", 10000, "cuLaunchHostFunc"},
    {"cuGraphCreate", 10000, "cuGraphCreate"},
    {"cuGraphDestroy", 10000, "cuGraphDestroy"},
    {"cuGraphAddKernelNode", 12000, "cuGraphAddKernelNode_v2"},
    {"cuGraphAddChildGraphNode", 10000, "cuGraphAddChildGraphNode"},
    {"cuGraphAddMemcpyNode", 10000, "cuGraphAddMemcpyNode"},
    {"cuGraphMemcpyNodeGetParams", 10000, "cuGraphMemcpyNodeGetParams"},
    {"cuGraphAddMemsetNode", 10000, "cuGraphAddMemsetNode"},
    {"cuGraphAddEmptyNode", 10000, "cuGraphAddEmptyNode"},
    {"cuGraphConditionalHandleCreate", 12030, "cuGraphConditionalHandleCreate"},
    {"cuGraphAddNode", 12030, "cuGraphAddNode_v2"},
    {"cuGraphGetNodes", 10000, "cuGraphGetNodes"},
    {"cuGraphNodeGetType", 10000, "cuGraphNodeGetType"},
    {"cuGraphChildGraphNodeGetGraph", 10000, "cuGraphChildGraphNodeGetGraph"},
    {"cuGraphNodeGetDependencies", 12030, "cuGraphNodeGetDependencies_v2"},
    {"cuGraphInstantiateWithParams", 12000, "cuGraphInstantiateWithParams"},
    {"cuGraphInstantiateWithFlags", 11040, "cuGraphInstantiateWithFlags"},
    {"cuGraphExecDestroy", 10000, "cuGraphExecDestroy"},
    {"cuGraphUpload", 11010, "cuGraphUpload"},
    {"cuGraphLaunch", 10000, "cuGraphLaunch"},
    {"cuGetErrorName", 6000, "cuGetErrorName"},
    {"cuGetErrorString", 6000, "cuGetErrorString"},
    {"cuGetProcAddress", 12000, "cuGetProcAddress_v2"},
};

struct ErrorText {
    CUresult error;
    const char *name, *meaning;
};

#define ERROR_TEXT(name, meaning) {name, #name, meaning}
const ErrorText kErrors[] = {
    ERROR_TEXT(CUDA_SUCCESS, "no error"),
    ERROR_TEXT(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    ERROR_TEXT(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    ERROR_TEXT(CUDA_ERROR_NOT_INITIALIZED, "initialization error"),
    ERROR_TEXT(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected"),
    ERROR_TEXT(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"),
    ERROR_TEXT(CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid"),
    ERROR_TEXT(CUDA_ERROR_INVALID_CONTEXT, "invalid device context"),
    ERROR_TEXT(CUDA_ERROR_NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device"),
    ERROR_TEXT(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"),
    ERROR_TEXT(CUDA_ERROR_NOT_FOUND, "named symbol not found"),
    ERROR_TEXT(CUDA_ERROR_NOT_READY, "device not ready"),
    ERROR_TEXT(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
    ERROR_TEXT(CUDA_ERROR_CONTEXT_IS_DESTROYED, "context is destroyed"),
    ERROR_TEXT(CUDA_ERROR_MISALIGNED_ADDRESS, "misaligned address"),
    ERROR_TEXT(CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure"),
    ERROR_TEXT(CUDA_ERROR_NOT_PERMITTED, "operation not permitted"),
    ERROR_TEXT(CUDA_ERROR_NOT_SUPPORTED, "operation not supported"),
    ERROR_TEXT(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing"),
    ERROR_TEXT(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "operation failed due to a previous error during capture"),
    ERROR_TEXT(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "capture was not ended in the same stream as it began"),
    ERROR_TEXT(CUDA_ERROR_STREAM_CAPTURE_UNJOINED, "capturing stream has unjoined work"),
    ERROR_TEXT(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "the legacy stream would depend on a capturing blocking stream"),
    ERROR_TEXT(CUDA_ERROR_CAPTURED_EVENT, "operation not permitted on an event last recorded in a capturing stream"),
    ERROR_TEXT(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "a capture is ended by another thread"),
};

const ErrorText* text_of(CUresult error) {
    const auto found =
        std::find_if(std::begin(kErrors), std::end(kErrors), [&](const ErrorText& t) { return t.error == error; });
    return found == std::end(kErrors) ? nullptr : found;
}

std::string lines;  // what the last question was answered with

const char* joined(const std::vector<std::string>& texts) {
    lines.clear();
    for (const auto& text : texts) lines += text + "\n";
    return lines.c_str();
}

}  // namespace

extern "C" {

static CUresult text(CUresult error, const char** given, const char* ErrorText::*which) {
    const ErrorText* found = text_of(error);
    *given = found ? found->*which : nullptr;
    return found ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorName(CUresult error, const char** given) { return text(error, given, &ErrorText::name); }

CUresult cuGetErrorString(CUresult error, const char** given) { return text(error, given, &ErrorText::meaning); }

CUresult cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t, int* status) {
    Dl_info here;
    dladdr(reinterpret_cast<void*>(&cuGetErrorName), &here);
    static void* const library = dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    *function = nullptr;
    for (const Entry& entry : kEntries)
        if (!std::strcmp(entry.name, name) && entry.version <= version) *function = dlsym(library, entry.symbol);
    if (status) *status = *function ? 0 : 1;  // found, or not
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

void emulated_reset() {
    std::lock_guard<std::recursive_mutex> guard(state().lock);
    reset();
}

void emulated_set(const char* name, long long value) {
    std::lock_guard<std::recursive_mutex> guard(state().lock);
    if (!std::strcmp(name, "seed")) state().random.seed(static_cast<uint64_t>(value));
    state().settings[name] = value;
}

// Lets the n-th call from now on of a function answer with an error.
void emulated_fail(const char* name, long long call, CUresult error) {
    std::lock_guard<std::recursive_mutex> guard(state().lock);
    state().faults[name] = {state().counts[name] + call, error};
}

// How often a function was called, or how many of something there are.
long long emulated_count(const char* name) {
    State& s = state();
    std::lock_guard<std::recursive_mutex> guard(s.lock);
    const bool device = !std::strcmp(name, "device allocations");
    if (device || !std::strcmp(name, "host allocations"))
        return std::count_if(s.memory.begin(), s.memory.end(), [&](auto& m) { return m.second.device == device; });
    static const std::map<std::string, Tag> tags = {
        {"streams", Tag::stream}, {"events", Tag::event}, {"modules", Tag::module},
        {"graphs", Tag::graph},   {"executables", Tag::executable},
    };
    if (const auto tag = tags.find(name); tag != tags.end())
        return std::count_if(s.objects.begin(), s.objects.end(), [&](auto& o) {
            return o.second == tag->second &&
                   (o.second != Tag::graph || !static_cast<Graph*>(const_cast<void*>(o.first))->owner);
        });
    if (!std::strcmp(name, "contexts")) return s.retained;
    const auto found = s.counts.find(name);
    return found == s.counts.end() ? 0 : found->second;
}

const char* emulated_violations() {
    std::lock_guard<std::recursive_mutex> guard(state().lock);
    check_guards();
    const char* text = joined(state().violations);
    state().violations.clear();
    return text;
}

const char* emulated_executed() {
    std::lock_guard<std::recursive_mutex> guard(state().lock);
    return joined(state().executed);
}

int emulated_is_device_memory(uint64_t address, size_t size) {
    std::lock_guard<std::recursive_mutex> guard(state().lock);
    return where(reinterpret_cast<void*>(address), size) == Where::device;
}

void emulated_break_capture(void* handle) {
    std::lock_guard<std::recursive_mutex> guard(state().lock);
    Stream* stream = stream_of(handle);
    if (stream && stream->capture) stream->capture->invalid = true;
}

// A kernel of no module that calls the host; it answers 0 where all went well.
void* emulated_host_function(const char* name, int (*callback)(void*), void* user_data) {
    std::lock_guard<std::recursive_mutex> guard(state().lock);
    auto function = std::make_unique<Function>();
    function->name = name;
    function->callback = callback;
    function->user_data = user_data;
    state().functions.push_back(std::move(function));
    return state().functions.back().get();
}

}  // extern "C"
