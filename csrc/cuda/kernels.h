// The kernels of a GPU, by what they take: the structures of ../router.h and ../experts.h, and structures over dense
// tensors that only the GPU has. All pointers are the device's; work is put on a stream.
#pragma once

#include "../experts.h"
#include "../router.h"

namespace monet::cuda {

using Stream = void*;  // a cudaStream_t

// ---- the router, and functions of its gates. T is float or double

using Word = uint32_t;  // of marks

constexpr int64_t kMomentTokens = 32;  // tokens that one block of threads sums up
inline int64_t moment_chunks(int64_t tokens) { return (tokens + kMomentTokens - 1) / kMomentTokens; }

template <class T>
void run(const HeadMoments<T>& p, Stream stream);
template <class T>
void run(const MarkActive<T, Word>& p, Stream stream);
void run(const PlacePairs<Word>& p, Stream stream);
template <class T>
void run(const ActiveSoftmax<T, Word>& p, Stream stream);
template <class T>
void run(const ActiveSoftmaxBackward<T>& p, Stream stream);

template <class T>
void run(const DenseGates<T>& p, Stream stream);
template <class T>
void run(const DenseGatesBackward<T>& p, Stream stream);
template <class T>
void run(const SumOverTokens<T>& p, Stream stream);
template <class T>
void run(const SumOverTokensBackward<T>& p, Stream stream);
template <class T>
void run(const SumOfLargest<T>& p, Stream stream);
template <class T>
void run(const SumOfLargestBackward<T>& p, Stream stream);

template <class C>
void run(const ExpertWeights<C>& p, Stream stream);
template <class C>
void run(const ExpertWeightsBackward<C>& p, Stream stream);

// ---- the expert layers on dense tensors: what lies between the dense products of the input and the output weights

// What dense products give and take: a row per token, which holds the units of all half-experts `operands` times,
// [tokens, operands, experts, units].
template <class S>
struct Dense {
  S* data;
  int operands;
};

// Pre-activations of one side as a dense product left them, and the bias that they still want.
template <class S>
struct Product {
  const S* data;  // [tokens, experts, units]
  const S* bias;  // [experts, units]
};

// mix1 and mix2 have two operands, own and cross, 0 where a pair is not active.
template <class S>
struct DenseMixVertical {
  using C = Accumulator<S>;
  Routing<C> routing;
  int64_t units;
  Product<S> product1, product2;
  C *s1, *s2;  // [pairs, units], kept for the backward pass
  Dense<S> mix1, mix2;
};
template <class S>
void run(const DenseMixVertical<S>& p, Stream stream);

// From the gradients of the mix those of s1, s2 (dense as the two operands of ds, 0 where a pair is not active, and
// by pair) and of the gates. Forms the mix again, for the weights' gradients.
template <class S>
struct DenseMixVerticalBackward {
  using C = Accumulator<S>;
  Routing<C> routing;
  int64_t units;
  const C *s1, *s2;
  Dense<const S> dmix1, dmix2;
  Dense<S> mix1, mix2, ds;
  C *ds1, *ds2, *dgates1, *dgates2;
};
template <class S>
void run(const DenseMixVerticalBackward<S>& p, Stream stream);

template <class S>
struct DenseMixHorizontal {
  using C = Accumulator<S>;
  Routing<C> routing;
  int64_t units;
  Product<S> product1;
  C* s1;
  Dense<S> y;
};
template <class S>
void run(const DenseMixHorizontal<S>& p, Stream stream);

template <class S>
struct DenseMixHorizontalBackward {
  using C = Accumulator<S>;
  Routing<C> routing;
  int64_t units;
  const C* s1;
  Dense<const S> dy;
  Dense<S> y, ds;
  C *ds1, *dgates1, *dgates2;
};
template <class S>
void run(const DenseMixHorizontalBackward<S>& p, Stream stream);

// The sum of each pair's gates over the heads, dense [tokens, experts].
template <class S>
struct DenseGateTotals {
  Side<Accumulator<S>> side;
  Dense<S> totals;
};
template <class S>
void run(const DenseGateTotals<S>& p, Stream stream);
template <class S>
struct DenseGateTotalsBackward {
  Side<Accumulator<S>> side;
  Dense<const S> dtotals;
  Accumulator<S>* dgates;
};
template <class S>
void run(const DenseGateTotalsBackward<S>& p, Stream stream);

// ---- decoding: by pair, so that only the rows of active half-experts are read of the weights

template <class S>
void run(const Projection<S>& p, Stream stream);
// The terms are over the same pairs; rows of weights are `columns` apart.
template <class S>
void run(const Combination<S>& p, Stream stream);

template <class C>
void run(const MixVertical<C>& p, Stream stream);
template <class C>
void run(const MixHorizontal<C>& p, Stream stream);
template <class C>
void run(const GateTotals<C>& p, Stream stream);

}  // namespace monet::cuda
