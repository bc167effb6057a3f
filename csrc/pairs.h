// The active (token, half-expert) pairs of one router side: its gates, compact.
#pragma once

#include <cstdint>

namespace monet {

// Tokens are taken in blocks of this many. Within a block, pairs are grouped by half-expert: a group is a small
// dense product whose token rows stay in cache. Part of the layout, so that results do not depend on the machine.
constexpr int64_t kBlockTokens = 512;
constexpr int64_t blocks_of(int64_t tokens) { return (tokens + kBlockTokens - 1) / kBlockTokens; }

// Pairs are numbered by (block, half-expert, token). A pair is active in at least one head.
struct Pairs {
  int64_t tokens;
  int64_t experts;
  int64_t count;
  const int32_t* token;        // [count]                 token of a pair
  const int32_t* group_start;  // [blocks * experts + 1]  first pair of (block, half-expert)
  const int32_t* row_start;    // [tokens + 1]            first entry of a token in row_pair
  const int32_t* row_pair;     // [count]                 pairs of a token, by ascending half-expert

  int64_t blocks() const { return blocks_of(tokens); }
};

// Gates of one side: values [pairs, heads].
template <class C>
struct Side {
  Pairs pairs;
  const C* gates;
  int64_t heads;
};

// A factor for every expert (i, j) of every head, [heads, experts, experts]; its product of gates is multiplied by
// it.
template <class C>
struct Mask {
  const C* factors;     // null: no expert is masked
  int64_t head_stride;  // from a head's factors to those of the next; 0: all heads have the same

  explicit operator bool() const { return factors != nullptr; }
};

}  // namespace monet
