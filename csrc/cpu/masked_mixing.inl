// Mixing under a mask, for the instruction set this is compiled for. Of a token the active gates are listed by head,
// and its rows of units are held side by side; then its experts are taken one by one: about k * k per head.

#include "mixing.inl"

namespace monet::cpu {
namespace {

// An active gate of a head. place: of its pair among those of the token; expert: its half-expert.
template <class C>
struct ActiveGate {
  int32_t place, expert;
  C gate;
};

// w v, but 0 if w is 0: an expert that is off has no say, whatever it computes. Without a branch: masks are not
// foreseen.
template <class V, class C>
inline V times(C w, V v) {
  const V factor = w - V{};
  return factor == 0 ? V{} : factor * v;
}

// Hands out the caller's workspace from its beginning.
class Workspace {
 public:
  explicit Workspace(WorkspaceVector* begin) : next_(begin) {}
  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += (count * sizeof(T) + sizeof(WorkspaceVector) - 1) / sizeof(WorkspaceVector);
    return taken;
  }

 private:
  WorkspaceVector* next_;
};

// One side of a token.
template <class C>
class TokenGates {
 public:
  TokenGates(const Side<C>& side, const int32_t* experts, Workspace& workspace)
      : side_(side), experts_(experts), count_(workspace.take<int64_t>(side.heads)),
        gates_(workspace.take<ActiveGate<C>>(side.heads * (side.pairs.experts + 1))) {}

  void take(int64_t token) {
    const int64_t heads = side_.heads, stride = side_.pairs.experts + 1;
    pair_ = side_.pairs.row_pair + side_.pairs.row_start[token];
    pairs_ = side_.pairs.row_start[token + 1] - side_.pairs.row_start[token];
    for (int64_t h = 0; h < heads; ++h) count_[h] = 0;
    for (int64_t place = 0; place < pairs_; ++place) {
      const int32_t expert = experts_[pair_[place]];
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
        __builtin_prefetch(experts_ + *next);
      }
  }

  const Side<C>& side() const { return side_; }
  int64_t pairs() const { return pairs_; }
  int64_t pair(int64_t place) const { return pair_[place]; }
  const ActiveGate<C>* begin(int64_t head) const { return gates_ + head * (side_.pairs.experts + 1); }
  const ActiveGate<C>* end(int64_t head) const { return begin(head) + count_[head]; }

 private:
  const Side<C>& side_;
  const int32_t* experts_;  // by pair
  int64_t* count_;          // by head
  ActiveGate<C>* gates_;
  const int32_t* pair_ = nullptr;
  int64_t pairs_ = 0;
};

// The experts of one token after the other.
template <class C>
class TokenExperts {
 public:
  TokenExperts(const Routing<C>& routing, ExpertsOfPairs experts, Workspace& workspace)
      : one(routing.side1, experts.side1, workspace), two(routing.side2, experts.side2, workspace),
        mask_(routing.mask) {}

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
    const MixVertical<C> p, ExpertsOfPairs experts_of_pairs, TokenRange tokens, WorkspaceVector* vectors) {
  using V = Units<C, count>;
  Workspace workspace(vectors);
  TokenExperts<C> experts(p.routing, experts_of_pairs, workspace);
  struct Rows {
    V *activation, *cross;
    C* total;
  };
  const auto rows = [&] {
    const int64_t most = p.routing.side1.pairs.experts;
    return Rows{workspace.take<V>(most), workspace.take<V>(most), workspace.take<C>(most)};
  };
  const Rows a = rows(), c = rows();
  const auto gather = [&](const TokenGates<C>& side, const C* s, const Rows& to) {
    for (int64_t place = 0; place < side.pairs(); ++place) {
      to.activation[place] = relu_squared(read<count>(s + side.pair(place) * p.units));
      to.cross[place] = V{};
      to.total[place] = 0;
    }
  };
  const auto write_back = [&](const TokenGates<C>& side, const Rows& from, C* own, C* cross) {
    for (int64_t place = 0; place < side.pairs(); ++place) {
      write<count>(own + side.pair(place) * p.units, from.activation[place] * from.total[place]);
      write<count>(cross + side.pair(place) * p.units, from.cross[place]);
    }
  };
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    experts.take(t);
    gather(experts.one, p.s1, a);
    gather(experts.two, p.s2, c);
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
    write_back(experts.one, a, p.mix.own1, p.mix.cross1);
    write_back(experts.two, c, p.mix.own2, p.mix.cross2);
  }
}

