// Mixing on the CPU: what happens to a token between the input and the output weights of its half-experts, and the
// weights that a mask leaves of these. See ../experts.h.
#pragma once

#include "../experts.h"

namespace monet::cpu {

template <class C>
void run(const MixVertical<C>& p);
template <class C>
void run(const MixVerticalBackward<C>& p);
template <class C>
void run(const MixHorizontal<C>& p);
template <class C>
void run(const MixHorizontalBackward<C>& p);

template <class C>
void run(const ExpertWeights<C>& p);
template <class C>
void run(const ExpertWeightsBackward<C>& p);

template <class C>
void run(const GateTotals<C>& p);
template <class C>
void run(const GateTotalsBackward<C>& p);

// The totals in the order of row_pair, with the half-expert of each.
template <class C>
struct GateTotalsByToken {
  Side<C> side;
  C* totals;        // [pairs]
  int32_t* expert;  // [pairs]
};
template <class C>
void run(const GateTotalsByToken<C>& p);

// ---- what is compiled for each instruction set

struct TokenRange {
  int64_t begin, end;
};

// Memory for one vector of any instruction set.
struct alignas(64) WorkspaceVector {
  char bytes[64];
};

// Without a mask; one table per instruction set.
template <class C>
struct Mixing {
  void (*vertical)(const MixVertical<C>& p, TokenRange tokens, WorkspaceVector* workspace);
  void (*vertical_backward)(const MixVerticalBackward<C>& p, TokenRange tokens, WorkspaceVector* workspace);
  void (*horizontal)(const MixHorizontal<C>& p, TokenRange tokens, WorkspaceVector* workspace);
  void (*horizontal_backward)(const MixHorizontalBackward<C>& p, TokenRange tokens, WorkspaceVector* workspace);
};
template <class C>
const Mixing<C>& mixing();
// Vectors of workspace that a call needs for each head.
constexpr int64_t kMixingVectorsPerHead = 4;

// The half-expert of each pair of both sides.
struct ExpertsOfPairs {
  const int32_t *side1, *side2;
};

// With a mask; one table per instruction set.
template <class C>
struct MaskedMixing {
  void (*vertical)(const MixVertical<C>& p, ExpertsOfPairs experts, TokenRange tokens, WorkspaceVector* workspace);
  void (*vertical_backward)(
      const MixVerticalBackward<C>& p, ExpertsOfPairs experts, TokenRange tokens, WorkspaceVector* workspace);
  void (*horizontal)(const MixHorizontal<C>& p, ExpertsOfPairs experts, TokenRange tokens, WorkspaceVector* workspace);
  void (*horizontal_backward)(
      const MixHorizontalBackward<C>& p, ExpertsOfPairs experts, TokenRange tokens, WorkspaceVector* workspace);
  void (*weights)(const ExpertWeights<C>& p, ExpertsOfPairs experts, TokenRange tokens, WorkspaceVector* workspace);
  void (*weights_backward)(
      const ExpertWeightsBackward<C>& p, ExpertsOfPairs experts, TokenRange tokens, WorkspaceVector* workspace);
};
template <class C>
const MaskedMixing<C>& masked_mixing();

// Vectors of workspace that a call needs, for a token that has every pair and every gate: on each side 4 rows of
// units (a vector at most) and 2 numbers per pair, its gates (16 bytes at most) and a count per head.
template <class C>
int64_t masked_mixing_vectors(const Routing<C>& routing) {
  const int64_t pairs = routing.side1.pairs.experts, heads = routing.heads();
  const int64_t allocations = 32;  // each begins with a vector of its own
  const int64_t bytes = pairs * 2 * sizeof(C) + heads * ((pairs + 1) * 16 + sizeof(int64_t));
  return 2 * (4 * pairs + bytes / sizeof(WorkspaceVector)) + allocations;
}

}  // namespace monet::cpu
