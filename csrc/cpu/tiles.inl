// The tiles of tiles.h for the instruction set this is compiled for. See kernels.inl.

#include "tasks.h"
#include "tiles.h"
#include "vector.h"

namespace monet::cpu {
namespace {

// Rows are fetched this many pairs before they are needed: tokens of a group lie apart, which no hardware foresees.
constexpr int64_t kAhead = 8;

template <int n>
struct Constant {
  static constexpr int value = n;
};

// f(Constant<n>) for an n in 1..max that is known only now.
template <int max, class F>
inline void with_constant(int64_t n, const F& f) {
  if (n == max)
    f(Constant<max>{});
  else if constexpr (max > 1)
    with_constant<max - 1>(n, f);
}

// Cuts 0..count-1 into as few parts of at most max as can be, of even size: f(begin, Constant<size>).
template <int max, class F>
inline void for_each_tile(int64_t count, const F& f) {
  if (count == 0) return;
  const int64_t even = ceil_div(count, ceil_div(count, max));
  for (int64_t begin = 0; begin < count; begin += even)
    with_constant<max>(smaller(even, count - begin), [&](auto size) { f(begin, size); });
}

// Reads a full vector, or the first few values at the end of a row.
struct Full {
  template <class S>
  Values<Accumulator<S>> read(const S* from) const {
    return load(from);
  }
  template <class C>
  void write(C* to, Values<C> v) const {
    store(to, v);
  }
};
struct First {
  int64_t count;
  template <class S>
  Values<Accumulator<S>> read(const S* from) const {
    return load_first(from, count);
  }
  template <class C>
  void write(C* to, Values<C> v) const {
    store_first(to, v, count);
  }
};

// f(column, Constant<vectors>, Full or First) over all columns: wide tiles, then single vectors, then the rest.
template <class C, int max, class F>
inline void for_each_column_tile(int64_t columns, const F& f) {
  int64_t k = 0;
  for (; k + max * lanes<C> <= columns; k += max * lanes<C>) f(k, Constant<max>{}, Full{});
  for (; k + lanes<C> <= columns; k += lanes<C>) f(k, Constant<1>{}, Full{});
  if (k < columns) f(k, Constant<1>{}, First{columns - k});
}

template <class S, int pairs, int units>
void dot_tile(Rows<const S> x, const int32_t* token, Rows<const S> w, int64_t columns, Rows<Accumulator<S>> out) {
  using C = Accumulator<S>;
  const S* row[pairs];
  for (int p = 0; p < pairs; ++p) row[p] = x.row(token[p]);
  Values<C> sum[pairs * units] = {};
  const auto step = [&](int64_t k, const auto& access) {
    Values<C> weight[units];
#pragma GCC unroll 16
    for (int u = 0; u < units; ++u) weight[u] = access.read(w.row(u) + k);
#pragma GCC unroll 16
    for (int p = 0; p < pairs; ++p) {
      const Values<C> value = access.read(row[p] + k);
#pragma GCC unroll 16
      for (int u = 0; u < units; ++u) sum[p * units + u] += value * weight[u];
    }
  };
  int64_t k = 0;
  for (; k + lanes<C> <= columns; k += lanes<C>) step(k, Full{});
  if (k < columns) step(k, First{columns - k});
  C total[pairs * units];
  sum_lanes<C, pairs * units>(sum, total);
  for (int p = 0; p < pairs; ++p)
    for (int u = 0; u < units; ++u) out.row(p)[u] += total[p * units + u];
}

template <class S>
void dot(const Dot<S>& p) {
  for_each_tile<DOT_UNITS>(p.units, [&](int64_t u, auto units) {
    for_each_tile<DOT_PAIRS>(p.pairs, [&](int64_t pair, auto pairs) {
      dot_tile<S, pairs.value, units.value>(
          p.x, p.token + pair, {p.w.row(u), p.w.stride}, p.columns, {p.out.row(pair) + u, p.out.stride});
    });
  });
}

template <class S, int pairs, int vectors, class Access>
void scatter_tile(
    const typename Scatter<S>::Term* terms, int term_count, int64_t first_pair, int64_t column, const int32_t* token,
    int32_t first_token, int64_t units, Rows<Accumulator<S>> out, const Access& access) {
  using C = Accumulator<S>;
  C* row[pairs];
  for (int i = 0; i < pairs; ++i) row[i] = out.row(token[first_pair + i] - first_token) + column;
  Values<C> sum[pairs][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < pairs; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) sum[i][v] = access.read(row[i] + v * lanes<C>);
  for (int term = 0; term < term_count; ++term) {
    const Rows<const C> y{terms[term].y.row(first_pair), terms[term].y.stride};
    const S* w = terms[term].w.data + column;
    for (int64_t u = 0; u < units; ++u, w += terms[term].w.stride) {
      Values<C> weight[vectors];
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) weight[v] = access.read(w + v * lanes<C>);
#pragma GCC unroll 16
      for (int i = 0; i < pairs; ++i) {
        const C factor = y.data[i * y.stride + u];
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) sum[i][v] += weight[v] * factor;
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < pairs; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) access.write(row[i] + v * lanes<C>, sum[i][v]);
}

template <class S>
void scatter(const Scatter<S>& given) {
  const Scatter<S> p = given;  // a copy: what is written to `out` might be taken for a part of `given`
  for_each_column_tile<Accumulator<S>, SCATTER_VECTORS>(p.columns, [&](int64_t k, auto vectors, const auto& access) {
    for_each_tile<SCATTER_PAIRS>(p.pairs, [&](int64_t pair, auto pairs) {
      for (int64_t next = pair + pairs.value; next < smaller(p.pairs, pair + 2 * pairs.value); ++next)
        for (int v = 0; v < vectors.value; ++v)
          __builtin_prefetch(p.out.row(p.token[next] - p.first_token) + k + v * lanes<Accumulator<S>>, 1);
      scatter_tile<S, pairs.value, vectors.value>(
          p.terms, p.term_count, pair, k, p.token, p.first_token, p.units, p.out, access);
    });
  });
}

template <class S, int units, int vectors, class Access>
void outer_tile(
    Rows<const Accumulator<S>> y, Rows<const S> x, const int32_t* token, int64_t pairs, Rows<Accumulator<S>> out,
    const Access& access) {
  using C = Accumulator<S>;
  Values<C> sum[units][vectors];
#pragma GCC unroll 16
  for (int u = 0; u < units; ++u)
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) sum[u][v] = access.read(out.row(u) + v * lanes<C>);
  for (int64_t p = 0; p < pairs; ++p) {
    const S* row = x.row(token[p]);
    const S* ahead = x.row(token[p + kAhead < pairs ? p + kAhead : p]);
    for (int v = 0; v < vectors; ++v) __builtin_prefetch(ahead + v * lanes<C>);
    Values<C> value[vectors];
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) value[v] = access.read(row + v * lanes<C>);
#pragma GCC unroll 16
    for (int u = 0; u < units; ++u) {
      const C factor = y.row(p)[u];
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) sum[u][v] += value[v] * factor;
    }
  }
