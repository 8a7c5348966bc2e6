// Graphs that are being put together.
#include "emulator.h"

#include <algorithm>

namespace emulated {

const char* type_name(int type) {
    switch (type) {
        case NODE_KERNEL: return "kernel";
        case NODE_MEMCPY: return "memcpy";
        case NODE_MEMSET: return "memset";
        case NODE_HOST: return "host";
        case NODE_GRAPH: return "graph";
        case NODE_EMPTY: return "empty";
        case NODE_MEM_ALLOC: return "mem alloc";
        case NODE_MEM_FREE: return "mem free";
        default: return "conditional";
    }
}

Graph* root_of(Graph* graph) {
    while (graph->owner) graph = graph->owner->graph;
    return graph;
}

std::unique_ptr<Node> copy_node(const Node& node, bool known) {
    auto copy = std::make_unique<Node>(node.type, known);
    copy->launch = node.launch;
    copy->copy = node.copy;
    copy->fill = node.fill;
    copy->host = node.host;
    copy->user_data = node.user_data;
    copy->memory = node.memory;
    copy->handle = node.handle;
    copy->condition = node.condition;
    if (node.child) {
        copy->child = copy_graph(*node.child, known);
        copy->child->owner = copy.get();
    }
    for (const auto& body : node.bodies) {
        copy->bodies.push_back(copy_graph(*body, known));
        copy->bodies.back()->owner = copy.get();
    }
    return copy;
}

std::unique_ptr<Graph> copy_graph(const Graph& graph, bool known) {
    auto copy = std::make_unique<Graph>(known);
    std::map<const Node*, Node*> twin;
    for (const auto& node : graph.nodes) {
        copy->nodes.push_back(copy_node(*node, known));
        twin[node.get()] = copy->nodes.back().get();
        copy->nodes.back()->graph = copy.get();
    }
    for (const auto& node : graph.nodes)
        for (const Node* before : node->after) twin[node.get()]->after.push_back(twin[before]);
    return copy;
}

static bool contains(const Graph& graph, int type) {
    return std::any_of(graph.nodes.begin(), graph.nodes.end(), [&](const auto& node) {
        const auto inside = [&](const auto& body) { return contains(*body, type); };
        return node->type == type || (node->child && inside(node->child)) ||
               std::any_of(node->bodies.begin(), node->bodies.end(), inside);
    });
}

static Graph* graph_of(void* handle) {
    Graph* graph = find<Graph>(handle, Tag::graph);
    if (!graph) violation(0, "a graph is used that is none");
    return graph;
}

static Node* node_of(void* handle) {
    Node* node = find<Node>(handle, Tag::node);
    if (!node) violation(0, "a node is used that is none");
    return node;
}

// Adds a node, if its dependencies are different nodes of the same graph.
static CUresult add(void** handle, void* graph_handle, void* const* after, size_t count, std::unique_ptr<Node> node) {
    Graph* graph = graph_of(graph_handle);
    if (!graph) return CUDA_ERROR_INVALID_VALUE;
    std::set<Node*> seen;
    for (size_t i = 0; i < count; ++i) {
        Node* before = node_of(after[i]);
        if (!before || before->graph != graph || !seen.insert(before).second) return CUDA_ERROR_INVALID_VALUE;
        node->after.push_back(before);
    }
    node->graph = graph;
    *handle = node.get();
    graph->nodes.push_back(std::move(node));
    return CUDA_SUCCESS;
}

static CUresult fill_child(Node& node, void* handle) {
    Graph* child = graph_of(handle);
    if (!child || contains(*child, NODE_CONDITIONAL) || contains(*child, NODE_MEM_ALLOC) ||
        contains(*child, NODE_MEM_FREE))
        return CUDA_ERROR_INVALID_VALUE;
    node.child = copy_graph(*child, true);
    node.child->owner = &node;
    return CUDA_SUCCESS;
}

static CUresult fill_kernel(Node& node, const CUDA_KERNEL_NODE_PARAMS& params) {
    if (params.extra) return CUDA_ERROR_NOT_SUPPORTED;
    return describe_launch(params.function ? params.function : params.kernel, params.grid, params.block,
                           params.shared_bytes, params.parameters, &node.launch);
}

static CUresult fill_memset(Node& node, const CUDA_MEMSET_NODE_PARAMS& params) {
    char* target = reinterpret_cast<char*>(params.target);
    const unsigned int element = params.element_bytes;
    if (element != 1 && element != 2 && element != 4) return CUDA_ERROR_INVALID_VALUE;
    if (!params.width || !params.height || params.target % element ||
        where(target, params.width * element) != Where::device)
        return CUDA_ERROR_INVALID_VALUE;
    node.fill = {target, params.value, element, params.width, params.height, params.pitch};
    return CUDA_SUCCESS;
}

static bool is_above(Graph* upper, Graph* graph) {
    for (;; graph = graph->owner->graph) {
        if (graph == upper) return true;
        if (!graph->owner) return false;
    }
}

static CUresult fill_conditional(Node& node, Graph* graph, const CUDA_CONDITIONAL_NODE_PARAMS& params) {
    State& s = state();
    const auto found = s.conditions.find(params.handle);
    const bool fits = params.type == CU_GRAPH_COND_TYPE_IF ? params.size == 1 || params.size == 2
                    : params.type == CU_GRAPH_COND_TYPE_SWITCH && params.size > 0;
    if (params.type == CU_GRAPH_COND_TYPE_WHILE) return CUDA_ERROR_NOT_SUPPORTED;
    if (found == s.conditions.end() || found->second.node || !graph || !fits || params.context != primary_context())
        return CUDA_ERROR_INVALID_VALUE;
    // IF with ELSE, and SWITCH, came with 12.8; no conditional stands in a child graph.
    if (s.settings["driver_version"] < 12080 && (params.type != CU_GRAPH_COND_TYPE_IF || params.size > 1))
        return CUDA_ERROR_INVALID_VALUE;
    if (!is_above(found->second.graph, graph)) return CUDA_ERROR_INVALID_VALUE;
    for (Graph* above = graph; above->owner; above = above->owner->graph)
        if (above->owner->child.get() == above) return CUDA_ERROR_INVALID_VALUE;
    node.handle = params.handle;
    node.condition = params.type;
    for (unsigned int i = 0; i < params.size; ++i) {
        node.bodies.push_back(std::make_unique<Graph>());
        node.bodies.back()->owner = &node;
        node.body_handles.push_back(node.bodies.back().get());
    }
    found->second.node = &node;
    return CUDA_SUCCESS;
}

// Whether all that a node of this type does not use is zero, as the driver asks for.
static bool rest_is_zero(const CUgraphNodeParams& params) {
    static const std::map<int, size_t> used = {
        {NODE_KERNEL, sizeof params.kernel}, {NODE_MEMSET, sizeof params.memset}, {NODE_GRAPH, sizeof params.graph},
        {NODE_CONDITIONAL, sizeof params.conditional}};
    const auto found = used.find(params.type);
    const char* bytes = reinterpret_cast<const char*>(&params.reserved1);
    for (size_t i = found == used.end() ? 0 : found->second; i < sizeof params.reserved1; ++i)
        if (bytes[i]) return false;
    return !params.reserved0[0] && !params.reserved0[1] && !params.reserved0[2] && !params.reserved2;
}

static CUresult fill_any(Node& node, Graph* graph, const CUgraphNodeParams& params) {
    switch (params.type) {
        case NODE_KERNEL: return fill_kernel(node, params.kernel);
        case NODE_MEMSET: return fill_memset(node, params.memset);
        case NODE_GRAPH: return fill_child(node, params.graph.graph);
        case NODE_CONDITIONAL: return fill_conditional(node, graph, params.conditional);
        case NODE_EMPTY: return CUDA_SUCCESS;
        default: return CUDA_ERROR_NOT_SUPPORTED;
    }
}

}  // namespace emulated

