// Mixing without a mask, for the instruction set this is compiled for. A vector holds units of one half-expert. All
// heads of a pair are taken, though most of its gates are 0: that is less work than to look for those that are not.

#include "mixing.h"
#include "vector.h"

namespace monet::cpu {
namespace {

template <class C, int lanes>
struct VectorOfLanes {
  typedef C Values __attribute__((vector_size(lanes * sizeof(C))));
};
constexpr int lanes_for(int units) { return units <= 1 ? 1 : 2 * lanes_for((units + 1) / 2); }
template <class C, int count>
using Units = typename VectorOfLanes<C, lanes_for(count)>::Values;

template <int count, class C>
inline Units<C, count> read(const C* from) {
  Units<C, count> v = {};
  __builtin_memcpy(&v, from, count * sizeof(C));
  return v;
}
template <int count, class C>
inline void write(C* to, Units<C, count> v) {
  __builtin_memcpy(to, &v, count * sizeof(C));
}
// The sum of lanes; those beyond count are 0.
template <int lanes, class C, class V>
inline C sum(V v) {
  if constexpr (lanes == 1) {
    return v[0];
  } else {
    typedef typename VectorOfLanes<C, lanes / 2>::Values Half;
    Half low, high;
    __builtin_memcpy(&low, &v, sizeof low);
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return sum<lanes / 2, C>(low + high);
  }
}

// relu(s)^2, but NaN for -inf: what is not finite must not become 0.
template <class V>
inline V relu_squared(V s) {
  return s * (s < 0 ? V{} : s);
}
template <class V>
inline V relu_squared_slope(V s) {
  return s < 0 ? 0 * s : 2 * s;
}

// Sums of one token by head: in registers where the number of heads is known to the compiler, else in the
// caller's workspace.
template <class V, int known>
struct ByHead {
  explicit ByHead(WorkspaceVector*, int64_t) {}
  V& operator[](int64_t h) { return sums_[h]; }
  const V& operator[](int64_t h) const { return sums_[h]; }

 private:
  V sums_[known];
};
template <class V>
struct ByHead<V, 0> {
  ByHead(WorkspaceVector* workspace, int64_t index) : sums_(workspace + index) {}
  V& operator[](int64_t h) { return *reinterpret_cast<V*>(sums_ + kMixingVectorsPerHead * h); }
  const V& operator[](int64_t h) const { return *reinterpret_cast<const V*>(sums_ + kMixingVectorsPerHead * h); }

 private:
  WorkspaceVector* sums_;
};

// The sides of a token for `count` of their units. known: the number of heads, or 0.
template <class C, int count, int known>
class Token {
 public:
  using V = Units<C, count>;
  using Sums = ByHead<V, known>;

  // stride: units of a pair.
  Token(int64_t token, int64_t heads, int64_t stride) : token_(token), heads_(heads), stride_(stride) {}

  int64_t heads() const { return known > 0 ? known : heads_; }

  // f(first unit of a pair in an array by pair, its first gate) for the pairs of a side.
  template <class F>
  void for_each_pair(const Side<C>& side, const F& f) const {
    const int32_t* last = side.pairs.row_pair + side.pairs.row_start[token_ + 1];
    for (const int32_t* pair = side.pairs.row_pair + side.pairs.row_start[token_]; pair != last; ++pair)
      f(*pair * stride_, *pair * heads());
  }

  void clear(Sums& sums) const {
    for (int64_t h = 0; h < heads(); ++h) sums[h] = V{};
  }
  // sums_h += gate_h value
  void gather(const C* gates, V value, Sums& sums) const {
    for (int64_t h = 0; h < heads(); ++h) sums[h] += gates[h] * value;
  }
  // sum over the heads of gate_h sums_h
  V spread(const C* gates, const Sums& sums) const {
    V value = {};
    for (int64_t h = 0; h < heads(); ++h) value += gates[h] * sums[h];
    return value;
  }
  // products_h (+)= value . sums_h
  void add_products(V value, const Sums& sums, bool add, C* products) const {
    for (int64_t h = 0; h < heads(); ++h) {
      const C product = sum<lanes_for(count), C>(value * sums[h]);
      products[h] = add ? products[h] + product : product;
    }
  }
  C total(const C* gates) const {
    C total = 0;
    for (int64_t h = 0; h < heads(); ++h) total += gates[h];
    return total;
  }

