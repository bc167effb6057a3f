// What happens to a token between the input and the output layer of its half-experts.
#include <algorithm>
#include <vector>

#include "../parallel.h"
#include "experts.h"

namespace monet::cpu {
namespace {

constexpr int64_t kTaskTokens = 64;

// relu(s)^2, but NaN for -inf: what is not finite must not become 0.
template <class C>
inline C relu_squared(C s) {
  return s * (s < 0 ? C{0} : s);
}
template <class C>
inline C relu_squared_slope(C s) {
  return s < 0 ? 0 * s : 2 * s;
}

template <class C, class U>
inline C dot(const C* a, const C* b, U units) {
  C sum = 0;
  for (int64_t u = 0; u < units; ++u) sum += a[u] * b[u];
  return sum;
}

// The number of units: known to the compiler for the usual sizes, so that loops over it unroll.
template <int known>
struct Units {
  explicit Units(int64_t) {}
  operator int64_t() const { return known; }
};
template <>
struct Units<0> {
  explicit Units(int64_t count) : count_(count) {}
  operator int64_t() const { return count_; }

 private:
  int64_t count_;
};

template <class F>
void with_units(int64_t count, const F& f) {
  switch (count) {
    case 4: return f(Units<4>(count));
    case 6: return f(Units<6>(count));
    case 8: return f(Units<8>(count));
    case 12: return f(Units<12>(count));
    case 16: return f(Units<16>(count));
    case 24: return f(Units<24>(count));
    default: return f(Units<0>(count));
  }
}

// One gate that is not 0: about one a pair.
template <class C>
struct Active {
  int32_t pair, head;
  C gate;
};

// One side of one token. "By pair" is [pairs, units] over all tokens, "by head" is [heads, units] of this token.
template <class C, class U>
class TokenSide {
 public:
  // room: for as many gates as a token can have, [experts * heads].
  TokenSide(const Side<C>& side, int64_t token, U units, Active<C>* room)
      : units_(units), side_(side), first_(side.pairs.row_pair + side.pairs.row_start[token]),
        last_(side.pairs.row_pair + side.pairs.row_start[token + 1]), active_(room) {
    // Without a branch that would be mispredicted at every active gate.
    const int64_t heads = side.heads;
    for (const int32_t* pair = first_; pair != last_; ++pair)
      for (int64_t h = 0; h < heads; ++h) {
        const C gate = side.gates[*pair * heads + h];
        *room = {*pair, static_cast<int32_t>(h), gate};
        room += gate != 0;
      }
    active_end_ = room;
  }

  void activate(const C* s, C* a) const {
    for_each_unit([&](int64_t at) { a[at] = relu_squared(s[at]); });
  }

  // ds = slope of the activation at s times da.
  void activate_backward(const C* s, const C* da, C* ds) const {
    for_each_unit([&](int64_t at) { ds[at] = relu_squared_slope(s[at]) * da[at]; });
  }

  // by_head[h] = sum over the pairs of gate_h by_pair.
  void gather(const C* by_pair, C* by_head) const {
    std::fill(by_head, by_head + side_.heads * units_, C{0});
    for (const Active<C>* it = active_; it != active_end_; ++it)
      for (int64_t u = 0; u < units_; ++u) by_head[it->head * units_ + u] += it->gate * by_pair[it->pair * units_ + u];
  }

  // by_pair = sum over the heads of gate_h by_head[h].
  void spread(const C* by_head, C* by_pair) const {
    for_each_unit([&](int64_t at) { by_pair[at] = 0; });
    for (const Active<C>* it = active_; it != active_end_; ++it)
      for (int64_t u = 0; u < units_; ++u) by_pair[it->pair * units_ + u] += it->gate * by_head[it->head * units_ + u];
  }

  // Gradient of the gates in gather (by_head: its gradient) or spread (by_pair: its gradient).
  void add_gate_gradient(const C* by_head, const C* by_pair, C* dgates) const {
    for (const Active<C>* it = active_; it != active_end_; ++it)
      dgates[it->pair * side_.heads + it->head] +=
          dot(by_head + it->head * units_, by_pair + it->pair * units_, units_);
  }

