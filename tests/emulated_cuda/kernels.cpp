// Modules, and kernels: a block of threads is a set of fibers that take turns in an order drawn by chance, and
// all meet at every __syncthreads(). Shared memory is poisoned when a block begins.
#include <elf.h>
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>

#include "emulator.h"

namespace emulated {

static constexpr size_t kStackBytes = 64u << 10;

struct Fiber {
    ucontext_t context;
    char* stack = nullptr;
    bool begun = false;
};

// The one block that runs.
struct Block {
    ucontext_t scheduler;
    std::vector<Fiber*> fibers;  // by thread; null: not begun, or ended
    std::vector<int> line;       // of the __syncthreads() that a thread waits at
    std::vector<char> ended;
    std::vector<Fiber*> idle;
    Fiber* current = nullptr;
    size_t thread = 0;
    const Launch* launch = nullptr;
    void** arguments = nullptr;
    CUresult error = CUDA_SUCCESS;
    size_t number = 0;  // of this block, in the launch
    std::map<uint64_t, std::pair<size_t, size_t>> setters;  // of a condition: block and thread
};

static Block& block() {
    static Block* const only = new Block;
    return *only;
}

void fault(int error, const char* what) {
    Block& b = block();
    violation(error, "kernel " + b.launch->function->name + ": " + what);
    if (!b.error) b.error = error;
    swapcontext(&b.current->context, &b.scheduler);  // and never come back
}

static void synchronize(int line) {
    Block& b = block();
    b.line[b.thread] = line;
    swapcontext(&b.current->context, &b.scheduler);
}

static void set_by_kernel(uint64_t handle, unsigned int value) {
    Block& b = block();
    const std::pair<size_t, size_t> here(b.number, b.thread);
    const auto [setter, first] = b.setters.emplace(handle, here);
    if (!first && setter->second != here)
        violation(0, "kernel " + b.launch->function->name + ": several threads set one condition");
    if (CUresult error = set_condition(handle, value)) fault(error, "it sets what is no condition of what runs");
}

static void access(const void* address, size_t size, bool) {
    const Block& b = block();
    const char* at = static_cast<const char*>(address);
    const Module& module = *b.launch->function->module;
    if (at >= b.current->stack && at + size <= b.current->stack + kStackBytes) return;
    if (at >= module.begin && at + size <= module.end) return;
    if (inside_known_memory(address, size)) return;
    char what[128];
    std::snprintf(what, sizeof what, "thread %zu uses %zu bytes at %p, where no memory is", b.thread, size, address);
    fault(CUDA_ERROR_ILLEGAL_ADDRESS, what);
}

static const EmulatedHost kHost = {synchronize, set_by_kernel, access, fault};

static void fiber_main() {
    for (;;) {
        Block& b = block();
        b.launch->function->invoke(b.arguments);
        b.ended[b.thread] = true;
        Fiber* fiber = b.current;
        b.fibers[b.thread] = nullptr;
        b.idle.push_back(fiber);
        swapcontext(&fiber->context, &b.scheduler);
    }
}

static Fiber* idle_fiber() {
    Block& b = block();
    Fiber* fiber;
    if (b.idle.empty()) {
        fiber = new Fiber;
        fiber->stack = static_cast<char*>(
            mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    } else {
        fiber = b.idle.back();
        b.idle.pop_back();
    }
    if (!fiber->begun) {
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = fiber->stack;
        fiber->context.uc_stack.ss_size = kStackBytes;
        fiber->context.uc_link = nullptr;
        makecontext(&fiber->context, fiber_main, 0);
        fiber->begun = true;
    }
    return fiber;
}

static void run_thread(size_t thread, EmulatedRegisters& registers) {
    Block& b = block();
    const unsigned int* size = b.launch->block;
    if (!b.fibers[thread]) b.fibers[thread] = idle_fiber();
    b.thread = thread;
    b.current = b.fibers[thread];
    const unsigned int index = static_cast<unsigned int>(thread);
    registers.thread = {index % size[0], index / size[0] % size[1], index / size[0] / size[1]};
    swapcontext(&b.scheduler, &b.current->context);
}

static CUresult run_block(EmulatedRegisters& registers, size_t threads) {
    Block& b = block();
    b.fibers.assign(threads, nullptr);
    b.line.assign(threads, 0);
    b.ended.assign(threads, false);
    std::vector<size_t> order(threads);
    std::iota(order.begin(), order.end(), 0);
    while (!order.empty() && !b.error) {
        std::shuffle(order.begin(), order.end(), state().random);
        for (size_t thread : order) {
            run_thread(thread, registers);
            if (b.error) break;
        }
        order.erase(std::remove_if(order.begin(), order.end(), [&](size_t t) { return b.ended[t]; }), order.end());
        for (size_t thread : order)
            if (!b.error && b.line[thread] != b.line[order.front()])
                b.error = violation(CUDA_ERROR_LAUNCH_FAILED, "kernel " + b.launch->function->name +
                                                                  ": threads wait at different barriers");
    }
    for (Fiber* fiber : b.fibers)
        if (fiber) {  // left in the middle
            fiber->begun = false;
            b.idle.push_back(fiber);
        }
    return b.error;
}

static CUresult run_image_kernel(const Launch& launch, void** arguments) {
    Block& b = block();
    EmulatedImage& image = *launch.function->module->image;
    b.launch = &launch;
    b.arguments = arguments;
    b.error = CUDA_SUCCESS;
    b.setters.clear();
    const unsigned int *grid = launch.grid, *size = launch.block;
    EmulatedRegisters& registers = *image.registers;
    registers.block_size = {size[0], size[1], size[2]};
    registers.grid_size = {grid[0], grid[1], grid[2]};
    std::vector<size_t> order(static_cast<size_t>(grid[0]) * grid[1] * grid[2]);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), state().random);
    for (size_t index : order) {
        b.number = index;
        registers.block = {static_cast<unsigned int>(index % grid[0]),
                           static_cast<unsigned int>(index / grid[0] % grid[1]),
                           static_cast<unsigned int>(index / grid[0] / grid[1])};
        if (image.shared_begin) std::memset(image.shared_begin, 0xFF, image.shared_end - image.shared_begin);
        if (CUresult error = run_block(registers, static_cast<size_t>(size[0]) * size[1] * size[2])) return error;
    }
    return CUDA_SUCCESS;
}

