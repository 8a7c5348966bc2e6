// The small kernels between the blocks of a device graph: what they do is said in graph_plan.py, how their
// arguments lie in memory in cuda_kernels.py. They turn actions into where rows go, and set conditions.
//
// Written in what NVRTC compiles without headers and a C++ compiler takes, too, given names for threadIdx,
// blockIdx, blockDim, gridDim and __syncthreads: no warp functions, no atomics.
//
// One thread of a launch sets a condition: several would race, whatever they set.

extern "C" __device__ __cudart_builtin__ void CUDARTAPI
cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned int value);

#define LEFT (-1)
#define NO_EXIT (-1)
#define MOST_ROWS 1024

struct Copy {
  const unsigned char *source;
  unsigned char *target;
  long long stride_bytes;  // from row to row, of both; 0: does not belong to rows
  unsigned int size_bytes;  // below 2^31: whoever counts in steps of threads stays in range
};

struct Way {
  int target;
  int edge;
  int exit;
  int arm;
  int first_copy;
  int copies;
};

struct Move {
  unsigned char *target;
  long long stride_bytes;
  unsigned int size_bytes;
  int first_source;
};

struct RouteArguments {
  const Way *ways;
  const Copy *copies;
  const int *action;  // null: all rows take the first way
  const int *rows;    // null: row j is at position j, and rows beyond the count have left
  const int *count;
  int *next;
  int *edge;
  int *position;
  int *exit_index;
  int way_count;
  int sets_condition;
};

struct GuardArguments {
  const int *next;
  int target;
};

struct CompactArguments {
  const int *next;
  int *rows;
  int *count;
  int capacity;
  int target;
};

struct PickBucketArguments {
  const int *count;
  const int *buckets;
  int bucket_count;
};

struct GatherArguments {
  const Move *moves;
  const unsigned char *const *sources;
  const int *list;  // null: row 0
  const int *edge;
  const int *position;
};

static_assert(sizeof(Copy) == 32, "as in cuda_kernels.py");
static_assert(sizeof(Way) == 24, "as in cuda_kernels.py");
static_assert(sizeof(Move) == 24, "as in cuda_kernels.py");
static_assert(sizeof(RouteArguments) == 80, "as in cuda_kernels.py");
static_assert(sizeof(GuardArguments) == 16, "as in cuda_kernels.py");
static_assert(sizeof(CompactArguments) == 32, "as in cuda_kernels.py");
static_assert(sizeof(PickBucketArguments) == 24, "as in cuda_kernels.py");
static_assert(sizeof(GatherArguments) == 40, "as in cuda_kernels.py");

struct alignas(16) Vector {
  unsigned int words[4];
};

template <typename T>
static __device__ void copy_as(unsigned char *target, const unsigned char *source, unsigned int size_bytes,
                               unsigned int first, unsigned int step) {
  T *__restrict__ to = reinterpret_cast<T *>(target);
  const T *__restrict__ from = reinterpret_cast<const T *>(source);
  const unsigned int count = size_bytes / static_cast<unsigned int>(sizeof(T));
  unsigned int i = first;
#pragma unroll 1
  for (; i + 3 * step < count; i += 4 * step) {  // four loads under way at a time
    const T a = from[i], b = from[i + step], c = from[i + 2 * step], d = from[i + 3 * step];
    to[i] = a;
    to[i + step] = b;
    to[i + 2 * step] = c;
    to[i + 3 * step] = d;
  }
#pragma unroll 1
  for (; i < count; i += step) to[i] = from[i];
}

// Copies a share of the bytes: the elements first, first + step, ... in the widest type that fits.
static __device__ void copy_bytes(unsigned char *target, const unsigned char *source, unsigned int size_bytes,
                                  unsigned int first, unsigned int step) {
  const unsigned long long all = reinterpret_cast<unsigned long long>(target) |
                                 reinterpret_cast<unsigned long long>(source) |
                                 size_bytes;
  if (all % 16 == 0) {
    copy_as<Vector>(target, source, size_bytes, first, step);
  } else if (all % 4 == 0) {
    copy_as<unsigned int>(target, source, size_bytes, first, step);
  } else {
    copy_as<unsigned char>(target, source, size_bytes, first, step);
  }
}

