// What the kernels of the expert layers take: one structure per kernel. S is the type of activations and weights;
// gates, sums and everything kept by pair are of type C, the accumulator of S. Pointers are the device's.
//
// Weights are rows by half-expert: row i * units + u belongs to unit u of half-expert i.
#pragma once

#include <cstdint>

#include "numbers.h"
#include "pairs.h"

namespace monet {

// Fewer tokens than this are decoding, where reading weights is all the work.
constexpr int64_t kDecodeTokens = 16;

// Rows of a matrix; row i begins at data + i * stride.
template <class T>
struct Rows {
  T* data;
  int64_t stride;

  T* row(int64_t i) const { return data + i * stride; }
  Rows from_column(int64_t column) const { return {data + column, stride}; }
};

// ---- products over all pairs

// out[p] = w_i x_t + bias_i for pair p = (t, i).
template <class S>
struct Projection {
  Pairs pairs;
  Rows<const S> x, w;
  const S* bias;  // [experts * units], or null
  int64_t units, columns;
  Accumulator<S>* out;  // [pairs, units]
};

// out[t] = sum over the terms and the pairs p of token t of y[p] w_i.
template <class S>
struct Term {
  Pairs pairs;
  const Accumulator<S>* y;  // [pairs, units]
  Rows<const S> w;
  int64_t units;
};
template <class S>
struct Combination {
  static constexpr int kMaxTerms = 2;
  Term<S> terms[kMaxTerms];
  int term_count;
  int64_t columns;
  Rows<S> out;  // [tokens, columns]
};

// ---- mixing: between the input and the output weights of the half-experts of a token
//
// With the activations a = relu(s1)^2 and c = relu(s2)^2.
// Vertical:
//   own1_i = a_i sum_h g1_hi       cross1_i = sum_h g1_hi sum_j g2_hj c_j
//   own2_j = c_j sum_h g2_hj       cross2_j = sum_h g2_hj sum_i g1_hi a_i
// With a mask M, and w_hij = M_hij g1_hi g2_hj:
//   own1_i = a_i sum_hj w_hij      cross1_i = sum_hj w_hij c_j
//   own2_j = c_j sum_hi w_hij      cross2_j = sum_hi w_hij a_i
// Horizontal:
//   y_j = sum_h g2_hj sum_i g1_hi a_i, with a mask sum_hi w_hij a_i

// The gates of both sides, and the factors of the experts.
template <class C>
struct Routing {
  Side<C> side1, side2;
  Mask<C> mask;

  int64_t tokens() const { return side1.pairs.tokens; }
  int64_t heads() const { return side1.heads; }
};

// By pair: [pairs of side 1, units] and [pairs of side 2, units].
template <class C>
struct VerticalMix {
  C *own1, *cross1, *own2, *cross2;
};

template <class C>
struct MixVertical {
  Routing<C> routing;
  int64_t units;
  const C *s1, *s2;  // pre-activations, by pair
  VerticalMix<C> mix;
};
// From the gradients of the mix those of s1, s2 and the gates. Forms the mix again, for the weights' gradients.
template <class C>
struct MixVerticalBackward {
  Routing<C> routing;
  int64_t units;
  const C *s1, *s2;
  VerticalMix<const C> dmix;
  VerticalMix<C> mix;
  C *ds1, *ds2, *dgates1, *dgates2;
};

template <class C>
struct MixHorizontal {
  Routing<C> routing;
  int64_t units;
  const C* s1;  // by pair of side 1
  C* y;         // by pair of side 2
};
template <class C>
struct MixHorizontalBackward {
  Routing<C> routing;
  int64_t units;
  const C *s1, *dy;
  C *y, *ds1, *dgates1, *dgates2;
};

// What a mask leaves of each half-expert: weights1_i = sum_hj w_hij, weights2_j = sum_hi w_hij.
template <class C>
struct ExpertWeights {
  Routing<C> routing;
  C *weights1, *weights2;  // [pairs of side 1], [pairs of side 2]
};
template <class C>
struct ExpertWeightsBackward {
  Routing<C> routing;
  const C *dweights1, *dweights2;
  C *dgates1, *dgates2;
};

// The sum of each pair's gates over the heads.
template <class C>
struct GateTotals {
  Side<C> side;
  C* totals;  // [pairs]
};
template <class C>
struct GateTotalsBackward {
  Side<C> side;
  const C* dtotals;
  C* dgates;
};

}  // namespace monet