template <class C, int count>
void masked_vertical_backward(
    const MixVerticalBackward<C> p, ExpertsOfPairs experts_of_pairs, TokenRange tokens, bool add,
    WorkspaceVector* vectors) {
  using V = Units<C, count>;
  Workspace workspace(vectors);
  TokenExperts<C> experts(p.routing, experts_of_pairs, workspace);
  struct Rows {
    V *activation, *dcross, *cross, *dactivation;
    C *total, *dtotal;
  };
  const auto rows = [&] {
    const int64_t most = p.routing.side1.pairs.experts;
    return Rows{workspace.take<V>(most), workspace.take<V>(most), workspace.take<V>(most),
                workspace.take<V>(most), workspace.take<C>(most), workspace.take<C>(most)};
  };
  const Rows a = rows(), c = rows();
  const auto gather = [&](const TokenGates<C>& side, const C* s, const C* down, const C* dcross, const Rows& to) {
    for (int64_t place = 0; place < side.pairs(); ++place) {
      const int64_t at = side.pair(place) * p.units;
      to.activation[place] = relu_squared(read<count>(s + at));
      to.dcross[place] = read<count>(dcross + at);
      to.cross[place] = to.dactivation[place] = V{};
      to.total[place] = 0;
      to.dtotal[place] = sum<lanes_for(count), C>(to.activation[place] * read<count>(down + at));
    }
  };
  const auto write_back = [&](const TokenGates<C>& side, const C* s, const C* down, const Rows& from, C* own, C* cross,
                              C* ds) {
    for (int64_t place = 0; place < side.pairs(); ++place) {
      const int64_t at = side.pair(place) * p.units;
      const V dactivation = from.dactivation[place] + from.total[place] * read<count>(down + at);
      write<count>(ds + at, relu_squared_slope(read<count>(s + at)) * dactivation);
      write<count>(own + at, from.activation[place] * from.total[place]);
      write<count>(cross + at, from.cross[place]);
    }
  };
  const int64_t heads = p.routing.heads();
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    experts.take(t);
    gather(experts.one, p.s1, p.dmix.own1, p.dmix.cross1, a);
    gather(experts.two, p.s2, p.dmix.own2, p.dmix.cross2, c);
    if (!add) clear_gates(experts.one, p.dgates1), clear_gates(experts.two, p.dgates2);
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
        p.dgates2[experts.two.pair(j->place) * heads + h] += i.gate * dw;
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
      p.dgates1[experts.one.pair(i.place) * heads + h] += dgate1;
    });
    write_back(experts.one, p.s1, p.dmix.own1, a, p.mix.own1, p.mix.cross1, p.ds1);
    write_back(experts.two, p.s2, p.dmix.own2, c, p.mix.own2, p.mix.cross2, p.ds2);
  }
}

template <class C, int count>
void masked_horizontal(
    const MixHorizontal<C> p, ExpertsOfPairs experts_of_pairs, TokenRange tokens, WorkspaceVector* vectors) {
  using V = Units<C, count>;
  Workspace workspace(vectors);
  TokenExperts<C> experts(p.routing, experts_of_pairs, workspace);
  const int64_t most = p.routing.side1.pairs.experts;
  V *a = workspace.take<V>(most), *mixed = workspace.take<V>(most);
  const TokenGates<C>&one = experts.one, &two = experts.two;
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    experts.take(t);
    for (int64_t place = 0; place < one.pairs(); ++place)
      a[place] = relu_squared(read<count>(p.s1 + one.pair(place) * p.units));
    for (int64_t place = 0; place < two.pairs(); ++place) mixed[place] = V{};
    experts.for_each_run([&](int64_t, ActiveGate<C> i, const C* factors, const auto* j, const auto* last) {
      for (const V a_i = a[i.place]; j != last; ++j)
        mixed[j->place] += times(factors[j->expert] * i.gate * j->gate, a_i);
    });
    for (int64_t place = 0; place < two.pairs(); ++place) write<count>(p.y + two.pair(place) * p.units, mixed[place]);
  }
}

template <class C, int count>
void masked_horizontal_backward(
    const MixHorizontalBackward<C> p, ExpertsOfPairs experts_of_pairs, TokenRange tokens, bool add,
    WorkspaceVector* vectors) {
  using V = Units<C, count>;
  Workspace workspace(vectors);
  TokenExperts<C> experts(p.routing, experts_of_pairs, workspace);
  const int64_t most = p.routing.side1.pairs.experts, heads = p.routing.heads();
  V *a = workspace.take<V>(most), *da = workspace.take<V>(most);
  V *mixed = workspace.take<V>(most), *dmixed = workspace.take<V>(most);
  const TokenGates<C>&one = experts.one, &two = experts.two;
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    experts.take(t);
    for (int64_t place = 0; place < one.pairs(); ++place) {
      a[place] = relu_squared(read<count>(p.s1 + one.pair(place) * p.units));
      da[place] = V{};
    }
    for (int64_t place = 0; place < two.pairs(); ++place) {
      mixed[place] = V{};
      dmixed[place] = read<count>(p.dy + two.pair(place) * p.units);
    }
    if (!add) clear_gates(one, p.dgates1), clear_gates(two, p.dgates2);
    experts.for_each_run([&](int64_t h, ActiveGate<C> i, const C* factors, const auto* j, const auto* last) {
      const V a_i = a[i.place];
      V da_i = da[i.place];
      C dgate1 = 0;
      for (; j != last; ++j) {
        const C factor = factors[j->expert], w = factor * i.gate * j->gate;
        const C dw = times(factor, sum<lanes_for(count), C>(dmixed[j->place] * a_i));
        dgate1 += j->gate * dw;
        p.dgates2[two.pair(j->place) * heads + h] += i.gate * dw;
        mixed[j->place] += times(w, a_i);
        da_i += times(w, dmixed[j->place]);
      }
      da[i.place] = da_i;
      p.dgates1[one.pair(i.place) * heads + h] += dgate1;
    });
    for (int64_t place = 0; place < one.pairs(); ++place) {
      const int64_t at = one.pair(place) * p.units;
      write<count>(p.ds1 + at, relu_squared_slope(read<count>(p.s1 + at)) * da[place]);
    }
    for (int64_t place = 0; place < two.pairs(); ++place) write<count>(p.y + two.pair(place) * p.units, mixed[place]);
  }
}

