// The masking of mixing.h for the instruction set this is compiled for. Of a token the active gates are listed by head,
// and its rows of units are held side by side; then its experts are taken one by one: about k * k a head.

#include "mixing.inl"

namespace monet::cpu {
namespace {

// An active gate of a head. place: of its pair among those of the token; expert: its half-expert.
template <class C>
struct ActiveGate {
  int32_t place, expert;
  C gate;
};

// w v, but 0 if w is 0: an expert that is off has no say, whatever it computes. Without a branch: masks are not foreseen.
template <class V, class C>
inline V times(C w, V v) {
  const V factor = w - V{};
  return factor == 0 ? V{} : factor * v;
}

// Parts of a caller's room.
class Parts {
 public:
  explicit Parts(VectorRoom* room) : next_(room) {}
  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(next_);
    next_ += (count * sizeof(T) + sizeof(VectorRoom) - 1) / sizeof(VectorRoom);
    return part;
  }

 private:
  VectorRoom* next_;
};

// One side of a token.
template <class C>
class TokenGates {
 public:
  TokenGates(const MaskedSide<C>& side, Parts& parts)
      : side_(side), count_(parts.take<int64_t>(side.heads)),
        gates_(parts.take<ActiveGate<C>>(side.heads * (side.pairs.experts + 1))) {}

  void take(int64_t token) {
    const int64_t heads = side_.heads, stride = side_.pairs.experts + 1;
    pair_ = side_.pairs.row_pair + side_.pairs.row_start[token];
    pairs_ = side_.pairs.row_start[token + 1] - side_.pairs.row_start[token];
    for (int64_t h = 0; h < heads; ++h) count_[h] = 0;
    for (int64_t place = 0; place < pairs_; ++place) {
      const int32_t expert = side_.expert[pair_[place]];
      const C* gates = side_.gates + pair_[place] * heads;
      // Without a branch that would be mispredicted at every active gate.
      for (int64_t h = 0; h < heads; ++h) {
        gates_[h * stride + count_[h]] = {static_cast<int32_t>(place), expert, gates[h]};
        count_[h] += gates[h] != 0;
      }
    }
    // The pairs of the next token follow.
    if (token + 1 < side_.pairs.tokens)
      for (const int32_t *next = pair_ + pairs_, *end = side_.pairs.row_pair + side_.pairs.row_start[token + 2];
           next != end; ++next) {
        __builtin_prefetch(side_.gates + *next * heads);
        __builtin_prefetch(side_.expert + *next);
      }
  }

  const MaskedSide<C>& side() const { return side_; }
  int64_t pairs() const { return pairs_; }
  int64_t pair(int64_t place) const { return pair_[place]; }
  const ActiveGate<C>* begin(int64_t head) const { return gates_ + head * (side_.pairs.experts + 1); }
  const ActiveGate<C>* end(int64_t head) const { return begin(head) + count_[head]; }

 private:
  const MaskedSide<C>& side_;
  int64_t* count_;   // by head
  ActiveGate<C>* gates_;
  const int32_t* pair_ = nullptr;
  int64_t pairs_ = 0;
};

// The experts of one token after the other.
template <class C>
class TokenExperts {
 public:
  TokenExperts(const MaskedSide<C>& side1, const MaskedSide<C>& side2, const Mask<C>& mask, Parts& parts)
      : one(side1, parts), two(side2, parts), mask_(mask) {}

  void take(int64_t token) {
    one.take(token);
    two.take(token);
    prefetch(0);
  }

  // f(head, active gate of side 1, its row of factors, the first active gate of side 2 in the head, their end).
  template <class F>
  void for_each_run(const F& f) const {
    const int64_t heads = one.side().heads;
    for (int64_t h = 0; h < heads; ++h) {
      if (h + 1 < heads) prefetch(h + 1);
      for (const ActiveGate<C>* i = one.begin(h); i != one.end(h); ++i)
        f(h, *i, factors_of(h, *i), two.begin(h), two.end(h));
    }
  }

