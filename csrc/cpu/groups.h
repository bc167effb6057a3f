// The pairs of a block of tokens, grouped by half-expert. See ../pairs.h.
#pragma once

#include <algorithm>

#include "../pairs.h"
#include "tasks.h"

namespace monet::cpu {

// f(half-expert, first pair, number of pairs) for the groups of half-experts begin..end-1 that are not empty.
template <class F>
inline void for_each_group(const Pairs& pairs, int64_t block, int64_t begin, int64_t end, const F& f) {
  const int32_t* start = pairs.group_start + block * pairs.experts;
  for (int64_t expert = begin; expert < end; ++expert) {
    const int64_t first = start[expert], count = start[expert + 1] - first;
    if (count > 0) f(expert, first, count);
  }
}
template <class F>
inline void for_each_group(const Pairs& pairs, int64_t block, const F& f) {
  for_each_group(pairs, block, 0, pairs.experts, f);
}

// The half-expert of each pair, [pairs].
inline void experts_of_pairs(const Pairs& pairs, int32_t* expert) {
  for_each_task(pairs.blocks(), [&](int64_t block) {
    for_each_group(pairs, block, [&](int64_t i, int64_t first, int64_t count) {
      std::fill_n(expert + first, count, static_cast<int32_t>(i));
    });
  });
}

}  // namespace monet::cpu