CUresult run_launch(const Launch& launch) {
    State& s = state();
    Function& function = *launch.function;
    if (function.unloaded)
        return violation(CUDA_ERROR_ILLEGAL_ADDRESS,
                         "kernel " + function.name + " runs after its module is unloaded");
    s.executing = true;
    CUresult error;
    if (function.callback) {
        error = function.callback(function.user_data) ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
    } else {
        std::vector<std::vector<char>> copied = launch.arguments;  // a kernel may write to its parameters
        std::vector<void*> arguments;
        for (auto& argument : copied) arguments.push_back(argument.data());
        error = run_image_kernel(launch, arguments.data());
    }
    s.executing = false;
    return error;
}

CUresult describe_launch(void* handle, const unsigned int* grid, const unsigned int* size, unsigned int shared,
                         void** parameters, Launch* launch) {
    Function* function = find<Function>(handle, Tag::function);
    if (!function || function->unloaded) return violation(CUDA_ERROR_INVALID_HANDLE, "a kernel is used that is none");
    const size_t threads = static_cast<size_t>(size[0]) * size[1] * size[2];
    if (!grid[0] || !grid[1] || !grid[2] || grid[0] > 0x7FFFFFFFu || grid[1] > 65535 || grid[2] > 65535 || !threads ||
        threads > 1024 || size[2] > 64 || shared || (!function->sizes.empty() && !parameters))
        return CUDA_ERROR_INVALID_VALUE;
    launch->function = function;
    std::copy(grid, grid + 3, launch->grid);
    std::copy(size, size + 3, launch->block);
    for (size_t i = 0; i < function->sizes.size(); ++i) {
        const char* value = static_cast<const char*>(parameters[i]);
        launch->arguments.emplace_back(value, value + function->sizes[i]);
    }
    return CUDA_SUCCESS;
}

static size_t image_size(const unsigned char* image) {
    const auto* header = reinterpret_cast<const Elf64_Ehdr*>(image);
    size_t size = header->e_shoff + static_cast<size_t>(header->e_shnum) * header->e_shentsize;
    const auto* sections = reinterpret_cast<const Elf64_Shdr*>(image + header->e_shoff);
    for (int i = 0; i < header->e_shnum; ++i)
        if (sections[i].sh_type != SHT_NOBITS)
            size = std::max<size_t>(size, sections[i].sh_offset + sections[i].sh_size);
    return size;
}

