// The mixing of experts.h under a mask.
#include <memory>

#include "../parallel.h"
#include "mixing.h"

namespace monet::cpu {
namespace {

// run(side 1, side 2, first token, end, room) for all tokens.
template <class C, class F>
void for_each_run_of_tokens(const Side<C>& side1, const Side<C>& side2, const F& run) {
  const std::unique_ptr<int32_t[]> expert1(new int32_t[side1.pairs.count]), expert2(new int32_t[side2.pairs.count]);
  experts_of_pairs(side1.pairs, expert1.get());
  experts_of_pairs(side2.pairs, expert2.get());
  const MaskedSide<C> one{side1, expert1.get()}, two{side2, expert2.get()};
  const int64_t tokens = side1.pairs.tokens, rooms = masking_rooms(side1);
  for_each_task(ceil_div(tokens, kTaskTokens), [&](int64_t task) {
    const std::unique_ptr<VectorRoom[]> room(new VectorRoom[rooms]);  // not filled: little of it is used
    run(one, two, task * kTaskTokens, smaller(tokens, (task + 1) * kTaskTokens), room.get());
  });
}

}  // namespace

template <class C>
void mix_vertical_masked(
    const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* s1, const C* s2, int64_t units,
    const VerticalMix<C>& mix) {
  for_each_run_of_tokens(side1, side2, [&](auto& one, auto& two, int64_t begin, int64_t end, VectorRoom* room) {
    masking<C>().vertical(one, two, mask, s1, s2, units, mix, begin, end, room);
  });
}

template <class C>
void mix_vertical_masked_backward(
    const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* s1, const C* s2, int64_t units,
    const VerticalMix<const C>& dmix, const VerticalMix<C>& mix, C* ds1, C* ds2, C* dgates1, C* dgates2) {
  for_each_run_of_tokens(side1, side2, [&](auto& one, auto& two, int64_t begin, int64_t end, VectorRoom* room) {
    masking<C>().vertical_backward(
        one, two, mask, s1, s2, units, dmix, mix, ds1, ds2, dgates1, dgates2, begin, end, room);
  });
}

template <class C>
void mix_horizontal_masked(
    const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* s1, int64_t units, C* y) {
  for_each_run_of_tokens(side1, side2, [&](auto& one, auto& two, int64_t begin, int64_t end, VectorRoom* room) {
    masking<C>().horizontal(one, two, mask, s1, units, y, begin, end, room);
  });
}

template <class C>
void mix_horizontal_masked_backward(
    const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* s1, int64_t units, const C* dy, C* y,
    C* ds1, C* dgates1, C* dgates2) {
  for_each_run_of_tokens(side1, side2, [&](auto& one, auto& two, int64_t begin, int64_t end, VectorRoom* room) {
    masking<C>().horizontal_backward(one, two, mask, s1, units, dy, y, ds1, dgates1, dgates2, begin, end, room);
  });
}

template <class C>
void masked_totals(const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, C* totals1, C* totals2) {
  for_each_run_of_tokens(side1, side2, [&](auto& one, auto& two, int64_t begin, int64_t end, VectorRoom* room) {
    masking<C>().totals(one, two, mask, totals1, totals2, begin, end, room);
  });
}

template <class C>
void masked_totals_backward(
    const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* dtotals1, const C* dtotals2, C* dgates1,
    C* dgates2) {
  for_each_run_of_tokens(side1, side2, [&](auto& one, auto& two, int64_t begin, int64_t end, VectorRoom* room) {
    masking<C>().totals_backward(one, two, mask, dtotals1, dtotals2, dgates1, dgates2, begin, end, room);
  });
}

#define INSTANTIATE(C)                                                                                           \
  template void mix_vertical_masked(                                                                             \
      const Side<C>&, const Side<C>&, const Mask<C>&, const C*, const C*, int64_t, const VerticalMix<C>&);       \
  template void mix_vertical_masked_backward(                                                                    \
      const Side<C>&, const Side<C>&, const Mask<C>&, const C*, const C*, int64_t, const VerticalMix<const C>&,  \
      const VerticalMix<C>&, C*, C*, C*, C*);                                                                    \
  template void mix_horizontal_masked(const Side<C>&, const Side<C>&, const Mask<C>&, const C*, int64_t, C*);    \
  template void mix_horizontal_masked_backward(                                                                  \
      const Side<C>&, const Side<C>&, const Mask<C>&, const C*, int64_t, const C*, C*, C*, C*, C*);              \
  template void masked_totals(const Side<C>&, const Side<C>&, const Mask<C>&, C*, C*);                           \
  template void masked_totals_backward(                                                                          \
      const Side<C>&, const Side<C>&, const Mask<C>&, const C*, const C*, C*, C*)
INSTANTIATE(float);
INSTANTIATE(double);
#undef INSTANTIATE

}  // namespace monet::cpu
