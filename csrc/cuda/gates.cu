// Functions of the gates of one side.
#include "heads.cuh"

namespace monet::cuda {
namespace {

// A block per token.
template <class T>
__global__ void scatter(const DenseGates<T> p) {
  const int64_t heads = p.side.heads, experts = p.side.pairs.experts, token = blockIdx.x;
  SharedMemory memory;
  T* dense = p.dense + token * heads * experts;
  clear(dense, heads * experts);
  const Row row(p.side.pairs, token, memory);
  __syncthreads();
  for_each_of_block(row.count * static_cast<int>(heads), [&](int at) {
    const int i = at / static_cast<int>(heads), h = at % static_cast<int>(heads);
    dense[h * experts + row.expert[i]] = p.side.gates[row.pair[i] * heads + h];
  });
}

// values[pair, head] = dense[token of the pair * token_stride + head * experts + half-expert], a thread per value.
template <class T>
__global__ void gather(const T* dense, int64_t token_stride, Pairs pairs, int64_t heads, T* values) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= pairs.count * heads) return;
  const int pair = static_cast<int>(at / heads);
  const int64_t token = pairs.token[pair];
  values[at] = dense[token * token_stride + at % heads * pairs.experts + expert_of(pairs, token, pair)];
}
Grid values_grid(int64_t values) { return {.blocks = over(values, kValueThreads), .threads = kValueThreads}; }

// A block per half-expert, a warp per head.
template <class T>
__global__ void sum_groups(const SumOverTokens<T> p, int64_t blocks) {
  const int64_t heads = p.side.heads, experts = p.side.pairs.experts, expert = blockIdx.x;
  for_each_head(heads, [&](int h) {
    double sum = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      const int32_t* start = p.side.pairs.group_start + block * experts + expert;
      for (int64_t pair = start[0] + lane(); pair < start[1]; pair += kWarp)
        sum += static_cast<double>(p.side.gates[pair * heads + h]);
    }
    sum = warp_sum(sum);
    if (lane() == 0) p.totals[h * experts + expert] = static_cast<T>(sum);
  });
}

// The largest gate of a head among the pairs of a token, in every lane; NaN if any is.
template <class T>
__device__ T largest_gate(const Side<T>& side, int64_t h, const int32_t* pair, int count) {
  T largest = 0;
  for_each_of_warp(count, [&](int i) { largest = larger(largest, side.gates[pair[i] * side.heads + h]); });
  return warp_largest(largest);
}

template <class T>
__global__ void largest_gates(const SumOfLargest<T> p) {
  with_token_of_warp(p.side.pairs, [&](int64_t token, const int32_t* pair, int count) {
    for (int64_t h = 0; h < p.side.heads; ++h) {
      const T found = largest_gate(p.side, h, pair, count);
      if (lane() == 0) p.workspace[token * p.side.heads + h] = found;
    }
  });
}

template <class T>
__global__ void largest_backward(const SumOfLargestBackward<T> p) {
  with_token_of_warp(p.side.pairs, [&](int64_t, const int32_t* pair, int count) {
    for (int64_t h = 0; h < p.side.heads; ++h) {
      const auto at = [&](int i) { return pair[i] * p.side.heads + h; };
      const T largest = largest_gate(p.side, h, pair, count);
      int equal = 0;
      for_each_of_warp(count, [&](int i) { equal += p.side.gates[at(i)] == largest; });
      equal = warp_sum(equal);
      for_each_of_warp(count, [&](int i) {
        p.dgates[at(i)] = p.side.gates[at(i)] == largest ? p.dtotals[h] / static_cast<T>(equal) : T{0};
      });
    }
  });
}

}  // namespace

template <class T>
void run(const DenseGates<T>& p, Stream stream) {
  const Pairs& pairs = p.side.pairs;
  const Grid grid{.blocks = pairs.tokens, .threads = kValueThreads, .shared = Row::bytes(pairs)};
  launch(stream, grid, scatter<T>, p);
}

template <class T>
void run(const DenseGatesBackward<T>& p, Stream stream) {
  const Pairs& pairs = p.side.pairs;
  const int64_t heads = p.side.heads;
  launch(stream, values_grid(pairs.count * heads), gather<T>, p.ddense, heads * pairs.experts, pairs, heads, p.dgates);
}

template <class T>
void run(const SumOverTokens<T>& p, Stream stream) {
  const Grid grid{.blocks = p.side.pairs.experts, .threads = head_threads(p.side.heads)};
  launch(stream, grid, sum_groups<T>, p, p.side.pairs.blocks());
}

template <class T>
void run(const SumOverTokensBackward<T>& p, Stream stream) {
  const Pairs& pairs = p.side.pairs;
  const int64_t heads = p.side.heads;
  launch(stream, values_grid(pairs.count * heads), gather<T>, p.dtotals, 0, pairs, heads, p.dgates);
}

template <class T>
void run(const SumOfLargest<T>& p, Stream stream) {
  const int64_t tokens = p.side.pairs.tokens, heads = p.side.heads;
  launch(stream, token_warps_grid(p.side.pairs), largest_gates<T>, p);
  launch(stream, columns_grid(heads), sum_rows<T, T>, p.workspace, tokens, heads, p.totals);
}

template <class T>
void run(const SumOfLargestBackward<T>& p, Stream stream) {
  launch(stream, token_warps_grid(p.side.pairs), largest_backward<T>, p);
}

#define INSTANTIATE(T)                                       \
  template void run(const DenseGates<T>&, Stream);            \
  template void run(const DenseGatesBackward<T>&, Stream);    \
  template void run(const SumOverTokens<T>&, Stream);         \
  template void run(const SumOverTokensBackward<T>&, Stream); \
  template void run(const SumOfLargest<T>&, Stream);          \
  template void run(const SumOfLargestBackward<T>&, Stream)
INSTANTIATE(float);
INSTANTIATE(double);
#undef INSTANTIATE

}  // namespace monet::cuda
