// What happens to a token between the input and the output weights of its half-experts: one block per token, one
// launch. Of the dense products only the entries of active pairs are read. Of what the next dense products take, each
// block first clears the rows of its token, then writes the active entries.
#include "masked_mixing.cuh"
#include "token_side.cuh"

namespace monet::cuda {
namespace {

template <class C, class In, class Out>
__global__ void vertical(const VerticalParameters<C, In, Out> p) {
  SharedMemory memory;
  const int64_t token = blockIdx.x;
  const TokenSide<C> one(p.routing.side1, token, p.units, memory), two(p.routing.side2, token, p.units, memory);
  C *mixed_a = memory.take<C>(one.heads * one.units), *mixed_c = memory.take<C>(one.heads * one.units);
  begin(one, p.mix1);
  begin(two, p.mix2);
  __syncthreads();
  complete(one, p.in1);
  complete(two, p.in2);
  __syncthreads();
  const auto a = [&](int i, int u) { return relu_squared(p.in1.s[one.by_pair(i, u)]); };
  const auto c = [&](int j, int u) { return relu_squared(p.in2.s[two.by_pair(j, u)]); };
  one.gather(a, mixed_a);
  two.gather(c, mixed_c);
  __syncthreads();
  const auto mix = [](const auto& side, const auto& activation, const C* mixed_other, const Out& out) {
    side.for_each_unit([&](int i, int u) {
      put(side, out, 0, i, u, side.total(i) * activation(i, u));
      put(side, out, 1, i, u, side.spread(mixed_other, i, u));
    });
  };
  mix(one, a, mixed_c, p.mix1);
  mix(two, c, mixed_a, p.mix2);
}

template <class S>
__global__ void vertical_backward(const DenseMixVerticalBackward<S> p) {
  using C = Accumulator<S>;
  SharedMemory memory;
  const int64_t token = blockIdx.x;
  const TokenSide<C> one(p.routing.side1, token, p.units, memory), two(p.routing.side2, token, p.units, memory);
  C *mixed_a = memory.take<C>(one.heads * one.units), *mixed_c = memory.take<C>(one.heads * one.units);
  C *dmixed_a = memory.take<C>(one.heads * one.units), *dmixed_c = memory.take<C>(one.heads * one.units);
  one.clear_row(p.mix1);
  two.clear_row(p.mix2);
  one.clear_row(p.ds);
  __syncthreads();
  const auto a = [&](int i, int u) { return relu_squared(p.s1[one.by_pair(i, u)]); };
  const auto c = [&](int j, int u) { return relu_squared(p.s2[two.by_pair(j, u)]); };
  one.gather(a, mixed_a);
  two.gather(c, mixed_c);
  one.gather([&](int i, int u) { return widen(one.in(p.dmix1, 1, i, u)); }, dmixed_c);
  two.gather([&](int j, int u) { return widen(two.in(p.dmix2, 1, j, u)); }, dmixed_a);
  __syncthreads();

  const auto backward = [&](const auto& side, int operand, const C* s, const auto& activation,
                            const Dense<const S>& dmix, const C* mixed_other, const C* dmixed, const Dense<S>& mix,
                            C* ds, C* dgates) {
    const auto down = [&](int i, int u) { return widen(side.in(dmix, 0, i, u)); };
    const auto dcross = [&](int i, int u) { return widen(side.in(dmix, 1, i, u)); };
    side.for_each_unit([&](int i, int u) {
      const C total = side.total(i), da = total * down(i, u) + side.spread(dmixed, i, u);
      const C gradient = relu_squared_slope(s[side.by_pair(i, u)]) * da;
      put(side, mix, 0, i, u, total * activation(i, u));
      put(side, mix, 1, i, u, side.spread(mixed_other, i, u));
      put(side, p.ds, operand, i, u, gradient);
      ds[side.by_pair(i, u)] = gradient;
    });
    side.for_each_gate([&](int i, int h) {
      C sum = 0;
      if (side.gate(i, h) != 0)
        for (int u = 0, at = h * one.units; u < one.units; ++u)
          sum += mixed_other[at + u] * dcross(i, u) + (dmixed[at + u] + down(i, u)) * activation(i, u);
      dgates[side.by_head(i, h)] = sum;
    });
  };
  backward(one, 0, p.s1, a, p.dmix1, mixed_c, dmixed_a, p.mix1, p.ds1, p.dgates1);
  backward(two, 1, p.s2, c, p.dmix2, mixed_a, dmixed_c, p.mix2, p.ds2, p.dgates2);
}

template <class C, class In, class Out>
__global__ void horizontal(const HorizontalParameters<C, In, Out> p) {
  SharedMemory memory;
  const int64_t token = blockIdx.x;
  const TokenSide<C> one(p.routing.side1, token, p.units, memory), two(p.routing.side2, token, p.units, memory);
  C* mixed = memory.take<C>(one.heads * one.units);
  begin(two, p.y);
  __syncthreads();
  complete(one, p.in1);
  __syncthreads();
  one.gather([&](int i, int u) { return relu_squared(p.in1.s[one.by_pair(i, u)]); }, mixed);
  __syncthreads();
  two.for_each_unit([&](int j, int u) { put(two, p.y, 0, j, u, two.spread(mixed, j, u)); });
}

template <class S>
__global__ void horizontal_backward(const DenseMixHorizontalBackward<S> p) {
  using C = Accumulator<S>;
  SharedMemory memory;
  const int64_t token = blockIdx.x;
  const TokenSide<C> one(p.routing.side1, token, p.units, memory), two(p.routing.side2, token, p.units, memory);
  C *mixed = memory.take<C>(one.heads * one.units), *dmixed = memory.take<C>(one.heads * one.units);
  two.clear_row(p.y);
  one.clear_row(p.ds);
  __syncthreads();
  const auto a = [&](int i, int u) { return relu_squared(p.s1[one.by_pair(i, u)]); };
  const auto dy = [&](int j, int u) { return widen(two.in(p.dy, 0, j, u)); };
  one.gather(a, mixed);
  two.gather(dy, dmixed);
  __syncthreads();
  one.for_each_unit([&](int i, int u) {
    const C gradient = relu_squared_slope(p.s1[one.by_pair(i, u)]) * one.spread(dmixed, i, u);
    put(one, p.ds, 0, i, u, gradient);
    p.ds1[one.by_pair(i, u)] = gradient;
  });
  two.for_each_unit([&](int j, int u) { put(two, p.y, 0, j, u, two.spread(mixed, j, u)); });
  const auto dgates = [&](const auto& side, const C* sums, const auto& value, C* out) {
    side.for_each_gate([&](int i, int h) {
      C sum = 0;
      if (side.gate(i, h) != 0)
        for (int u = 0; u < one.units; ++u) sum += sums[h * one.units + u] * value(i, u);
      out[side.by_head(i, h)] = sum;
    });
  };
  dgates(one, dmixed, a, p.dgates1);
  dgates(two, mixed, dy, p.dgates2);
}

template <class C, class Out>
__global__ void totals(const Side<C> gates, const Out out) {
  SharedMemory memory;
  const TokenSide<C> side(gates, blockIdx.x, 1, memory);
  begin(side, out);
  __syncthreads();
  side.for_each_unit([&](int i, int) { put(side, out, 0, i, 0, side.total(i)); });
}

template <class S>
__global__ void totals_backward(const DenseGateTotalsBackward<S> p) {
  using C = Accumulator<S>;
  SharedMemory memory;
  const TokenSide<C> side(p.side, blockIdx.x, 1, memory);
  __syncthreads();
  // The only head of a pair is active: a weight that a mask left may be 0 by cancelling.
  const bool all_active = side.heads == 1;
  side.for_each_gate([&](int i, int h) {
    p.dgates[side.by_head(i, h)] = all_active || side.gate(i, h) != 0 ? C{widen(side.in(p.dtotals, 0, i, 0))} : C{0};
  });
}

// ---- launches

template <class C, class In, class Out>
void launch_mix(const VerticalParameters<C, In, Out>& p, Stream stream) {
  if (p.routing.mask)
    launch(stream, token_blocks(p.routing, p.units, 0), vertical_masked<C, In, Out>, p);
  else
    launch(stream, token_blocks(p.routing, p.units, 2), vertical<C, In, Out>, p);
}

template <class C, class In, class Out>
void launch_mix(const HorizontalParameters<C, In, Out>& p, Stream stream) {
  if (p.routing.mask)
    launch(stream, token_blocks(p.routing, p.units, 0), horizontal_masked<C, In, Out>, p);
  else
    launch(stream, token_blocks(p.routing, p.units, 1), horizontal<C, In, Out>, p);
}

template <class C>
Grid totals_grid(const Side<C>& side) {
  return {.blocks = side.pairs.tokens, .threads = kThreads, .shared = Row::bytes(side.pairs)};
}

}  // namespace

template <class S>
void run(const DenseMixVertical<S>& p, Stream stream) {
  using Parameters = VerticalParameters<Accumulator<S>, FromProduct<S>, Dense<S>>;
  launch_mix(Parameters{p.routing, p.units, {p.product1, p.s1}, {p.product2, p.s2}, p.mix1, p.mix2}, stream);
}
template <class C>
void run(const MixVertical<C>& p, Stream stream) {
  using Parameters = VerticalParameters<C, FromPairs<C>, ByPair<C>>;
  launch_mix(
      Parameters{
          p.routing, p.units, {p.s1}, {p.s2}, {{p.mix.own1, p.mix.cross1}}, {{p.mix.own2, p.mix.cross2}}}, stream);
}
template <class S>
void run(const DenseMixVerticalBackward<S>& p, Stream stream) {
  if (p.routing.mask)
    launch(stream, token_blocks(p.routing, p.units, 0), vertical_masked_backward<S>, p);
  else
    launch(stream, token_blocks(p.routing, p.units, 4), vertical_backward<S>, p);
}

template <class S>
void run(const DenseMixHorizontal<S>& p, Stream stream) {
  using Parameters = HorizontalParameters<Accumulator<S>, FromProduct<S>, Dense<S>>;
  launch_mix(Parameters{p.routing, p.units, {p.product1, p.s1}, p.y}, stream);
}
template <class C>
void run(const MixHorizontal<C>& p, Stream stream) {
  using Parameters = HorizontalParameters<C, FromPairs<C>, ByPair<C>>;
  launch_mix(Parameters{p.routing, p.units, {p.s1}, {{p.y, nullptr}}}, stream);
}
template <class S>
void run(const DenseMixHorizontalBackward<S>& p, Stream stream) {
  if (p.routing.mask)
    launch(stream, token_blocks(p.routing, p.units, 0), horizontal_masked_backward<S>, p);
  else
    launch(stream, token_blocks(p.routing, p.units, 2), horizontal_backward<S>, p);
}

template <class C>
void run(const ExpertWeights<C>& p, Stream stream) {
  launch(stream, token_blocks(p.routing, 1, 0), weights_masked<C>, p);
}
template <class C>
void run(const ExpertWeightsBackward<C>& p, Stream stream) {
  launch(stream, token_blocks(p.routing, 1, 0), weights_masked_backward<C>, p);
}

template <class S>
void run(const DenseGateTotals<S>& p, Stream stream) {
  launch(stream, totals_grid(p.side), totals<Accumulator<S>, Dense<S>>, p.side, p.totals);
}
template <class C>
void run(const GateTotals<C>& p, Stream stream) {
  launch(stream, totals_grid(p.side), totals<C, ByPair<C>>, p.side, ByPair<C>{{p.totals, nullptr}});
}
template <class S>
void run(const DenseGateTotalsBackward<S>& p, Stream stream) {
  launch(stream, totals_grid(p.side), totals_backward<S>, p);
}

#define INSTANTIATE(S)                                            \
  template void run(const DenseMixVertical<S>&, Stream);           \
  template void run(const DenseMixVerticalBackward<S>&, Stream);   \
  template void run(const DenseMixHorizontal<S>&, Stream);         \
  template void run(const DenseMixHorizontalBackward<S>&, Stream); \
  template void run(const DenseGateTotals<S>&, Stream);            \
  template void run(const DenseGateTotalsBackward<S>&, Stream)
INSTANTIATE(float);
INSTANTIATE(BFloat16);
INSTANTIATE(double);
#undef INSTANTIATE

#define INSTANTIATE(C)                                  \
  template void run(const MixVertical<C>&, Stream);      \
  template void run(const MixHorizontal<C>&, Stream);    \
  template void run(const ExpertWeights<C>&, Stream);    \
  template void run(const ExpertWeightsBackward<C>&, Stream); \
  template void run(const GateTotals<C>&, Stream)
INSTANTIATE(float);
INSTANTIATE(double);
#undef INSTANTIATE

}  // namespace monet::cuda
