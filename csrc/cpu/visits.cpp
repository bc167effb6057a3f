// A task owns the experts of one half-expert i of side 1, and takes its tokens in order: the rows of i stay in cache,
// and sums and contexts do not depend on threads.
#include "visits.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "groups.h"
#include "tasks.h"

namespace monet::cpu {
namespace {

// Of side 2, for all tasks: the entries of a token side by side, and the pair of each (half-expert, token).
struct OtherSide {
  explicit OtherSide(const Visit& p)
      : expert(p.side2.pairs.row_start[p.tokens]), gates(expert.size() * p.side2.heads) {
    const Pairs& pairs = p.side2.pairs;
    const int64_t heads = p.side2.heads;
    std::vector<int32_t> of_pair(pairs.count);
    experts_of_pairs(pairs, of_pair.data());
    for (int64_t t = 0; t < p.tokens; ++t)
      for (int64_t first = pairs.row_start[t], count = pairs.row_start[t + 1] - first, k = 0; k < count; ++k) {
        const int64_t pair = pairs.row_pair[first + k];
        expert[first + k] = of_pair[pair];
        for (int64_t h = 0; h < heads; ++h) gates[first * heads + h * count + k] = p.side2.gates[pair * heads + h];
      }
    if (p.tally.score) place_pairs(pairs, of_pair);
  }
  void place_pairs(const Pairs& pairs, const std::vector<int32_t>& of_pair) {
    pair_at.assign(pairs.experts * pairs.tokens, -1);
    for (int64_t pair = 0; pair < pairs.count; ++pair)
      pair_at[of_pair[pair] * pairs.tokens + pairs.token[pair]] = static_cast<int32_t>(pair);
  }