// Blocks: (capacity, shares of a row's bytes).
extern "C" __global__ void route(RouteArguments a, cudaGraphConditionalHandle condition) {
  const int position = static_cast<int>(blockIdx.x);
  const bool writes = threadIdx.x == 0 && blockIdx.y == 0;
  if (position >= a.count[0]) {
    if (writes && !a.rows) {
      a.next[position] = LEFT;
      a.exit_index[position] = NO_EXIT;
    }
    return;
  }
  const int row = a.rows ? a.rows[position] : position;
  const int action = a.action ? a.action[position] : 0;
  if (action < 0 || action >= a.way_count) {  // an engine went wrong: the row leaves without an exit
    if (writes) {
      a.next[row] = LEFT;
      a.exit_index[row] = NO_EXIT;
    }
    return;
  }
  const Way way = a.ways[action];
  if (writes) {
    if (a.sets_condition) cudaGraphSetConditional(condition, static_cast<unsigned int>(way.arm));
    a.next[row] = way.target;
    a.edge[row] = way.edge;
    a.position[row] = position;
    a.exit_index[row] = way.target == LEFT ? way.exit : NO_EXIT;  // what an earlier launch left is gone
  }
  const unsigned int first = blockIdx.y * blockDim.x + threadIdx.x;
  const unsigned int step = gridDim.y * blockDim.x;
  for (int i = 0; i < way.copies; ++i) {
    const Copy copy = a.copies[way.first_copy + i];
    copy_bytes(copy.target + row * copy.stride_bytes, copy.source + position * copy.stride_bytes, copy.size_bytes,
               first, step);
  }
}

// One thread.
extern "C" __global__ void guard(GuardArguments a, cudaGraphConditionalHandle condition) {
  cudaGraphSetConditional(condition, a.next[0] == a.target ? 1u : 0u);
}

// One block of at least as many threads as there are rows, at most MOST_ROWS.
extern "C" __global__ void compact(CompactArguments a, cudaGraphConditionalHandle condition) {
  __shared__ int upto[MOST_ROWS];  // of the rows up to this one, how many go there
  __shared__ int first;
  const int row = static_cast<int>(threadIdx.x);
  const bool goes = row < a.capacity && a.next[row] == a.target;
  upto[row] = goes ? 1 : 0;
  __syncthreads();
  for (int reach = 1; reach < static_cast<int>(blockDim.x); reach *= 2) {
    const int before = row >= reach ? upto[row - reach] : 0;
    __syncthreads();
    upto[row] += before;
    __syncthreads();
  }
  const int total = upto[blockDim.x - 1];
  if (goes) {
    a.rows[upto[row] - 1] = row;
    if (upto[row] == 1) first = row;
  }
  __syncthreads();
  if (total > 0 && row >= total && row < a.capacity) a.rows[row] = first;
  if (row == 0) {
    a.count[0] = total;
    cudaGraphSetConditional(condition, total > 0 ? 1u : 0u);
  }
}

// One thread.
extern "C" __global__ void pick_bucket(PickBucketArguments a, cudaGraphConditionalHandle condition) {
  const int count = a.count[0];
  int bucket = 0;
  while (bucket < a.bucket_count && a.buckets[bucket] < count) ++bucket;
  cudaGraphSetConditional(condition, static_cast<unsigned int>(bucket));
}

// Blocks: (shares of a row's bytes, rows, moves).
extern "C" __global__ void gather(GatherArguments a) {
  const long long place = blockIdx.y;
  const Move move = a.moves[blockIdx.z];
  const int row = a.list ? a.list[place] : 0;
  const long long position = a.position[row];
  const unsigned char *source = a.sources[move.first_source + a.edge[row]];
  const unsigned int first = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned int step = gridDim.x * blockDim.x;
  copy_bytes(move.target + place * move.stride_bytes, source + position * move.stride_bytes, move.size_bytes, first,
             step);
}
