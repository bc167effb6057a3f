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

// out += factor times in.
template <class C, class U>
inline void add(C* __restrict out, C factor, const C* __restrict in, U units) {
  for (int64_t u = 0; u < units; ++u) out[u] += factor * in[u];
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
    for (int64_t h = 0; h < heads; ++h)
      for (const int32_t* pair = first_; pair != last_; ++pair) {
        const C gate = side.gates[*pair * heads + h];
        *room = {*pair, static_cast<int32_t>(h), gate};
        room += gate != 0;
      }
    active_end_ = room;
  }

  // The active gates by ascending head.
  const Active<C>* begin() const { return active_; }
  const Active<C>* end() const { return active_end_; }

  U units() const { return units_; }

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
    clear(by_pair);
    for (const Active<C>* it = active_; it != active_end_; ++it)
      for (int64_t u = 0; u < units_; ++u) by_pair[it->pair * units_ + u] += it->gate * by_head[it->head * units_ + u];
  }

  void clear(C* by_pair) const {
    for_each_unit([&](int64_t at) { by_pair[at] = 0; });
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
    scale<add>(
        [this](int32_t pair) {
          C total = 0;
          for (int64_t h = 0; h < side_.heads; ++h) total += side_.gates[pair * side_.heads + h];
          return total;
        },
        by_pair, out);
  }
  // The same with totals that are known, [pairs].
  template <bool add>
  void scale_by_total(const C* totals, const C* by_pair, C* out) const {
    scale<add>([totals](int32_t pair) { return totals[pair]; }, by_pair, out);
  }
  void total_gradient(const C* by_pair, const C* dout, C* dtotals) const {
    for (const int32_t* pair = first_; pair != last_; ++pair)
      dtotals[*pair] = dot(by_pair + *pair * units_, dout + *pair * units_, units_);
  }
  // Gradient of the gates in scale_by_total.
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

  template <bool add, class F>
  void scale(const F& total_of, const C* by_pair, C* out) const {
    for (const int32_t* pair = first_; pair != last_; ++pair) {
      const C total = total_of(*pair);
      for (int64_t u = 0, at = *pair * units_; u < units_; ++u)
        out[at + u] = (add ? out[at + u] : C{0}) + total * by_pair[at + u];
    }
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

// The half-expert of each pair.
std::vector<int32_t> experts_of(const Pairs& pairs) {
  std::vector<int32_t> expert(pairs.count);
  for (int64_t group = 0; group < pairs.blocks() * pairs.experts; ++group)
    std::fill(
        expert.begin() + pairs.group_start[group], expert.begin() + pairs.group_start[group + 1],
        static_cast<int32_t>(group % pairs.experts));
  return expert;
}

// The experts of each token under a mask. There are few: about k * k a head.
template <class C>
class MaskedExperts {
 public:
  MaskedExperts(const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask)
      : mask_(mask), experts_(side1.pairs.experts), expert1_(experts_of(side1.pairs)),
        expert2_(experts_of(side2.pairs)) {}

  // f(gate of side 1, gate of side 2, factor, w) for the active experts of a token, w = factor gate gate. Without those
  // whose w is 0: an expert that is off has no say, whatever it computes.
  template <class U, class F>
  void for_each(const TokenSide<C, U>& one, const TokenSide<C, U>& two, const F& f) const {
    const Active<C>* two_begin = two.begin();
    for (const Active<C>* i = one.begin(); i != one.end();) {
      const int32_t head = i->head;
      while (two_begin != two.end() && two_begin->head < head) ++two_begin;
      const Active<C>* two_end = two_begin;
      while (two_end != two.end() && two_end->head == head) ++two_end;
      for (; i != one.end() && i->head == head; ++i) {
        const C* factors = mask_.factors + head * mask_.head_stride + expert1_[i->pair] * experts_;
        for (const Active<C>* j = two_begin; j != two_end; ++j) {
          const C factor = factors[expert2_[j->pair]], w = factor * i->gate * j->gate;
          if (w != 0) f(*i, *j, factor, w);
        }
      }
    }
  }

 private:
  Mask<C> mask_;
  int64_t experts_;
  std::vector<int32_t> expert1_, expert2_;
};

template <class C>
void clear_gates(const Side<C>& side, C* gates) {
  std::fill(gates, gates + side.pairs.count * side.heads, C{0});
}

template <class C>
void mix_vertical_masked(
    const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* s1, const C* s2, int64_t units,
    const VerticalMix<C>& mix) {
  const MaskedExperts<C> experts(side1, side2, mask);
  std::vector<C> total1(side1.pairs.count), total2(side2.pairs.count);
  for_each_token(side1, side2, units, 0, [&](const auto& one, const auto& two, C*) {
    one.activate(s1, mix.own1);
    two.activate(s2, mix.own2);
    one.clear(mix.cross1);
    two.clear(mix.cross2);
    const auto units = one.units();
    experts.for_each(one, two, [&](const Active<C>& i, const Active<C>& j, C, C w) {
      total1[i.pair] += w;
      total2[j.pair] += w;
      add(mix.cross1 + i.pair * units, w, mix.own2 + j.pair * units, units);
      add(mix.cross2 + j.pair * units, w, mix.own1 + i.pair * units, units);
    });
    one.template scale_by_total<false>(total1.data(), mix.own1, mix.own1);
    two.template scale_by_total<false>(total2.data(), mix.own2, mix.own2);
  });
}

template <class C>
void mix_vertical_masked_backward(
    const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* s1, const C* s2, int64_t units,
    const VerticalMix<const C>& dmix, const VerticalMix<C>& mix, C* ds1, C* ds2, C* dgates1, C* dgates2) {
  const MaskedExperts<C> experts(side1, side2, mask);
  std::vector<C> total1(side1.pairs.count), total2(side2.pairs.count), dtotal1(total1.size()), dtotal2(total2.size());
  clear_gates(side1, dgates1);
  clear_gates(side2, dgates2);
  for_each_token(side1, side2, units, 0, [&](const auto& one, const auto& two, C*) {
    one.activate(s1, mix.own1);
    two.activate(s2, mix.own2);
    one.total_gradient(mix.own1, dmix.own1, dtotal1.data());
    two.total_gradient(mix.own2, dmix.own2, dtotal2.data());
    for (C* sum : {mix.cross1, ds1}) one.clear(sum);
    for (C* sum : {mix.cross2, ds2}) two.clear(sum);
    const auto units = one.units();
    experts.for_each(one, two, [&](const Active<C>& i, const Active<C>& j, C factor, C w) {
      const int64_t at1 = i.pair * units, at2 = j.pair * units;
      const C *a = mix.own1 + at1, *c = mix.own2 + at2, *dcross1 = dmix.cross1 + at1, *dcross2 = dmix.cross2 + at2;
      const C dw = dtotal1[i.pair] + dtotal2[j.pair] + dot(dcross1, c, units) + dot(dcross2, a, units);
      dgates1[i.pair * side1.heads + i.head] += factor * j.gate * dw;
      dgates2[j.pair * side2.heads + j.head] += factor * i.gate * dw;
      total1[i.pair] += w;
      total2[j.pair] += w;
      add(mix.cross1 + at1, w, c, units);
      add(mix.cross2 + at2, w, a, units);
      add(ds1 + at1, w, dcross2, units);
      add(ds2 + at2, w, dcross1, units);
    });
    const auto side_backward = [](const auto& side, const C* s, const C* total, C* own, const C* down, C* ds) {
      side.template scale_by_total<true>(total, down, ds);
      side.activate_backward(s, ds, ds);
      side.template scale_by_total<false>(total, own, own);
    };
    side_backward(one, s1, total1.data(), mix.own1, dmix.own1, ds1);
    side_backward(two, s2, total2.data(), mix.own2, dmix.own2, ds2);
  });
}

template <class C>
void mix_horizontal_masked(
    const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* s1, int64_t units, C* y) {
  const MaskedExperts<C> experts(side1, side2, mask);
  std::vector<C> a(side1.pairs.count * units);
  for_each_token(side1, side2, units, 0, [&](const auto& one, const auto& two, C*) {
    one.activate(s1, a.data());
    two.clear(y);
    const auto units = one.units();
    experts.for_each(one, two, [&](const Active<C>& i, const Active<C>& j, C, C w) {
      add(y + j.pair * units, w, a.data() + i.pair * units, units);
    });
  });
}

template <class C>
void mix_horizontal_masked_backward(
    const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* s1, int64_t units, const C* dy, C* y,
    C* ds1, C* dgates1, C* dgates2) {
  const MaskedExperts<C> experts(side1, side2, mask);
  std::vector<C> a(side1.pairs.count * units);
  clear_gates(side1, dgates1);
  clear_gates(side2, dgates2);
  for_each_token(side1, side2, units, 0, [&](const auto& one, const auto& two, C*) {
    one.activate(s1, a.data());
    two.clear(y);
    one.clear(ds1);
    const auto units = one.units();
    experts.for_each(one, two, [&](const Active<C>& i, const Active<C>& j, C factor, C w) {
      const int64_t at1 = i.pair * units, at2 = j.pair * units;
      const C dw = dot(dy + at2, a.data() + at1, units);
      dgates1[i.pair * side1.heads + i.head] += factor * j.gate * dw;
      dgates2[j.pair * side2.heads + j.head] += factor * i.gate * dw;
      add(y + at2, w, a.data() + at1, units);
      add(ds1 + at1, w, dy + at2, units);
    });
    one.activate_backward(s1, ds1, ds1);
  });
}

}  // namespace

