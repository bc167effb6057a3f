// The products that all expert layers are made of. The first three are of one group, a few tokens with one half-expert's
// weights: p its pairs, u its weight rows ("units"), k columns. C is the type of sums.
#pragma once

#include <cstdint>

#include "../numbers.h"

namespace monet::cpu {

// Rows of a matrix; row i begins at data + i * stride.
template <class T>
struct Rows {
  T* data;
  int64_t stride;

  T* row(int64_t i) const { return data + i * stride; }
  Rows from_column(int64_t column) const { return {data + column, stride}; }
};

// One addend of `scatter`.
template <class S>
struct ScatterPart {
  Rows<const Accumulator<S>> y;
  Rows<const S> w;
};

// The scan of one row of logits. T is float or double.
template <class T>
struct Scan {
  // The largest value; NaN if any is.
  T (*largest)(const T* values, int64_t count);
  // flags[i] |= values[i] >= cut
  void (*mark)(const T* values, int64_t count, T cut, uint8_t* flags);
};

template <class S>
struct Products {
  using C = Accumulator<S>;

  // out[p][u] += sum over k of x[token[p]][k] w[u][k]
  void (*dot)(Rows<const S> x, const int32_t* token, int64_t pairs, Rows<const S> w, int64_t units, int64_t columns,
              Rows<C> out);
  // out[token[p] - first_token][k] += sum over the parts and u of y[p][u] w[u][k]
  void (*scatter)(const ScatterPart<S>* parts, int64_t part_count, const int32_t* token, int32_t first_token,
                  int64_t pairs, int64_t units, int64_t columns, Rows<C> out);
  // out[u][k] += sum over p of y[p][u] x[token[p]][k]
  void (*outer)(Rows<const C> y, Rows<const S> x, const int32_t* token, int64_t pairs, int64_t units,
                int64_t columns, Rows<C> out);
  // out[k] = sum over e of y[e] w[row[e]][k], for one token with that many entries
  void (*gather)(const C* y, const int32_t* row, int64_t entries, Rows<const S> w, int64_t columns, C* out);
};

// Those of the best instruction set of this machine, unless another was selected.
template <class S>
const Products<S>& products();
template <class T>
const Scan<T>& scan();

}  // namespace monet::cpu