#pragma GCC unroll 16
  for (int u = 0; u < units; ++u)
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) access.write(out.row(u) + v * lanes<C>, sum[u][v]);
}

template <class S>
void outer(const Outer<S>& p) {
  for_each_column_tile<Accumulator<S>, OUTER_VECTORS>(p.columns, [&](int64_t k, auto vectors, const auto& access) {
    for_each_tile<OUTER_UNITS>(p.units, [&](int64_t u, auto units) {
      outer_tile<S, units.value, vectors.value>(
          p.y.from_column(u), p.x.from_column(k), p.token, p.pairs, {p.out.row(u) + k, p.out.stride}, access);
    });
  });
}

template <class S, int vectors, class Access>
void gather_tile(
    const Accumulator<S>* y, const int32_t* row, int64_t entries, Rows<const S> w, Accumulator<S>* out,
    const Access& access) {
  using C = Accumulator<S>;
  Values<C> sum[vectors] = {};
  for (int64_t e = 0; e < entries; ++e) {
    const S* weight = w.row(row[e]);
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) sum[v] += access.read(weight + v * lanes<C>) * y[e];
  }
#pragma GCC unroll 16
  for (int v = 0; v < vectors; ++v) access.write(out + v * lanes<C>, sum[v]);
}

template <class S>
void gather(const Gather<S>& p) {
  for_each_column_tile<Accumulator<S>, GATHER_VECTORS>(p.columns, [&](int64_t k, auto vectors, const auto& access) {
    gather_tile<S, vectors.value>(p.y, p.row, p.entries, p.w.from_column(k), p.out + k, access);
  });
}

template <class T>
T largest(const T* values, int64_t count) {
  Values<T> best, nan = {};
  for (int lane = 0; lane < lanes<T>; ++lane) best[lane] = -__builtin_inf();
  const auto take = [&](Values<T> v) {
    best = v > best ? v : best;
    nan = v == v ? nan : v;
  };
  int64_t i = 0;
  for (; i + lanes<T> <= count; i += lanes<T>) take(load(values + i));
  T result = -__builtin_inf(), bad = 0;
  const auto take_one = [&](T value, T not_a_number) {
    result = value > result ? value : result;
    bad = not_a_number == not_a_number ? bad : not_a_number;
  };
  for (int lane = 0; lane < lanes<T>; ++lane) take_one(best[lane], nan[lane]);
  for (; i < count; ++i) take_one(values[i], values[i]);
  return bad == bad ? result : bad;
}

template <class T>
void mark(const T* values, int64_t count, T cut, uint8_t* flags) {
  for (int64_t i = 0; i < count; ++i) flags[i] |= values[i] >= cut;
}

template <class T>
constexpr Scan<T> scan_table = {largest<T>, mark<T>};
template <class S>
constexpr Tiles<S> tiles_table = {dot<S>, scatter<S>, outer<S>, gather<S>};

}  // namespace
}  // namespace monet::cpu
