// The kernels of mixing.cu under a mask: experts are taken one by one.
#pragma once

#include "token_side.cuh"

namespace monet::cuda {
namespace {

// The factors of the experts as one side sees them.
template <class C>
struct Factors {
  const C* factors;
  int64_t head_stride, of_mine, of_other;  // strides of the half-experts of this side and of the other

  static __device__ Factors of_side1(const Mask<C>& mask, int64_t experts) {
    return {mask.factors, mask.head_stride, experts, 1};
  }
  static __device__ Factors of_side2(const Mask<C>& mask, int64_t experts) {
    return {mask.factors, mask.head_stride, 1, experts};
  }
  __device__ C operator()(int h, int mine, int other) const {
    return factors[h * head_stride + mine * of_mine + other * of_other];
  }
};

// f(j, factor, w) for the active experts that half-expert i makes up in one head with half-experts j of the other
// side, w = factor gate gate. Without those whose w is 0: an expert that is off has no say, whatever it computes.
template <class C, class F>
__device__ void for_each_expert(
    const TokenSide<C>& side, int i, int h, const TokenSide<C>& other, const Factors<C>& factors, const F& f) {
  const C gate = side.gate(i, h);
  if (gate == 0) return;
  for (int j = 0; j < other.row.count; ++j) {
    const C gate_of_other = other.gate(j, h);
    if (gate_of_other == 0) continue;
    const C factor = factors(h, side.row.expert[i], other.row.expert[j]), w = factor * gate * gate_of_other;
    if (w != 0) f(j, factor, w);
  }
}
// The same in all heads.
template <class C, class F>
__device__ void for_each_expert(
    const TokenSide<C>& side, int i, const TokenSide<C>& other, const Factors<C>& factors, const F& f) {
  for (int h = 0; h < side.heads; ++h) for_each_expert(side, i, h, other, factors, f);
}

// Gradients of the gates of a side from those of w, dw(i, j).
template <class C, class F>
__device__ void masked_gate_gradients(
    const TokenSide<C>& side, const TokenSide<C>& other, const Factors<C>& factors, const F& dw, C* dgates) {
  side.for_each_gate([&](int i, int h) {
    C sum = 0;
    for_each_expert(
        side, i, h, other, factors, [&](int j, C factor, C) { sum += factor * other.gate(j, h) * dw(i, j); });
    dgates[side.by_head(i, h)] = sum;
  });
}

template <class C, class In, class Out>
__global__ void vertical_masked(const VerticalParameters<C, In, Out> p) {
  SharedMemory memory;
  const int64_t token = blockIdx.x;
  const TokenSide<C> one(p.routing.side1, token, p.units, memory), two(p.routing.side2, token, p.units, memory);
  begin(one, p.mix1);
  begin(two, p.mix2);
  __syncthreads();
  complete(one, p.in1);
  complete(two, p.in2);
  __syncthreads();
  const auto a = [&](int i, int u) { return relu_squared(p.in1.s[one.by_pair(i, u)]); };
  const auto c = [&](int j, int u) { return relu_squared(p.in2.s[two.by_pair(j, u)]); };
  const auto mix = [](const auto& side, const auto& other, const Factors<C>& factors, const auto& activation,
                      const auto& activation_of_other, const Out& out) {
    side.for_each_unit([&](int i, int u) {
      C total = 0, cross = 0;
      for_each_expert(side, i, other, factors, [&](int j, C, C w) {
        total += w;
        cross += w * activation_of_other(j, u);
      });
      put(side, out, 0, i, u, total * activation(i, u));
      put(side, out, 1, i, u, cross);
    });
  };
  mix(one, two, Factors<C>::of_side1(p.routing.mask, one.experts), a, c, p.mix1);
  mix(two, one, Factors<C>::of_side2(p.routing.mask, one.experts), c, a, p.mix2);
}

template <class S>
__global__ void vertical_masked_backward(const DenseMixVerticalBackward<S> p) {
  using C = Accumulator<S>;
  SharedMemory memory;
  const int64_t token = blockIdx.x;
  const TokenSide<C> one(p.routing.side1, token, p.units, memory), two(p.routing.side2, token, p.units, memory);
  one.clear_row(p.mix1);
  two.clear_row(p.mix2);
  one.clear_row(p.ds);
  __syncthreads();
  const auto a = [&](int i, int u) { return relu_squared(p.s1[one.by_pair(i, u)]); };
  const auto c = [&](int j, int u) { return relu_squared(p.s2[two.by_pair(j, u)]); };
  const auto backward = [&](const auto& side, const auto& other, const Factors<C>& factors, int operand, const C* s,
                            const auto& activation, const auto& activation_of_other, const Dense<const S>& dmix,
                            const Dense<const S>& dmix_of_other, const Dense<S>& mix, C* ds, C* dgates) {
    const auto down = [&](int i, int u) { return widen(side.in(dmix, 0, i, u)); };
    const auto dcross = [&](int i, int u) { return widen(side.in(dmix, 1, i, u)); };
    const auto down_of_other = [&](int j, int u) { return widen(other.in(dmix_of_other, 0, j, u)); };
    const auto dcross_of_other = [&](int j, int u) { return widen(other.in(dmix_of_other, 1, j, u)); };
    side.for_each_unit([&](int i, int u) {
      C total = 0, cross = 0, da = 0;
      for_each_expert(side, i, other, factors, [&](int j, C, C w) {
        total += w;
        cross += w * activation_of_other(j, u);
        da += w * dcross_of_other(j, u);
      });
      const C gradient = relu_squared_slope(s[side.by_pair(i, u)]) * (da + total * down(i, u));
      put(side, mix, 0, i, u, total * activation(i, u));
      put(side, mix, 1, i, u, cross);
      put(side, p.ds, operand, i, u, gradient);
      ds[side.by_pair(i, u)] = gradient;
    });
    const auto dw = [&](int i, int j) {
      C sum = 0;
      for (int u = 0; u < one.units; ++u)
        sum += (down(i, u) + dcross_of_other(j, u)) * activation(i, u) +
               (down_of_other(j, u) + dcross(i, u)) * activation_of_other(j, u);
      return sum;
    };
    masked_gate_gradients(side, other, factors, dw, dgates);
  };
  const auto factors1 = Factors<C>::of_side1(p.routing.mask, one.experts);
  const auto factors2 = Factors<C>::of_side2(p.routing.mask, one.experts);
  backward(one, two, factors1, 0, p.s1, a, c, p.dmix1, p.dmix2, p.mix1, p.ds1, p.dgates1);
  backward(two, one, factors2, 1, p.s2, c, a, p.dmix2, p.dmix1, p.mix2, p.ds2, p.dgates2);
}

template <class C, class In, class Out>
__global__ void horizontal_masked(const HorizontalParameters<C, In, Out> p) {
  SharedMemory memory;
  const int64_t token = blockIdx.x;
  const TokenSide<C> one(p.routing.side1, token, p.units, memory), two(p.routing.side2, token, p.units, memory);
  begin(two, p.y);
  __syncthreads();
  complete(one, p.in1);
  __syncthreads();
  const auto factors = Factors<C>::of_side2(p.routing.mask, one.experts);
  two.for_each_unit([&](int j, int u) {
    C sum = 0;
    for_each_expert(
        two, j, one, factors, [&](int i, C, C w) { sum += w * relu_squared(p.in1.s[one.by_pair(i, u)]); });
    put(two, p.y, 0, j, u, sum);
  });
}

template <class S>
__global__ void horizontal_masked_backward(const DenseMixHorizontalBackward<S> p) {
  using C = Accumulator<S>;
  SharedMemory memory;
  const int64_t token = blockIdx.x;
  const TokenSide<C> one(p.routing.side1, token, p.units, memory), two(p.routing.side2, token, p.units, memory);
  two.clear_row(p.y);
  one.clear_row(p.ds);
  __syncthreads();
  const auto a = [&](int i, int u) { return relu_squared(p.s1[one.by_pair(i, u)]); };
  const auto dy = [&](int j, int u) { return widen(two.in(p.dy, 0, j, u)); };
  const auto factors1 = Factors<C>::of_side1(p.routing.mask, one.experts);
  const auto factors2 = Factors<C>::of_side2(p.routing.mask, one.experts);
  one.for_each_unit([&](int i, int u) {
    C da = 0;
    for_each_expert(one, i, two, factors1, [&](int j, C, C w) { da += w * dy(j, u); });
    const C gradient = relu_squared_slope(p.s1[one.by_pair(i, u)]) * da;
    put(one, p.ds, 0, i, u, gradient);
    p.ds1[one.by_pair(i, u)] = gradient;
  });
  two.for_each_unit([&](int j, int u) {
    C sum = 0;
    for_each_expert(two, j, one, factors2, [&](int i, C, C w) { sum += w * a(i, u); });
    put(two, p.y, 0, j, u, sum);
  });
  const auto dw = [&](int i, int j) {
    C sum = 0;
    for (int u = 0; u < one.units; ++u) sum += a(i, u) * dy(j, u);
    return sum;
  };
  masked_gate_gradients(one, two, factors1, dw, p.dgates1);
  masked_gate_gradients(two, one, factors2, [&](int j, int i) { return dw(i, j); }, p.dgates2);
}

template <class C>
__global__ void weights_masked(const ExpertWeights<C> p) {
  SharedMemory memory;
  const int64_t token = blockIdx.x;
  const TokenSide<C> one(p.routing.side1, token, 1, memory), two(p.routing.side2, token, 1, memory);
  __syncthreads();
  const auto sum_up = [](const auto& side, const auto& other, const Factors<C>& factors, C* weights) {
    side.for_each_unit([&](int i, int) {
      C sum = 0;
      for_each_expert(side, i, other, factors, [&](int, C, C w) { sum += w; });
      weights[side.row.pair[i]] = sum;
    });
  };
  sum_up(one, two, Factors<C>::of_side1(p.routing.mask, one.experts), p.weights1);
  sum_up(two, one, Factors<C>::of_side2(p.routing.mask, one.experts), p.weights2);
}

template <class C>
__global__ void weights_masked_backward(const ExpertWeightsBackward<C> p) {
  SharedMemory memory;
  const int64_t token = blockIdx.x;
  const TokenSide<C> one(p.routing.side1, token, 1, memory), two(p.routing.side2, token, 1, memory);
  __syncthreads();
  const auto dw = [&](int i, int j) { return p.dweights1[one.row.pair[i]] + p.dweights2[two.row.pair[j]]; };
  masked_gate_gradients(one, two, Factors<C>::of_side1(p.routing.mask, one.experts), dw, p.dgates1);
  masked_gate_gradients(
      two, one, Factors<C>::of_side2(p.routing.mask, one.experts), [&](int j, int i) { return dw(i, j); }, p.dgates2);
}

}  // namespace
}  // namespace monet::cuda
