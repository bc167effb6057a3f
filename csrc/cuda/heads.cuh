// What the kernels of the router and of its gates share: warps that take heads, warps that take tokens, sums of a
// block.
#pragma once

#include "device.cuh"

namespace monet::cuda {
namespace {

constexpr int kHeadWarps = 8;   // most warps of a block that takes the heads of a token one by one
constexpr int kTokenWarps = 4;  // tokens of a block that gives each a warp
constexpr int kValueThreads = 256;

inline int head_threads(int64_t heads) { return kWarp * static_cast<int>(heads < kHeadWarps ? heads : kHeadWarps); }
__host__ __device__ inline int64_t over(int64_t count, int64_t each) { return (count + each - 1) / each; }

// f(head) for the heads of this warp.
template <class F>
__device__ void for_each_head(int64_t heads, const F& f) {
  for (int h = warp(); h < heads; h += warps()) f(h);
}

// f(token, its first entry of row_pair, number of entries) for the token of this warp.
template <class F>
__device__ void with_token_of_warp(const Pairs& pairs, const F& f) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * warps() + warp();
  if (token >= pairs.tokens) return;
  f(token, pairs.row_pair + pairs.row_start[token], pairs.row_start[token + 1] - pairs.row_start[token]);
}
inline Grid token_warps_grid(const Pairs& pairs) {
  return {.blocks = over(pairs.tokens, kTokenWarps), .threads = kTokenWarps * kWarp};
}

// The sum over the block's threads, in thread 0. workspace: one value per warp.
__device__ inline double block_sum(double value, double* workspace) {
  value = warp_sum(value);
  if (lane() == 0) workspace[warp()] = value;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0)
    for (int i = 0; i < warps(); ++i) sum += workspace[i];
  __syncthreads();
  return sum;
}

// totals[column] = sum over the rows of values [rows, columns], a block per column.
template <class T, class U>
__global__ void sum_rows(const T* values, int64_t rows, int64_t columns, U* totals) {
  SharedMemory memory;
  double* workspace = memory.take<double>(kWarp);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < rows; i += blockDim.x) sum += static_cast<double>(values[i * columns + blockIdx.x]);
  sum = block_sum(sum, workspace);
  if (threadIdx.x == 0) totals[blockIdx.x] = static_cast<U>(sum);
}
inline Grid columns_grid(int64_t columns) {
  return {.blocks = columns, .threads = kValueThreads, .shared = SharedMemory::bytes<double>(kWarp)};
}

}  // namespace
}  // namespace monet::cuda
