// What all kernels of this folder use. The sources are CUDA C++ without launch syntax, so that the tests can also
// compile them as C++ against an emulation of a few runtime calls.
//
// Every sum has a fixed order and there are no floating-point atomics: the same inputs give the same bits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace monet::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- launching

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

struct Grid {
  int64_t blocks;
  int threads;            // of a block
  size_t shared = 0;      // bytes of dynamic shared memory
  int64_t rows = 1;       // blockIdx.y
};

// The work may be empty. The arguments are converted to what the kernel takes.
template <class... Parameters, class... Arguments>
void launch(Stream stream, const Grid& grid, void (*kernel)(Parameters...), Arguments... arguments) {
  if (grid.blocks == 0 || grid.rows == 0) return;
  constexpr size_t without_asking = 48 << 10;
  if (grid.shared > without_asking) {
    const cudaError_t error = cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
        static_cast<int>(grid.shared));
    if (error == cudaErrorInvalidValue) {
      cudaGetLastError();  // is told here, and would be taken for the next call's
      throw std::runtime_error(
          "an expert kernel needs " + std::to_string(grid.shared) +
          " bytes of shared memory per block, more than this GPU has: use fewer half-experts (model.moe_experts) or "
          "kernels=plain");
    }
    check(error);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks), static_cast<unsigned>(grid.rows));
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared;
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

// ---- threads

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ inline int warps() { return static_cast<int>(blockDim.x) / kWarp; }

// f(i) for this thread's share of 0..count-1, dealt out over the block.
template <class F>
__device__ void for_each_of_block(int count, const F& f) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) f(i);
}
// The same over a warp.
template <class F>
__device__ void for_each_of_warp(int count, const F& f) {
  for (int i = lane(); i < count; i += kWarp) f(i);
}

// In every lane the same bits.
template <class T>
__device__ T warp_sum(T value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// The larger one; NaN if either is.
template <class T>
__device__ T larger(T a, T b) {
  return a > b || a != a ? a : b;
}
template <class T>
__device__ T warp_largest(T value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value = larger(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}

extern __shared__ __align__(16) unsigned char dynamic_shared[];

// Hands out the block's dynamic shared memory from its beginning. What it hands out is padded, so that any type may
// follow.
class SharedMemory {
 public:
  template <class T>
  __device__ T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(dynamic_shared + used_);
    used_ += bytes<T>(count);
    return taken;
  }
  // What `take` uses up, for the launch.
  template <class T>
  static __host__ __device__ size_t bytes(int64_t count) {
    return (count * sizeof(T) + 15) / 16 * 16;
  }

 private:
  size_t used_ = 0;
};

// ---- numbers

__device__ inline float widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}
__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }

// To the nearest, ties to even.
__device__ inline void convert(float from, BFloat16& to) {
  uint32_t bits;
  memcpy(&bits, &from, sizeof bits);
  const bool nan = from != from;
  to.bits = static_cast<uint16_t>(nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
__device__ inline void convert(float from, float& to) { to = from; }
__device__ inline void convert(double from, double& to) { to = from; }
__device__ inline void convert(double from, float& to) { to = static_cast<float>(from); }
__device__ inline void convert(double from, BFloat16& to) { convert(static_cast<float>(from), to); }

// ---- pairs

// The half-expert of a pair of this token: the last group of the token's block that begins at or before the pair.
__device__ inline int expert_of(const Pairs& pairs, int64_t token, int pair) {
  const int32_t* start = pairs.group_start + token / kBlockTokens * pairs.experts;
  int low = 0, high = static_cast<int>(pairs.experts);
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (start[middle] <= pair)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// Pairs and half-experts of one token, by ascending half-expert, listed in shared memory by the whole block. To be
// used after a barrier.
struct Row {
  __device__ Row(const Pairs& pairs, int64_t token, SharedMemory& memory) {
    const int32_t first = pairs.row_start[token];
    count = pairs.row_start[token + 1] - first;
    pair = memory.take<int32_t>(pairs.experts);
    expert = memory.take<int32_t>(pairs.experts);
    for_each_of_block(count, [&](int i) {
      pair[i] = pairs.row_pair[first + i];
      expert[i] = expert_of(pairs, token, pair[i]);
    });
  }
  static size_t bytes(const Pairs& pairs) { return 2 * SharedMemory::bytes<int32_t>(pairs.experts); }

  int count;
  int32_t *pair, *expert;
};

// ---- memory

struct alignas(16) Sixteen {
  uint32_t words[4];
};

// row[0..count-1] = 0, by the whole block.
template <class S>
__device__ void clear(S* row, int64_t count) {
  const int64_t bytes = count * sizeof(S);
  if (reinterpret_cast<uintptr_t>(row) % sizeof(Sixteen) == 0 && bytes % sizeof(Sixteen) == 0) {
    Sixteen* wide = reinterpret_cast<Sixteen*>(row);
    for_each_of_block(static_cast<int>(bytes / sizeof(Sixteen)), [&](int i) { wide[i] = Sixteen{}; });
  } else {
    for_each_of_block(static_cast<int>(count), [&](int i) { row[i] = S{}; });
  }
}

}  // namespace monet::cuda
