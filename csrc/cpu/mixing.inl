// The mixing of mixing.h for the instruction set this is compiled for. A vector holds units of one half-expert. All
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

// Sums of one token by head: in registers where the number of heads is known to the compiler, else in the caller's room.
template <class V, int known>
struct ByHead {
  explicit ByHead(VectorRoom*, int64_t) {}
  V& operator[](int64_t h) { return sums_[h]; }
  const V& operator[](int64_t h) const { return sums_[h]; }

 private:
  V sums_[known];
};
template <class V>
struct ByHead<V, 0> {
  ByHead(VectorRoom* room, int64_t index) : sums_(room + index) {}
  V& operator[](int64_t h) { return *reinterpret_cast<V*>(sums_ + kRoomsPerHead * h); }
  const V& operator[](int64_t h) const { return *reinterpret_cast<const V*>(sums_ + kRoomsPerHead * h); }

 private:
  VectorRoom* sums_;
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
void mix_vertical(
    const Side<C>& side1, const Side<C>& side2, const C* s1, const C* s2, int64_t units, const VerticalMix<C>& mix,
    int64_t begin, int64_t end, VectorRoom* room) {
  using T = Token<C, count, known>;
  typename T::Sums mixed_a(room, 0), mixed_c(room, 1);
  for (int64_t t = begin; t < end; ++t) {
    const T token(t, side1.heads, units);
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
    own(side1, s1, mix.own1, mixed_a);
    own(side2, s2, mix.own2, mixed_c);
    cross(side1, mixed_c, mix.cross1);
    cross(side2, mixed_a, mix.cross2);
  }
}

template <class C, int count, int known>
void mix_vertical_backward(
    const Side<C>& side1, const Side<C>& side2, const C* s1, const C* s2, int64_t units,
    const VerticalMix<const C>& dmix, const VerticalMix<C>& mix, C* ds1, C* ds2, C* dgates1, C* dgates2,
    int64_t begin, int64_t end, bool add, VectorRoom* room) {
  using T = Token<C, count, known>;
  typename T::Sums mixed_a(room, 0), mixed_c(room, 1), dmixed_a(room, 2), dmixed_c(room, 3);
  for (int64_t t = begin; t < end; ++t) {
    const T token(t, side1.heads, units);
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
    gather(side1, s1, dmix.cross1, mixed_a, dmixed_c);
    gather(side2, s2, dmix.cross2, mixed_c, dmixed_a);
    backward(side1, s1, dmix.own1, dmix.cross1, mixed_c, dmixed_a, mix.own1, mix.cross1, ds1, dgates1);
    backward(side2, s2, dmix.own2, dmix.cross2, mixed_a, dmixed_c, mix.own2, mix.cross2, ds2, dgates2);
  }
}

template <class C, int count, int known>
void mix_horizontal(
    const Side<C>& side1, const Side<C>& side2, const C* s1, int64_t units, C* y, int64_t begin, int64_t end,
    VectorRoom* room) {
  using T = Token<C, count, known>;
  typename T::Sums mixed(room, 0);
  for (int64_t t = begin; t < end; ++t) {
    const T token(t, side1.heads, units);
    token.clear(mixed);
    token.for_each_pair(side1, [&](int64_t at, int64_t gate) {
      token.gather(side1.gates + gate, relu_squared(read<count>(s1 + at)), mixed);
    });
    token.for_each_pair(side2, [&](int64_t at, int64_t gate) {
      write<count>(y + at, token.spread(side2.gates + gate, mixed));
    });
  }
}

template <class C, int count, int known>
void mix_horizontal_backward(
    const Side<C>& side1, const Side<C>& side2, const C* s1, int64_t units, const C* dy, C* y, C* ds1, C* dgates1,
    C* dgates2, int64_t begin, int64_t end, bool add, VectorRoom* room) {
  using T = Token<C, count, known>;
  typename T::Sums mixed(room, 0), dmixed(room, 1);
  for (int64_t t = begin; t < end; ++t) {
    const T token(t, side1.heads, units);
    token.clear(mixed);
    token.clear(dmixed);
    token.for_each_pair(side1, [&](int64_t at, int64_t gate) {
      token.gather(side1.gates + gate, relu_squared(read<count>(s1 + at)), mixed);
    });
    token.for_each_pair(side2, [&](int64_t at, int64_t gate) {
      const auto down = read<count>(dy + at);
      token.gather(side2.gates + gate, down, dmixed);
      token.add_products(down, mixed, add, dgates2 + gate);
      write<count>(y + at, token.spread(side2.gates + gate, mixed));
    });
    token.for_each_pair(side1, [&](int64_t at, int64_t gate) {
      const auto input = read<count>(s1 + at);
      token.add_products(relu_squared(input), dmixed, add, dgates1 + gate);
      write<count>(ds1 + at, relu_squared_slope(input) * token.spread(side1.gates + gate, dmixed));
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

// The published models have half as many heads as an expert has units: as many as a half-expert of the vertical form.
template <class C>
void vertical(
    const Side<C>& side1, const Side<C>& side2, const C* s1, const C* s2, int64_t units, const VerticalMix<C>& mix,
    int64_t begin, int64_t end, VectorRoom* room) {
  for_each_piece<C>(units, [&](int64_t u, auto count) {
    with_heads<count.value>(side1.heads, [&](auto heads) {
      mix_vertical<C, count.value, heads.value>(
          side1, side2, s1 + u, s2 + u, units, mix.from_unit(u), begin, end, room);
    });
  });
}

template <class C>
void vertical_backward(
    const Side<C>& side1, const Side<C>& side2, const C* s1, const C* s2, int64_t units,
    const VerticalMix<const C>& dmix, const VerticalMix<C>& mix, C* ds1, C* ds2, C* dgates1, C* dgates2,
    int64_t begin, int64_t end, VectorRoom* room) {
  for_each_piece<C>(units, [&](int64_t u, auto count) {
    with_heads<count.value>(side1.heads, [&](auto heads) {
      mix_vertical_backward<C, count.value, heads.value>(
          side1, side2, s1 + u, s2 + u, units, dmix.from_unit(u), mix.from_unit(u), ds1 + u, ds2 + u, dgates1, dgates2,
          begin, end, u > 0, room);
    });
  });
}

template <class C>
void horizontal(
    const Side<C>& side1, const Side<C>& side2, const C* s1, int64_t units, C* y, int64_t begin, int64_t end,
    VectorRoom* room) {
  for_each_piece<C>(units, [&](int64_t u, auto count) {
    with_heads<count.value / 2>(side1.heads, [&](auto heads) {
      mix_horizontal<C, count.value, heads.value>(side1, side2, s1 + u, units, y + u, begin, end, room);
    });
  });
}

template <class C>
void horizontal_backward(
    const Side<C>& side1, const Side<C>& side2, const C* s1, int64_t units, const C* dy, C* y, C* ds1, C* dgates1,
    C* dgates2, int64_t begin, int64_t end, VectorRoom* room) {
  for_each_piece<C>(units, [&](int64_t u, auto count) {
    with_heads<count.value / 2>(side1.heads, [&](auto heads) {
      mix_horizontal_backward<C, count.value, heads.value>(
          side1, side2, s1 + u, units, dy + u, y + u, ds1 + u, dgates1, dgates2, begin, end, u > 0, room);
    });
  });
}

template <class C>
constexpr Mixing<C> mixing_table = {vertical<C>, vertical_backward<C>, horizontal<C>, horizontal_backward<C>};

}  // namespace
}  // namespace monet::cpu
