// The emulated driver's state. One lock for all of it; one thing that nothing may rely on in a driver, an order
// that no dependency asks for, is drawn from a seeded random number generator.
#pragma once
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "cuda_abi.h"
#include "image_abi.h"

namespace emulated {

enum class Tag { context, stream, event, module, function, graph, node, executable };

// What the caller holds a handle of; it is known as long as it lives.
struct Object {
    explicit Object(Tag tag, bool known = true);
    ~Object();
    Object(const Object&) = delete;
    Object& operator=(const Object&) = delete;
};

struct Module;

struct Function : Object {
    Function() : Object(Tag::function) {}
    std::string name;
    std::vector<size_t> sizes;  // of its parameters, in bytes
    Module* module = nullptr;
    void (*invoke)(void**) = nullptr;
    int (*callback)(void*) = nullptr;  // instead of `invoke`: runs once for a launch
    void* user_data = nullptr;
    bool unloaded = false;
};

struct Module : Object {
    Module() : Object(Tag::module) {}
    void* library = nullptr;
    EmulatedImage* image = nullptr;
    const char *begin = nullptr, *end = nullptr;  // its own memory
    std::vector<Function*> functions;
};

struct Launch {
    Function* function = nullptr;
    unsigned int grid[3] = {1, 1, 1}, block[3] = {1, 1, 1};
    std::vector<std::vector<char>> arguments;
};

struct Copy {
    const char* source = nullptr;
    char* target = nullptr;
    size_t width = 0, height = 1, depth = 1;
    size_t source_pitch = 0, source_slice = 0, target_pitch = 0, target_slice = 0;
    std::vector<char> staged;  // where the source was pageable memory: what it held at the call
    bool pageable = false;
    CUDA_MEMCPY3D given{};  // as the caller, or a capture, describes it
};

struct Fill {
    char* target = nullptr;
    unsigned int value = 0, element = 1;
    size_t width = 0, height = 1, pitch = 0;
};

struct Graph;

// One piece of work: of a graph, or on its own of a stream.
struct Node : Object {
    Node(int type, bool known = true) : Object(Tag::node, known), type(type) {}
    int type;
    Graph* graph = nullptr;
    std::vector<Node*> after;
    Launch launch;
    Copy copy;
    Fill fill;
    void (*host)(void*) = nullptr;
    void* user_data = nullptr;
    uint64_t memory = 0;  // that it allocates or frees
    std::unique_ptr<Graph> child;
    uint64_t handle = 0;
    int condition = 0;
    std::vector<std::unique_ptr<Graph>> bodies;
    std::vector<void*> body_handles;
};

struct Graph : Object {
    explicit Graph(bool known = true) : Object(Tag::graph, known) {}
    Node* owner = nullptr;  // the node whose child or body it is
    std::vector<std::unique_ptr<Node>> nodes;
    int instantiations = 0;
};

struct Condition {
    Graph* graph;  // the one it was made for
    unsigned int value;
    unsigned int flags;
    Node* node = nullptr;  // that reads it
};

struct Executable : Object {
    Executable() : Object(Tag::executable) {}
    std::shared_ptr<Graph> graph;
    Graph* source = nullptr;
    std::map<uint64_t, Condition> conditions;
};

struct Capture {
    std::unique_ptr<Graph> owned;
    Graph* graph = nullptr;
    struct Stream* origin = nullptr;
    int mode = 0;
    std::thread::id thread;
    bool invalid = false, ended = false;
    uint64_t number = 0;
    std::set<struct Stream*> streams;
};

struct Stream : Object {
    Stream() : Object(Tag::stream, false) {}  // the state holds one: this cannot ask for the state
    bool blocking = true;
    std::deque<std::function<CUresult()>> queue;
    uint64_t enqueued = 0, done = 0;
    std::shared_ptr<Capture> capture;
    std::vector<Node*> last;  // of the capture: what comes next depends on these
};

struct Event : Object {
    Event() : Object(Tag::event) {}
    bool timed = true, recorded = false, happened = false;
    Stream* stream = nullptr;
    uint64_t position = 0;
    double milliseconds = 0;
    std::shared_ptr<Capture> capture;
    std::vector<Node*> after;
};

struct Allocation {
    size_t size;
    bool device;
    char* block;  // with the guards before and behind
};

// What happens to conditions during one launch of a graph.
struct Launched {
    struct Value {
        unsigned int value;
        const Node* setter = nullptr;
        bool read = false;
    };
    std::map<uint64_t, Value> conditions;
};

struct State {
    std::recursive_mutex lock;
    std::map<std::string, long long> settings;
    std::map<std::string, long long> counts;  // calls by name, and "host_syncs"
    struct Fault {
        long long call;
        CUresult error;
    };
    std::map<std::string, Fault> faults;
    std::vector<std::string> violations, executed;
    std::mt19937_64 random{0};

