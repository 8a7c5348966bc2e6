// The state of the emulated driver, and what every call begins with.
#include "emulator.h"

#include <algorithm>

namespace emulated {

State& state() {
    static State* const only = new State;  // never destroyed: other destructors may still come by
    return *only;
}

Object::Object(Tag tag, bool known) {
    if (known) state().objects.emplace(this, tag);
}

Object::~Object() { state().objects.erase(this); }

void* primary_context() {
    static char context;
    return &context;
}

CUresult violation(CUresult error, const std::string& what) {
    state().violations.push_back(what);
    return error;
}

static thread_local std::vector<void*>* contexts_of_thread = nullptr;

static std::vector<void*>& contexts() {
    if (!contexts_of_thread) contexts_of_thread = new std::vector<void*>;
    return *contexts_of_thread;
}

static CUresult context_refusal() {
    if (contexts().empty() || !contexts().back()) return CUDA_ERROR_INVALID_CONTEXT;
    return state().retained > 0 ? CUDA_SUCCESS : CUDA_ERROR_CONTEXT_IS_DESTROYED;
}

Call::Call(const char* name, bool context) : _guard(state().lock) {
    State& s = state();
    const long long count = ++s.counts[name];
    auto fault = s.faults.find(name);
    if (fault != s.faults.end() && count == fault->second.call) {
        refused = fault->second.error;
        s.faults.erase(fault);
    } else if (s.executing) {
        refused = violation(CUDA_ERROR_NOT_PERMITTED, std::string(name) + " is called while the device works");
    } else if (context) {
        refused = !s.initialised ? CUDA_ERROR_NOT_INITIALIZED : s.lost ? s.lost : context_refusal();
    }
}

void reset() {
    State& s = state();
    free_everything();
    s.counts.clear();
    s.faults.clear();
    s.violations.clear();
    s.executed.clear();
    s.conditions.clear();
    s.functions.clear();
    s.default_stream.queue.clear();
    s.default_stream.done = s.default_stream.enqueued;
    s.objects.clear();
    s.initialised = false;
    s.retained = 0;
    s.lost = CUDA_SUCCESS;
    contexts().clear();
    s.settings = {
        {"devices", 0},
        {"driver_version", 13000},
        {"compute_capability_major", 9},
        {"compute_capability_minor", 0},
        {"total_memory_bytes", 8LL << 30},
    };
}

}  // namespace emulated

using namespace emulated;

static CUresult need_device() {
    return !state().initialised ? CUDA_ERROR_NOT_INITIALIZED
         : state().settings["devices"] < 1 ? CUDA_ERROR_INVALID_DEVICE
                                           : CUDA_SUCCESS;
}

#define NEED_DEVICE(number)                                    \
    if (CUresult error = need_device()) return error;          \
    if ((number) < 0 || (number) >= state().settings["devices"]) return CUDA_ERROR_INVALID_DEVICE

extern "C" {

CUresult cuInit(unsigned int flags) {
    EMULATED_CALL("cuInit", false);
    if (flags) return CUDA_ERROR_INVALID_VALUE;
    if (state().settings["devices"] < 1) return CUDA_ERROR_NO_DEVICE;
    state().initialised = true;
    return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
    EMULATED_CALL("cuDriverGetVersion", false);
    *version = static_cast<int>(state().settings["driver_version"]);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
    EMULATED_CALL("cuDeviceGetCount", false);
    if (!state().initialised) return CUDA_ERROR_NOT_INITIALIZED;
    *count = static_cast<int>(state().settings["devices"]);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(int* device, int ordinal) {
    EMULATED_CALL("cuDeviceGet", false);
    NEED_DEVICE(ordinal);
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char* name, int length, int device) {
    EMULATED_CALL("cuDeviceGetName", false);
    NEED_DEVICE(device);
    if (length < 1) return CUDA_ERROR_INVALID_VALUE;
    const std::string given = "Emulated";
    name[given.copy(name, length - 1)] = 0;
    return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem_v2(size_t* bytes, int device) {
    EMULATED_CALL("cuDeviceTotalMem", false);
    NEED_DEVICE(device);
    *bytes = static_cast<size_t>(state().settings["total_memory_bytes"]);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, int attribute, int device) {
    EMULATED_CALL("cuDeviceGetAttribute", false);
    NEED_DEVICE(device);
    static const std::map<int, int> fixed = {
        {1, 1024},  // threads of a block
        {10, 32},   // threads of a warp
        {16, 132},  // multiprocessors
        {41, 1},    // unified addressing
        {8, 49152}, // shared memory of a block
    };
    if (attribute == 75 || attribute == 76) {
        *value = static_cast<int>(
            state().settings[attribute == 75 ? "compute_capability_major" : "compute_capability_minor"]);
        return CUDA_SUCCESS;
    }
    const auto found = fixed.find(attribute);
    if (found == fixed.end()) return CUDA_ERROR_NOT_SUPPORTED;
    *value = found->second;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(void** context, int device) {
    EMULATED_CALL("cuDevicePrimaryCtxRetain", false);
    NEED_DEVICE(device);
    ++state().retained;
    *context = primary_context();
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease_v2(int device) {
    EMULATED_CALL("cuDevicePrimaryCtxRelease", false);
    NEED_DEVICE(device);
    if (state().retained < 1) return violation(CUDA_ERROR_INVALID_CONTEXT, "the context is released once too often");
    --state().retained;
    return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent_v2(void* context) {
    EMULATED_CALL("cuCtxPushCurrent", false);
    if (!state().initialised) return CUDA_ERROR_NOT_INITIALIZED;
    if (context != primary_context()) return CUDA_ERROR_INVALID_CONTEXT;
    contexts().push_back(context);
    return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent_v2(void** context) {
    EMULATED_CALL("cuCtxPopCurrent", false);
    if (!state().initialised) return CUDA_ERROR_NOT_INITIALIZED;
    if (contexts().empty()) return CUDA_ERROR_INVALID_CONTEXT;
    if (context) *context = contexts().back();
    contexts().pop_back();
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(void* context) {
    EMULATED_CALL("cuCtxSetCurrent", false);
    if (!state().initialised) return CUDA_ERROR_NOT_INITIALIZED;
    if (context && context != primary_context()) return CUDA_ERROR_INVALID_CONTEXT;
    if (!contexts().empty()) contexts().pop_back();
    if (context) contexts().push_back(context);
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(void** context) {
    EMULATED_CALL("cuCtxGetCurrent", false);
    if (!state().initialised) return CUDA_ERROR_NOT_INITIALIZED;
    *context = contexts().empty() ? nullptr : contexts().back();
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(int* device) {
    EMULATED_CALL("cuCtxGetDevice");
    *device = 0;
    return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize() {
    EMULATED_CALL("cuCtxSynchronize");
    ++state().counts["host_syncs"];
    if (unsafe_now()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    return run_everything();
}

}  // extern "C"
