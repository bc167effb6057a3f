// The parts that the mixing of experts.h is made of.
#pragma once

#include <cstdint>

#include "experts.h"

namespace monet::cpu {

constexpr int64_t kTaskTokens = 64;

// ---- without a mask

// Room for one vector of any instruction set.
struct alignas(64) VectorRoom {
  char bytes[64];
};
// Rooms that a call needs for each head.
constexpr int64_t kRoomsPerHead = 4;

// For tokens begin..end-1; one table for each instruction set.
template <class C>
struct Mixing {
  void (*vertical)(
      const Side<C>& side1, const Side<C>& side2, const C* s1, const C* s2, int64_t units, const VerticalMix<C>& mix,
      int64_t begin, int64_t end, VectorRoom* room);
  void (*vertical_backward)(
      const Side<C>& side1, const Side<C>& side2, const C* s1, const C* s2, int64_t units,
      const VerticalMix<const C>& dmix, const VerticalMix<C>& mix, C* ds1, C* ds2, C* dgates1, C* dgates2,
      int64_t begin, int64_t end, VectorRoom* room);
  void (*horizontal)(
      const Side<C>& side1, const Side<C>& side2, const C* s1, int64_t units, C* y, int64_t begin, int64_t end,
      VectorRoom* room);
  void (*horizontal_backward)(
      const Side<C>& side1, const Side<C>& side2, const C* s1, int64_t units, const C* dy, C* y, C* ds1, C* dgates1,
      C* dgates2, int64_t begin, int64_t end, VectorRoom* room);
};

template <class C>
const Mixing<C>& mixing();

// ---- with a mask

// A side and the half-expert of each of its pairs.
template <class C>
struct MaskedSide : Side<C> {
  const int32_t* expert;
};

// For tokens begin..end-1; one table for each instruction set.
template <class C>
struct Masking {
  void (*vertical)(
      const MaskedSide<C>& side1, const MaskedSide<C>& side2, const Mask<C>& mask, const C* s1, const C* s2,
      int64_t units, const VerticalMix<C>& mix, int64_t begin, int64_t end, VectorRoom* room);
  void (*vertical_backward)(
      const MaskedSide<C>& side1, const MaskedSide<C>& side2, const Mask<C>& mask, const C* s1, const C* s2,
      int64_t units, const VerticalMix<const C>& dmix, const VerticalMix<C>& mix, C* ds1, C* ds2, C* dgates1,
      C* dgates2, int64_t begin, int64_t end, VectorRoom* room);
  void (*horizontal)(
      const MaskedSide<C>& side1, const MaskedSide<C>& side2, const Mask<C>& mask, const C* s1, int64_t units, C* y,
      int64_t begin, int64_t end, VectorRoom* room);
  void (*horizontal_backward)(
      const MaskedSide<C>& side1, const MaskedSide<C>& side2, const Mask<C>& mask, const C* s1, int64_t units,
      const C* dy, C* y, C* ds1, C* dgates1, C* dgates2, int64_t begin, int64_t end, VectorRoom* room);
  void (*totals)(
      const MaskedSide<C>& side1, const MaskedSide<C>& side2, const Mask<C>& mask, C* totals1, C* totals2,
      int64_t begin, int64_t end, VectorRoom* room);
  void (*totals_backward)(
      const MaskedSide<C>& side1, const MaskedSide<C>& side2, const Mask<C>& mask, const C* dtotals1,
      const C* dtotals2, C* dgates1, C* dgates2, int64_t begin, int64_t end, VectorRoom* room);
};

template <class C>
const Masking<C>& masking();

// Rooms that a call needs, for a token that has every pair and every gate: of each side 4 rows of units (a vector at most)
// and 2 numbers a pair, its gates (16 bytes at most) and a count a head.
template <class C>
int64_t masking_rooms(const Side<C>& side) {
  const int64_t pairs = side.pairs.experts, parts = 32;  // each part begins with a room of its own
  const int64_t bytes = pairs * 2 * sizeof(C) + side.heads * ((pairs + 1) * 16 + sizeof(int64_t));
  return 2 * (4 * pairs + bytes / sizeof(VectorRoom)) + parts;
}

// The mixing of the same names.

template <class C>
void mix_vertical_masked(
    const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* s1, const C* s2, int64_t units,
    const VerticalMix<C>& mix);
template <class C>
void mix_vertical_masked_backward(
    const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* s1, const C* s2, int64_t units,
    const VerticalMix<const C>& dmix, const VerticalMix<C>& mix, C* ds1, C* ds2, C* dgates1, C* dgates2);
template <class C>
void mix_horizontal_masked(
    const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* s1, int64_t units, C* y);
template <class C>
void mix_horizontal_masked_backward(
    const Side<C>& side1, const Side<C>& side2, const Mask<C>& mask, const C* s1, int64_t units, const C* dy, C* y,
    C* ds1, C* dgates1, C* dgates2);

// The half-expert of each pair, [pairs].
void experts_of_pairs(const Pairs& pairs, int32_t* expert);

}  // namespace monet::cpu
