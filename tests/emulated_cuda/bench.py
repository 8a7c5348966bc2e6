"""A device with a few kernels to try things on."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from emulated_cuda.build import build_image
from emulated_cuda.emulator import Emulator
from exitcompiler.runtime.cuda_driver import Driver

__all__ = ["SOURCE", "Bench"]

WORD = 4
SOURCE = """
extern "C" __device__ void cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned int value);
extern "C" __global__ void add(int *word, int number) { *word = *word * 10 + number; }
extern "C" __global__ void set_from(const int *word, cudaGraphConditionalHandle handle) {
  cudaGraphSetConditional(handle, *word);
}
extern "C" __global__ void store(int *words, long long index) { words[index] = 1; }
extern "C" __global__ void store_wide(int *words) { *reinterpret_cast<int4 *>(words + 1) = int4{1, 2, 3, 4}; }
extern "C" __global__ void index_shared(int *words, int index) {
  __shared__ int kept[4];
  kept[threadIdx.x] = 0;
  words[0] = kept[index];
}
extern "C" __global__ void total(int *words, int barriers) {
  __shared__ int kept[64];
  kept[threadIdx.x] = 1;
  if (barriers == 1) __syncthreads();
  if (barriers == 2 && threadIdx.x % 2) __syncthreads();
  else if (barriers == 2) __syncthreads();
  if (threadIdx.x == 0) {
    int sum = 0;
    for (unsigned int i = 0; i < blockDim.x; ++i) sum += kept[i];
    words[0] = sum;
  }
}
extern "C" __global__ void set_by_all(int *words, cudaGraphConditionalHandle handle) {
  cudaGraphSetConditional(handle, 1);
}
extern "C" __global__ void where(int *words) {
  const unsigned int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  words[block * blockDim.x + threadIdx.x] = block * 100 + threadIdx.x;
}
"""


class Bench:
    """A device with a stream, a module and some words that begin as 0."""

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator
        self.driver = Driver.open()
        self.stream = self.driver.create_stream()
        self.module = self.driver.load_module(build_image(SOURCE))
        self.words = self.driver.malloc(64 * WORD)
        self.driver.fill(self.words, 0, 64 * WORD, self.stream)

    def kernel(
        self, graph: int, after: Sequence[int], name: str, *arguments: object, threads: int = 1
    ) -> int:
        function = self.driver.function(self.module, name)
        return self.driver.add_kernel(graph, after, function, (1, 1, 1), threads, arguments)

    def add(self, graph: int, after: Sequence[int], number: int, word: int = 0) -> int:
        return self.kernel(graph, after, "add", self.word(word), ctypes.c_int(number))

    def word(self, index: int = 0) -> ctypes.c_uint64:
        return ctypes.c_uint64(self.words + index * WORD)

    def run(self, graph: int) -> int:
        """Instantiate and launch a graph; the first word after it, which is 0 again for the next run."""
        executable = self.driver.instantiate(graph)
        self.driver.launch(executable, self.stream)
        self.driver.destroy_exec(executable)  # what runs already is freed when it is done
        value = self.read()
        self.driver.set_word(self.words, 0, self.stream)
        return value

    def read(self, index: int = 0) -> int:
        value = np.zeros(1, np.int32)
        self.driver.download(value, self.words + index * WORD, self.stream)
        return int(value[0])

    def write(self, index: int, value: int) -> None:
        self.driver.set_word(self.words + index * WORD, value, self.stream)

    def conditional(self, kind: str, bodies: int, default: int = 0) -> tuple[int, int, list[int]]:
        """A graph whose word 1 decides which body runs; body n adds n + 1 to word 0."""
        graph = self.driver.create_graph()
        handle = self.driver.create_condition(graph, default)
        setter = self.kernel(graph, [], "set_from", self.word(1), ctypes.c_uint64(handle))
        _, inner = self.driver.add_conditional(graph, [setter], kind, handle, bodies)  # type: ignore[arg-type]
        for number, body in enumerate(inner):
            self.add(body, [], number + 1)
        return graph, handle, inner
