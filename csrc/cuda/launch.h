// What the interfaces of the CUDA kernels share with those who call them.
#pragma once

namespace monet::cuda {

// The stream that work is put on: a cudaStream_t.
using Stream = void*;

}  // namespace monet::cuda