  std::vector<int32_t> expert;   // by entry
  std::vector<float> gates;      // by token, [heads, entries of the token]
  std::vector<int32_t> pair_at;  // [experts, tokens]; -1: not active. Empty without contexts.
};

float score_of(const float* gates1, const float* gates2, int64_t heads) {
  float score = 0;
  for (int64_t h = 0; h < heads; ++h) score += gates1[h] * gates2[h];
  return score;
}

// floor(log2 score) as a bin.
int64_t bin_of(float score) {
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  const int power = static_cast<int>(bits >> 23) - 127;  // a denormal comes out as -127: far below the first bin
  return std::clamp<int64_t>(power - kLowestPower, 0, kHistogramBins - 1);
}

void add(const Tally& tally, int64_t expert, float score) {
  const double wide = score;
  tally.total[expert] += wide;
  tally.square[expert] += wide * wide;
  ++tally.count[expert];
  ++tally.histogram[expert * kHistogramBins + bin_of(score)];
}

// To fp16, nearest even. The score is not negative.
uint16_t half(float score) {
  uint32_t bits;
  constexpr uint32_t kLeastNormal = 0x38800000, kRebias = (127 - 15) << 23;
  std::memcpy(&bits, &score, sizeof bits);
  if (bits >= kLeastNormal) return static_cast<uint16_t>((bits + 0xfff + (bits >> 13 & 1) - kRebias) >> 13);
  const float rounded = score + 0.5f;  // whose last bit is worth that of a denormal
  std::memcpy(&bits, &rounded, sizeof bits);
  return static_cast<uint16_t>(bits - 0x3f000000);
}

struct Firing {
  float score;
  uint64_t hash;
  int64_t place;  // -1: an empty slot, worse than every firing
};

struct Stronger {
  static constexpr int64_t kFirst = 0, kEnd = kStrongSlots;
  static bool better(const Firing& a, const Firing& b) {
    if (a.place < 0 || b.place < 0) return b.place < a.place && b.place < 0;
    if (a.score != b.score) return a.score > b.score;
    return a.hash != b.hash ? a.hash < b.hash : a.place < b.place;
  }
};

struct Sampled {
  static constexpr int64_t kFirst = kStrongSlots, kEnd = kSlots;
  static bool better(const Firing& a, const Firing& b) {
    if (a.place < 0 || b.place < 0) return b.place < a.place && b.place < 0;
    return a.hash != b.hash ? a.hash < b.hash : a.place < b.place;
  }
};

Firing in_slot(const Tally& tally, int64_t slot) { return {tally.score[slot], tally.hash[slot], tally.place[slot]}; }

template <class Order>
int64_t worst_slot(const Tally& tally, int64_t expert) {
  int64_t worst = expert * kSlots + Order::kFirst;
  Firing in_worst = in_slot(tally, worst);
  for (int64_t slot = worst + 1; slot < expert * kSlots + Order::kEnd && in_worst.place >= 0; ++slot)
    if (const Firing firing = in_slot(tally, slot); Order::better(in_worst, firing)) {
      worst = slot;
      in_worst = firing;
    }
  return worst;
}

// Whether the firing is kept; `worst` is then what no slot is worse than.
template <class Order>
bool offer(const Tally& tally, int64_t expert, const Firing& firing, Firing& worst) {
  const int64_t slot = worst_slot<Order>(tally, expert);
  if (!Order::better(firing, in_slot(tally, slot))) return false;
  tally.score[slot] = firing.score;
  tally.hash[slot] = firing.hash;
  tally.place[slot] = firing.place;
  worst = in_slot(tally, worst_slot<Order>(tally, expert));
  return true;
}

bool offer(const Tally& tally, int64_t expert, const Firing& firing) {
  bool kept = false;
  Firing worst;
  if (firing.score >= tally.strong_bar[expert] && offer<Stronger>(tally, expert, firing, worst)) {
    kept = true;
    if (worst.place >= 0) tally.strong_bar[expert] = worst.score;
  }
  if (firing.hash <= tally.sample_bar[expert] && offer<Sampled>(tally, expert, firing, worst)) {
    kept = true;
    if (worst.place >= 0) tally.sample_bar[expert] = worst.hash;
  }
  return kept;
}

float relu_squared(float s) { return s > 0 ? s * s : 0; }

class HalfExpert {
 public:
  HalfExpert(const Visit& p, const OtherSide& other, int64_t i) : p_(p), other_(other), i_(i) {
    for (int64_t block = 0; block < p.side1.pairs.blocks(); ++block)
      for_each_group(p.side1.pairs, block, i, i + 1, [&](int64_t, int64_t first, int64_t count) {
        for (int64_t pair = first; pair < first + count && p.side1.pairs.token[pair] < p.tokens; ++pair)
          pairs_.push_back(static_cast<int32_t>(pair));
      });
  }

  void run() {
    for (const int32_t pair : pairs_) visit(pair);
    std::sort(changed_.begin(), changed_.end());
    changed_.erase(std::unique(changed_.begin(), changed_.end()), changed_.end());
    for (const int32_t j : changed_) complete(j);
  }

 private:
  int64_t experts() const { return p_.side1.pairs.experts; }
  int64_t token(int32_t pair) const { return p_.side1.pairs.token[pair]; }
  const float* gates1(int32_t pair) const { return p_.side1.gates + pair * p_.side1.heads; }

  void visit(int32_t pair) {
    const int64_t t = token(pair), heads = p_.side1.heads;
    const int64_t first = p_.side2.pairs.row_start[t], count = p_.side2.pairs.row_start[t + 1] - first;
    scores_.assign(count, 0);
    for (int64_t h = 0; h < heads; ++h)
      if (const float gate = gates1(pair)[h]; gate != 0)  // most half-experts are active in one head
        for (int64_t k = 0; k < count; ++k) scores_[k] += gate * other_.gates[first * heads + h * count + k];
    for (int64_t k = 0; k < count; ++k) {
      if (!(scores_[k] > 0)) continue;
      const int32_t j = other_.expert[first + k];
      const int64_t expert = i_ * experts() + j;
      add(p_.tally, expert, scores_[k]);
      if (p_.tally.score && offer(p_.tally, expert, {scores_[k], p_.hashes[t], p_.unit * kUnitPlaces + t}))
        changed_.push_back(j);
    }
  }