    std::unordered_map<const void*, Tag> objects;
    std::map<uintptr_t, Allocation> memory;
    std::map<char*, size_t> freed;  // kept for a while, so that a write to it is found
    size_t used_bytes = 0, freed_bytes = 0;
    std::map<uint64_t, Condition> conditions;
    uint64_t next_number = 1;
    std::deque<std::unique_ptr<Function>> functions;

    bool initialised = false;
    int retained = 0;
    CUresult lost = CUDA_SUCCESS;  // what the context died of
    Launched* launched = nullptr;  // while a graph runs
    const Node* running = nullptr;
    bool executing = false;
    Stream default_stream;
};

State& state();
void* primary_context();
void reset();

// The begin of every entry point: counts, locks, and says what it has to answer at once, if anything.
class Call {
public:
    explicit Call(const char* name, bool context = true);
    CUresult refused = CUDA_SUCCESS;

private:
    std::lock_guard<std::recursive_mutex> _guard;
};

#define EMULATED_CALL(...)              \
    emulated::Call call_in_progress(__VA_ARGS__); \
    if (call_in_progress.refused) return call_in_progress.refused

CUresult violation(CUresult error, const std::string& what);

template <typename T> T* find(void* handle, Tag tag) {
    auto& objects = state().objects;
    auto found = objects.find(handle);
    return found != objects.end() && found->second == tag ? static_cast<T*>(handle) : nullptr;
}

// memory.cpp
enum class Where { device, pinned, pageable, wild };
Where where(const void* address, size_t size);
bool inside_known_memory(const void* address, size_t size);
CUresult allocate(size_t size, bool device, void** address);
CUresult release(void* address, bool device);
void check_guards();
void free_everything();
CUresult run_copy(const Copy& copy);
CUresult run_fill(const Fill& fill);
CUresult describe_copy(const CUDA_MEMCPY3D& given, Copy* copy);

// streams.cpp
Stream* stream_of(void* handle);
CUresult submit(Stream* stream, std::unique_ptr<Node> node);
CUresult enqueue(Stream* stream, std::function<CUresult()> work);
CUresult run_until(Stream* stream, uint64_t position);
CUresult run_stream(Stream* stream);
CUresult run_everything();
bool unsafe_now();  // whether a capture forbids what might wait for the device

// kernels.cpp
CUresult describe_launch(void* function, const unsigned int* grid, const unsigned int* block, unsigned int shared,
                         void** parameters, Launch* launch);
CUresult run_launch(const Launch& launch);
void fault(int error, const char* what);

// graphs.cpp, graph_runs.cpp
std::unique_ptr<Node> copy_node(const Node& node, bool known);
std::unique_ptr<Graph> copy_graph(const Graph& graph, bool known);
Graph* root_of(Graph* graph);
CUresult run_node(const Node& node);
CUresult run_executable(Graph& graph, std::map<uint64_t, Condition>& conditions);
CUresult set_condition(uint64_t handle, unsigned int value);
const char* type_name(int type);

}  // namespace emulated
