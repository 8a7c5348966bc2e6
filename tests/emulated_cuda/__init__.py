"""A CUDA driver emulated on the CPU, and what runs on it: so that all but the GPU itself is tested for real.

cuda-bindings loads a library of its own functions, compiled from the C++ files here, in the place of the
driver; the project's kernels are compiled from their own source with g++ and run thread by thread. What is
emulated is what the documentation of CUDA 13.0 says, not what a GPU was seen to do.
"""

from emulated_cuda.emulator import Emulator, emulated_device, kernel_image, load
from emulated_cuda.host_engine import (
    HostEngine,
    allocate_in_capture,
    call_host_in_capture,
    primary_context,
)

__all__ = [
    "Emulator",
    "HostEngine",
    "allocate_in_capture",
    "call_host_in_capture",
    "emulated_device",
    "kernel_image",
    "load",
    "primary_context",
]
