// The products of decoding, where reading weights is all the work: only rows of active half-experts are read.
#include "device.cuh"

namespace monet::cuda {
namespace {

constexpr int kProjectWarps = 4;
constexpr int kCombineWarps = 16;

// Neighbours in memory, read at once.
template <class S, int count>
struct alignas(count * sizeof(S)) Vector {
  S values[count];
};
// Whether all rows can be read so.
template <class S, int count>
bool in_vectors(const Rows<const S>& rows, int64_t columns) {
  return reinterpret_cast<uintptr_t>(rows.data) % sizeof(Vector<S, count>) == 0 && columns % count == 0 &&
         rows.stride % count == 0;
}

// A warp per unit of a pair.
template <class S, int width>
__global__ void project(const Projection<S> p) {
  const Pairs& pairs = p.pairs;
  const int units = static_cast<int>(p.units);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * warps() + warp();
  if (at >= pairs.count * units) return;
  const int pair = static_cast<int>(at / units);
  const int64_t token = pairs.token[pair];
  const int64_t unit = static_cast<int64_t>(expert_of(pairs, token, pair)) * units + at % units;
  using Values = Vector<S, width>;
  const Values* x_row = reinterpret_cast<const Values*>(p.x.data + token * p.x.stride);
  const Values* w_row = reinterpret_cast<const Values*>(p.w.data + unit * p.w.stride);
  Accumulator<S> sum = 0;
  for_each_of_warp(static_cast<int>(p.columns / width), [&](int k) {
    const Values a = x_row[k], b = w_row[k];
    for (int i = 0; i < width; ++i) sum += widen(a.values[i]) * widen(b.values[i]);
  });
  sum = warp_sum(sum);
  if (lane() == 0) p.out[at] = sum + widen(p.bias[unit]);
}

// A block per token and `width` columns per lane. The warps share the rows of all terms, and add up in their order.
template <class S, int width>
__global__ void combine(const Combination<S> p) {
  using C = Accumulator<S>;
  SharedMemory memory;
  const int64_t token = blockIdx.y, column = (static_cast<int64_t>(blockIdx.x) * kWarp + lane()) * width;
  const int units = static_cast<int>(p.terms[0].units);
  const Row row(p.terms[0].pairs, token, memory);
  C* sums = memory.take<C>(kCombineWarps * kWarp * width);
  __syncthreads();
  C sum[width] = {};
  const auto add = [&](const Term<S>& term, int i, int u) {
    const C y = term.y[static_cast<int64_t>(row.pair[i]) * units + u];
    const S* from = term.w.data + (static_cast<int64_t>(row.expert[i]) * units + u) * term.w.stride + column;
    const Vector<S, width> w = *reinterpret_cast<const Vector<S, width>*>(from);
    for (int k = 0; k < width; ++k) sum[k] += y * widen(w.values[k]);
  };
  if (column < p.columns)
    for (int at = warp(); at < row.count * units; at += kCombineWarps) {
      add(p.terms[0], at / units, at % units);
      if (p.term_count > 1) add(p.terms[1], at / units, at % units);
    }
  for (int k = 0; k < width; ++k) sums[(warp() * kWarp + lane()) * width + k] = sum[k];
  __syncthreads();
  for_each_of_block(kWarp * width, [&](int k) {
    C total = 0;
    for (int i = 0; i < kCombineWarps; ++i) total += sums[i * kWarp * width + k];
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarp * width + k;
    if (at < p.columns) convert(total, p.out.data[token * p.out.stride + at]);
  });
}

}  // namespace

template <class S>
void run(const Projection<S>& p, Stream stream) {
  constexpr int width = sizeof(Sixteen) / sizeof(S);
  const bool wide = in_vectors<S, width>(p.x, p.columns) && in_vectors<S, width>(p.w, p.columns);
  const int64_t rows = p.pairs.count * p.units;
  const Grid grid{.blocks = (rows + kProjectWarps - 1) / kProjectWarps, .threads = kProjectWarps * kWarp};
  launch(stream, grid, wide ? project<S, width> : project<S, 1>, p);
}

template <class S>
void run(const Combination<S>& p, Stream stream) {
  const Pairs& pairs = p.terms[0].pairs;
  bool wide = true;
  for (int i = 0; i < p.term_count; ++i) wide = wide && in_vectors<S, 2>(p.terms[i].w, p.columns);
  const int tile = kWarp * (wide ? 2 : 1);
  const Grid grid{
      .blocks = (p.columns + tile - 1) / tile, .threads = kCombineWarps * kWarp,
      .shared = Row::bytes(pairs) + SharedMemory::bytes<Accumulator<S>>(kCombineWarps * tile), .rows = pairs.tokens};
  launch(stream, grid, wide ? combine<S, 2> : combine<S, 1>, p);
}

#define INSTANTIATE(S)                              \
  template void run(const Projection<S>&, Stream);   \
  template void run(const Combination<S>&, Stream)
INSTANTIATE(float);
INSTANTIATE(BFloat16);
INSTANTIATE(double);
#undef INSTANTIATE

}  // namespace monet::cuda
