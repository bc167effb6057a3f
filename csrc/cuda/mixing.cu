// What happens to a token between the input and the output weights of its half-experts: one block a token, one launch.
// Of the dense products only the entries of active pairs are read. Of what the next dense products take, each block first
// clears the rows of its token, then writes the active entries.
#include "masking.cuh"
#include "token_side.cuh"

namespace monet::cuda {
namespace {

template <class C, class In, class Out>
__global__ void vertical(
    Side<C> side1, Side<C> side2, int units, In in1, In in2, C* s1, C* s2, Out mix1, Out mix2) {
  SharedMemory memory;
  const int64_t token = blockIdx.x;
  const TokenSide<C> one(side1, token, units, memory), two(side2, token, units, memory);
  C *mixed_a = memory.take<C>(one.heads * units), *mixed_c = memory.take<C>(one.heads * units);
  begin(one, mix1);
  begin(two, mix2);
  __syncthreads();
  complete(one, in1, s1);
  complete(two, in2, s2);
  __syncthreads();
  const auto a = [&](int i, int u) { return relu_squared(s1[one.by_pair(i, u)]); };
  const auto c = [&](int j, int u) { return relu_squared(s2[two.by_pair(j, u)]); };
  one.gather(a, mixed_a);
  two.gather(c, mixed_c);
  __syncthreads();
  const auto mix = [](const auto& side, const auto& activation, const C* mixed_other, const Out& out) {
    side.for_each_unit([&](int i, int u) {
      put(side, out, 0, i, u, side.total(i) * activation(i, u));
      put(side, out, 1, i, u, side.spread(mixed_other, i, u));
    });
  };
  mix(one, a, mixed_c, mix1);
  mix(two, c, mixed_a, mix2);
}

template <class S, class C>
__global__ void vertical_backward(Side<C> side1, Side<C> side2, int units, VerticalBackward<S> t) {
  SharedMemory memory;
  const int64_t token = blockIdx.x;
  const TokenSide<C> one(side1, token, units, memory), two(side2, token, units, memory);
  C *mixed_a = memory.take<C>(one.heads * units), *mixed_c = memory.take<C>(one.heads * units);
  C *dmixed_a = memory.take<C>(one.heads * units), *dmixed_c = memory.take<C>(one.heads * units);
  one.clear_row(t.mix1);
  two.clear_row(t.mix2);
  one.clear_row(t.ds);
  __syncthreads();
  const auto a = [&](int i, int u) { return relu_squared(t.s1[one.by_pair(i, u)]); };
  const auto c = [&](int j, int u) { return relu_squared(t.s2[two.by_pair(j, u)]); };
  one.gather(a, mixed_a);
  two.gather(c, mixed_c);
  one.gather([&](int i, int u) { return widen(one.in(t.dmix1, 1, i, u)); }, dmixed_c);
  two.gather([&](int j, int u) { return widen(two.in(t.dmix2, 1, j, u)); }, dmixed_a);
  __syncthreads();

  const auto backward = [&](const auto& side, int part, const C* s, const auto& activation, const Dense<const S>& dmix,
                            const C* mixed_other, const C* dmixed, const Dense<S>& mix, C* ds, C* dgates) {
    const auto down = [&](int i, int u) { return widen(side.in(dmix, 0, i, u)); };
    const auto dcross = [&](int i, int u) { return widen(side.in(dmix, 1, i, u)); };
    side.for_each_unit([&](int i, int u) {
      const C total = side.total(i), da = total * down(i, u) + side.spread(dmixed, i, u);
      const C gradient = relu_squared_slope(s[side.by_pair(i, u)]) * da;
      put(side, mix, 0, i, u, total * activation(i, u));
      put(side, mix, 1, i, u, side.spread(mixed_other, i, u));
      put(side, t.ds, part, i, u, gradient);
      ds[side.by_pair(i, u)] = gradient;
    });
    side.for_each_gate([&](int i, int h) {
      C sum = 0;
      if (side.gate(i, h) != 0)
        for (int u = 0; u < units; ++u)
          sum += mixed_other[h * units + u] * dcross(i, u) + (dmixed[h * units + u] + down(i, u)) * activation(i, u);
      dgates[side.by_head(i, h)] = sum;
    });
  };
  backward(one, 0, t.s1, a, t.dmix1, mixed_c, dmixed_a, t.mix1, t.ds1, t.dgates1);
  backward(two, 1, t.s2, c, t.dmix2, mixed_a, dmixed_c, t.mix2, t.ds2, t.dgates2);
}

template <class C, class In, class Out>
__global__ void horizontal(Side<C> side1, Side<C> side2, int units, In in1, C* s1, Out y) {
  SharedMemory memory;
  const int64_t token = blockIdx.x;
  const TokenSide<C> one(side1, token, units, memory), two(side2, token, units, memory);
  C* mixed = memory.take<C>(one.heads * units);
  begin(two, y);
  __syncthreads();
  complete(one, in1, s1);
  __syncthreads();
  one.gather([&](int i, int u) { return relu_squared(s1[one.by_pair(i, u)]); }, mixed);
  __syncthreads();
  two.for_each_unit([&](int j, int u) { put(two, y, 0, j, u, two.spread(mixed, j, u)); });
}

template <class S, class C>
__global__ void horizontal_backward(Side<C> side1, Side<C> side2, int units, HorizontalBackward<S> t) {
  SharedMemory memory;
  const int64_t token = blockIdx.x;
  const TokenSide<C> one(side1, token, units, memory), two(side2, token, units, memory);
  C *mixed = memory.take<C>(one.heads * units), *dmixed = memory.take<C>(one.heads * units);
  two.clear_row(t.y);
  one.clear_row(t.ds);
  __syncthreads();
  const auto a = [&](int i, int u) { return relu_squared(t.s1[one.by_pair(i, u)]); };
  const auto dy = [&](int j, int u) { return widen(two.in(t.dy, 0, j, u)); };
  one.gather(a, mixed);
  two.gather(dy, dmixed);
  __syncthreads();
  one.for_each_unit([&](int i, int u) {
    const C gradient = relu_squared_slope(t.s1[one.by_pair(i, u)]) * one.spread(dmixed, i, u);
    put(one, t.ds, 0, i, u, gradient);
    t.ds1[one.by_pair(i, u)] = gradient;
  });
  two.for_each_unit([&](int j, int u) { put(two, t.y, 0, j, u, two.spread(mixed, j, u)); });
  const auto dgates = [&](const auto& side, const C* sums, const auto& value, C* out) {
    side.for_each_gate([&](int i, int h) {
      C sum = 0;
      if (side.gate(i, h) != 0)
        for (int u = 0; u < units; ++u) sum += sums[h * units + u] * value(i, u);
      out[side.by_head(i, h)] = sum;
    });
  };
  dgates(one, dmixed, a, t.dgates1);
  dgates(two, mixed, dy, t.dgates2);
}

template <class C, class Out>
__global__ void totals(Side<C> gates, Out out) {
  SharedMemory memory;
  const TokenSide<C> side(gates, blockIdx.x, 1, memory);
  begin(side, out);
  __syncthreads();
  side.for_each_unit([&](int i, int) { put(side, out, 0, i, 0, side.total(i)); });
}

template <class S, class C>
__global__ void totals_backward(Side<C> gates, Dense<const S> dtotals, C* dgates) {
  SharedMemory memory;
  const TokenSide<C> side(gates, blockIdx.x, 1, memory);
  __syncthreads();
  // The only head of a pair is active: a weight that a mask left may be 0 by cancelling.
  const bool all_active = side.heads == 1;
  side.for_each_gate([&](int i, int h) {
    dgates[side.by_head(i, h)] = all_active || side.gate(i, h) != 0 ? C{widen(side.in(dtotals, 0, i, 0))} : C{0};
  });
}

// ---- launches

template <class C, class In, class Out>
void launch_vertical(
    Stream stream, const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, int64_t units, const In& in1,
    const In& in2, C* s1, C* s2, const Out& mix1, const Out& mix2) {
  if (mask)
    launch(
        stream, token_blocks(side1, side2, units, 0), vertical_masked<C, In, Out>, side1, side2, mask, units, in1, in2,
        s1, s2, mix1, mix2);
  else
    launch(
        stream, token_blocks(side1, side2, units, 2), vertical<C, In, Out>, side1, side2, units, in1, in2, s1, s2, mix1,
        mix2);
}

template <class C, class In, class Out>
void launch_horizontal(
    Stream stream, const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, int64_t units, const In& in1, C* s1,
    const Out& y) {
  if (mask)
    launch(
        stream, token_blocks(side1, side2, units, 0), horizontal_masked<C, In, Out>, side1, side2, mask, units, in1, s1,
        y);
  else
    launch(stream, token_blocks(side1, side2, units, 1), horizontal<C, In, Out>, side1, side2, units, in1, s1, y);
}

template <class C>
Grid totals_grid(const Side<C>& side) {
  return {.blocks = side.pairs.tokens, .threads = kThreads, .shared = Row::bytes(side.pairs)};
}

}  // namespace

template <class S>
void mix_vertical(
    Stream stream, const Side<Accumulator<S>>& side1, const Side<Accumulator<S>>& side2,
    const Mask<Accumulator<S>>& mask, int64_t units, const Product<S>& product1, const Product<S>& product2,
    Accumulator<S>* s1, Accumulator<S>* s2, const Dense<S>& mix1, const Dense<S>& mix2) {
  launch_vertical(stream, side1, side2, mask, units, product1, product2, s1, s2, mix1, mix2);
}
template <class C>
void mix_vertical_by_pair(
    Stream stream, const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, int64_t units, C* s1, C* s2,
    const VerticalMix<C>& mix) {
  const ByPair<C> mix1{{mix.own1, mix.cross1}}, mix2{{mix.own2, mix.cross2}};
  launch_vertical(stream, side1, side2, mask, units, Complete{}, Complete{}, s1, s2, mix1, mix2);
}

template <class S>
void mix_vertical_backward(
    Stream stream, const Side<Accumulator<S>>& side1, const Side<Accumulator<S>>& side2,
    const Mask<Accumulator<S>>& mask, int64_t units, const VerticalBackward<S>& tensors) {
  using C = Accumulator<S>;
  if (mask)
    launch(
        stream, token_blocks(side1, side2, units, 0), vertical_masked_backward<S, C>, side1, side2, mask, units, tensors);
  else
    launch(stream, token_blocks(side1, side2, units, 4), vertical_backward<S, C>, side1, side2, units, tensors);
}

template <class S>
void mix_horizontal(
    Stream stream, const Side<Accumulator<S>>& side1, const Side<Accumulator<S>>& side2,
    const Mask<Accumulator<S>>& mask, int64_t units, const Product<S>& product1, Accumulator<S>* s1,
    const Dense<S>& y) {
  launch_horizontal(stream, side1, side2, mask, units, product1, s1, y);
}
template <class C>
void mix_horizontal_by_pair(
    Stream stream, const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, int64_t units, C* s1, C* y) {
  launch_horizontal(stream, side1, side2, mask, units, Complete{}, s1, ByPair<C>{{y, nullptr}});
}

template <class S>
void mix_horizontal_backward(
    Stream stream, const Side<Accumulator<S>>& side1, const Side<Accumulator<S>>& side2,
    const Mask<Accumulator<S>>& mask, int64_t units, const HorizontalBackward<S>& tensors) {
  using C = Accumulator<S>;
  if (mask)
    launch(
        stream, token_blocks(side1, side2, units, 0), horizontal_masked_backward<S, C>, side1, side2, mask, units,
        tensors);
  else
    launch(stream, token_blocks(side1, side2, units, 2), horizontal_backward<S, C>, side1, side2, units, tensors);
}

template <class C>
void masked_totals(
    Stream stream, const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, C* totals1, C* totals2) {
  launch(stream, token_blocks(side1, side2, 1, 0), totals_masked<C>, side1, side2, mask, totals1, totals2);
}
template <class C>
void masked_totals_backward(
    Stream stream, const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* dtotals1,
    const C* dtotals2, C* dgates1, C* dgates2) {
  launch(
      stream, token_blocks(side1, side2, 1, 0), totals_masked_backward<C>, side1, side2, mask, dtotals1, dtotals2,
      dgates1, dgates2);
}

template <class S>
void gate_totals(Stream stream, const Side<Accumulator<S>>& side, const Dense<S>& out) {
  launch(stream, totals_grid(side), totals<Accumulator<S>, Dense<S>>, side, out);
}
template <class C>
void gate_totals_by_pair(Stream stream, const Side<C>& side, C* out) {
  launch(stream, totals_grid(side), totals<C, ByPair<C>>, side, ByPair<C>{{out, nullptr}});
}
template <class S>
void gate_totals_backward(
    Stream stream, const Side<Accumulator<S>>& side, const Dense<const S>& dtotals, Accumulator<S>* dgates) {
  launch(stream, totals_grid(side), totals_backward<S, Accumulator<S>>, side, dtotals, dgates);
}

#define INSTANTIATE(S)                                                                                           \
  template void mix_vertical(                                                                                    \
      Stream, const Side<Accumulator<S>>&, const Side<Accumulator<S>>&, const Mask<Accumulator<S>>&, int64_t,    \
      const Product<S>&, const Product<S>&, Accumulator<S>*, Accumulator<S>*, const Dense<S>&, const Dense<S>&); \
  template void mix_vertical_backward(                                                                           \
      Stream, const Side<Accumulator<S>>&, const Side<Accumulator<S>>&, const Mask<Accumulator<S>>&, int64_t,    \
      const VerticalBackward<S>&);                                                                               \
  template void mix_horizontal(                                                                                  \
      Stream, const Side<Accumulator<S>>&, const Side<Accumulator<S>>&, const Mask<Accumulator<S>>&, int64_t,    \
      const Product<S>&, Accumulator<S>*, const Dense<S>&);                                                      \
  template void mix_horizontal_backward(                                                                         \
      Stream, const Side<Accumulator<S>>&, const Side<Accumulator<S>>&, const Mask<Accumulator<S>>&, int64_t,    \
      const HorizontalBackward<S>&);                                                                             \
  template void gate_totals(Stream, const Side<Accumulator<S>>&, const Dense<S>&);                               \
  template void gate_totals_backward(                                                                            \
      Stream, const Side<Accumulator<S>>&, const Dense<const S>&, Accumulator<S>*)
INSTANTIATE(float);
INSTANTIATE(BFloat16);
INSTANTIATE(double);
#undef INSTANTIATE

#define INSTANTIATE(C)                                                                                           \
  template void mix_vertical_by_pair(                                                                            \
      Stream, const Side<C>&, const Side<C>&, const Mask<C>&, int64_t, C*, C*, const VerticalMix<C>&);           \
  template void mix_horizontal_by_pair(                                                                          \
      Stream, const Side<C>&, const Side<C>&, const Mask<C>&, int64_t, C*, C*);                                  \
  template void masked_totals(Stream, const Side<C>&, const Side<C>&, const Mask<C>&, C*, C*);                   \
  template void masked_totals_backward(                                                                          \
      Stream, const Side<C>&, const Side<C>&, const Mask<C>&, const C*, const C*, C*, C*);                       \
  template void gate_totals_by_pair(Stream, const Side<C>&, C*)
INSTANTIATE(float);
INSTANTIATE(double);
#undef INSTANTIATE

}  // namespace monet::cuda