template <class C>
void weights(
    const ExpertWeights<C>& p, ExpertsOfPairs experts_of_pairs, TokenRange tokens, WorkspaceVector* vectors) {
  Workspace workspace(vectors);
  TokenExperts<C> experts(p.routing, experts_of_pairs, workspace);
  const TokenGates<C>&one = experts.one, &two = experts.two;
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    experts.take(t);
    for (int64_t place = 0; place < one.pairs(); ++place) p.weights1[one.pair(place)] = 0;
    for (int64_t place = 0; place < two.pairs(); ++place) p.weights2[two.pair(place)] = 0;
    experts.for_each_run([&](int64_t, ActiveGate<C> i, const C* factors, const auto* j, const auto* last) {
      C total1 = 0;
      for (; j != last; ++j) {
        const C w = factors[j->expert] * i.gate * j->gate;
        total1 += w;
        p.weights2[two.pair(j->place)] += w;
      }
      p.weights1[one.pair(i.place)] += total1;
    });
  }
}

template <class C>
void weights_backward(
    const ExpertWeightsBackward<C>& p, ExpertsOfPairs experts_of_pairs, TokenRange tokens, WorkspaceVector* vectors) {
  Workspace workspace(vectors);
  TokenExperts<C> experts(p.routing, experts_of_pairs, workspace);
  const TokenGates<C>&one = experts.one, &two = experts.two;
  const int64_t heads = p.routing.heads();
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    experts.take(t);
    clear_gates(one, p.dgates1);
    clear_gates(two, p.dgates2);
    experts.for_each_run([&](int64_t h, ActiveGate<C> i, const C* factors, const auto* j, const auto* last) {
      const int64_t pair1 = one.pair(i.place);
      C dgate1 = 0;
      for (; j != last; ++j) {
        const int64_t pair2 = two.pair(j->place);
        const C dw = times(factors[j->expert], p.dweights1[pair1] + p.dweights2[pair2]);
        dgate1 += j->gate * dw;
        p.dgates2[pair2 * heads + h] += i.gate * dw;
      }
      p.dgates1[pair1 * heads + h] += dgate1;
    });
  }
}

// ---- from any number of units to those above

template <class C>
void masked_vertical(
    const MixVertical<C>& p, ExpertsOfPairs experts, TokenRange tokens, WorkspaceVector* workspace) {
  for_each_piece<C>(p.units, [&](int64_t u, auto count) {
    masked_vertical<C, count.value>(from_unit(p, u), experts, tokens, workspace);
  });
}

template <class C>
void masked_vertical_backward(
    const MixVerticalBackward<C>& p, ExpertsOfPairs experts, TokenRange tokens, WorkspaceVector* workspace) {
  for_each_piece<C>(p.units, [&](int64_t u, auto count) {
    masked_vertical_backward<C, count.value>(from_unit(p, u), experts, tokens, u > 0, workspace);
  });
}

template <class C>
void masked_horizontal(
    const MixHorizontal<C>& p, ExpertsOfPairs experts, TokenRange tokens, WorkspaceVector* workspace) {
  for_each_piece<C>(p.units, [&](int64_t u, auto count) {
    masked_horizontal<C, count.value>(from_unit(p, u), experts, tokens, workspace);
  });
}

template <class C>
void masked_horizontal_backward(
    const MixHorizontalBackward<C>& p, ExpertsOfPairs experts, TokenRange tokens, WorkspaceVector* workspace) {
  for_each_piece<C>(p.units, [&](int64_t u, auto count) {
    masked_horizontal_backward<C, count.value>(from_unit(p, u), experts, tokens, u > 0, workspace);
  });
}

template <class C>
constexpr MaskedMixing<C> masked_mixing_table = {
    masked_vertical<C>, masked_vertical_backward<C>, masked_horizontal<C>, masked_horizontal_backward<C>, weights<C>,
    weights_backward<C>};

}  // namespace
}  // namespace monet::cpu
