// The products over all pairs on the CPU: only active (token, half-expert) pairs are computed. See ../experts.h.
// Several jobs of a kind are given at once, so that they share one round of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../experts.h"

namespace monet::cpu {

template <class S>
void run(const Projection<S>* jobs, int64_t count);

// Terms over the same pairs are best put next to each other.
template <class S>
void run(const Combination<S>* jobs, int64_t count);

// out_i = sum over the pairs p of half-expert i of y[p]^T x_t.
template <class S>
struct WeightGradient {
  Pairs pairs;
  const Accumulator<S>* y;  // [pairs, units]
  Rows<const S> x;
  int64_t units, columns;
  S* out;  // [experts * units, columns]
  bool transposed;  // out is [columns, experts * units]
};
template <class S>
void run(const WeightGradient<S>* jobs, int64_t count);

template <template <class> class Job, class S, size_t count>
void run(const Job<S> (&jobs)[count]) {
  run(jobs, static_cast<int64_t>(count));
}

// out_i = sum over the pairs p of half-expert i of y[p].
template <class C>
struct BiasGradient {
  Pairs pairs;
  const C* y;  // [pairs, units]
  int64_t units;
  C* out;  // [experts, units]
};
template <class C>
void run(const BiasGradient<C>& p);

// out[t] = sum over the entries e of token t of y[e] w[row[e]]. What a combination is where a pair has one unit, by
// token: there is little to gain from groups then.
template <class S>
struct SparseProduct {
  int64_t tokens;
  const int32_t* row_start;  // [tokens + 1]
  const int32_t* row;        // [entries]
  const Accumulator<S>* y;   // [entries]
  Rows<const S> w;
  int64_t columns;
  Rows<S> out;  // [tokens, columns]
};
template <class S>
void run(const SparseProduct<S>& p);

// out = in^T.
template <class S>
struct Transposition {
  const S* in;  // [rows, columns]
  int64_t rows, columns;
  S* out;  // [columns, rows]
};
template <class S>
void run(const Transposition<S>& p);
// For those columns alone that belong to half-experts of some pair; other rows of out are left as they are.
template <class S>
void run_for_pairs(const Transposition<S>& p, const Pairs& pairs);

}  // namespace monet::cpu