  TokenGates<C> one, two;

 private:
  const C* factors_of(int64_t head, const ActiveGate<C>& i) const {
    return mask_.factors + head * mask_.head_stride + i.expert * one.side().pairs.experts;
  }
  // The factors are far apart in memory.
  void prefetch(int64_t head) const {
    for (const ActiveGate<C>* i = one.begin(head); i != one.end(head); ++i) {
      const C* factors = factors_of(head, *i);
      for (const ActiveGate<C>* j = two.begin(head); j != two.end(head); ++j) __builtin_prefetch(factors + j->expert);
    }
  }

  const Mask<C>& mask_;
};

template <class C>
void clear_gates(const TokenGates<C>& token, C* dgates) {
  const int64_t heads = token.side().heads;
  for (int64_t place = 0; place < token.pairs(); ++place)
    for (int64_t h = 0; h < heads; ++h) dgates[token.pair(place) * heads + h] = 0;
}

template <class C, int count>
void masked_vertical(
    const MaskedSide<C>& side1, const MaskedSide<C>& side2, const Mask<C>& mask, const C* s1, const C* s2,
    int64_t units, const VerticalMix<C>& mix, int64_t begin, int64_t end, VectorRoom* room) {
  using V = Units<C, count>;
  Parts parts(room);
  TokenExperts<C> experts(side1, side2, mask, parts);
  struct Rows {
    V *activation, *cross;
    C* total;
  };
  const auto rows = [&] {
    const int64_t most = side1.pairs.experts;
    return Rows{parts.take<V>(most), parts.take<V>(most), parts.take<C>(most)};
  };
  const Rows a = rows(), c = rows();
  const auto gather = [&](const TokenGates<C>& side, const C* s, const Rows& to) {
    for (int64_t p = 0; p < side.pairs(); ++p) {
      to.activation[p] = relu_squared(read<count>(s + side.pair(p) * units));
      to.cross[p] = V{};
      to.total[p] = 0;
    }
  };
  const auto write_back = [&](const TokenGates<C>& side, const Rows& from, C* own, C* cross) {
    for (int64_t p = 0; p < side.pairs(); ++p) {
      write<count>(own + side.pair(p) * units, from.activation[p] * from.total[p]);
      write<count>(cross + side.pair(p) * units, from.cross[p]);
    }
  };
  for (int64_t t = begin; t < end; ++t) {
    experts.take(t);
    gather(experts.one, s1, a);
    gather(experts.two, s2, c);
    experts.for_each_run([&](int64_t, ActiveGate<C> i, const C* factors, const auto* j, const auto* last) {
      const V a_i = a.activation[i.place];
      V cross1 = a.cross[i.place];
      C total1 = a.total[i.place];
      for (; j != last; ++j) {
        const C w = factors[j->expert] * i.gate * j->gate;
        total1 += w;
        c.total[j->place] += w;
        cross1 += times(w, c.activation[j->place]);
        c.cross[j->place] += times(w, a_i);
      }
      a.cross[i.place] = cross1;
      a.total[i.place] = total1;
    });
    write_back(experts.one, a, mix.own1, mix.cross1);
    write_back(experts.two, c, mix.own2, mix.cross2);
  }
}

template <class C, int count>
void masked_vertical_backward(
    const MaskedSide<C>& side1, const MaskedSide<C>& side2, const Mask<C>& mask, const C* s1, const C* s2,
    int64_t units, const VerticalMix<const C>& dmix, const VerticalMix<C>& mix, C* ds1, C* ds2, C* dgates1, C* dgates2,
    int64_t begin, int64_t end, bool add, VectorRoom* room) {
  using V = Units<C, count>;
  Parts parts(room);
  TokenExperts<C> experts(side1, side2, mask, parts);
  struct Rows {
    V *activation, *dcross, *cross, *dactivation;
    C *total, *dtotal;
  };
  const auto rows = [&] {
    const int64_t most = side1.pairs.experts;
    return Rows{parts.take<V>(most), parts.take<V>(most), parts.take<V>(most),
                parts.take<V>(most), parts.take<C>(most), parts.take<C>(most)};
  };
  const Rows a = rows(), c = rows();
  const auto gather = [&](const TokenGates<C>& side, const C* s, const C* down, const C* dcross, const Rows& to) {
    for (int64_t p = 0; p < side.pairs(); ++p) {
      const int64_t at = side.pair(p) * units;
      to.activation[p] = relu_squared(read<count>(s + at));
      to.dcross[p] = read<count>(dcross + at);
      to.cross[p] = to.dactivation[p] = V{};
      to.total[p] = 0;
      to.dtotal[p] = sum<lanes_for(count), C>(to.activation[p] * read<count>(down + at));
    }
  };
  const auto write_back = [&](const TokenGates<C>& side, const C* s, const C* down, const Rows& from, C* own, C* cross,
                              C* ds) {
    for (int64_t p = 0; p < side.pairs(); ++p) {
      const int64_t at = side.pair(p) * units;
      const V dactivation = from.dactivation[p] + from.total[p] * read<count>(down + at);
      write<count>(ds + at, relu_squared_slope(read<count>(s + at)) * dactivation);
      write<count>(own + at, from.activation[p] * from.total[p]);
      write<count>(cross + at, from.cross[p]);
    }
  };
  const int64_t heads = side1.heads;
  for (int64_t t = begin; t < end; ++t) {
    experts.take(t);
    gather(experts.one, s1, dmix.own1, dmix.cross1, a);
    gather(experts.two, s2, dmix.own2, dmix.cross2, c);
    if (!add) clear_gates(experts.one, dgates1), clear_gates(experts.two, dgates2);
    experts.for_each_run([&](int64_t h, ActiveGate<C> i, const C* factors, const auto* j, const auto* last) {
      const V a_i = a.activation[i.place], dcross1 = a.dcross[i.place];
      V cross1 = a.cross[i.place], da = a.dactivation[i.place];
      C total1 = a.total[i.place], dgate1 = 0;
      for (; j != last; ++j) {
        const C factor = factors[j->expert], w = factor * i.gate * j->gate;
        const V c_j = c.activation[j->place], dcross2 = c.dcross[j->place];
        const C dw = times(
            factor, a.dtotal[i.place] + c.dtotal[j->place] + sum<lanes_for(count), C>(dcross1 * c_j + dcross2 * a_i));
        dgate1 += j->gate * dw;
        dgates2[experts.two.pair(j->place) * heads + h] += i.gate * dw;
        total1 += w;
        c.total[j->place] += w;
        cross1 += times(w, c_j);
        c.cross[j->place] += times(w, a_i);
        da += times(w, dcross2);
        c.dactivation[j->place] += times(w, dcross1);
      }
      a.cross[i.place] = cross1;
      a.dactivation[i.place] = da;
      a.total[i.place] = total1;
      dgates1[experts.one.pair(i.place) * heads + h] += dgate1;
    });
    write_back(experts.one, s1, dmix.own1, a, mix.own1, mix.cross1, ds1);
    write_back(experts.two, s2, dmix.own2, c, mix.own2, mix.cross2, ds2);
  }
}

template <class C, int count>
void masked_horizontal(
    const MaskedSide<C>& side1, const MaskedSide<C>& side2, const Mask<C>& mask, const C* s1, int64_t units, C* y,
    int64_t begin, int64_t end, VectorRoom* room) {
  using V = Units<C, count>;
  Parts parts(room);
  TokenExperts<C> experts(side1, side2, mask, parts);
  V *a = parts.take<V>(side1.pairs.experts), *mixed = parts.take<V>(side1.pairs.experts);
  const TokenGates<C>&one = experts.one, &two = experts.two;
  for (int64_t t = begin; t < end; ++t) {
    experts.take(t);
    for (int64_t p = 0; p < one.pairs(); ++p) a[p] = relu_squared(read<count>(s1 + one.pair(p) * units));
    for (int64_t p = 0; p < two.pairs(); ++p) mixed[p] = V{};
    experts.for_each_run([&](int64_t, ActiveGate<C> i, const C* factors, const auto* j, const auto* last) {
      for (const V a_i = a[i.place]; j != last; ++j)
        mixed[j->place] += times(factors[j->expert] * i.gate * j->gate, a_i);
    });
    for (int64_t p = 0; p < two.pairs(); ++p) write<count>(y + two.pair(p) * units, mixed[p]);
  }
}

template <class C, int count>
void masked_horizontal_backward(
    const MaskedSide<C>& side1, const MaskedSide<C>& side2, const Mask<C>& mask, const C* s1, int64_t units,
    const C* dy, C* y, C* ds1, C* dgates1, C* dgates2, int64_t begin, int64_t end, bool add, VectorRoom* room) {
  using V = Units<C, count>;
  Parts parts(room);
  TokenExperts<C> experts(side1, side2, mask, parts);
  const int64_t most = side1.pairs.experts, heads = side1.heads;
  V *a = parts.take<V>(most), *da = parts.take<V>(most), *mixed = parts.take<V>(most), *dmixed = parts.take<V>(most);
  const TokenGates<C>&one = experts.one, &two = experts.two;
  for (int64_t t = begin; t < end; ++t) {
    experts.take(t);
    for (int64_t p = 0; p < one.pairs(); ++p) {
      a[p] = relu_squared(read<count>(s1 + one.pair(p) * units));
      da[p] = V{};
    }
    for (int64_t p = 0; p < two.pairs(); ++p) {
      mixed[p] = V{};
      dmixed[p] = read<count>(dy + two.pair(p) * units);
    }
    if (!add) clear_gates(one, dgates1), clear_gates(two, dgates2);
    experts.for_each_run([&](int64_t h, ActiveGate<C> i, const C* factors, const auto* j, const auto* last) {
      const V a_i = a[i.place];
      V da_i = da[i.place];
      C dgate1 = 0;
      for (; j != last; ++j) {
        const C factor = factors[j->expert], w = factor * i.gate * j->gate;
        const C dw = times(factor, sum<lanes_for(count), C>(dmixed[j->place] * a_i));
        dgate1 += j->gate * dw;
        dgates2[two.pair(j->place) * heads + h] += i.gate * dw;
        mixed[j->place] += times(w, a_i);
        da_i += times(w, dmixed[j->place]);
      }
      da[i.place] = da_i;
      dgates1[one.pair(i.place) * heads + h] += dgate1;
    });
    for (int64_t p = 0; p < one.pairs(); ++p) {
      const int64_t at = one.pair(p) * units;
      write<count>(ds1 + at, relu_squared_slope(read<count>(s1 + at)) * da[p]);
    }
    for (int64_t p = 0; p < two.pairs(); ++p) write<count>(y + two.pair(p) * units, mixed[p]);
  }
}

template <class C>
void totals(
    const MaskedSide<C>& side1, const MaskedSide<C>& side2, const Mask<C>& mask, C* totals1, C* totals2, int64_t begin,
    int64_t end, VectorRoom* room) {
  Parts parts(room);
  TokenExperts<C> experts(side1, side2, mask, parts);
  const TokenGates<C>&one = experts.one, &two = experts.two;
  for (int64_t t = begin; t < end; ++t) {
    experts.take(t);
    for (int64_t p = 0; p < one.pairs(); ++p) totals1[one.pair(p)] = 0;
    for (int64_t p = 0; p < two.pairs(); ++p) totals2[two.pair(p)] = 0;
    experts.for_each_run([&](int64_t, ActiveGate<C> i, const C* factors, const auto* j, const auto* last) {
      C total1 = 0;
      for (; j != last; ++j) {
        const C w = factors[j->expert] * i.gate * j->gate;
        total1 += w;
        totals2[two.pair(j->place)] += w;
      }
      totals1[one.pair(i.place)] += total1;
    });
  }
}

template <class C>
void totals_backward(
    const MaskedSide<C>& side1, const MaskedSide<C>& side2, const Mask<C>& mask, const C* dtotals1, const C* dtotals2,
    C* dgates1, C* dgates2, int64_t begin, int64_t end, VectorRoom* room) {
  Parts parts(room);
  TokenExperts<C> experts(side1, side2, mask, parts);
  const TokenGates<C>&one = experts.one, &two = experts.two;
  const int64_t heads = side1.heads;
  for (int64_t t = begin; t < end; ++t) {
    experts.take(t);
    clear_gates(one, dgates1);
    clear_gates(two, dgates2);
    experts.for_each_run([&](int64_t h, ActiveGate<C> i, const C* factors, const auto* j, const auto* last) {
      const int64_t pair1 = one.pair(i.place);
      C dgate1 = 0;
      for (; j != last; ++j) {
        const int64_t pair2 = two.pair(j->place);
        const C dw = times(factors[j->expert], dtotals1[pair1] + dtotals2[pair2]);
        dgate1 += j->gate * dw;
        dgates2[pair2 * heads + h] += i.gate * dw;
      }
      dgates1[pair1 * heads + h] += dgate1;
    });
  }
}

// ---- from any number of units to those above

template <class C>
void masked_vertical(
    const MaskedSide<C>& side1, const MaskedSide<C>& side2, const Mask<C>& mask, const C* s1, const C* s2,
    int64_t units, const VerticalMix<C>& mix, int64_t begin, int64_t end, VectorRoom* room) {
  for_each_piece<C>(units, [&](int64_t u, auto count) {
    masked_vertical<C, count.value>(
        side1, side2, mask, s1 + u, s2 + u, units, mix.from_unit(u), begin, end, room);
  });
}

template <class C>
void masked_vertical_backward(
    const MaskedSide<C>& side1, const MaskedSide<C>& side2, const Mask<C>& mask, const C* s1, const C* s2,
    int64_t units, const VerticalMix<const C>& dmix, const VerticalMix<C>& mix, C* ds1, C* ds2, C* dgates1, C* dgates2,
    int64_t begin, int64_t end, VectorRoom* room) {
  for_each_piece<C>(units, [&](int64_t u, auto count) {
    masked_vertical_backward<C, count.value>(
        side1, side2, mask, s1 + u, s2 + u, units, dmix.from_unit(u), mix.from_unit(u), ds1 + u, ds2 + u, dgates1,
        dgates2, begin, end, u > 0, room);
  });
}

template <class C>
void masked_horizontal(
    const MaskedSide<C>& side1, const MaskedSide<C>& side2, const Mask<C>& mask, const C* s1, int64_t units, C* y,
    int64_t begin, int64_t end, VectorRoom* room) {
  for_each_piece<C>(units, [&](int64_t u, auto count) {
    masked_horizontal<C, count.value>(side1, side2, mask, s1 + u, units, y + u, begin, end, room);
  });
}

template <class C>
void masked_horizontal_backward(
    const MaskedSide<C>& side1, const MaskedSide<C>& side2, const Mask<C>& mask, const C* s1, int64_t units,
    const C* dy, C* y, C* ds1, C* dgates1, C* dgates2, int64_t begin, int64_t end, VectorRoom* room) {
  for_each_piece<C>(units, [&](int64_t u, auto count) {
    masked_horizontal_backward<C, count.value>(
        side1, side2, mask, s1 + u, units, dy + u, y + u, ds1 + u, dgates1, dgates2, begin, end, u > 0, room);
  });
}

template <class C>
constexpr Masking<C> masking_table = {
    masked_vertical<C>, masked_vertical_backward<C>, masked_horizontal<C>, masked_horizontal_backward<C>, totals<C>,
    totals_backward<C>};

}  // namespace
}  // namespace monet::cpu