 private:
  int64_t token_, heads_, stride_;
};

template <class C, int count, int known>
void mix_vertical(const MixVertical<C> p, TokenRange tokens, WorkspaceVector* workspace) {
  using T = Token<C, count, known>;
  typename T::Sums mixed_a(workspace, 0), mixed_c(workspace, 1);
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    const T token(t, p.routing.heads(), p.units);
    const auto own = [&](const Side<C>& side, const C* s, C* own, auto& mixed) {
      token.clear(mixed);
      token.for_each_pair(side, [&](int64_t at, int64_t gate) {
        const auto a = relu_squared(read<count>(s + at));
        token.gather(side.gates + gate, a, mixed);
        write<count>(own + at, a * token.total(side.gates + gate));
      });
    };
    const auto cross = [&](const Side<C>& side, const auto& mixed, C* cross) {
      token.for_each_pair(side, [&](int64_t at, int64_t gate) {
        write<count>(cross + at, token.spread(side.gates + gate, mixed));
      });
    };
    own(p.routing.side1, p.s1, p.mix.own1, mixed_a);
    own(p.routing.side2, p.s2, p.mix.own2, mixed_c);
    cross(p.routing.side1, mixed_c, p.mix.cross1);
    cross(p.routing.side2, mixed_a, p.mix.cross2);
  }
}

// add: to the gates' gradients, which earlier units began.
template <class C, int count, int known>
void mix_vertical_backward(const MixVerticalBackward<C> p, TokenRange tokens, bool add, WorkspaceVector* workspace) {
  using T = Token<C, count, known>;
  typename T::Sums mixed_a(workspace, 0), mixed_c(workspace, 1), dmixed_a(workspace, 2), dmixed_c(workspace, 3);
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    const T token(t, p.routing.heads(), p.units);
    const auto gather = [&](const Side<C>& side, const C* s, const C* dcross, auto& mixed, auto& dmixed_other) {
      token.clear(mixed);
      token.clear(dmixed_other);
      token.for_each_pair(side, [&](int64_t at, int64_t gate) {
        token.gather(side.gates + gate, relu_squared(read<count>(s + at)), mixed);
        token.gather(side.gates + gate, read<count>(dcross + at), dmixed_other);
      });
    };
    const auto backward = [&](const Side<C>& side, const C* s, const C* down, const C* dcross, const auto& mixed_other,
                              const auto& dmixed, C* own, C* cross, C* ds, C* dgates) {
      token.for_each_pair(side, [&](int64_t at, int64_t gate) {
        const auto input = read<count>(s + at), a = relu_squared(input);
        const auto down_own = read<count>(down + at), down_cross = read<count>(dcross + at);
        for (int64_t h = 0; h < token.heads(); ++h) {
          const C product = sum<lanes_for(count), C>(a * (down_own + dmixed[h]) + down_cross * mixed_other[h]);
          dgates[gate + h] = add ? dgates[gate + h] + product : product;
        }
        const C* gates = side.gates + gate;
        const C total = token.total(gates);
        write<count>(own + at, a * total);
        write<count>(cross + at, token.spread(gates, mixed_other));
        write<count>(ds + at, relu_squared_slope(input) * (token.spread(gates, dmixed) + total * down_own));
      });
    };
    const Side<C>&side1 = p.routing.side1, &side2 = p.routing.side2;
    gather(side1, p.s1, p.dmix.cross1, mixed_a, dmixed_c);
    gather(side2, p.s2, p.dmix.cross2, mixed_c, dmixed_a);
    backward(
        side1, p.s1, p.dmix.own1, p.dmix.cross1, mixed_c, dmixed_a, p.mix.own1, p.mix.cross1, p.ds1, p.dgates1);
    backward(
        side2, p.s2, p.dmix.own2, p.dmix.cross2, mixed_a, dmixed_c, p.mix.own2, p.mix.cross2, p.ds2, p.dgates2);
  }
}

template <class C, int count, int known>
void mix_horizontal(const MixHorizontal<C> p, TokenRange tokens, WorkspaceVector* workspace) {
  using T = Token<C, count, known>;
  typename T::Sums mixed(workspace, 0);
  const Side<C>&side1 = p.routing.side1, &side2 = p.routing.side2;
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    const T token(t, p.routing.heads(), p.units);
    token.clear(mixed);
    token.for_each_pair(side1, [&](int64_t at, int64_t gate) {
      token.gather(side1.gates + gate, relu_squared(read<count>(p.s1 + at)), mixed);
    });
    token.for_each_pair(side2, [&](int64_t at, int64_t gate) {
      write<count>(p.y + at, token.spread(side2.gates + gate, mixed));
    });
  }
}

