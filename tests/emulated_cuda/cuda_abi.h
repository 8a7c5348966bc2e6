// The part of CUDA's driver API that is emulated: numbers and layouts, as its documentation gives them.
#pragma once
#include <cstddef>
#include <cstdint>

typedef int CUresult;
typedef uint64_t CUdeviceptr;

enum : CUresult {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NOT_INITIALIZED = 3,
    CUDA_ERROR_NO_DEVICE = 100,
    CUDA_ERROR_INVALID_DEVICE = 101,
    CUDA_ERROR_INVALID_IMAGE = 200,
    CUDA_ERROR_INVALID_CONTEXT = 201,
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209,
    CUDA_ERROR_INVALID_HANDLE = 400,
    CUDA_ERROR_NOT_FOUND = 500,
    CUDA_ERROR_NOT_READY = 600,
    CUDA_ERROR_ILLEGAL_ADDRESS = 700,
    CUDA_ERROR_CONTEXT_IS_DESTROYED = 709,
    CUDA_ERROR_MISALIGNED_ADDRESS = 716,
    CUDA_ERROR_LAUNCH_FAILED = 719,
    CUDA_ERROR_NOT_PERMITTED = 800,
    CUDA_ERROR_NOT_SUPPORTED = 801,
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900,
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901,
    CUDA_ERROR_STREAM_CAPTURE_UNMATCHED = 903,
    CUDA_ERROR_STREAM_CAPTURE_UNJOINED = 904,
    CUDA_ERROR_STREAM_CAPTURE_IMPLICIT = 906,
    CUDA_ERROR_CAPTURED_EVENT = 907,
    CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD = 908,
};

enum : int {
    CU_STREAM_NON_BLOCKING = 1,
    CU_EVENT_DISABLE_TIMING = 2,
    CU_GRAPH_COND_ASSIGN_DEFAULT = 1,
    CU_GRAPH_COND_TYPE_IF = 0,
    CU_GRAPH_COND_TYPE_WHILE = 1,
    CU_GRAPH_COND_TYPE_SWITCH = 2,
    CU_STREAM_CAPTURE_MODE_GLOBAL = 0,
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1,
    CU_STREAM_CAPTURE_MODE_RELAXED = 2,
    CU_STREAM_CAPTURE_STATUS_NONE = 0,
    CU_STREAM_CAPTURE_STATUS_ACTIVE = 1,
    CU_STREAM_CAPTURE_STATUS_INVALIDATED = 2,
    CU_MEMORYTYPE_HOST = 1,
    CU_MEMORYTYPE_DEVICE = 2,
    CU_MEMORYTYPE_ARRAY = 3,
    CU_MEMORYTYPE_UNIFIED = 4,
    CU_GRAPH_INSTANTIATE_SUCCESS = 0,
    CU_GRAPH_INSTANTIATE_ERROR = 1,
    CU_GRAPH_INSTANTIATE_CONDITIONAL_HANDLE_UNUSED = 5,
};

enum NodeType : int {
    NODE_KERNEL = 0,
    NODE_MEMCPY = 1,
    NODE_MEMSET = 2,
    NODE_HOST = 3,
    NODE_GRAPH = 4,
    NODE_EMPTY = 5,
    NODE_MEM_ALLOC = 10,
    NODE_MEM_FREE = 11,
    NODE_CONDITIONAL = 13,
};

struct CUDA_KERNEL_NODE_PARAMS {
    void* function;
    unsigned int grid[3];
    unsigned int block[3];
    unsigned int shared_bytes;
    void** parameters;
    void** extra;
    void* kernel;
    void* context;
};

struct MemcpyEnd {
    size_t x_bytes, y, z, level;
    int type;
    const void* host;
    CUdeviceptr device;
    void* array;
    void* reserved;
    size_t pitch, height;
};

struct CUDA_MEMCPY3D {
    MemcpyEnd source, target;
    size_t width_bytes, height, depth;
};

struct CUDA_MEMSET_NODE_PARAMS {
    CUdeviceptr target;
    size_t pitch;
    unsigned int value, element_bytes;
    size_t width, height;
    void* context;  // only as a member of CUgraphNodeParams
};

struct CUDA_CHILD_GRAPH_NODE_PARAMS {
    void* graph;
    int ownership;
};

struct CUDA_CONDITIONAL_NODE_PARAMS {
    uint64_t handle;
    int type;
    unsigned int size;
    void** bodies;
    void* context;
};

struct CUgraphNodeParams {
    int type;
    int reserved0[3];
    union {
        long long reserved1[29];
        CUDA_KERNEL_NODE_PARAMS kernel;
        CUDA_MEMSET_NODE_PARAMS memset;
        CUDA_CHILD_GRAPH_NODE_PARAMS graph;
        CUDA_CONDITIONAL_NODE_PARAMS conditional;
    };
    long long reserved2;
};

struct CUDA_GRAPH_INSTANTIATE_PARAMS {
    uint64_t flags;
    void* upload_stream;
    void* error_node;
    int result;
};

struct CUgraphEdgeData {
    unsigned char from_port, to_port, type, reserved[5];
};

static_assert(sizeof(CUDA_KERNEL_NODE_PARAMS) == 72, "as in cuda.h");
static_assert(sizeof(CUDA_MEMCPY3D) == 200, "as in cuda.h");
static_assert(sizeof(CUDA_CONDITIONAL_NODE_PARAMS) == 32, "as in cuda.h");
static_assert(sizeof(CUgraphNodeParams) == 256, "as in cuda.h");
static_assert(sizeof(CUDA_GRAPH_INSTANTIATE_PARAMS) == 32, "as in cuda.h");
