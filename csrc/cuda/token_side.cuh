// What the mixing kernels share: one side of a token as a block of threads sees it, and where a mix comes from and
// goes to.
#pragma once

#include "device.cuh"

namespace monet::cuda {
namespace {

constexpr int kThreads = 128;

// relu(s)^2, but NaN for -inf: what is not finite must not become 0.
template <class C>
__device__ C relu_squared(C s) {
  return s * (s < 0 ? C{0} : s);
}
template <class C>
__device__ C relu_squared_slope(C s) {
  return s < 0 ? 0 * s : 2 * s;
}

// One side of one token: its active pairs by number i, and their gates.
template <class C>
struct TokenSide {
  __device__ TokenSide(const Side<C>& side, int64_t token, int64_t units, SharedMemory& memory)
      : token(token), experts(side.pairs.experts), units(static_cast<int>(units)), heads(static_cast<int>(side.heads)),
        row(side.pairs, token, memory), gates(side.gates) {}

  // Where a gate is in [pairs, heads].
  __device__ int64_t by_head(int i, int h) const { return static_cast<int64_t>(row.pair[i]) * heads + h; }
  __device__ C gate(int i, int h) const { return gates[by_head(i, h)]; }
  __device__ C total(int i) const {
    C sum = 0;
    for (int h = 0; h < heads; ++h) sum += gate(i, h);
    return sum;
  }
  // Where unit u of pair i is in [pairs, units], in [experts, units], and in an operand of a dense matrix.
  __device__ int64_t by_pair(int i, int u) const { return static_cast<int64_t>(row.pair[i]) * units + u; }
  __device__ int64_t by_expert(int i, int u) const { return static_cast<int64_t>(row.expert[i]) * units + u; }
  template <class S>
  __device__ S& in(const Dense<S>& dense, int operand, int i, int u) const {
    return dense.data[(token * dense.operands + operand) * experts * units + by_expert(i, u)];
  }
  template <class S>
  __device__ void clear_row(const Dense<S>& dense) const {
    const int64_t count = dense.operands * experts * units;
    clear(dense.data + token * count, count);
  }

  // f(i, u) and f(i, h), dealt out over the block.
  template <class F>
  __device__ void for_each_unit(const F& f) const {
    for_each_of_block(row.count * units, [&](int at) { f(at / units, at % units); });
  }
  template <class F>
  __device__ void for_each_gate(const F& f) const {
    for_each_of_block(row.count * heads, [&](int at) { f(at / heads, at % heads); });
  }

  // sums[h, u] = sum over the pairs of gate_h value(i, u).
  template <class F>
  __device__ void gather(const F& value, C* sums) const {
    for_each_of_block(heads * units, [&](int at) {
      const int h = at / units, u = at % units;
      C sum = 0;
      for (int i = 0; i < row.count; ++i) sum += gate(i, h) * value(i, u);
      sums[at] = sum;
    });
  }
  // sum over the heads of gate_h sums[h, u].
  __device__ C spread(const C* sums, int i, int u) const {
    C sum = 0;
    for (int h = 0; h < heads; ++h) sum += gate(i, h) * sums[h * units + u];
    return sum;
  }

  int64_t token, experts;
  int units, heads;
  Row row;
  const C* gates;
};

// A block per token, with shared memory for both sides of it and `tables` sums by head.
template <class C>
Grid token_blocks(const Routing<C>& routing, int64_t units, int tables) {
  const size_t rows = Row::bytes(routing.side1.pairs) + Row::bytes(routing.side2.pairs);
  return {
      .blocks = routing.tokens(), .threads = kThreads,
      .shared = rows + tables * SharedMemory::bytes<C>(routing.heads() * units)};
}

// ---- where a mix comes from: pre-activations s by pair

// From a dense product; they are kept by pair.
template <class S>
struct FromProduct {
  Product<S> product;
  Accumulator<S>* s;
};
template <class S, class C>
__device__ void complete(const TokenSide<C>& side, const FromProduct<S>& in) {
  const Dense<const S> dense{in.product.data, 1};
  side.for_each_unit([&](int i, int u) {
    in.s[side.by_pair(i, u)] = widen(side.in(dense, 0, i, u)) + widen(in.product.bias[side.by_expert(i, u)]);
  });
}
// They are there.
template <class C>
struct FromPairs {
  const C* s;
};
template <class C>
__device__ void complete(const TokenSide<C>&, const FromPairs<C>&) {}

// ---- where it goes to: operands of a dense product, or by pair

template <class S, class C>
__device__ void begin(const TokenSide<C>& side, const Dense<S>& mix) {
  side.clear_row(mix);
}
template <class S, class C>
__device__ void put(const TokenSide<C>& side, const Dense<S>& mix, int operand, int i, int u, C value) {
  convert(value, side.in(mix, operand, i, u));
}
template <class C>
struct ByPair {
  C* operands[2];
};
template <class C>
__device__ void begin(const TokenSide<C>&, const ByPair<C>&) {}
template <class C>
__device__ void put(const TokenSide<C>& side, const ByPair<C>& mix, int operand, int i, int u, C value) {
  mix.operands[operand][side.by_pair(i, u)] = value;
}

// ---- what the kernels of a mix take, wherever it comes from and goes to

template <class C, class In, class Out>
struct VerticalParameters {
  Routing<C> routing;
  int64_t units;
  In in1, in2;
  Out mix1, mix2;
};
template <class C, class In, class Out>
struct HorizontalParameters {
  Routing<C> routing;
  int64_t units;
  In in1;
  Out y;
};

}  // namespace
}  // namespace monet::cuda