template <class C>
void mix_vertical(
    const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* s1, const C* s2, int64_t units,
    const VerticalMix<C>& mix) {
  if (mask) return mix_vertical_masked(side1, side2, mask, s1, s2, units, mix);
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
    const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* s1, const C* s2, int64_t units,
    const VerticalMix<const C>& dmix, const VerticalMix<C>& mix, C* ds1, C* ds2, C* dgates1, C* dgates2) {
  if (mask)
    return mix_vertical_masked_backward(side1, side2, mask, s1, s2, units, dmix, mix, ds1, ds2, dgates1, dgates2);
  clear_gates(side1, dgates1);
  clear_gates(side2, dgates2);
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
void mix_horizontal(
    const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* s1, int64_t units, C* y) {
  if (mask) return mix_horizontal_masked(side1, side2, mask, s1, units, y);
  std::vector<C> a(side1.pairs.count * units);
  for_each_token(side1, side2, units, 1, [&](const auto& one, const auto& two, C* mixed) {
    one.activate(s1, a.data());
    one.gather(a.data(), mixed);
    two.spread(mixed, y);
  });
}

template <class C>
void mix_horizontal_backward(
    const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* s1, int64_t units, const C* dy, C* y,
    C* ds1, C* dgates1, C* dgates2) {
  if (mask) return mix_horizontal_masked_backward(side1, side2, mask, s1, units, dy, y, ds1, dgates1, dgates2);
  clear_gates(side1, dgates1);
  clear_gates(side2, dgates2);
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
void masked_totals(const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, C* totals1, C* totals2) {
  const MaskedExperts<C> experts(side1, side2, mask);
  for_each_token(side1, side2, 1, 0, [&](const auto& one, const auto& two, C*) {
    one.clear(totals1);
    two.clear(totals2);
    experts.for_each(one, two, [&](const Active<C>& i, const Active<C>& j, C, C w) {
      totals1[i.pair] += w;
      totals2[j.pair] += w;
    });
  });
}

template <class C>
void masked_totals_backward(
    const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* dtotals1, const C* dtotals2, C* dgates1,
    C* dgates2) {
  const MaskedExperts<C> experts(side1, side2, mask);
  clear_gates(side1, dgates1);
  clear_gates(side2, dgates2);
  for_each_token(side1, side2, 1, 0, [&](const auto& one, const auto& two, C*) {
    experts.for_each(one, two, [&](const Active<C>& i, const Active<C>& j, C factor, C) {
      const C dw = dtotals1[i.pair] + dtotals2[j.pair];
      dgates1[i.pair * side1.heads + i.head] += factor * j.gate * dw;
      dgates2[j.pair * side2.heads + j.head] += factor * i.gate * dw;
    });
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
  const std::vector<int32_t> expert_of_pair = experts_of(pairs);
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
  template void masked_totals(const Side<C>&, const Side<C>&, const Mask<C>&, C*, C*);                           \
  template void masked_totals_backward(                                                                          \
      const Side<C>&, const Side<C>&, const Mask<C>&, const C*, const C*, C*, C*);                               \
  template void gate_totals_by_token(const Side<C>&, C*, int32_t*);                                              \
  template void gate_totals(const Side<C>&, C*);                                                                 \
  template void gate_totals_backward(const Side<C>&, const C*, C*)
INSTANTIATE(float);
INSTANTIATE(double);
#undef INSTANTIATE

}  // namespace monet::cpu