template <class C, int count, int known>
void mix_horizontal_backward(
    const MixHorizontalBackward<C> p, TokenRange tokens, bool add, WorkspaceVector* workspace) {
  using T = Token<C, count, known>;
  typename T::Sums mixed(workspace, 0), dmixed(workspace, 1);
  const Side<C>&side1 = p.routing.side1, &side2 = p.routing.side2;
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    const T token(t, p.routing.heads(), p.units);
    token.clear(mixed);
    token.clear(dmixed);
    token.for_each_pair(side1, [&](int64_t at, int64_t gate) {
      token.gather(side1.gates + gate, relu_squared(read<count>(p.s1 + at)), mixed);
    });
    token.for_each_pair(side2, [&](int64_t at, int64_t gate) {
      const auto down = read<count>(p.dy + at);
      token.gather(side2.gates + gate, down, dmixed);
      token.add_products(down, mixed, add, p.dgates2 + gate);
      write<count>(p.y + at, token.spread(side2.gates + gate, mixed));
    });
    token.for_each_pair(side1, [&](int64_t at, int64_t gate) {
      const auto input = read<count>(p.s1 + at);
      token.add_products(relu_squared(input), dmixed, add, p.dgates1 + gate);
      write<count>(p.ds1 + at, relu_squared_slope(input) * token.spread(side1.gates + gate, dmixed));
    });
  }
}

// ---- from any number of units and heads to those above

template <int n>
struct Known {
  static constexpr int value = n;
};

// f(first, Known<count>) for pieces of the units: the largest that fit into a vector.
template <class C, class F>
void for_each_piece(int64_t units, const F& f) {
  int64_t first = 0;
  const auto take = [&](auto count) {
    if constexpr (lanes_for(count.value) <= lanes<C>)
      for (; units - first >= count.value; first += count.value) f(first, count);
  };
  take(Known<16>{});
  take(Known<12>{});
  take(Known<8>{});
  take(Known<6>{});
  take(Known<4>{});
  take(Known<2>{});
  take(Known<1>{});
}

// f(Known<usual>) with that number of heads, else f(Known<0>).
template <int usual, class F>
void with_heads(int64_t heads, const F& f) {
  if (usual == heads)
    f(Known<usual>{});
  else
    f(Known<0>{});
}

// The same work on the units from u on.
template <class C>
VerticalMix<C> from_unit(const VerticalMix<C>& mix, int64_t u) {
  return {mix.own1 + u, mix.cross1 + u, mix.own2 + u, mix.cross2 + u};
}
template <class C>
MixVertical<C> from_unit(MixVertical<C> p, int64_t u) {
  p.s1 += u, p.s2 += u, p.mix = from_unit(p.mix, u);
  return p;
}
template <class C>
MixVerticalBackward<C> from_unit(MixVerticalBackward<C> p, int64_t u) {
  p.s1 += u, p.s2 += u, p.dmix = from_unit(p.dmix, u), p.mix = from_unit(p.mix, u), p.ds1 += u, p.ds2 += u;
  return p;
}
template <class C>
MixHorizontal<C> from_unit(MixHorizontal<C> p, int64_t u) {
  p.s1 += u, p.y += u;
  return p;
}
template <class C>
MixHorizontalBackward<C> from_unit(MixHorizontalBackward<C> p, int64_t u) {
  p.s1 += u, p.dy += u, p.y += u, p.ds1 += u;
  return p;
}

// The published models have half as many heads as an expert has units: as many as a half-expert of the vertical one.
template <class C>
void vertical(const MixVertical<C>& p, TokenRange tokens, WorkspaceVector* workspace) {
  for_each_piece<C>(p.units, [&](int64_t u, auto count) {
    with_heads<count.value>(p.routing.heads(), [&](auto heads) {
      mix_vertical<C, count.value, heads.value>(from_unit(p, u), tokens, workspace);
    });
  });
}

template <class C>
void vertical_backward(const MixVerticalBackward<C>& p, TokenRange tokens, WorkspaceVector* workspace) {
  for_each_piece<C>(p.units, [&](int64_t u, auto count) {
    with_heads<count.value>(p.routing.heads(), [&](auto heads) {
      mix_vertical_backward<C, count.value, heads.value>(from_unit(p, u), tokens, u > 0, workspace);
    });
  });
}

template <class C>
void horizontal(const MixHorizontal<C>& p, TokenRange tokens, WorkspaceVector* workspace) {
  for_each_piece<C>(p.units, [&](int64_t u, auto count) {
    with_heads<count.value / 2>(p.routing.heads(), [&](auto heads) {
      mix_horizontal<C, count.value, heads.value>(from_unit(p, u), tokens, workspace);
    });
  });
}

template <class C>
void horizontal_backward(const MixHorizontalBackward<C>& p, TokenRange tokens, WorkspaceVector* workspace) {
  for_each_piece<C>(p.units, [&](int64_t u, auto count) {
    with_heads<count.value / 2>(p.routing.heads(), [&](auto heads) {
      mix_horizontal_backward<C, count.value, heads.value>(from_unit(p, u), tokens, u > 0, workspace);
    });
  });
}

template <class C>
constexpr Mixing<C> mixing_table = {vertical<C>, vertical_backward<C>, horizontal<C>, horizontal_backward<C>};

}  // namespace
}  // namespace monet::cpu
