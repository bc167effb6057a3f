// Stands in for CUDA's header where csrc/cuda is compiled as plain C++: what its kernels use of the execution model, on
// the CPU. Blocks run one after another. The threads of a block are fibers that run until a barrier, one at a time and in
// a chosen order, so that a missing barrier shows as a result that depends on the order.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__  // dynamic shared memory alone: an array declared in a kernel would be private to a thread
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = struct Stream*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulation {

// Runs the kernel for every block and thread. Throws where threads wait for each other in vain.
void run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);

enum class Barrier { none, block, warp };
void wait(Barrier barrier);

// This thread's value is shown to its warp; returns that of a lane.
uint64_t exchange(uint64_t value, unsigned lane);
// One bit a lane.
unsigned vote(bool predicate);

template <class T>
T shuffle(T value, unsigned lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t word = 0;
  memcpy(&word, &value, sizeof value);
  word = exchange(word, lane);
  memcpy(&value, &word, sizeof value);
  return value;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::Barrier::block); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline unsigned __ballot_sync(unsigned, bool predicate) { return emulation::vote(predicate); }
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::shuffle(value, lane % 32);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::shuffle(value, threadIdx.x % 32 ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int offset) {
  const int lane = threadIdx.x % 32;
  return emulation::shuffle(value, lane < offset ? lane : lane - offset);
}

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  constexpr int most = 227 << 10;  // of a block on compute capability 9.0
  return bytes <= most ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  emulation::run(*config, [&] { kernel(arguments...); });
  return cudaSuccess;
}