  // out (+)= sum of the pair's gates times by_pair.
  template <bool add>
  void scale_by_total(const C* by_pair, C* out) const {
    for (const int32_t* pair = first_; pair != last_; ++pair) {
      C total = 0;
      for (int64_t h = 0; h < side_.heads; ++h) total += side_.gates[*pair * side_.heads + h];
      for (int64_t u = 0, at = *pair * units_; u < units_; ++u)
        out[at + u] = (add ? out[at + u] : C{0}) + total * by_pair[at + u];
    }
  }
  void add_total_gradient(const C* by_pair, const C* dout, C* dgates) const {
    for (const Active<C>* it = active_; it != active_end_; ++it)
      dgates[it->pair * side_.heads + it->head] +=
          dot(by_pair + it->pair * units_, dout + it->pair * units_, units_);
  }

 private:
  template <class F>
  void for_each_unit(const F& f) const {
    for (const int32_t* pair = first_; pair != last_; ++pair)
      for (int64_t u = 0; u < units_; ++u) f(*pair * units_ + u);
  }

  U units_;
  const Side<C>& side_;
  const int32_t *first_, *last_;
  const Active<C> *active_, *active_end_;
};

// What a task needs beside its tokens: `count` sums by head, and room for the active gates of both sides.
template <class C>
struct Scratch {
  Scratch(const Side<C>& side, int64_t count)
      : by_head(count), room1(side.pairs.experts * side.heads + 1), room2(room1.size()) {}

