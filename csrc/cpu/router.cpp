// The router: from logits to gates over the active pairs.
#include "router.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "groups.h"
#include "tasks.h"
#include "tiles.h"

namespace monet::cpu {
namespace {

constexpr int64_t kTaskTokens = 64;

template <class F>
void for_each_bit(const Word* words, int64_t count, const F& f) {
  for (int64_t word = 0; word < count; ++word)
    for (Word bits = words[word]; bits != 0; bits &= bits - 1) f(word * 64 + __builtin_ctzll(bits));
}

// Eight flags (0 or 1) as bits, the first the lowest.
inline Word pack_flags(const uint8_t* flags) {
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

}  // namespace

template <class T>
void run(const HeadMoments<T>& p) {
  const int64_t heads = p.logits.heads, experts = p.logits.experts, chunks = moment_chunks(p.logits.tokens);
  std::fill_n(p.workspace, chunks * 2 * heads, 0.0);
  for_each_range(p.logits.tokens, kMomentTokens, [&](int64_t begin, int64_t end) {
    double* of_chunk = p.workspace + begin / kMomentTokens * 2 * heads;
    for (int64_t t = begin; t < end; ++t)
      for (int64_t h = 0; h < heads; ++h)
        add_moments(p.logits.values + (t * heads + h) * experts, experts, of_chunk + h, of_chunk + heads + h);
  });
  std::fill_n(p.sums, 2 * heads, 0.0);
  for (int64_t i = 0; i < chunks * 2 * heads; ++i) p.sums[i % (2 * heads)] += p.workspace[i];
}

template <class T>
void run(const MarkActive<T, Word>& p) {
  const T* logits = p.logits.values;
  const int64_t tokens = p.logits.tokens, heads = p.logits.heads, experts = p.logits.experts;
  const int64_t words_per_token = words<Word>(experts);
  for_each_range(tokens, kTaskTokens, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> flags(words_per_token * 64);
    for (int64_t t = begin; t < end; ++t) {
      std::fill(flags.begin(), flags.end(), uint8_t{0});
      for (int64_t h = 0; h < heads; ++h) {
        const T* z = logits + (t * heads + h) * experts;
        const T largest = scan<T>().largest(z, experts);
        const T cut = p.threshold[h] < largest ? p.threshold[h] : largest;
        // The softmax of such a row is NaN in every half-expert, so all of them are kept.
        const bool undefined = !std::isfinite(largest) || std::isnan(p.threshold[h]);
        p.marks.largest[t * heads + h] = undefined ? std::numeric_limits<T>::quiet_NaN() : largest;
        p.marks.cut[t * heads + h] = undefined ? -std::numeric_limits<T>::infinity() : cut;
        if (undefined)
          std::fill(flags.begin(), flags.begin() + experts, uint8_t{1});
        else
          scan<T>().mark(z, experts, cut, flags.data());
      }
      int32_t count = 0;
      for (int64_t word = 0; word < words_per_token; ++word) {
        Word bits = 0;
        for (int byte = 0; byte < 8; ++byte) bits |= pack_flags(flags.data() + word * 64 + byte * 8) << byte * 8;
        p.marks.active[t * words_per_token + word] = bits;
        count += __builtin_popcountll(bits);
      }
      p.row_start[t + 1] = count;
    }
  });
  p.row_start[0] = 0;
  for (int64_t t = 0; t < tokens; ++t) p.row_start[t + 1] += p.row_start[t];
}

void run(const PlacePairs<Word>& p) {
  const int64_t words_per_token = words<Word>(p.experts), blocks = blocks_of(p.tokens);
  for_each_task(blocks, [&](int64_t block) {
    const int64_t begin = block * kBlockTokens, end = smaller(p.tokens, begin + kBlockTokens);
    std::vector<int32_t> next(p.experts, 0);
    for (int64_t t = begin; t < end; ++t)
      for_each_bit(p.active + t * words_per_token, words_per_token, [&](int64_t expert) { ++next[expert]; });
    int32_t start = p.row_start[begin];
    for (int64_t expert = 0; expert < p.experts; ++expert) {
      p.group_start[block * p.experts + expert] = start;
      start += next[expert];
      next[expert] = start - next[expert];
    }
    for (int64_t t = begin; t < end; ++t) {
      int32_t* pair = p.row_pair + p.row_start[t];
      for_each_bit(p.active + t * words_per_token, words_per_token, [&](int64_t expert) {
        p.token[next[expert]] = static_cast<int32_t>(t);
        *pair++ = next[expert]++;
      });
    }
  });
  p.group_start[blocks * p.experts] = p.row_start[p.tokens];
}

template <class T>
void run(const ActiveSoftmax<T, Word>& p) {
  const Pairs& pairs = p.pairs;
  const int64_t heads = p.logits.heads, words_per_token = words<Word>(pairs.experts);
  const T* logits = p.logits.values;
  T* gates = p.gates;
  for_each_range(pairs.tokens, kTaskTokens, [&](int64_t begin, int64_t end) {
    std::vector<T> sum(heads);
    for (int64_t t = begin; t < end; ++t) {
      const T *largest = p.marks.largest + t * heads, *cut = p.marks.cut + t * heads;
      const int32_t *first = pairs.row_pair + pairs.row_start[t], *last = pairs.row_pair + pairs.row_start[t + 1];
      std::fill(sum.begin(), sum.end(), T{0});
      const int32_t* pair = first;
      for_each_bit(p.marks.active + t * words_per_token, words_per_token, [&](int64_t expert) {
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
void run(const ActiveSoftmaxBackward<T>& p) {
  const Pairs& pairs = p.side.pairs;
  const int64_t heads = p.side.heads, row = heads * pairs.experts;
  const T *gates = p.side.gates, *dgates = p.dgates;
  std::vector<int32_t> expert(pairs.count);
  experts_of_pairs(pairs, expert.data());
  for_each_range(pairs.tokens, kTaskTokens, [&](int64_t begin, int64_t end) {
    std::memset(p.dlogits + begin * row, 0, (end - begin) * row * sizeof(T));
    std::vector<T> dot(heads);
    for (int64_t t = begin; t < end; ++t) {
      const int32_t *first = pairs.row_pair + pairs.row_start[t], *last = pairs.row_pair + pairs.row_start[t + 1];
      std::fill(dot.begin(), dot.end(), T{0});
      for (const int32_t* pair = first; pair != last; ++pair)
        for (int64_t h = 0, at = *pair * heads; h < heads; ++h) dot[h] += gates[at + h] * dgates[at + h];
      for (const int32_t* pair = first; pair != last; ++pair) {
        T* out = p.dlogits + t * row + expert[*pair];
        for (int64_t h = 0, at = *pair * heads; h < heads; ++h)
          out[h * pairs.experts] = gates[at + h] * (dgates[at + h] - dot[h]);
      }
    }
  });
}

#define INSTANTIATE(T)                             \
  template void run(const HeadMoments<T>&);         \
  template void run(const MarkActive<T, Word>&);    \
  template void run(const ActiveSoftmax<T, Word>&); \
  template void run(const ActiveSoftmaxBackward<T>&)
INSTANTIATE(float);
INSTANTIATE(double);
#undef INSTANTIATE

}  // namespace monet::cpu
