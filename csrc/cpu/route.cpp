#include "route.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../parallel.h"
#include "mixing.h"
#include "products.h"

namespace monet::cpu {
namespace {

constexpr int64_t kChunkTokens = 64;  // tokens of a task

template <class F>
void for_each_chunk(int64_t tokens, const F& f) {
  for_each_task(ceil_div(tokens, kChunkTokens), [&](int64_t chunk) {
    f(chunk, chunk * kChunkTokens, smaller(tokens, (chunk + 1) * kChunkTokens));
  });
}

// For each group of a block: f(half-expert, first pair, end).
template <class F>
void for_each_group(const Pairs& pairs, int64_t block, const F& f) {
  const int32_t* start = pairs.group_start + block * pairs.experts;
  for (int64_t expert = 0; expert < pairs.experts; ++expert) f(expert, start[expert], start[expert + 1]);
}

template <class F>
void for_each_bit(const uint64_t* words, int64_t count, const F& f) {
  for (int64_t word = 0; word < count; ++word)
    for (uint64_t bits = words[word]; bits != 0; bits &= bits - 1) f(word * 64 + __builtin_ctzll(bits));
}

// Eight flags (0 or 1) as bits, the first the lowest.
inline uint64_t pack_flags(const uint8_t* flags) {
  uint64_t bytes;
  std::memcpy(&bytes, flags, sizeof bytes);
  return bytes * 0x0102040810204080 >> 56;  // brings bit 0 of byte i to bit 56 + i
}

template <class T>
void add_moments(const T* values, int64_t count, double* sum, double* square) {
  constexpr int lanes = 8;
  double s[lanes] = {}, q[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes)
    for (int lane = 0; lane < lanes; ++lane) {
      const double value = values[i + lane];
      s[lane] += value;
      q[lane] += value * value;
    }
  for (; i < count; ++i) {
    const double value = values[i];
    s[0] += value;
    q[0] += value * value;
  }
  for (int lane = 0; lane < lanes; ++lane) {
    *sum += s[lane];
    *square += q[lane];
  }
}

// The largest gate of a token in one head, and how many of its pairs have it.
template <class T>
struct Largest {
  T gate;
  int32_t count;
};

template <class T>
void find_largest(const T* gates, const Pairs& pairs, int64_t token, std::vector<Largest<T>>& largest) {
  std::fill(largest.begin(), largest.end(), Largest<T>{T{0}, 0});
  const int64_t heads = largest.size();
  for (int64_t entry = pairs.row_start[token]; entry < pairs.row_start[token + 1]; ++entry)
    for (int64_t h = 0, at = pairs.row_pair[entry] * heads; h < heads; ++h) {
      const T gate = gates[at + h];
      Largest<T>& best = largest[h];
      if (gate == best.gate)
        ++best.count;
      else if (!(gate <= best.gate) && !std::isnan(best.gate))  // once NaN, it stays
        best = {gate, 1};
    }
}

}  // namespace

template <class T>
void head_moments(const T* logits, int64_t tokens, int64_t heads, int64_t experts, double* sums) {
  std::vector<double> partial(ceil_div(tokens, kChunkTokens) * 2 * heads, 0.0);
  for_each_chunk(tokens, [&](int64_t chunk, int64_t begin, int64_t end) {
    double* of_chunk = partial.data() + chunk * 2 * heads;
    for (int64_t t = begin; t < end; ++t)
      for (int64_t h = 0; h < heads; ++h)
        add_moments(logits + (t * heads + h) * experts, experts, of_chunk + h, of_chunk + heads + h);
  });
  std::fill(sums, sums + 2 * heads, 0.0);
  for (size_t i = 0; i < partial.size(); ++i) sums[i % (2 * heads)] += partial[i];
}

template <class T>
void mark_active(
    const T* logits, const T* threshold, int64_t tokens, int64_t heads, int64_t experts, const Marks<T>& marks,
    int32_t* row_start) {
  const int64_t words = mark_words(experts);
  for_each_chunk(tokens, [&](int64_t, int64_t begin, int64_t end) {
    std::vector<uint8_t> flags(words * 64);
    for (int64_t t = begin; t < end; ++t) {
      std::fill(flags.begin(), flags.end(), uint8_t{0});
      for (int64_t h = 0; h < heads; ++h) {
        const T* z = logits + (t * heads + h) * experts;
        const T largest = scan<T>().largest(z, experts);
        const T cut = threshold[h] < largest ? threshold[h] : largest;
        // The softmax of such a row is NaN in every half-expert, so all of them are kept.
        const bool undefined = !std::isfinite(largest) || std::isnan(threshold[h]);
        marks.largest[t * heads + h] = undefined ? std::numeric_limits<T>::quiet_NaN() : largest;
        marks.cut[t * heads + h] = undefined ? -std::numeric_limits<T>::infinity() : cut;
        if (undefined)
          std::fill(flags.begin(), flags.begin() + experts, uint8_t{1});
        else
          scan<T>().mark(z, experts, cut, flags.data());
      }
      int32_t count = 0;
      for (int64_t word = 0; word < words; ++word) {
        uint64_t bits = 0;
        for (int byte = 0; byte < 8; ++byte) bits |= pack_flags(flags.data() + word * 64 + byte * 8) << byte * 8;
        marks.active[t * words + word] = bits;
        count += __builtin_popcountll(bits);
      }
      row_start[t + 1] = count;
    }
  });
  row_start[0] = 0;
  for (int64_t t = 0; t < tokens; ++t) row_start[t + 1] += row_start[t];
}

void place_pairs(
    const uint64_t* active, int64_t tokens, int64_t experts, const int32_t* row_start, int32_t* token,
    int32_t* group_start, int32_t* row_pair) {
  const int64_t words = mark_words(experts);
  const int64_t blocks = ceil_div(tokens, kBlockTokens);
  for_each_task(blocks, [&](int64_t block) {
    const int64_t begin = block * kBlockTokens, end = smaller(tokens, begin + kBlockTokens);
    std::vector<int32_t> next(experts, 0);
    for (int64_t t = begin; t < end; ++t)
      for_each_bit(active + t * words, words, [&](int64_t expert) { ++next[expert]; });
    int32_t start = row_start[begin];
    for (int64_t expert = 0; expert < experts; ++expert) {
      group_start[block * experts + expert] = start;
      start += next[expert];
      next[expert] = start - next[expert];
    }
    for (int64_t t = begin; t < end; ++t) {
      int32_t* pair = row_pair + row_start[t];
      for_each_bit(active + t * words, words, [&](int64_t expert) {
        token[next[expert]] = static_cast<int32_t>(t);
        *pair++ = next[expert]++;
      });
    }
  });
  group_start[blocks * experts] = row_start[tokens];
}

template <class T>
void active_softmax(const T* logits, const Marks<T>& marks, const Pairs& pairs, int64_t heads, T* gates) {
  const int64_t words = mark_words(pairs.experts);
  for_each_chunk(pairs.tokens, [&](int64_t, int64_t begin, int64_t end) {
    std::vector<T> sum(heads);
    for (int64_t t = begin; t < end; ++t) {
      const T *largest = marks.largest + t * heads, *cut = marks.cut + t * heads;
      const int32_t *first = pairs.row_pair + pairs.row_start[t], *last = pairs.row_pair + pairs.row_start[t + 1];
      std::fill(sum.begin(), sum.end(), T{0});
      const int32_t* pair = first;
      for_each_bit(marks.active + t * words, words, [&](int64_t expert) {
        T* gate = gates + *pair++ * heads;
        for (int64_t h = 0; h < heads; ++h) {
          const T z = logits[(t * heads + h) * pairs.experts + expert];
          // Written so that NaN passes the comparison.
          gate[h] = z < cut[h] ? T{0} : std::exp(z - largest[h]);
          sum[h] += gate[h];
        }
      });
      for (pair = first; pair != last; ++pair)
        for (int64_t h = 0; h < heads; ++h) gates[*pair * heads + h] /= sum[h];
    }
  });
}

template <class T>
void active_softmax_backward(const T* gates, const T* dgates, const Pairs& pairs, int64_t heads, T* dlogits) {
  std::vector<int32_t> expert(pairs.count);
  experts_of_pairs(pairs, expert.data());
  const int64_t row = heads * pairs.experts;
  for_each_chunk(pairs.tokens, [&](int64_t, int64_t begin, int64_t end) {
    std::memset(dlogits + begin * row, 0, (end - begin) * row * sizeof(T));
    std::vector<T> dot(heads);
    for (int64_t t = begin; t < end; ++t) {
      const int32_t *first = pairs.row_pair + pairs.row_start[t], *last = pairs.row_pair + pairs.row_start[t + 1];
      std::fill(dot.begin(), dot.end(), T{0});
      for (const int32_t* pair = first; pair != last; ++pair)
        for (int64_t h = 0, at = *pair * heads; h < heads; ++h) dot[h] += gates[at + h] * dgates[at + h];
      for (const int32_t* pair = first; pair != last; ++pair) {
        T* out = dlogits + t * row + expert[*pair];
        for (int64_t h = 0, at = *pair * heads; h < heads; ++h)
          out[h * pairs.experts] = gates[at + h] * (dgates[at + h] - dot[h]);
      }
    }
  });
}

template <class T>
void scatter_dense(const T* values, const Pairs& pairs, int64_t heads, T* dense) {
  for_each_task(pairs.blocks(), [&](int64_t block) {
    const int64_t begin = block * kBlockTokens, end = smaller(pairs.tokens, begin + kBlockTokens);
    std::memset(dense + begin * heads * pairs.experts, 0, (end - begin) * heads * pairs.experts * sizeof(T));
    for_each_group(pairs, block, [&](int64_t expert, int64_t first, int64_t last) {
      for (int64_t pair = first; pair < last; ++pair)
        for (int64_t h = 0; h < heads; ++h)
          dense[(pairs.token[pair] * heads + h) * pairs.experts + expert] = values[pair * heads + h];
    });
  });
}

template <class T>
void gather_dense(const T* dense, const Pairs& pairs, int64_t heads, T* values) {
  for_each_task(pairs.blocks(), [&](int64_t block) {
    for_each_group(pairs, block, [&](int64_t expert, int64_t first, int64_t last) {
      for (int64_t pair = first; pair < last; ++pair)
        for (int64_t h = 0; h < heads; ++h)
          values[pair * heads + h] = dense[(pairs.token[pair] * heads + h) * pairs.experts + expert];
    });
  });
}

template <class T>
void sum_over_tokens(const T* gates, const Pairs& pairs, int64_t heads, T* totals) {
  for_each_task(pairs.experts, [&](int64_t expert) {
    std::vector<double> sum(heads, 0.0);
    for (int64_t block = 0; block < pairs.blocks(); ++block) {
      const int32_t* start = pairs.group_start + block * pairs.experts + expert;
      for (int64_t pair = start[0]; pair < start[1]; ++pair)
        for (int64_t h = 0; h < heads; ++h) sum[h] += gates[pair * heads + h];
    }
    for (int64_t h = 0; h < heads; ++h) totals[h * pairs.experts + expert] = static_cast<T>(sum[h]);
  });
}

template <class T>
void sum_over_tokens_backward(const T* dtotals, const Pairs& pairs, int64_t heads, T* dgates) {
  for_each_task(pairs.blocks(), [&](int64_t block) {
    for_each_group(pairs, block, [&](int64_t expert, int64_t first, int64_t last) {
      for (int64_t pair = first; pair < last; ++pair)
        for (int64_t h = 0; h < heads; ++h) dgates[pair * heads + h] = dtotals[h * pairs.experts + expert];
    });
  });
}

template <class T>
void sum_of_largest(const T* gates, const Pairs& pairs, int64_t heads, T* totals) {
  std::vector<double> partial(ceil_div(pairs.tokens, kChunkTokens) * heads, 0.0);
  for_each_chunk(pairs.tokens, [&](int64_t chunk, int64_t begin, int64_t end) {
    std::vector<Largest<T>> largest(heads);
    for (int64_t t = begin; t < end; ++t) {
      find_largest(gates, pairs, t, largest);
      for (int64_t h = 0; h < heads; ++h) partial[chunk * heads + h] += largest[h].gate;
    }
  });
  std::vector<double> sum(heads, 0.0);
  for (size_t i = 0; i < partial.size(); ++i) sum[i % heads] += partial[i];
  for (int64_t h = 0; h < heads; ++h) totals[h] = static_cast<T>(sum[h]);
}

template <class T>
void sum_of_largest_backward(const T* gates, const T* dtotals, const Pairs& pairs, int64_t heads, T* dgates) {
  for_each_chunk(pairs.tokens, [&](int64_t, int64_t begin, int64_t end) {
    std::vector<Largest<T>> largest(heads);
    for (int64_t t = begin; t < end; ++t) {
      find_largest(gates, pairs, t, largest);
      for (int64_t entry = pairs.row_start[t]; entry < pairs.row_start[t + 1]; ++entry)
        for (int64_t h = 0, at = pairs.row_pair[entry] * heads; h < heads; ++h)
          dgates[at + h] = gates[at + h] == largest[h].gate ? dtotals[h] / largest[h].count : T{0};
    }
  });
}

template void head_moments(const float*, int64_t, int64_t, int64_t, double*);
template void head_moments(const double*, int64_t, int64_t, int64_t, double*);

#define INSTANTIATE(T)                                                                                           \
  template void mark_active(const T*, const T*, int64_t, int64_t, int64_t, const Marks<T>&, int32_t*);           \
  template void active_softmax(const T*, const Marks<T>&, const Pairs&, int64_t, T*);                            \
  template void active_softmax_backward(const T*, const T*, const Pairs&, int64_t, T*);                          \
  template void scatter_dense(const T*, const Pairs&, int64_t, T*);                                              \
  template void gather_dense(const T*, const Pairs&, int64_t, T*);                                               \
  template void sum_over_tokens(const T*, const Pairs&, int64_t, T*);                                            \
  template void sum_over_tokens_backward(const T*, const Pairs&, int64_t, T*);                                   \
  template void sum_of_largest(const T*, const Pairs&, int64_t, T*);                                             \
  template void sum_of_largest_backward(const T*, const T*, const Pairs&, int64_t, T*)
INSTANTIATE(float);
INSTANTIATE(double);
#undef INSTANTIATE

}  // namespace monet::cpu
