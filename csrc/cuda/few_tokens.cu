// The dense products of few tokens, where reading weights is all the work: only rows of active half-experts are read.
#include "device.cuh"
#include "experts.h"

namespace monet::cuda {
namespace {

constexpr int kProjectWarps = 4;
constexpr int kCombineWarps = 16;

// Neighbours in memory, read at once.
template <class S, int count>
struct alignas(count * sizeof(S)) Vector {
  S values[count];
};
template <class S, int count>
bool in_vectors(const S* data, int64_t columns) {
  return data == nullptr ||
         (reinterpret_cast<uintptr_t>(data) % sizeof(Vector<S, count>) == 0 && columns % count == 0);
}

// A warp a unit of a pair.
template <class S, int width>
__global__ void project_units(
    Pairs pairs, int units, int64_t columns, const S* x, const S* w, const S* bias, Accumulator<S>* out) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * warps() + warp();
  if (at >= pairs.count * units) return;
  const int pair = static_cast<int>(at / units);
  const int64_t token = pairs.token[pair];
  const int64_t unit = static_cast<int64_t>(expert_of(pairs, token, pair)) * units + at % units;
  using Values = Vector<S, width>;
  const Values* x_row = reinterpret_cast<const Values*>(x + token * columns);
  const Values* w_row = reinterpret_cast<const Values*>(w + unit * columns);
  Accumulator<S> sum = 0;
  for_each_of_warp(static_cast<int>(columns / width), [&](int k) {
    const Values a = x_row[k], b = w_row[k];
    for (int i = 0; i < width; ++i) sum += widen(a.values[i]) * widen(b.values[i]);
  });
  sum = warp_sum(sum);
  if (lane() == 0) out[at] = sum + widen(bias[unit]);
}

// A block a token and `width` columns a lane. The warps share the rows of both terms, and add up in their order.
template <class S, int width>
__global__ void combine_rows(
    Pairs pairs, int units, int64_t columns, Term<S> first, Term<S> second, S* out, int64_t stride) {
  using C = Accumulator<S>;
  SharedMemory memory;
  const int64_t token = blockIdx.y, column = (static_cast<int64_t>(blockIdx.x) * kWarp + lane()) * width;
  const Row row(pairs, token, memory);
  C* sums = memory.take<C>(kCombineWarps * kWarp * width);
  __syncthreads();
  C sum[width] = {};
  const auto add = [&](const Term<S>& term, int i, int u) {
    if (term.y == nullptr) return;
    const C y = term.y[static_cast<int64_t>(row.pair[i]) * units + u];
    const S* from = term.w + (static_cast<int64_t>(row.expert[i]) * units + u) * columns + column;
    const Vector<S, width> w = *reinterpret_cast<const Vector<S, width>*>(from);
    for (int k = 0; k < width; ++k) sum[k] += y * widen(w.values[k]);
  };
  if (column < columns)
    for (int at = warp(); at < row.count * units; at += kCombineWarps) {
      add(first, at / units, at % units);
      add(second, at / units, at % units);
    }
  for (int k = 0; k < width; ++k) sums[(warp() * kWarp + lane()) * width + k] = sum[k];
  __syncthreads();
  for_each_of_block(kWarp * width, [&](int k) {
    C total = 0;
    for (int i = 0; i < kCombineWarps; ++i) total += sums[i * kWarp * width + k];
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarp * width + k;
    if (at < columns) convert(total, out[token * stride + at]);
  });
}

}  // namespace

template <class S>
void project(
    Stream stream, const Pairs& pairs, int64_t units, int64_t columns, const S* x, const S* w, const S* bias,
    Accumulator<S>* out) {
  constexpr int width = sizeof(Sixteen) / sizeof(S);
  const bool wide = in_vectors<S, width>(x, columns) && in_vectors<S, width>(w, columns);
  const Grid grid{.blocks = (pairs.count * units + kProjectWarps - 1) / kProjectWarps, .threads = kProjectWarps * kWarp};
  launch(
      stream, grid, wide ? project_units<S, width> : project_units<S, 1>, pairs, units, columns, x, w, bias, out);
}

template <class S>
void combine(
    Stream stream, const Pairs& pairs, int64_t units, int64_t columns, const Term<S>& first, const Term<S>& second,
    S* out, int64_t stride) {
  const bool wide = in_vectors<S, 2>(first.w, columns) && in_vectors<S, 2>(second.w, columns);
  const int tile = kWarp * (wide ? 2 : 1);
  const Grid grid{
      .blocks = (columns + tile - 1) / tile, .threads = kCombineWarps * kWarp,
      .shared = Row::bytes(pairs) + SharedMemory::bytes<Accumulator<S>>(kCombineWarps * tile), .rows = pairs.tokens};
  launch(
      stream, grid, wide ? combine_rows<S, 2> : combine_rows<S, 1>, pairs, units, columns, first, second, out, stride);
}

#define INSTANTIATE(S)                                                                                           \
  template void project(                                                                                         \
      Stream, const Pairs&, int64_t, int64_t, const S*, const S*, const S*, Accumulator<S>*);                    \
  template void combine(                                                                                         \
      Stream, const Pairs&, int64_t, int64_t, const Term<S>&, const Term<S>&, S*, int64_t)
INSTANTIATE(float);
INSTANTIATE(BFloat16);
INSTANTIATE(double);
#undef INSTANTIATE

}  // namespace monet::cuda
