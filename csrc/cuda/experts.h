// The expert layers on a GPU: what lies between the dense products of the input and the output weights, and the products
// of few tokens. S is the type of activations and weights; gates, sums and everything kept per pair are of type C, the
// accumulator of S. All pointers are the device's.
#pragma once

#include <cstdint>

#include "../numbers.h"
#include "../pairs.h"
#include "launch.h"

namespace monet::cuda {

// Fewer tokens than this are decoding, where reading weights is all the work.
constexpr int64_t kFewTokens = 16;

// A matrix with a row a token: `parts` times the units of all half-experts, [tokens, parts, experts, units]. What dense
// products give and take.
template <class S>
struct Dense {
  S* data;
  int parts;
};

// Pre-activations of one side as a dense product left them, and the bias [experts, units] that they still want.
template <class S>
struct Product {
  const S* data;  // [tokens, experts, units]
  const S* bias;
};

// Between the input and the output weights of the vertical form, with a = relu(s1)^2 and c = relu(s2)^2:
//   own1_i = a_i sum_h g1_hi       cross1_i = sum_h g1_hi sum_j g2_hj c_j
//   own2_j = c_j sum_h g2_hj       cross2_j = sum_h g2_hj sum_i g1_hi a_i
// With a mask M, and w_hij = M_hij g1_hi g2_hj:
//   own1_i = a_i sum_hj w_hij      cross1_i = sum_hj w_hij c_j
//   own2_j = c_j sum_hi w_hij      cross2_j = sum_hi w_hij a_i
// mix1 and mix2 have two parts, own and cross, 0 where a pair is not active. s1, s2 [pairs, units] are kept for backward.
template <class S>
void mix_vertical(
    Stream stream, const Side<Accumulator<S>>& side1, const Side<Accumulator<S>>& side2,
    const Mask<Accumulator<S>>& mask, int64_t units,
    const Product<S>& product1, const Product<S>& product2, Accumulator<S>* s1, Accumulator<S>* s2,
    const Dense<S>& mix1, const Dense<S>& mix2);

// From the gradients of the mix those of s1, s2 (dense as the two parts of ds, 0 where a pair is not active, and by pair)
// and of the gates; forms the mix again, for the weights' gradients.
template <class S>
struct VerticalBackward {
  const Accumulator<S> *s1, *s2;
  Dense<const S> dmix1, dmix2;
  Dense<S> mix1, mix2, ds;
  Accumulator<S> *ds1, *ds2, *dgates1, *dgates2;
};
template <class S>
void mix_vertical_backward(
    Stream stream, const Side<Accumulator<S>>& side1, const Side<Accumulator<S>>& side2,
    const Mask<Accumulator<S>>& mask, int64_t units,
    const VerticalBackward<S>& tensors);

// The same of the horizontal form: y_j = sum_h g2_hj sum_i g1_hi a_i, with a mask sum_hi w_hij a_i.
template <class S>
void mix_horizontal(
    Stream stream, const Side<Accumulator<S>>& side1, const Side<Accumulator<S>>& side2,
    const Mask<Accumulator<S>>& mask, int64_t units,
    const Product<S>& product1, Accumulator<S>* s1, const Dense<S>& y);
template <class S>
struct HorizontalBackward {
  const Accumulator<S>* s1;
  Dense<const S> dy;
  Dense<S> y, ds;
  Accumulator<S> *ds1, *dgates1, *dgates2;
};
template <class S>
void mix_horizontal_backward(
    Stream stream, const Side<Accumulator<S>>& side1, const Side<Accumulator<S>>& side2,
    const Mask<Accumulator<S>>& mask, int64_t units,
    const HorizontalBackward<S>& tensors);

// What a mask leaves of each half-expert: totals1_i = sum_hj w_hij [pairs of side 1], totals2_j = sum_hi w_hij [pairs of
// side 2]; and the gradient of them.
template <class C>
void masked_totals(
    Stream stream, const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, C* totals1, C* totals2);
template <class C>
void masked_totals_backward(
    Stream stream, const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* dtotals1,
    const C* dtotals2, C* dgates1, C* dgates2);

// The sum of each pair's gates over the heads, dense [tokens, experts], and the gradient of it.
template <class S>
void gate_totals(Stream stream, const Side<Accumulator<S>>& side, const Dense<S>& totals);
template <class S>
void gate_totals_backward(
    Stream stream, const Side<Accumulator<S>>& side, const Dense<const S>& dtotals, Accumulator<S>* dgates);

// ---- few tokens: only the rows of active half-experts are read of the weights, [experts * units, columns]

// The mix by pair, [pairs, units], from pre-activations that are complete.
template <class C>
struct VerticalMix {
  C *own1, *cross1, *own2, *cross2;
};
template <class C>
void mix_vertical_by_pair(
    Stream stream, const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, int64_t units, C* s1, C* s2,
    const VerticalMix<C>& mix);
template <class C>
void mix_horizontal_by_pair(
    Stream stream, const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, int64_t units, C* s1, C* y);
template <class C>
void gate_totals_by_pair(Stream stream, const Side<C>& side, C* totals);

// out[p] = w_i x_t + bias_i for pair p = (t, i): [pairs, units].
template <class S>
void project(
    Stream stream, const Pairs& pairs, int64_t units, int64_t columns, const S* x, const S* w, const S* bias,
    Accumulator<S>* out);

// out[t] = sum over the terms and the pairs p of token t of y[p] w_i, out [tokens, columns] with rows `stride` apart.
template <class S>
struct Term {
  const Accumulator<S>* y;  // null: no such term
  const S* w;
};
template <class S>
void combine(
    Stream stream, const Pairs& pairs, int64_t units, int64_t columns, const Term<S>& first, const Term<S>& second,
    S* out, int64_t stride);

}  // namespace monet::cuda
