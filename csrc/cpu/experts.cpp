#include "experts.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../parallel.h"

namespace monet::cpu {
namespace {

constexpr int64_t kTaskExperts = 16;   // half-experts of a task
constexpr int64_t kTaskColumns = 256;  // columns of a task: 512 tokens of them fit in a core's second-level cache

// f(half-expert, first pair, number of pairs) for the groups of a block that are not empty.
template <class F>
inline void for_each_group(const Pairs& pairs, int64_t block, int64_t begin, int64_t end, const F& f) {
  const int32_t* start = pairs.group_start + block * pairs.experts;
  for (int64_t expert = begin; expert < end; ++expert)
    if (start[expert] < start[expert + 1]) f(expert, int64_t{start[expert]}, int64_t{start[expert + 1] - start[expert]});
}

inline void convert(float from, BFloat16& to) {
  uint32_t bits;
  std::memcpy(&bits, &from, sizeof bits);
  const bool nan = from != from;
  to.bits = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to the nearest, ties to even
}
inline void convert(float from, float& to) { to = from; }
inline void convert(double from, double& to) { to = from; }
inline void convert(BFloat16 from, BFloat16& to) { to = from; }

inline float widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
inline float widen(float value) { return value; }
inline double widen(double value) { return value; }

}  // namespace

template <class S>
void project(
    const Pairs& pairs, Rows<const S> x, Rows<const S> w, const S* bias, int64_t units, int64_t columns,
    Accumulator<S>* out) {
  using C = Accumulator<S>;
  const int64_t ranges = ceil_div(pairs.experts, kTaskExperts);
  for_each_task(pairs.blocks() * ranges, [&](int64_t task) {
    const int64_t begin = task % ranges * kTaskExperts, end = smaller(pairs.experts, begin + kTaskExperts);
    for_each_group(pairs, task / ranges, begin, end, [&](int64_t expert, int64_t first, int64_t count) {
      C* rows = out + first * units;
      for (int64_t i = 0; i < count * units; ++i) rows[i] = bias ? widen(bias[expert * units + i % units]) : C{0};
      products<S>().dot(
          x, pairs.token + first, count, {w.row(expert * units), w.stride}, units, columns, {rows, units});
    });
  });
}

template <class S>
void combine(const Term<S>* terms, int64_t term_count, int64_t columns, Rows<S> out) {
  using C = Accumulator<S>;
  const Pairs& any = terms[0].pairs;
  const int64_t chunks = ceil_div(columns, kTaskColumns);
  for_each_task(any.blocks() * chunks, [&](int64_t task) {
    const int64_t first_token = task / chunks * kBlockTokens, tokens = smaller(kBlockTokens, any.tokens - first_token);
    const int64_t column = task % chunks * kTaskColumns, width = smaller(kTaskColumns, columns - column);
    std::vector<C> sums(tokens * width, C{0});
    for (int64_t i = 0; i < term_count; ++i) {
      const Term<S>& term = terms[i];
      const int64_t units = term.units;
      const auto add = [&](int64_t expert, int64_t first, int64_t count) {
        products<S>().scatter(
            {term.y + first * units, units}, term.pairs.token + first, first_token, count,
            {term.w.row(expert * units) + column, term.w.stride}, units, width, {sums.data(), width});
      };
      for_each_group(term.pairs, task / chunks, 0, term.pairs.experts, add);
    }
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t k = 0; k < width; ++k) convert(sums[t * width + k], out.row(first_token + t)[column + k]);
  });
}

template <class S>
void weight_gradient(
    const Pairs& pairs, const Accumulator<S>* y, Rows<const S> x, int64_t units, int64_t columns,
    Accumulator<S>* out) {
  const int64_t ranges = ceil_div(pairs.experts, kTaskExperts);
  for_each_task(ceil_div(columns, kTaskColumns) * ranges, [&](int64_t task) {
    const int64_t column = task / ranges * kTaskColumns, width = smaller(kTaskColumns, columns - column);
    const int64_t begin = task % ranges * kTaskExperts, end = smaller(pairs.experts, begin + kTaskExperts);
    for (int64_t row = begin * units; row < end * units; ++row)
      std::fill_n(out + row * columns + column, width, Accumulator<S>{0});
    for (int64_t block = 0; block < pairs.blocks(); ++block)
      for_each_group(pairs, block, begin, end, [&](int64_t expert, int64_t first, int64_t count) {
        products<S>().outer(
            {y + first * units, units}, x.from_column(column), pairs.token + first, count, units, width,
            {out + expert * units * columns + column, columns});
      });
  });
}

template <class C>
void bias_gradient(const Pairs& pairs, const C* y, int64_t units, C* out) {
  for_each_task(ceil_div(pairs.experts, kTaskExperts), [&](int64_t task) {
    const int64_t begin = task * kTaskExperts, end = smaller(pairs.experts, begin + kTaskExperts);
    std::fill(out + begin * units, out + end * units, C{0});
    for (int64_t block = 0; block < pairs.blocks(); ++block)
      for_each_group(pairs, block, begin, end, [&](int64_t expert, int64_t first, int64_t count) {
        for (int64_t i = 0; i < count * units; ++i) out[expert * units + i % units] += y[first * units + i];
      });
  });
}

template <class From, class To>
void transpose(const From* in, int64_t rows, int64_t columns, To* out) {
  constexpr int64_t tile = 32;
  const int64_t across = ceil_div(columns, tile);
  for_each_task(across, [&](int64_t task) {
    const int64_t begin = task * tile, end = smaller(columns, begin + tile);
    for (int64_t top = 0; top < rows; top += tile)
      for (int64_t j = begin; j < end; ++j)
        for (int64_t i = top; i < smaller(rows, top + tile); ++i) convert(in[i * columns + j], out[j * rows + i]);
  });
}

#define INSTANTIATE(S)                                                                                           \
  template void project(                                                                                         \
      const Pairs&, Rows<const S>, Rows<const S>, const S*, int64_t, int64_t, Accumulator<S>*);                  \
  template void combine(const Term<S>*, int64_t, int64_t, Rows<S>);                                              \
  template void weight_gradient(                                                                                 \
      const Pairs&, const Accumulator<S>*, Rows<const S>, int64_t, int64_t, Accumulator<S>*)
INSTANTIATE(float);
INSTANTIATE(BFloat16);
INSTANTIATE(double);
#undef INSTANTIATE

template void bias_gradient(const Pairs&, const float*, int64_t, float*);
template void bias_gradient(const Pairs&, const double*, int64_t, double*);
template void transpose(const float*, int64_t, int64_t, float*);
template void transpose(const BFloat16*, int64_t, int64_t, BFloat16*);
template void transpose(const float*, int64_t, int64_t, BFloat16*);
template void transpose(const double*, int64_t, int64_t, double*);

}  // namespace monet::cpu
