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

// f(j, factor, w) for the active experts that half-expert i makes up in one head with half-experts j of the other side,
// w = factor gate gate. Without those whose w is 0: an expert that is off has no say, whatever it computes.
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
    for_each_expert(side, i, h, other, factors, [&](int j, C factor, C) { sum += factor * other.gate(j, h) * dw(i, j); });
    dgates[side.by_head(i, h)] = sum;
  });
}

template <class C, class In, class Out>
__global__ void vertical_masked(
    Side<C> side1, Side<C> side2, Mask<C> mask, int units, In in1, In in2, C* s1, C* s2, Out mix1, Out mix2) {
  SharedMemory memory;
  const int64_t token = blockIdx.x;
  const TokenSide<C> one(side1, token, units, memory), two(side2, token, units, memory);
  begin(one, mix1);
  begin(two, mix2);
  __syncthreads();
  complete(one, in1, s1);
  complete(two, in2, s2);
  __syncthreads();
  const auto a = [&](int i, int u) { return relu_squared(s1[one.by_pair(i, u)]); };
  const auto c = [&](int j, int u) { return relu_squared(s2[two.by_pair(j, u)]); };
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
  mix(one, two, Factors<C>::of_side1(mask, one.experts), a, c, mix1);
  mix(two, one, Factors<C>::of_side2(mask, one.experts), c, a, mix2);
}

template <class S, class C>
__global__ void vertical_masked_backward(
    Side<C> side1, Side<C> side2, Mask<C> mask, int units, VerticalBackward<S> t) {
  SharedMemory memory;
  const int64_t token = blockIdx.x;
  const TokenSide<C> one(side1, token, units, memory), two(side2, token, units, memory);
  one.clear_row(t.mix1);
  two.clear_row(t.mix2);
  one.clear_row(t.ds);
  __syncthreads();
  const auto a = [&](int i, int u) { return relu_squared(t.s1[one.by_pair(i, u)]); };
  const auto c = [&](int j, int u) { return relu_squared(t.s2[two.by_pair(j, u)]); };
  const auto backward = [&](const auto& side, const auto& other, const Factors<C>& factors, int part, const C* s,
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
      put(side, t.ds, part, i, u, gradient);
      ds[side.by_pair(i, u)] = gradient;
    });
    const auto dw = [&](int i, int j) {
      C sum = 0;
      for (int u = 0; u < units; ++u)
        sum += (down(i, u) + dcross_of_other(j, u)) * activation(i, u) +
               (down_of_other(j, u) + dcross(i, u)) * activation_of_other(j, u);
      return sum;
    };
    masked_gate_gradients(side, other, factors, dw, dgates);
  };
  const auto factors1 = Factors<C>::of_side1(mask, one.experts), factors2 = Factors<C>::of_side2(mask, one.experts);
  backward(one, two, factors1, 0, t.s1, a, c, t.dmix1, t.dmix2, t.mix1, t.ds1, t.dgates1);
  backward(two, one, factors2, 1, t.s2, c, a, t.dmix2, t.dmix1, t.mix2, t.ds2, t.dgates2);
}

template <class C, class In, class Out>
__global__ void horizontal_masked(Side<C> side1, Side<C> side2, Mask<C> mask, int units, In in1, C* s1, Out y) {
  SharedMemory memory;
  const int64_t token = blockIdx.x;
  const TokenSide<C> one(side1, token, units, memory), two(side2, token, units, memory);
  begin(two, y);
  __syncthreads();
  complete(one, in1, s1);
  __syncthreads();
  const auto factors = Factors<C>::of_side2(mask, one.experts);
  two.for_each_unit([&](int j, int u) {
    C sum = 0;
    for_each_expert(
        two, j, one, factors, [&](int i, C, C w) { sum += w * relu_squared(s1[one.by_pair(i, u)]); });
    put(two, y, 0, j, u, sum);
  });
}

template <class S, class C>
__global__ void horizontal_masked_backward(
    Side<C> side1, Side<C> side2, Mask<C> mask, int units, HorizontalBackward<S> t) {
  SharedMemory memory;
  const int64_t token = blockIdx.x;
  const TokenSide<C> one(side1, token, units, memory), two(side2, token, units, memory);
  two.clear_row(t.y);
  one.clear_row(t.ds);
  __syncthreads();
  const auto a = [&](int i, int u) { return relu_squared(t.s1[one.by_pair(i, u)]); };
  const auto dy = [&](int j, int u) { return widen(two.in(t.dy, 0, j, u)); };
  const auto factors1 = Factors<C>::of_side1(mask, one.experts), factors2 = Factors<C>::of_side2(mask, one.experts);
  one.for_each_unit([&](int i, int u) {
    C da = 0;
    for_each_expert(one, i, two, factors1, [&](int j, C, C w) { da += w * dy(j, u); });
    const C gradient = relu_squared_slope(t.s1[one.by_pair(i, u)]) * da;
    put(one, t.ds, 0, i, u, gradient);
    t.ds1[one.by_pair(i, u)] = gradient;
  });
  two.for_each_unit([&](int j, int u) {
    C sum = 0;
    for_each_expert(two, j, one, factors2, [&](int i, C, C w) { sum += w * a(i, u); });
    put(two, t.y, 0, j, u, sum);
  });
  const auto dw = [&](int i, int j) {
    C sum = 0;
    for (int u = 0; u < units; ++u) sum += a(i, u) * dy(j, u);
    return sum;
  };
  masked_gate_gradients(one, two, factors1, dw, t.dgates1);
  masked_gate_gradients(two, one, factors2, [&](int j, int i) { return dw(i, j); }, t.dgates2);
}

template <class C>
__global__ void totals_masked(Side<C> side1, Side<C> side2, Mask<C> mask, C* totals1, C* totals2) {
  SharedMemory memory;
  const TokenSide<C> one(side1, blockIdx.x, 1, memory), two(side2, blockIdx.x, 1, memory);
  __syncthreads();
  const auto sum_up = [](const auto& side, const auto& other, const Factors<C>& factors, C* totals) {
    side.for_each_unit([&](int i, int) {
      C sum = 0;
      for_each_expert(side, i, other, factors, [&](int, C, C w) { sum += w; });
      totals[side.row.pair[i]] = sum;
    });
  };
  sum_up(one, two, Factors<C>::of_side1(mask, one.experts), totals1);
  sum_up(two, one, Factors<C>::of_side2(mask, one.experts), totals2);
}

template <class C>
__global__ void totals_masked_backward(
    Side<C> side1, Side<C> side2, Mask<C> mask, const C* dtotals1, const C* dtotals2, C* dgates1, C* dgates2) {
  SharedMemory memory;
  const TokenSide<C> one(side1, blockIdx.x, 1, memory), two(side2, blockIdx.x, 1, memory);
  __syncthreads();
  const auto dw = [&](int i, int j) { return dtotals1[one.row.pair[i]] + dtotals2[two.row.pair[j]]; };
  masked_gate_gradients(one, two, Factors<C>::of_side1(mask, one.experts), dw, dgates1);
  masked_gate_gradients(
      two, one, Factors<C>::of_side2(mask, one.experts), [&](int j, int i) { return dw(i, j); }, dgates2);
}

}  // namespace
}  // namespace monet::cuda
