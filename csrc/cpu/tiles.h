// The products that all expert layers are made of, in tiles of as many sums as the registers hold. The first three
// are of one group, a few tokens with one half-expert's weights: p its pairs, u its weight rows ("units"), k columns.
// C is the type of sums.
#pragma once

#include <cstdint>

#include "../experts.h"

namespace monet::cpu {

// out[p][u] += sum over k of x[token[p]][k] w[u][k]
template <class S>
struct Dot {
  Rows<const S> x;
  const int32_t* token;
  Rows<const S> w;
  int64_t pairs, units, columns;
  Rows<Accumulator<S>> out;
};

// out[token[p] - first_token][k] += sum over the terms and u of y[p][u] w[u][k]
template <class S>
struct Scatter {
  struct Term {
    Rows<const Accumulator<S>> y;
    Rows<const S> w;
  };
  Term terms[Combination<S>::kMaxTerms];
  int term_count;
  const int32_t* token;
  int32_t first_token;
  int64_t pairs, units, columns;
  Rows<Accumulator<S>> out;
};

// out[u][k] += sum over p of y[p][u] x[token[p]][k]
template <class S>
struct Outer {
  Rows<const Accumulator<S>> y;
  Rows<const S> x;
  const int32_t* token;
  int64_t pairs, units, columns;
  Rows<Accumulator<S>> out;
};

// out[k] = sum over e of y[e] w[row[e]][k], for one token with that many entries
template <class S>
struct Gather {
  const Accumulator<S>* y;
  const int32_t* row;
  int64_t entries;
  Rows<const S> w;
  int64_t columns;
  Accumulator<S>* out;
};

// One table per instruction set.
template <class S>
struct Tiles {
  void (*dot)(const Dot<S>& p);
  void (*scatter)(const Scatter<S>& p);
  void (*outer)(const Outer<S>& p);
  void (*gather)(const Gather<S>& p);
};

// The scan of one row of logits. T is float or double.
template <class T>
struct Scan {
  // The largest value; NaN if any is.
  T (*largest)(const T* values, int64_t count);
  // flags[i] |= values[i] >= cut
  void (*mark)(const T* values, int64_t count, T cut, uint8_t* flags);
};

// Those of the best instruction set of this machine, unless another was selected.
template <class S>
const Tiles<S>& tiles();
template <class T>
const Scan<T>& scan();

}  // namespace monet::cpu
