// Vectors of MONET_VECTOR_BYTES, by the compilers' own vector types: the same source for AVX-512, AVX2, SSE and NEON.
//
// Included by files that are compiled for one instruction set each. Everything is in an unnamed namespace and nothing
// of the standard library is instantiated, so that no function compiled for a newer machine can be linked into the
// code that runs everywhere.
#pragma once

#include <cstdint>

#include "../numbers.h"

namespace monet::cpu {
namespace {

template <class C>
struct VectorOf;

template <>
struct VectorOf<float> {
  typedef float Values __attribute__((vector_size(MONET_VECTOR_BYTES)));
  typedef int32_t Lanes __attribute__((vector_size(MONET_VECTOR_BYTES)));
};

template <>
struct VectorOf<double> {
  typedef double Values __attribute__((vector_size(MONET_VECTOR_BYTES)));
  typedef int64_t Lanes __attribute__((vector_size(MONET_VECTOR_BYTES)));
};

template <class C>
using Values = typename VectorOf<C>::Values;

template <class C>
constexpr int lanes = MONET_VECTOR_BYTES / sizeof(C);

template <class C>
inline Values<C> load(const C* from) {
  Values<C> v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

inline Values<float> load(const BFloat16* from) {
  typedef uint16_t Halves __attribute__((vector_size(MONET_VECTOR_BYTES / 2)));
  typedef uint32_t Words __attribute__((vector_size(MONET_VECTOR_BYTES)));
  Halves bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  return reinterpret_cast<Values<float>>(__builtin_convertvector(bits, Words) << 16);
}

template <class C>
inline void store(C* to, Values<C> v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// The first `count` values; 0 in the other lanes.
template <class S>
inline Values<Accumulator<S>> load_first(const S* from, int64_t count) {
  S padded[lanes<Accumulator<S>>] = {};
  __builtin_memcpy(padded, from, count * sizeof(S));
  return load(padded);
}

template <class C>
inline void store_first(C* to, Values<C> v, int64_t count) {
  __builtin_memcpy(to, &v, count * sizeof(C));
}

// a and b hold partial sums in groups of `width` lanes. Halves every group; the groups of a come first.
template <class C, int width>
inline Values<C> fold(Values<C> a, Values<C> b) {
  constexpr int half = width / 2, of_a = lanes<C> / 2;
  typename VectorOf<C>::Lanes low, high;
  for (int lane = 0; lane < lanes<C>; ++lane) {
    const int within = lane % of_a, source = lane / of_a * lanes<C> + within / half * width + within % half;
    low[lane] = source;
    high[lane] = source + half;
  }
#if defined(__clang__)
  Values<C> x, y;
  for (int lane = 0; lane < lanes<C>; ++lane) {
    x[lane] = lane < of_a ? a[low[lane]] : b[low[lane] - lanes<C>];
    y[lane] = lane < of_a ? a[high[lane]] : b[high[lane] - lanes<C>];
  }
  return x + y;
#else
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
#endif
}

// Partial sums of `count` vectors (a power of two), side by side in groups of lanes / count.
template <class C, int count>
inline Values<C> partial_sums(const Values<C>* v) {
  if constexpr (count == 1)
    return v[0];
  else
    return fold<C, 2 * lanes<C> / count>(partial_sums<C, count / 2>(v), partial_sums<C, count / 2>(v + count / 2));
}

template <class C, int width>
inline Values<C> finish_sums(Values<C> v) {
  if constexpr (width == 1)
    return v;
  else
    return finish_sums<C, width / 2>(fold<C, width>(v, v));
}

// sums[i] = sum over the lanes of v[i].
template <class C, int count>
inline void sum_lanes(const Values<C>* v, C* sums) {
  constexpr int part = []() constexpr {
    int power = lanes<C>;
    while (power > count) power /= 2;
    return power;
  }();
  store_first<C>(sums, finish_sums<C, lanes<C> / part>(partial_sums<C, part>(v)), part);
  if constexpr (count > part) sum_lanes<C, count - part>(v + part, sums + part);
}

}  // namespace
}  // namespace monet::cpu
