// Graphs that run: checked when they are made executable, then run node by node, in any order that the
// dependencies leave open.
#include "emulator.h"

#include <algorithm>

namespace emulated {

static bool allowed_in_body(const Node& node) {
    switch (node.type) {
        case NODE_KERNEL:
        case NODE_MEMSET:
        case NODE_EMPTY:
        case NODE_GRAPH:
        case NODE_CONDITIONAL: return true;
        case NODE_MEMCPY: return !node.copy.pageable;
        default: return false;
    }
}

// The first node that the driver would not make executable; null: there is none.
static Node* offending(const Graph& graph, bool in_body) {
    for (const auto& node : graph.nodes) {
        if (in_body && !allowed_in_body(*node)) return node.get();
        if (node->type == NODE_KERNEL && node->launch.function->unloaded) return node.get();
        if (node->child)
            if (Node* found = offending(*node->child, in_body)) return found;
        for (const auto& body : node->bodies)
            if (Node* found = offending(*body, true)) return found;
    }
    return nullptr;
}

static CUresult make_executable(Executable** made, void* handle, void** error_node, int* result) {
    State& s = state();
    Graph* graph = find<Graph>(handle, Tag::graph);
    *result = CU_GRAPH_INSTANTIATE_ERROR;
    *error_node = nullptr;
    if (!graph || graph->owner) return CUDA_ERROR_INVALID_VALUE;
    std::map<uint64_t, Condition> conditions;
    for (const auto& [number, condition] : s.conditions) {
        if (root_of(condition.graph) != graph) continue;
        if (!condition.node) {
            *result = CU_GRAPH_INSTANTIATE_CONDITIONAL_HANDLE_UNUSED;
            return CUDA_ERROR_INVALID_VALUE;
        }
        conditions.emplace(number, condition);
    }
    if (!conditions.empty() && graph->instantiations) return CUDA_ERROR_INVALID_VALUE;
    *error_node = offending(*graph, false);
    if (*error_node) return CUDA_ERROR_INVALID_VALUE;
    auto executable = std::make_unique<Executable>();
    executable->graph = copy_graph(*graph, false);
    executable->source = graph;
    executable->conditions = std::move(conditions);
    ++graph->instantiations;
    *made = executable.release();
    *result = CU_GRAPH_INSTANTIATE_SUCCESS;
    return CUDA_SUCCESS;
}

static CUresult run_graph(const Graph& graph);

// What the last launch of a graph ran.
static void note(std::string what) {
    if (state().launched) state().executed.push_back(std::move(what));
}

static CUresult run_conditional(const Node& node) {
    auto& condition = state().launched->conditions.at(node.handle);
    condition.read = true;
    const unsigned int value = condition.value;
    const size_t body = node.condition == CU_GRAPH_COND_TYPE_SWITCH ? value : value ? 0 : 1;
    const bool runs = body < node.bodies.size();
    note(std::string(node.condition == CU_GRAPH_COND_TYPE_SWITCH ? "switch " : "if ") + std::to_string(value) +
         (runs ? "" : " none"));
    return runs ? run_graph(*node.bodies[body]) : CUDA_SUCCESS;
}

CUresult set_condition(uint64_t handle, unsigned int value) {
    Launched* launched = state().launched;
    if (!launched || !launched->conditions.count(handle)) return CUDA_ERROR_LAUNCH_FAILED;
    auto& condition = launched->conditions[handle];
    if (condition.read) violation(0, "a condition is set after it was read");
    if (condition.setter && condition.setter != state().running) violation(0, "two kernels set one condition");
    condition.setter = state().running;
    condition.value = value;
    return CUDA_SUCCESS;
}

static CUresult run_allocation(const Node& node) {
    // What a stream allocates lies where it will lie from the call on: here there is nothing left to do.
    return node.type == NODE_MEM_FREE ? release(reinterpret_cast<void*>(node.memory), true) : CUDA_SUCCESS;
}

CUresult run_node(const Node& node) {
    State& s = state();
    if (node.type == NODE_KERNEL) note("kernel " + node.launch.function->name);
    else if (node.type != NODE_CONDITIONAL) note(type_name(node.type));
    switch (node.type) {
        case NODE_KERNEL: s.running = &node; return run_launch(node.launch);
        case NODE_MEMCPY: return run_copy(node.copy);
        case NODE_MEMSET: return run_fill(node.fill);
        case NODE_GRAPH: return run_graph(*node.child);
        case NODE_CONDITIONAL: return run_conditional(node);
        case NODE_HOST:
            s.executing = true;
            node.host(node.user_data);
            s.executing = false;
            return CUDA_SUCCESS;
        case NODE_MEM_ALLOC:
        case NODE_MEM_FREE: return run_allocation(node);
        default: return CUDA_SUCCESS;
    }
}

static CUresult run_graph(const Graph& graph) {
    std::map<const Node*, size_t> waits;
    std::map<const Node*, std::vector<const Node*>> next;
    std::vector<const Node*> ready;
    for (const auto& node : graph.nodes) {
        waits[node.get()] = node->after.size();
        if (node->after.empty()) ready.push_back(node.get());
        for (const Node* before : node->after) next[before].push_back(node.get());
    }
    while (!ready.empty()) {
        std::swap(ready[state().random() % ready.size()], ready.back());
        const Node* node = ready.back();
        ready.pop_back();
        if (CUresult error = run_node(*node)) return error;
        for (const Node* after : next[node])
            if (--waits[after] == 0) ready.push_back(after);
    }
    return CUDA_SUCCESS;
}

CUresult run_executable(Graph& graph, std::map<uint64_t, Condition>& conditions) {
    State& s = state();
    Launched launched;
    for (const auto& [handle, condition] : conditions) {
        const bool given = condition.flags & CU_GRAPH_COND_ASSIGN_DEFAULT;
        launched.conditions[handle].value = given ? condition.value : static_cast<unsigned int>(s.random());
    }
    s.executed.clear();
    s.launched = &launched;
    const CUresult error = run_graph(graph);
    s.launched = nullptr;
    return error;
}

static CUresult submit_memory(void* handle, int type, uint64_t address) {
    Stream* stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    auto node = std::make_unique<Node>(type);
    node->memory = address;
    return submit(stream, std::move(node));
}

}  // namespace emulated

