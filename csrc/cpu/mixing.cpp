#include "mixing.h"

#include <memory>
#include <vector>

#include "groups.h"
#include "tasks.h"

namespace monet::cpu {
namespace {

constexpr int64_t kTaskTokens = 64;
constexpr int64_t kTaskPairs = 4096;

// mix(token range, workspace) for all tokens.
template <class C, class F>
void without_mask(const Routing<C>& routing, const F& mix) {
  for_each_range(routing.tokens(), kTaskTokens, [&](int64_t begin, int64_t end) {
    std::vector<WorkspaceVector> workspace(kMixingVectorsPerHead * routing.heads());
    mix(TokenRange{begin, end}, workspace.data());
  });
}

// mix(half-experts of the pairs, token range, workspace) for all tokens.
template <class C, class F>
void with_mask(const Routing<C>& routing, const F& mix) {
  const Pairs &pairs1 = routing.side1.pairs, &pairs2 = routing.side2.pairs;
  const std::unique_ptr<int32_t[]> expert1(new int32_t[pairs1.count]), expert2(new int32_t[pairs2.count]);
  experts_of_pairs(pairs1, expert1.get());
  experts_of_pairs(pairs2, expert2.get());
  const ExpertsOfPairs experts{expert1.get(), expert2.get()};
  const int64_t vectors = masked_mixing_vectors(routing);
  for_each_range(routing.tokens(), kTaskTokens, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<WorkspaceVector[]> workspace(new WorkspaceVector[vectors]);  // not filled: little is used
    mix(experts, TokenRange{begin, end}, workspace.get());
  });
}

// One of the two, as the routing has a mask or not.
template <class C, class P>
void mix(
    const P& p, void (*unmasked)(const P&, TokenRange, WorkspaceVector*),
    void (*masked)(const P&, ExpertsOfPairs, TokenRange, WorkspaceVector*)) {
  if (p.routing.mask)
    with_mask(p.routing, [&](ExpertsOfPairs experts, TokenRange tokens, WorkspaceVector* workspace) {
      masked(p, experts, tokens, workspace);
    });
  else
    without_mask(p.routing, [&](TokenRange tokens, WorkspaceVector* workspace) { unmasked(p, tokens, workspace); });
}

template <class C>
C total(const Side<C>& side, int64_t pair) {
  C sum = 0;
  for (int64_t h = 0; h < side.heads; ++h) sum += side.gates[pair * side.heads + h];
  return sum;
}

}  // namespace

template <class C>
void run(const MixVertical<C>& p) {
  mix<C>(p, mixing<C>().vertical, masked_mixing<C>().vertical);
}
template <class C>
void run(const MixVerticalBackward<C>& p) {
  mix<C>(p, mixing<C>().vertical_backward, masked_mixing<C>().vertical_backward);
}
template <class C>
void run(const MixHorizontal<C>& p) {
  mix<C>(p, mixing<C>().horizontal, masked_mixing<C>().horizontal);
}
template <class C>
void run(const MixHorizontalBackward<C>& p) {
  mix<C>(p, mixing<C>().horizontal_backward, masked_mixing<C>().horizontal_backward);
}

template <class C>
void run(const ExpertWeights<C>& p) {
  with_mask(p.routing, [&](ExpertsOfPairs experts, TokenRange tokens, WorkspaceVector* workspace) {
    masked_mixing<C>().weights(p, experts, tokens, workspace);
  });
}
template <class C>
void run(const ExpertWeightsBackward<C>& p) {
  with_mask(p.routing, [&](ExpertsOfPairs experts, TokenRange tokens, WorkspaceVector* workspace) {
    masked_mixing<C>().weights_backward(p, experts, tokens, workspace);
  });
}

template <class C>
void run(const GateTotals<C>& p) {
  for_each_range(p.side.pairs.count, kTaskPairs, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) p.totals[pair] = total(p.side, pair);
  });
}

template <class C>
void run(const GateTotalsByToken<C>& p) {
  const Pairs& pairs = p.side.pairs;
  std::vector<int32_t> expert_of_pair(pairs.count);
  experts_of_pairs(pairs, expert_of_pair.data());
  for (int64_t entry = 0; entry < pairs.count; ++entry) {
    const int64_t pair = pairs.row_pair[entry];
    p.expert[entry] = expert_of_pair[pair];
    p.totals[entry] = total(p.side, pair);
  }
}

template <class C>
void run(const GateTotalsBackward<C>& p) {
  const int64_t heads = p.side.heads;
  // The only head of a pair is active: a weight that a mask left may be 0 by cancelling.
  const bool all_active = heads == 1;
  for_each_range(p.side.pairs.count, kTaskPairs, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t at = pair * heads + h;
        p.dgates[at] = all_active || p.side.gates[at] != 0 ? p.dtotals[pair] : C{0};
      }
  });
}

#define INSTANTIATE(C)                               \
  template void run(const MixVertical<C>&);           \
  template void run(const MixVerticalBackward<C>&);   \
  template void run(const MixHorizontal<C>&);         \
  template void run(const MixHorizontalBackward<C>&); \
  template void run(const ExpertWeights<C>&);         \
  template void run(const ExpertWeightsBackward<C>&); \
  template void run(const GateTotals<C>&);            \
  template void run(const GateTotalsByToken<C>&);     \
  template void run(const GateTotalsBackward<C>&)
INSTANTIATE(float);
INSTANTIATE(double);
#undef INSTANTIATE

}  // namespace monet::cpu