static void* open_image(const void* image) {
    // Beside the driver: what lies there may be loaded. The name is new, or the loader would take it for another.
    Dl_info here;
    dladdr(reinterpret_cast<void*>(&fault), &here);
    std::string path = std::string(here.dli_fname) + "-image-XXXXXX";
    const int file = mkstemp(path.data());
    if (file < 0) return nullptr;
    const size_t size = image_size(static_cast<const unsigned char*>(image));
    const bool written = write(file, image, size) == static_cast<ssize_t>(size);
    close(file);
    void* library = written ? dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL) : nullptr;
    unlink(path.c_str());
    return library;
}

static void find_extent(Module* module) {
    link_map* map = nullptr;
    dlinfo(module->library, RTLD_DI_LINKMAP, &map);
    const auto* header = reinterpret_cast<const Elf64_Ehdr*>(map->l_addr);
    const auto* segments = reinterpret_cast<const Elf64_Phdr*>(map->l_addr + header->e_phoff);
    module->begin = reinterpret_cast<const char*>(map->l_addr);
    module->end = module->begin;
    for (int i = 0; i < header->e_phnum; ++i)
        if (segments[i].p_type == PT_LOAD)
            module->end = std::max(module->end, module->begin + segments[i].p_vaddr + segments[i].p_memsz);
}

}  // namespace emulated

using namespace emulated;

extern "C" {

CUresult cuModuleLoadData(void** handle, const void* image) {
    EMULATED_CALL("cuModuleLoadData");
    const auto* header = static_cast<const Elf64_Ehdr*>(image);
    if (!image || std::memcmp(header->e_ident, ELFMAG, SELFMAG) != 0) return CUDA_ERROR_INVALID_IMAGE;
    if (header->e_machine != EM_X86_64 && header->e_machine != EM_AARCH64) return CUDA_ERROR_NO_BINARY_FOR_GPU;
    auto module = std::make_unique<Module>();
    module->library = open_image(image);
    if (!module->library) return violation(CUDA_ERROR_INVALID_IMAGE, "an image cannot be loaded");
    module->image = static_cast<EmulatedImage*>(dlsym(module->library, "emulated_image"));
    if (!module->image) return CUDA_ERROR_INVALID_IMAGE;
    module->image->host = &kHost;
    find_extent(module.get());
    for (size_t i = 0; i < module->image->kernel_count; ++i) {
        const EmulatedKernel& kernel = module->image->kernels[i];
        auto function = std::make_unique<Function>();
        function->name = kernel.name;
        function->sizes.assign(kernel.sizes, kernel.sizes + kernel.parameters);
        function->module = module.get();
        function->invoke = kernel.invoke;
        module->functions.push_back(function.get());
        state().functions.push_back(std::move(function));
    }
    *handle = module.release();
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(void** function, void* handle, const char* name) {
    EMULATED_CALL("cuModuleGetFunction");
    Module* module = find<Module>(handle, Tag::module);
    if (!module) return CUDA_ERROR_INVALID_HANDLE;
    for (Function* candidate : module->functions)
        if (candidate->name == name) {
            *function = candidate;
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_NOT_FOUND;
}

CUresult cuModuleUnload(void* handle) {
    EMULATED_CALL("cuModuleUnload");
    Module* module = find<Module>(handle, Tag::module);
    if (!module) return violation(CUDA_ERROR_INVALID_HANDLE, "a module is unloaded that is none");
    if (CUresult error = run_everything()) return error;
    for (Function* function : module->functions) function->unloaded = true;
    dlclose(module->library);
    delete module;
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(void* function, unsigned int gx, unsigned int gy, unsigned int gz, unsigned int bx,
                        unsigned int by, unsigned int bz, unsigned int shared, void* handle, void** parameters,
                        void** extra) {
    EMULATED_CALL("cuLaunchKernel");
    Stream* stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (extra) return CUDA_ERROR_NOT_SUPPORTED;
    const unsigned int grid[3] = {gx, gy, gz}, size[3] = {bx, by, bz};
    auto node = std::make_unique<Node>(NODE_KERNEL);
    if (CUresult error = describe_launch(function, grid, size, shared, parameters, &node->launch)) return error;
    return submit(stream, std::move(node));
}

}  // extern "C"