using namespace emulated;

extern "C" {

CUresult cuGraphInstantiateWithParams(void** executable, void* graph, CUDA_GRAPH_INSTANTIATE_PARAMS* params) {
    EMULATED_CALL("cuGraphInstantiateWithParams");
    return make_executable(reinterpret_cast<Executable**>(executable), graph, &params->error_node, &params->result);
}

CUresult cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long flags) {
    EMULATED_CALL("cuGraphInstantiateWithFlags");
    if (flags & 4) return CUDA_ERROR_NOT_SUPPORTED;  // to be launched by the device
    void* error_node;
    int result;
    return make_executable(reinterpret_cast<Executable**>(executable), graph, &error_node, &result);
}

CUresult cuGraphExecDestroy(void* handle) {
    EMULATED_CALL("cuGraphExecDestroy");
    Executable* executable = find<Executable>(handle, Tag::executable);
    if (!executable) return violation(CUDA_ERROR_INVALID_VALUE, "an executable graph is destroyed that is none");
    if (Graph* source = find<Graph>(executable->source, Tag::graph)) --source->instantiations;
    delete executable;
    return CUDA_SUCCESS;
}

CUresult cuGraphUpload(void* handle, void* stream) {
    EMULATED_CALL("cuGraphUpload");
    if (!stream_of(stream)) return CUDA_ERROR_INVALID_HANDLE;
    return find<Executable>(handle, Tag::executable) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGraphLaunch(void* handle, void* stream_handle) {
    EMULATED_CALL("cuGraphLaunch");
    Executable* executable = find<Executable>(handle, Tag::executable);
    Stream* stream = stream_of(stream_handle);
    if (!executable || !stream) return violation(CUDA_ERROR_INVALID_VALUE, "something is launched that is no graph");
    if (stream->capture) return CUDA_ERROR_NOT_SUPPORTED;  // would be a child graph
    const std::shared_ptr<Graph> graph = executable->graph;
    auto conditions = executable->conditions;
    return enqueue(stream, [graph, conditions]() mutable { return run_executable(*graph, conditions); });
}

CUresult cuLaunchHostFunc(void* handle, void (*function)(void*), void* user_data) {
    EMULATED_CALL("cuLaunchHostFunc");
    Stream* stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    auto node = std::make_unique<Node>(NODE_HOST);
    node->host = function;
    node->user_data = user_data;
    return submit(stream, std::move(node));
}

CUresult cuMemAllocAsync(uint64_t* address, size_t size, void* stream) {
    EMULATED_CALL("cuMemAllocAsync");
    Stream* known = stream_of(stream);
    if (!known) return CUDA_ERROR_INVALID_HANDLE;
    if (known->capture) *address = 0x7E00000000u;  // memory that is there while the graph runs
    else if (CUresult error = allocate(size, true, reinterpret_cast<void**>(address))) return error;
    return submit_memory(stream, NODE_MEM_ALLOC, *address);
}

CUresult cuMemFreeAsync(uint64_t address, void* stream) {
    EMULATED_CALL("cuMemFreeAsync");
    return submit_memory(stream, NODE_MEM_FREE, address);
}

}  // extern "C"