using namespace emulated;

extern "C" {

CUresult cuGraphCreate(void** graph, unsigned int flags) {
    EMULATED_CALL("cuGraphCreate");
    if (flags) return CUDA_ERROR_INVALID_VALUE;
    *graph = new Graph;
    return CUDA_SUCCESS;
}

CUresult cuGraphDestroy(void* handle) {
    EMULATED_CALL("cuGraphDestroy");
    Graph* graph = graph_of(handle);
    if (!graph) return CUDA_ERROR_INVALID_VALUE;
    if (graph->owner) return violation(CUDA_ERROR_INVALID_VALUE, "a graph is destroyed that belongs to a node");
    auto& conditions = state().conditions;
    for (auto it = conditions.begin(); it != conditions.end();)
        it = root_of(it->second.graph) == graph ? conditions.erase(it) : std::next(it);
    delete graph;
    return CUDA_SUCCESS;
}

CUresult cuGraphAddKernelNode_v2(void** node, void* graph, void* const* after, size_t count,
                                 const CUDA_KERNEL_NODE_PARAMS* params) {
    EMULATED_CALL("cuGraphAddKernelNode");
    auto made = std::make_unique<Node>(NODE_KERNEL);
    if (CUresult error = fill_kernel(*made, *params)) return error;
    return add(node, graph, after, count, std::move(made));
}

CUresult cuGraphAddChildGraphNode(void** node, void* graph, void* const* after, size_t count, void* child) {
    EMULATED_CALL("cuGraphAddChildGraphNode");
    auto made = std::make_unique<Node>(NODE_GRAPH);
    if (CUresult error = fill_child(*made, child)) return error;
    return add(node, graph, after, count, std::move(made));
}

CUresult cuGraphAddMemcpyNode(void** node, void* graph, void* const* after, size_t count, const CUDA_MEMCPY3D* params,
                              void* context) {
    EMULATED_CALL("cuGraphAddMemcpyNode");
    if (context != primary_context()) return CUDA_ERROR_INVALID_VALUE;
    auto made = std::make_unique<Node>(NODE_MEMCPY);
    if (CUresult error = describe_copy(*params, &made->copy)) return error;
    return add(node, graph, after, count, std::move(made));
}

CUresult cuGraphMemcpyNodeGetParams(void* handle, CUDA_MEMCPY3D* params) {
    EMULATED_CALL("cuGraphMemcpyNodeGetParams");
    Node* node = node_of(handle);
    if (!node || node->type != NODE_MEMCPY) return CUDA_ERROR_INVALID_VALUE;
    *params = node->copy.given;
    return CUDA_SUCCESS;
}

CUresult cuGraphAddMemsetNode(void** node, void* graph, void* const* after, size_t count,
                              const CUDA_MEMSET_NODE_PARAMS* params, void* context) {
    EMULATED_CALL("cuGraphAddMemsetNode");
    if (context != primary_context()) return CUDA_ERROR_INVALID_VALUE;
    auto made = std::make_unique<Node>(NODE_MEMSET);
    if (CUresult error = fill_memset(*made, *params)) return error;
    return add(node, graph, after, count, std::move(made));
}

CUresult cuGraphAddEmptyNode(void** node, void* graph, void* const* after, size_t count) {
    EMULATED_CALL("cuGraphAddEmptyNode");
    return add(node, graph, after, count, std::make_unique<Node>(NODE_EMPTY));
}

CUresult cuGraphConditionalHandleCreate(uint64_t* handle, void* graph_handle, void* context, unsigned int value,
                                        unsigned int flags) {
    EMULATED_CALL("cuGraphConditionalHandleCreate");
    Graph* graph = graph_of(graph_handle);
    if (!graph || context != primary_context() || flags > CU_GRAPH_COND_ASSIGN_DEFAULT)
        return CUDA_ERROR_INVALID_VALUE;
    *handle = 0xC0DE000000000000u + state().next_number++;  // more than 32 bits
    state().conditions[*handle] = {graph, value, flags};
    return CUDA_SUCCESS;
}

CUresult cuGraphAddNode_v2(void** node, void* graph, void* const* after, const CUgraphEdgeData* edges, size_t count,
                           CUgraphNodeParams* params) {
    EMULATED_CALL("cuGraphAddNode");
    if (edges) return CUDA_ERROR_NOT_SUPPORTED;
    if (!rest_is_zero(*params)) return CUDA_ERROR_INVALID_VALUE;
    auto made = std::make_unique<Node>(params->type);
    CUresult error = fill_any(*made, graph_of(graph), *params);
    if (error) return error;
    Node* raw = made.get();
    error = add(node, graph, after, count, std::move(made));
    if (error && params->type == NODE_CONDITIONAL) state().conditions[params->conditional.handle].node = nullptr;
    if (!error && params->type == NODE_CONDITIONAL) params->conditional.bodies = raw->body_handles.data();
    return error;
}

CUresult cuGraphGetNodes(void* handle, void** nodes, size_t* count) {
    EMULATED_CALL("cuGraphGetNodes");
    Graph* graph = graph_of(handle);
    if (!graph || !count) return CUDA_ERROR_INVALID_VALUE;
    const size_t room = nodes ? *count : 0;
    for (size_t i = 0; i < room; ++i) nodes[i] = i < graph->nodes.size() ? graph->nodes[i].get() : nullptr;
    *count = nodes ? std::min(room, graph->nodes.size()) : graph->nodes.size();
    return CUDA_SUCCESS;
}

CUresult cuGraphNodeGetType(void* handle, int* type) {
    EMULATED_CALL("cuGraphNodeGetType");
    Node* node = node_of(handle);
    if (!node) return CUDA_ERROR_INVALID_VALUE;
    *type = node->type;
    return CUDA_SUCCESS;
}

CUresult cuGraphChildGraphNodeGetGraph(void* handle, void** graph) {
    EMULATED_CALL("cuGraphChildGraphNodeGetGraph");
    Node* node = node_of(handle);
    if (!node || !node->child) return CUDA_ERROR_INVALID_VALUE;
    *graph = node->child.get();
    return CUDA_SUCCESS;
}

CUresult cuGraphNodeGetDependencies_v2(void* handle, void** nodes, CUgraphEdgeData* edges, size_t* count) {
    EMULATED_CALL("cuGraphNodeGetDependencies");
    Node* node = node_of(handle);
    if (!node || !count) return CUDA_ERROR_INVALID_VALUE;
    const size_t room = nodes ? *count : 0;
    for (size_t i = 0; i < room; ++i) {
        nodes[i] = i < node->after.size() ? node->after[i] : nullptr;
        if (edges) edges[i] = {};
    }
    *count = nodes ? std::min(room, node->after.size()) : node->after.size();
    return CUDA_SUCCESS;
}

}  // extern "C"
