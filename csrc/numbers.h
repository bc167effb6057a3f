// Number types of the kernels: what is stored (fp32, bf16, fp64) and what sums are kept in (fp32, fp64).
#pragma once

#include <cstdint>

namespace monet {

struct BFloat16 {
  uint16_t bits;
};

template <class S>
struct AccumulatorOf {
  using type = S;
};
template <>
struct AccumulatorOf<BFloat16> {
  using type = float;
};

// The type in which sums over values of type S are kept.
template <class S>
using Accumulator = typename AccumulatorOf<S>::type;

}  // namespace monet
