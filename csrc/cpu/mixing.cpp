// What happens to a token between the input and the output layer of its half-experts.
#include "mixing.h"

#include <algorithm>
#include <vector>

#include "../parallel.h"

namespace monet::cpu {
namespace {

// mix(first token, end, room) for all tokens.
template <class C, class F>
void for_each_run_of_tokens(const Side<C>& side, const F& mix) {
  for_each_task(ceil_div(side.pairs.tokens, kTaskTokens), [&](int64_t task) {
    std::vector<VectorRoom> room(kRoomsPerHead * side.heads);
    mix(task * kTaskTokens, smaller(side.pairs.tokens, (task + 1) * kTaskTokens), room.data());
  });
}

}  // namespace

template <class C>
void mix_vertical(
    const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* s1, const C* s2, int64_t units,
    const VerticalMix<C>& mix) {
  if (mask) return mix_vertical_masked(side1, side2, mask, s1, s2, units, mix);
  for_each_run_of_tokens(side1, [&](int64_t begin, int64_t end, VectorRoom* room) {
    mixing<C>().vertical(side1, side2, s1, s2, units, mix, begin, end, room);
  });
}

template <class C>
void mix_vertical_backward(
    const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* s1, const C* s2, int64_t units,
    const VerticalMix<const C>& dmix, const VerticalMix<C>& mix, C* ds1, C* ds2, C* dgates1, C* dgates2) {
  if (mask)
    return mix_vertical_masked_backward(side1, side2, mask, s1, s2, units, dmix, mix, ds1, ds2, dgates1, dgates2);
  for_each_run_of_tokens(side1, [&](int64_t begin, int64_t end, VectorRoom* room) {
    mixing<C>().vertical_backward(
        side1, side2, s1, s2, units, dmix, mix, ds1, ds2, dgates1, dgates2, begin, end, room);
  });
}

template <class C>
void mix_horizontal(
    const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* s1, int64_t units, C* y) {
  if (mask) return mix_horizontal_masked(side1, side2, mask, s1, units, y);
  for_each_run_of_tokens(side1, [&](int64_t begin, int64_t end, VectorRoom* room) {
    mixing<C>().horizontal(side1, side2, s1, units, y, begin, end, room);
  });
}

template <class C>
void mix_horizontal_backward(
    const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* s1, int64_t units, const C* dy, C* y,
    C* ds1, C* dgates1, C* dgates2) {
  if (mask) return mix_horizontal_masked_backward(side1, side2, mask, s1, units, dy, y, ds1, dgates1, dgates2);
  for_each_run_of_tokens(side1, [&](int64_t begin, int64_t end, VectorRoom* room) {
    mixing<C>().horizontal_backward(side1, side2, s1, units, dy, y, ds1, dgates1, dgates2, begin, end, room);
  });
}

void experts_of_pairs(const Pairs& pairs, int32_t* expert) {
  for_each_task(pairs.blocks(), [&](int64_t block) {
    const int32_t* start = pairs.group_start + block * pairs.experts;
    for (int64_t i = 0; i < pairs.experts; ++i)
      std::fill(expert + start[i], expert + start[i + 1], static_cast<int32_t>(i));
  });
}

template <class C>
void gate_totals(const Side<C>& side, C* totals) {
  for_each_task(ceil_div(side.pairs.count, 4096), [&](int64_t task) {
    for (int64_t pair = task * 4096; pair < smaller(side.pairs.count, (task + 1) * 4096); ++pair) {
      totals[pair] = 0;
      for (int64_t h = 0; h < side.heads; ++h) totals[pair] += side.gates[pair * side.heads + h];
    }
  });
}

template <class C>
void gate_totals_by_token(const Side<C>& side, C* totals, int32_t* expert) {
  const Pairs& pairs = side.pairs;
  std::vector<int32_t> expert_of_pair(pairs.count);
  experts_of_pairs(pairs, expert_of_pair.data());
  for (int64_t entry = 0; entry < pairs.count; ++entry) {
    const int64_t pair = pairs.row_pair[entry];
    expert[entry] = expert_of_pair[pair];
    totals[entry] = 0;
    for (int64_t h = 0; h < side.heads; ++h) totals[entry] += side.gates[pair * side.heads + h];
  }
}

template <class C>
void gate_totals_backward(const Side<C>& side, const C* dtotals, C* dgates) {
  // The only head of a pair is active: a weight that a mask left may be 0 by cancelling.
  const bool all_active = side.heads == 1;
  for_each_task(ceil_div(side.pairs.count, 4096), [&](int64_t task) {
    for (int64_t pair = task * 4096; pair < smaller(side.pairs.count, (task + 1) * 4096); ++pair)
      for (int64_t h = 0; h < side.heads; ++h) {
        const int64_t at = pair * side.heads + h;
        dgates[at] = all_active || side.gates[at] != 0 ? dtotals[pair] : C{0};
      }
  });
}

#define INSTANTIATE(C)                                                                                           \
  template void mix_vertical(                                                                                    \
      const Side<C>&, const Side<C>&, const Mask<C>&, const C*, const C*, int64_t, const VerticalMix<C>&);       \
  template void mix_vertical_backward(                                                                           \
      const Side<C>&, const Side<C>&, const Mask<C>&, const C*, const C*, int64_t, const VerticalMix<const C>&,  \
      const VerticalMix<C>&, C*, C*, C*, C*);                                                                    \
  template void mix_horizontal(const Side<C>&, const Side<C>&, const Mask<C>&, const C*, int64_t, C*);           \
  template void mix_horizontal_backward(                                                                         \
      const Side<C>&, const Side<C>&, const Mask<C>&, const C*, int64_t, const C*, C*, C*, C*, C*);              \
  template void gate_totals_by_token(const Side<C>&, C*, int32_t*);                                              \
  template void gate_totals(const Side<C>&, C*);                                                                 \
  template void gate_totals_backward(const Side<C>&, const C*, C*)
INSTANTIATE(float);
INSTANTIATE(double);
#undef INSTANTIATE

}  // namespace monet::cpu
