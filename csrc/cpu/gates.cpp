// Functions of the gates of one side.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "groups.h"
#include "router.h"
#include "tasks.h"

namespace monet::cpu {
namespace {

constexpr int64_t kTaskTokens = 64;

// f(half-expert, pair) for all pairs, by blocks of tokens.
template <class F>
void for_each_pair(const Pairs& pairs, const F& f) {
  for_each_task(pairs.blocks(), [&](int64_t block) {
    for_each_group(pairs, block, [&](int64_t expert, int64_t first, int64_t count) {
      for (int64_t pair = first; pair < first + count; ++pair) f(expert, pair);
    });
  });
}

// The largest gate of a token in one head, and how many of its pairs have it.
template <class T>
struct Largest {
  T gate;
  int32_t count;
};

template <class T>
void find_largest(const Side<T>& side, int64_t token, std::vector<Largest<T>>& largest) {
  const Pairs& pairs = side.pairs;
  std::fill(largest.begin(), largest.end(), Largest<T>{T{0}, 0});
  for (int64_t entry = pairs.row_start[token]; entry < pairs.row_start[token + 1]; ++entry)
    for (int64_t h = 0, at = pairs.row_pair[entry] * side.heads; h < side.heads; ++h) {
      const T gate = side.gates[at + h];
      Largest<T>& best = largest[h];
      if (gate == best.gate)
        ++best.count;
      else if (!(gate <= best.gate) && !std::isnan(best.gate))  // once NaN, it stays
        best = {gate, 1};
    }
}

}  // namespace

template <class T>
void run(const DenseGates<T>& p) {
  const Pairs& pairs = p.side.pairs;
  const int64_t heads = p.side.heads, row = heads * pairs.experts;
  for_each_range(pairs.tokens, kBlockTokens, [&](int64_t begin, int64_t end) {
    std::memset(p.dense + begin * row, 0, (end - begin) * row * sizeof(T));
  });
  for_each_pair(pairs, [&](int64_t expert, int64_t pair) {
    T* out = p.dense + pairs.token[pair] * row + expert;
    for (int64_t h = 0; h < heads; ++h) out[h * pairs.experts] = p.side.gates[pair * heads + h];
  });
}

template <class T>
void run(const DenseGatesBackward<T>& p) {
  const Pairs& pairs = p.side.pairs;
  const int64_t heads = p.side.heads, row = heads * pairs.experts;
  for_each_pair(pairs, [&](int64_t expert, int64_t pair) {
    const T* from = p.ddense + pairs.token[pair] * row + expert;
    for (int64_t h = 0; h < heads; ++h) p.dgates[pair * heads + h] = from[h * pairs.experts];
  });
}

template <class T>
void run(const SumOverTokens<T>& p) {
  const Pairs& pairs = p.side.pairs;
  const int64_t heads = p.side.heads;
  for_each_task(pairs.experts, [&](int64_t expert) {
    std::vector<double> sum(heads, 0.0);
    for (int64_t block = 0; block < pairs.blocks(); ++block)
      for_each_group(pairs, block, expert, expert + 1, [&](int64_t, int64_t first, int64_t count) {
        for (int64_t pair = first; pair < first + count; ++pair)
          for (int64_t h = 0; h < heads; ++h) sum[h] += p.side.gates[pair * heads + h];
      });
    for (int64_t h = 0; h < heads; ++h) p.totals[h * pairs.experts + expert] = static_cast<T>(sum[h]);
  });
}

template <class T>
void run(const SumOverTokensBackward<T>& p) {
  const int64_t heads = p.side.heads, experts = p.side.pairs.experts;
  for_each_pair(p.side.pairs, [&](int64_t expert, int64_t pair) {
    for (int64_t h = 0; h < heads; ++h) p.dgates[pair * heads + h] = p.dtotals[h * experts + expert];
  });
}

template <class T>
void run(const SumOfLargest<T>& p) {
  const int64_t tokens = p.side.pairs.tokens, heads = p.side.heads;
  for_each_range(tokens, kTaskTokens, [&](int64_t begin, int64_t end) {
    std::vector<Largest<T>> largest(heads);
    for (int64_t t = begin; t < end; ++t) {
      find_largest(p.side, t, largest);
      for (int64_t h = 0; h < heads; ++h) p.workspace[t * heads + h] = largest[h].gate;
    }
  });
  std::vector<double> sum(heads, 0.0);
  for (int64_t i = 0; i < tokens * heads; ++i) sum[i % heads] += p.workspace[i];
  for (int64_t h = 0; h < heads; ++h) p.totals[h] = static_cast<T>(sum[h]);
}

template <class T>
void run(const SumOfLargestBackward<T>& p) {
  const Pairs& pairs = p.side.pairs;
  const int64_t heads = p.side.heads;
  for_each_range(pairs.tokens, kTaskTokens, [&](int64_t begin, int64_t end) {
    std::vector<Largest<T>> largest(heads);
    for (int64_t t = begin; t < end; ++t) {
      find_largest(p.side, t, largest);
      for (int64_t entry = pairs.row_start[t]; entry < pairs.row_start[t + 1]; ++entry)
        for (int64_t h = 0, at = pairs.row_pair[entry] * heads; h < heads; ++h)
          p.dgates[at + h] = p.side.gates[at + h] == largest[h].gate ? p.dtotals[h] / largest[h].count : T{0};
    }
  });
}

#define INSTANTIATE(T)                               \
  template void run(const DenseGates<T>&);            \
  template void run(const DenseGatesBackward<T>&);    \
  template void run(const SumOverTokens<T>&);         \
  template void run(const SumOverTokensBackward<T>&); \
  template void run(const SumOfLargest<T>&);          \
  template void run(const SumOfLargestBackward<T>&)
INSTANTIATE(float);
INSTANTIATE(double);
#undef INSTANTIATE

}  // namespace monet::cpu
