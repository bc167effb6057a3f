// The expert layers on the CPU: only active (token, half-expert) pairs are computed. S is the type of activations and
// weights; gates, sums and everything kept per pair are of type C, the accumulator of S.
//
// Weights are rows by half-expert: row i * units + u belongs to unit u of half-expert i.
#pragma once

#include <cstdint>

#include "../pairs.h"
#include "products.h"

namespace monet::cpu {

// Fewer tokens than this are decoding, where reading weights is all the work.
constexpr int64_t kFewTokens = 16;

// The three products over all pairs. Several jobs of a kind are given at once, so that they share one round of threads.

// out[p] = w_i x_t + bias_i for pair p = (t, i): [pairs, units]. bias [experts * units] may be null.
template <class S>
struct Projection {
  const Pairs& pairs;
  Rows<const S> x, w;
  const S* bias;
  int64_t units, columns;
  Accumulator<S>* out;
};
template <class S>
void project(const Projection<S>* jobs, int64_t count);

// out[t] = sum over the terms and the pairs p of token t of y[p] w_i: [tokens, columns], y [pairs, units]. Terms over
// the same pairs are best put next to each other.
template <class S>
struct Term {
  const Pairs& pairs;
  const Accumulator<S>* y;
  Rows<const S> w;
  int64_t units;
};
template <class S>
struct Combination {
  const Term<S>* terms;
  int64_t term_count, columns;
  Rows<S> out;
};
template <class S>
void combine(const Combination<S>* jobs, int64_t count);

// out_i = sum over the pairs p of half-expert i of y[p]^T x_t: [experts * units, columns]; transposed: the transpose of it.
template <class S>
struct WeightGradient {
  const Pairs& pairs;
  const Accumulator<S>* y;
  Rows<const S> x;
  int64_t units, columns;
  S* out;
  bool transposed;
};
template <class S>
void weight_gradients(const WeightGradient<S>* jobs, int64_t count);

// out[t] = sum over the entries e of token t of y[e] w[row[e]]: [tokens, columns]. What a combination is where a pair has
// one unit, by token: there is little to gain from groups then.
template <class S>
struct SparseProduct {
  int64_t tokens;
  const int32_t* row_start;  // [tokens + 1]
  const int32_t* row;        // [entries]
  const Accumulator<S>* y;   // [entries]
  Rows<const S> w;
  int64_t columns;
  Rows<S> out;
};
template <class S>
void multiply(const SparseProduct<S>& job);

// out_i = sum over the pairs p of half-expert i of y[p]: [experts, units].
template <class C>
void bias_gradient(const Pairs& pairs, const C* y, int64_t units, C* out);

// Between the input and the output layer of the vertical form, with a = relu(s1)^2 and c = relu(s2)^2:
//   own1_i = a_i sum_h g1_hi       cross1_i = sum_h g1_hi sum_j g2_hj c_j       [pairs of side 1, units]
//   own2_j = c_j sum_h g2_hj       cross2_j = sum_h g2_hj sum_i g1_hi a_i       [pairs of side 2, units]
// With a mask M, and w_hij = M_hij g1_hi g2_hj:
//   own1_i = a_i sum_hj w_hij      cross1_i = sum_hj w_hij c_j
//   own2_j = c_j sum_hi w_hij      cross2_j = sum_hi w_hij a_i
template <class C>
struct VerticalMix {
  C *own1, *cross1, *own2, *cross2;

  VerticalMix from_unit(int64_t u) const { return {own1 + u, cross1 + u, own2 + u, cross2 + u}; }
};
template <class C>
void mix_vertical(
    const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* s1, const C* s2, int64_t units,
    const VerticalMix<C>& mix);

// From the gradients of the mix those of s1, s2 and the gates; forms the mix again, for the weights' gradients.
template <class C>
void mix_vertical_backward(
    const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* s1, const C* s2, int64_t units,
    const VerticalMix<const C>& dmix, const VerticalMix<C>& mix, C* ds1, C* ds2, C* dgates1, C* dgates2);

// The same of the horizontal form, [pairs of side 2, units]:
//   y_j = sum_h g2_hj sum_i g1_hi a_i, with a mask sum_hi w_hij a_i.
template <class C>
void mix_horizontal(
    const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* s1, int64_t units, C* y);
template <class C>
void mix_horizontal_backward(
    const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* s1, int64_t units, const C* dy, C* y,
    C* ds1, C* dgates1, C* dgates2);

// What a mask leaves of each half-expert: totals1_i = sum_hj w_hij [pairs of side 1], totals2_j = sum_hi w_hij [pairs of
// side 2]; and the gradient of them.
template <class C>
void masked_totals(const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, C* totals1, C* totals2);
template <class C>
void masked_totals_backward(
    const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* dtotals1, const C* dtotals2, C* dgates1,
    C* dgates2);

// The sum of each pair's gates over the heads, [pairs], and the gradient of it.
template <class C>
void gate_totals(const Side<C>& side, C* totals);
// The same in the order of row_pair, with the half-expert of each.
template <class C>
void gate_totals_by_token(const Side<C>& side, C* totals, int32_t* expert);
template <class C>
void gate_totals_backward(const Side<C>& side, const C* dtotals, C* dgates);

// out = in^T for in [rows, columns].
template <class S>
void transpose(const S* in, int64_t rows, int64_t columns, S* out);

// The same for those columns alone that belong to half-experts of some pair; other rows of out are left as they are.
template <class S>
void transpose_used(const S* in, int64_t rows, const Pairs& pairs, int64_t units, S* out);

}  // namespace monet::cpu