  std::vector<C> by_head;
  std::vector<Active<C>> room1, room2;
};

// f(side 1 of a token, side 2 of it, room for `count` sums by head) for every token.
template <class C, class F>
void for_each_token(const Side<C>& side1, const Side<C>& side2, int64_t units, int64_t count, const F& f) {
  const int64_t tokens = side1.pairs.tokens;
  with_units(units, [&](auto known_units) {
    for_each_task(ceil_div(tokens, kTaskTokens), [&](int64_t task) {
      Scratch<C> scratch(side1, count * side1.heads * units);
      for (int64_t t = task * kTaskTokens; t < smaller(tokens, (task + 1) * kTaskTokens); ++t)
        f(TokenSide(side1, t, known_units, scratch.room1.data()), TokenSide(side2, t, known_units, scratch.room2.data()),
          scratch.by_head.data());
    });
  });
}

}  // namespace

template <class C>
void mix_vertical(
    const Side<C>& side1, const Side<C>& side2, const C* s1, const C* s2, int64_t units, const VerticalMix<C>& mix) {
  for_each_token(side1, side2, units, 2, [&](const auto& one, const auto& two, C* scratch) {
    C *mixed_a = scratch, *mixed_c = mixed_a + side1.heads * units;
    one.activate(s1, mix.own1);
    two.activate(s2, mix.own2);
    one.gather(mix.own1, mixed_a);
    two.gather(mix.own2, mixed_c);
    one.spread(mixed_c, mix.cross1);
    two.spread(mixed_a, mix.cross2);
    one.template scale_by_total<false>(mix.own1, mix.own1);
    two.template scale_by_total<false>(mix.own2, mix.own2);
  });
}

template <class C>
void mix_vertical_backward(
    const Side<C>& side1, const Side<C>& side2, const C* s1, const C* s2, int64_t units,
    const VerticalMix<const C>& dmix, const VerticalMix<C>& mix, C* ds1, C* ds2, C* dgates1, C* dgates2) {
  std::fill(dgates1, dgates1 + side1.pairs.count * side1.heads, C{0});
  std::fill(dgates2, dgates2 + side2.pairs.count * side2.heads, C{0});
  for_each_token(side1, side2, units, 4, [&](const auto& one, const auto& two, C* scratch) {
    const int64_t by_head = side1.heads * units;
    C *mixed_a = scratch, *mixed_c = mixed_a + by_head, *dmixed_a = mixed_c + by_head, *dmixed_c = dmixed_a + by_head;
    one.activate(s1, mix.own1);
    two.activate(s2, mix.own2);
    one.gather(mix.own1, mixed_a);
    two.gather(mix.own2, mixed_c);
    one.spread(mixed_c, mix.cross1);
    two.spread(mixed_a, mix.cross2);
    one.gather(dmix.cross1, dmixed_c);
    two.gather(dmix.cross2, dmixed_a);

    const auto side_backward = [](const auto& side, const C* s, C* own, const C* down, const C* dcross,
                                  const C* mixed_other, const C* dmixed, C* ds, C* dgates) {
      side.add_gate_gradient(mixed_other, dcross, dgates);
      side.add_gate_gradient(dmixed, own, dgates);
      side.add_total_gradient(own, down, dgates);
      side.spread(dmixed, ds);
      side.template scale_by_total<true>(down, ds);
      side.activate_backward(s, ds, ds);
      side.template scale_by_total<false>(own, own);
    };
    side_backward(one, s1, mix.own1, dmix.own1, dmix.cross1, mixed_c, dmixed_a, ds1, dgates1);
    side_backward(two, s2, mix.own2, dmix.own2, dmix.cross2, mixed_a, dmixed_c, ds2, dgates2);
  });
}

template <class C>
void mix_horizontal(const Side<C>& side1, const Side<C>& side2, const C* s1, int64_t units, C* y) {
  std::vector<C> a(side1.pairs.count * units);
  for_each_token(side1, side2, units, 1, [&](const auto& one, const auto& two, C* mixed) {
    one.activate(s1, a.data());
    one.gather(a.data(), mixed);
    two.spread(mixed, y);
  });
}

template <class C>
void mix_horizontal_backward(
    const Side<C>& side1, const Side<C>& side2, const C* s1, int64_t units, const C* dy, C* y, C* ds1, C* dgates1,
    C* dgates2) {
  std::fill(dgates1, dgates1 + side1.pairs.count * side1.heads, C{0});
  std::fill(dgates2, dgates2 + side2.pairs.count * side2.heads, C{0});
  for_each_token(side1, side2, units, 2, [&](const auto& one, const auto& two, C* mixed) {
    C* dmixed = mixed + side1.heads * units;
    C* a = ds1;  // until its gradient takes the place
    one.activate(s1, a);
    one.gather(a, mixed);
    two.spread(mixed, y);
    two.gather(dy, dmixed);
    two.add_gate_gradient(mixed, dy, dgates2);
    one.add_gate_gradient(dmixed, a, dgates1);
    one.spread(dmixed, ds1);
    one.activate_backward(s1, ds1, ds1);
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
  for (int64_t group = 0; group < pairs.blocks() * pairs.experts; ++group)
    std::fill(
        expert_of_pair.begin() + pairs.group_start[group], expert_of_pair.begin() + pairs.group_start[group + 1],
        static_cast<int32_t>(group % pairs.experts));
  for (int64_t entry = 0; entry < pairs.count; ++entry) {
    const int64_t pair = pairs.row_pair[entry];
    expert[entry] = expert_of_pair[pair];
    totals[entry] = 0;
    for (int64_t h = 0; h < side.heads; ++h) totals[entry] += side.gates[pair * side.heads + h];
  }
}

template <class C>
void gate_totals_backward(const Side<C>& side, const C* dtotals, C* dgates) {
  for_each_task(ceil_div(side.pairs.count, 4096), [&](int64_t task) {
    for (int64_t pair = task * 4096; pair < smaller(side.pairs.count, (task + 1) * 4096); ++pair)
      for (int64_t h = 0; h < side.heads; ++h)
        dgates[pair * side.heads + h] = side.gates[pair * side.heads + h] == 0 ? C{0} : dtotals[pair];
  });
}

#define INSTANTIATE(C)                                                                                           \
  template void mix_vertical(                                                                                    \
      const Side<C>&, const Side<C>&, const C*, const C*, int64_t, const VerticalMix<C>&);                       \
  template void mix_vertical_backward(                                                                           \
      const Side<C>&, const Side<C>&, const C*, const C*, int64_t, const VerticalMix<const C>&,                  \
      const VerticalMix<C>&, C*, C*, C*, C*);                                                                    \
  template void mix_horizontal(const Side<C>&, const Side<C>&, const C*, int64_t, C*);                           \
  template void mix_horizontal_backward(                                                                         \
      const Side<C>&, const Side<C>&, const C*, int64_t, const C*, C*, C*, C*, C*);                              \
  template void gate_totals_by_token(const Side<C>&, C*, int32_t*);                                              \
  template void gate_totals(const Side<C>&, C*);                                                                 \
  template void gate_totals_backward(const Side<C>&, const C*, C*)
INSTANTIATE(float);
INSTANTIATE(double);
#undef INSTANTIATE

}  // namespace monet::cpu
