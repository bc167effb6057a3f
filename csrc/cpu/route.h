// The router on the CPU: threshold, softmax over the active half-experts, compact gates. T is float or double.
#pragma once

#include <cstdint>

#include "../pairs.h"

namespace monet::cpu {

// Sum and sum of squares of the logits [tokens, heads, experts] of each head, sums [2, heads].
template <class T>
void head_moments(const T* logits, int64_t tokens, int64_t heads, int64_t experts, double* sums);

// What is known of each token after a first look at its logits.
template <class T>
struct Marks {
  uint64_t* active;  // [tokens, mark_words]  one bit a half-expert: active in some head
  T* largest;        // [tokens, heads]       largest logit; NaN where the whole row must be NaN
  T* cut;            // [tokens, heads]       active from here on: min(largest, threshold)
};
inline int64_t mark_words(int64_t experts) { return (experts + 63) / 64; }

// First pass: which half-experts are active. row_start [tokens + 1] receives the running count of pairs.
template <class T>
void mark_active(
    const T* logits, const T* threshold, int64_t tokens, int64_t heads, int64_t experts, const Marks<T>& marks,
    int32_t* row_start);

// Second pass: numbers the pairs.
void place_pairs(
    const uint64_t* active, int64_t tokens, int64_t experts, const int32_t* row_start, int32_t* token,
    int32_t* group_start, int32_t* row_pair);

// Third pass: softmax over the active half-experts of each head. gates [pairs, heads], 0 where a pair is not active
// in that head.
template <class T>
void active_softmax(const T* logits, const Marks<T>& marks, const Pairs& pairs, int64_t heads, T* gates);

// The gradient of the softmax, dlogits [tokens, heads, experts]: gates (dgates - sum over the row of gates dgates) of the
// pairs, 0 elsewhere.
template <class T>
void active_softmax_backward(const T* gates, const T* dgates, const Pairs& pairs, int64_t heads, T* dlogits);

// Spreads values [pairs, heads] over dense [tokens, heads, experts], 0 elsewhere.
template <class T>
void scatter_dense(const T* values, const Pairs& pairs, int64_t heads, T* dense);

// Reads the entries of dense [tokens, heads, experts] that the pairs stand for.
template <class T>
void gather_dense(const T* dense, const Pairs& pairs, int64_t heads, T* values);

// Sum of the gates over the tokens, totals [heads, experts]; and the gradient of it.
template <class T>
void sum_over_tokens(const T* gates, const Pairs& pairs, int64_t heads, T* totals);
template <class T>
void sum_over_tokens_backward(const T* dtotals, const Pairs& pairs, int64_t heads, T* dgates);

// Sum over the tokens of each head's largest gate, totals [heads]; and the gradient of it, shared evenly among equals.
template <class T>
void sum_of_largest(const T* gates, const Pairs& pairs, int64_t heads, T* totals);
template <class T>
void sum_of_largest_backward(const T* gates, const T* dtotals, const Pairs& pairs, int64_t heads, T* dgates);

}  // namespace monet::cpu
