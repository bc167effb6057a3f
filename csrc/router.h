// What the kernels of the router and of its gates take: one structure per kernel, the same on every device. T is
// float or double. Pointers are the device's.
#pragma once

#include <cstdint>

#include "pairs.h"

namespace monet {

// Logits of one router side.
template <class T>
struct Logits {
  const T* values;  // [tokens, heads, experts]
  int64_t tokens, heads, experts;
};

// Sum and sum of squares of the logits of each head.
template <class T>
struct HeadMoments {
  Logits<T> logits;
  double* workspace;  // [moment_chunks of the device, 2, heads]
  double* sums;       // [2, heads]
};

// ---- from logits to gates, in three passes

// What the first pass finds out about each token.
template <class T, class Word>
struct Marks {
  Word* active;  // [tokens, words<Word>(experts)]  one bit per half-expert: active in some head
  T* largest;    // [tokens, heads]  largest logit; NaN where the whole row must be NaN
  T* cut;        // [tokens, heads]  active from here on: min(largest, threshold)
};
// Words that hold a bit per half-expert.
template <class Word>
constexpr int64_t words(int64_t experts) {
  constexpr int64_t bits = 8 * sizeof(Word);
  return (experts + bits - 1) / bits;
}

// First pass: which half-experts are active.
template <class T, class Word>
struct MarkActive {
  Logits<T> logits;
  const T* threshold;  // [heads]
  Marks<T, Word> marks;
  int32_t* row_start;  // [tokens + 1]  the running count of pairs
};

// Second pass: numbers the pairs.
template <class Word>
struct PlacePairs {
  const Word* active;
  int64_t tokens, experts;
  const int32_t* row_start;
  int32_t *token, *group_start, *row_pair;  // as in Pairs
};

// Third pass: softmax over the active half-experts of each head.
template <class T, class Word>
struct ActiveSoftmax {
  Logits<T> logits;
  Marks<T, Word> marks;
  Pairs pairs;
  T* gates;  // [pairs, heads]  0 where a pair is not active in that head
};

// The gradient of the softmax: gates (dgates - sum over the row of gates dgates) of the pairs, 0 elsewhere.
template <class T>
struct ActiveSoftmaxBackward {
  Side<T> side;
  const T* dgates;  // [pairs, heads]
  T* dlogits;       // [tokens, heads, experts]
};

// ---- functions of gates

// Spreads gates over a dense tensor, 0 where there is no pair; and reads the gradients of the pairs from one.
template <class T>
struct DenseGates {
  Side<T> side;
  T* dense;  // [tokens, heads, experts]
};
template <class T>
struct DenseGatesBackward {
  Side<T> side;
  const T* ddense;
  T* dgates;
};

// Sum of the gates over the tokens.
template <class T>
struct SumOverTokens {
  Side<T> side;
  T* totals;  // [heads, experts]
};
template <class T>
struct SumOverTokensBackward {
  Side<T> side;
  const T* dtotals;
  T* dgates;
};

// Sum over the tokens of each head's largest gate. Its gradient is shared evenly among equals.
template <class T>
struct SumOfLargest {
  Side<T> side;
  T* workspace;  // [tokens, heads]
  T* totals;     // [heads]
};
template <class T>
struct SumOfLargestBackward {
  Side<T> side;
  const T* dtotals;
  T* dgates;
};

}  // namespace monet
