// The mixing of experts.h under a mask.
#include <algorithm>
#include <vector>

#include "../parallel.h"
#include "mixing.h"

namespace monet::cpu {
namespace {

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
  static constexpr int64_t count = known;
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

  void clear(C* by_pair) const {
    for_each_unit([&](int64_t at) { by_pair[at] = 0; });
  }

  // out (+)= totals times by_pair.
  template <bool add>
  void scale_by_total(const C* totals, const C* by_pair, C* out) const {
    for (const int32_t* pair = first_; pair != last_; ++pair)
      for (int64_t u = 0, at = *pair * units_; u < units_; ++u)
        out[at + u] = (add ? out[at + u] : C{0}) + totals[*pair] * by_pair[at + u];
  }
  void total_gradient(const C* by_pair, const C* dout, C* dtotals) const {
    for (const int32_t* pair = first_; pair != last_; ++pair)
      dtotals[*pair] = dot(by_pair + *pair * units_, dout + *pair * units_, units_);
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

// f(side 1 of a token, side 2 of it) for every token.
template <class C, class F>
void for_each_token(const Side<C>& side1, const Side<C>& side2, int64_t units, const F& f) {
  const int64_t tokens = side1.pairs.tokens;
  with_units(units, [&](auto known_units) {
    for_each_task(ceil_div(tokens, kTaskTokens), [&](int64_t task) {
      std::vector<Active<C>> room1(side1.pairs.experts * side1.heads + 1), room2(room1.size());
      for (int64_t t = task * kTaskTokens; t < smaller(tokens, (task + 1) * kTaskTokens); ++t)
        f(TokenSide(side1, t, known_units, room1.data()), TokenSide(side2, t, known_units, room2.data()));
    });
  });
}

// An expert of a token: its active gates, its factor in the mask, and w = factor gate1 gate2.
template <class C>
struct ActiveExpert {
  const Active<C>*one, *two;
  C factor, w;
};

// The experts of each token under a mask. There are few: about k * k a head.
template <class C>
class MaskedExperts {
 public:
  MaskedExperts(const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask)
      : mask_(mask), experts_(side1.pairs.experts), expert1_(side1.pairs.count), expert2_(side2.pairs.count) {
    experts_of_pairs(side1.pairs, expert1_.data());
    experts_of_pairs(side2.pairs, expert2_.data());
  }

  // f(first, last) for runs of experts of a token that have the gate of side 1 in common. Without those whose w is 0: an
  // expert that is off has no say, whatever it computes.
  template <class U, class F>
  void for_each_run(const TokenSide<C, U>& one, const TokenSide<C, U>& two, const F& f) const {
    // All factors first: they are far apart in memory, and reads that wait for nothing overlap.
    ActiveExpert<C> room[kRoom + kRun], *end = room;
    const auto flush = [&] {
      for (const ActiveExpert<C>* first = room; first != end;) {
        const ActiveExpert<C>* last = first + 1;
        while (last != end && last->one == first->one) ++last;
        f(first, last);
        first = last;
      }
      end = room;
    };
    const Active<C>* two_begin = two.begin();
    for (const Active<C>* i = one.begin(); i != one.end();) {
      const int32_t head = i->head;
      while (two_begin != two.end() && two_begin->head < head) ++two_begin;
      const Active<C>* two_end = two_begin;
      while (two_end != two.end() && two_end->head == head) ++two_end;
      for (; i != one.end() && i->head == head; ++i) {
        const C* factors = mask_.factors + head * mask_.head_stride + expert1_[i->pair] * experts_;
        for (const Active<C>* j = two_begin; j != two_end;) {
          if (end - room >= kRoom) flush();
          for (const Active<C>* run_end = j + smaller(kRun, two_end - j); j != run_end; ++j) {
            const C factor = factors[expert2_[j->pair]], w = factor * i->gate * j->gate;
            *end = {i, j, factor, w};
            end += w != 0;
          }
        }
      }
    }
    flush();
  }

 private:
  static constexpr int64_t kRoom = 256, kRun = 32;

  Mask<C> mask_;
  int64_t experts_;
  std::vector<int32_t> expert1_, expert2_;
};

// A row of units that is summed up: in registers where their number is known.
template <class C, class U>
class RowSum {
 public:
  RowSum(C* row, U units) : row_(row), units_(units) { std::copy_n(row, units, sum_); }
  ~RowSum() { std::copy_n(sum_, units_, row_); }
  void add(C factor, const C* in) { monet::cpu::add(sum_, factor, in, units_); }

 private:
  C* row_;
  U units_;
  C sum_[U::count];
};
template <class C>
class RowSum<C, Units<0>> {
 public:
  RowSum(C* row, Units<0> units) : row_(row), units_(units) {}
  void add(C factor, const C* in) { monet::cpu::add(row_, factor, in, units_); }

 private:
  C* row_;
  Units<0> units_;
};

template <class C>
void clear_gates(const Side<C>& side, C* gates) {
  std::fill(gates, gates + side.pairs.count * side.heads, C{0});
}

}  // namespace

template <class C>
void mix_vertical_masked(
    const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* s1, const C* s2, int64_t units,
    const VerticalMix<C>& mix) {
  const MaskedExperts<C> experts(side1, side2, mask);
  std::vector<C> total1(side1.pairs.count), total2(side2.pairs.count);
  for_each_token(side1, side2, units, [&](const auto& one, const auto& two) {
    one.activate(s1, mix.own1);
    two.activate(s2, mix.own2);
    one.clear(mix.cross1);
    two.clear(mix.cross2);
    const auto units = one.units();
    experts.for_each_run(one, two, [&](const ActiveExpert<C>* e, const ActiveExpert<C>* last) {
      const int32_t pair1 = e->one->pair;
      const C* a = mix.own1 + pair1 * units;
      RowSum cross1(mix.cross1 + pair1 * units, units);
      C total = total1[pair1];
      for (; e != last; ++e) {
        const int32_t pair2 = e->two->pair;
        total += e->w;
        total2[pair2] += e->w;
        cross1.add(e->w, mix.own2 + pair2 * units);
        add(mix.cross2 + pair2 * units, e->w, a, units);
      }
      total1[pair1] = total;
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
  for_each_token(side1, side2, units, [&](const auto& one, const auto& two) {
    one.activate(s1, mix.own1);
    two.activate(s2, mix.own2);
    one.total_gradient(mix.own1, dmix.own1, dtotal1.data());
    two.total_gradient(mix.own2, dmix.own2, dtotal2.data());
    for (C* sum : {mix.cross1, ds1}) one.clear(sum);
    for (C* sum : {mix.cross2, ds2}) two.clear(sum);
    const auto units = one.units();
    experts.for_each_run(one, two, [&](const ActiveExpert<C>* e, const ActiveExpert<C>* last) {
      const Active<C>& i = *e->one;
      const int64_t at1 = i.pair * units;
      const C *a = mix.own1 + at1, *dcross1 = dmix.cross1 + at1;
      RowSum cross1(mix.cross1 + at1, units), da(ds1 + at1, units);
      C total = total1[i.pair], dgate = dgates1[i.pair * side1.heads + i.head];
      for (; e != last; ++e) {
        const Active<C>& j = *e->two;
        const int64_t at2 = j.pair * units;
        const C *c = mix.own2 + at2, *dcross2 = dmix.cross2 + at2, w = e->w;
        const C dw = dtotal1[i.pair] + dtotal2[j.pair] + dot(dcross1, c, units) + dot(dcross2, a, units);
        dgate += e->factor * j.gate * dw;
        dgates2[j.pair * side2.heads + j.head] += e->factor * i.gate * dw;
        total += w;
        total2[j.pair] += w;
        cross1.add(w, c);
        da.add(w, dcross2);
        add(mix.cross2 + at2, w, a, units);
        add(ds2 + at2, w, dcross1, units);
      }
      total1[i.pair] = total;
      dgates1[i.pair * side1.heads + i.head] = dgate;
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
  for_each_token(side1, side2, units, [&](const auto& one, const auto& two) {
    one.activate(s1, a.data());
    two.clear(y);
    const auto units = one.units();
    experts.for_each_run(one, two, [&](const ActiveExpert<C>* e, const ActiveExpert<C>* last) {
      for (const C* from = a.data() + e->one->pair * units; e != last; ++e)
        add(y + e->two->pair * units, e->w, from, units);
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
  for_each_token(side1, side2, units, [&](const auto& one, const auto& two) {
    one.activate(s1, a.data());
    two.clear(y);
    one.clear(ds1);
    const auto units = one.units();
    experts.for_each_run(one, two, [&](const ActiveExpert<C>* e, const ActiveExpert<C>* last) {
      const Active<C>& i = *e->one;
      const C* from = a.data() + i.pair * units;
      RowSum da(ds1 + i.pair * units, units);
      C dgate = dgates1[i.pair * side1.heads + i.head];
      for (; e != last; ++e) {
        const Active<C>& j = *e->two;
        const int64_t at2 = j.pair * units;
        const C dw = dot(dy + at2, from, units);
        dgate += e->factor * j.gate * dw;
        dgates2[j.pair * side2.heads + j.head] += e->factor * i.gate * dw;
        add(y + at2, e->w, from, units);
        da.add(e->w, dy + at2);
      }
      dgates1[i.pair * side1.heads + i.head] = dgate;
    });
    one.activate_backward(s1, ds1, ds1);
  });
}

template <class C>
void masked_totals(const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, C* totals1, C* totals2) {
  const MaskedExperts<C> experts(side1, side2, mask);
  for_each_token(side1, side2, 1, [&](const auto& one, const auto& two) {
    one.clear(totals1);
    two.clear(totals2);
    experts.for_each_run(one, two, [&](const ActiveExpert<C>* e, const ActiveExpert<C>* last) {
      for (; e != last; ++e) {
        totals1[e->one->pair] += e->w;
        totals2[e->two->pair] += e->w;
      }
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
  for_each_token(side1, side2, 1, [&](const auto& one, const auto& two) {
    experts.for_each_run(one, two, [&](const ActiveExpert<C>* e, const ActiveExpert<C>* last) {
      for (; e != last; ++e) {
        const Active<C>&i = *e->one, &j = *e->two;
        const C dw = dtotals1[i.pair] + dtotals2[j.pair];
        dgates1[i.pair * side1.heads + i.head] += e->factor * j.gate * dw;
        dgates2[j.pair * side2.heads + j.head] += e->factor * i.gate * dw;
      }
    });
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