  // Fills in what the unit has put into the slots of expert (i, j) and not been displaced from: with all tokens seen,
  // nothing is done for firings that did not stay.
  void complete(int32_t j) {
    const int64_t first = (i_ * experts() + j) * kSlots, first_place = p_.unit * kUnitPlaces;
    for (int64_t slot = first; slot < first + kSlots; ++slot) {
      const int64_t t = p_.tally.place[slot] - first_place;
      if (t < 0 || t >= p_.tokens) continue;
      const int64_t* places = p_.tally.place;
      const int64_t twin = std::find(places + first, places + slot, places[slot]) - places;
      if (twin < slot) {  // it is among the strongest and in the sample
        p_.tally.contribution[slot] = p_.tally.contribution[twin];
        std::copy_n(p_.tally.scores + twin * kContext, kContext, p_.tally.scores + slot * kContext);
        continue;
      }
      const auto at = std::lower_bound(
          pairs_.begin(), pairs_.end(), t, [&](int32_t pair, int64_t wanted) { return token(pair) < wanted; });
      p_.tally.contribution[slot] = p_.tally.score[slot] * output_norm(*at, pair2(j, t), j);
      write_neighbours(slot, j, t, at - pairs_.begin());
    }
  }

  int32_t pair2(int64_t j, int64_t t) const { return other_.pair_at[j * p_.side2.pairs.tokens + t]; }

  // `at` is the place of token t among the tokens of i.
  void write_neighbours(int64_t slot, int64_t j, int64_t t, int64_t at) const {
    uint16_t* scores = p_.tally.scores + slot * kContext;
    std::fill_n(scores, kContext, uint16_t{0});
    const int64_t first = t - kBefore, count = static_cast<int64_t>(pairs_.size()), heads = p_.side1.heads;
    while (at > 0 && token(pairs_[at - 1]) >= first) --at;
    for (; at < count && token(pairs_[at]) < first + kContext; ++at) {
      const int32_t one = pairs_[at], two = pair2(j, token(one));
      if (two >= 0) scores[token(one) - first] = half(score_of(gates1(one), p_.side2.gates + two * heads, heads));
    }
  }

  // The norm of the expert's output for a token, over the layers.
  float output_norm(int64_t one, int64_t two, int64_t j) {
    double square = 0;
    for (int64_t layer = 0; layer < p_.reader_count; ++layer) {
      const Reader& reader = p_.readers[layer];
      const int64_t n = reader.units1 + reader.units2 + 1;
      z_.resize(n);
      for (int64_t u = 0; u < reader.units1; ++u) z_[u] = relu_squared(reader.s1[one * reader.units1 + u]);
      for (int64_t u = 0; u < reader.units2; ++u)
        z_[reader.units1 + u] = relu_squared(reader.s2[two * reader.units2 + u]);
      z_[n - 1] = 1;
      square += quadratic_form(reader.gram1 + i_ * n * n, reader.gram2 + j * n * n);
    }
    return static_cast<float>(std::sqrt(std::max(square, 0.0)));  // rounding can leave a square just below 0
  }
  double quadratic_form(const float* gram1, const float* gram2) {
    const int64_t n = static_cast<int64_t>(z_.size());
    y_.assign(n, 0);
    for (int64_t row = 0; row < n; ++row, gram1 += n, gram2 += n)
      for (int64_t column = 0; column < n; ++column) y_[column] += z_[row] * (gram1[column] + gram2[column]);
    double sum = 0;
    for (int64_t column = 0; column < n; ++column) sum += static_cast<double>(y_[column]) * z_[column];
    return sum;
  }

  const Visit& p_;
  const OtherSide& other_;
  int64_t i_;
  std::vector<int32_t> pairs_;    // of half-expert i, by token
  std::vector<int32_t> changed_;  // the j of experts that have taken a firing
  std::vector<float> scores_;     // of the token in hand with every entry of side 2
  std::vector<float> z_, y_;
};

}  // namespace

void run(const Visit& p) {
  const OtherSide other(p);
  for_each_task(p.side1.pairs.experts, [&](int64_t i) { HalfExpert(p, other, i).run(); });
}

}  // namespace monet::cpu
