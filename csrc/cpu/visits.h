// Visiting the active experts of a unit: sums over their scores, and the contexts in which they fire. The definition
// is monet_train/kernels/visits.py.
#pragma once

#include <cstdint>

#include "../pairs.h"

namespace monet::cpu {

constexpr int64_t kStrongSlots = 20, kSlots = 45;  // of an expert: the strongest first, then the sample
constexpr int64_t kContext = 32, kBefore = 24;     // scores around a firing, and how many of them lie before it
constexpr int64_t kHistogramBins = 16;
constexpr int kLowestPower = -12;
constexpr int64_t kUnitPlaces = 65536;  // a place is unit * kUnitPlaces + position

// One row per expert i * experts + j. Without contexts all that follows the histogram is null.
struct Tally {
  double *total, *square;
  int32_t* count;
  int64_t* histogram;  // [experts^2, kHistogramBins]
  float* score;        // [experts^2, kSlots], as the four that follow
  uint64_t* hash;
  int64_t* place;  // -1: empty
  float* contribution;
  uint16_t* scores;     // fp16 [experts^2, kSlots, kContext]
  float* strong_bar;    // no more than the least score in the strong slots
  uint64_t* sample_bar; // no less than the greatest hash in the sample
};

// What tells the norm of an expert's output in one layer: its square is z' (gram1_i + gram2_j) z with
// z = (relu^2(s1), relu^2(s2), 1).
struct Reader {
  const float *s1, *s2;  // pre-activations by pair, [pairs, units]
  int64_t units1, units2;
  const float *gram1, *gram2;  // [experts, n, n] with n = units1 + units2 + 1
};

struct Visit {
  Side<float> side1, side2;
  int64_t tokens;          // those behind are padding
  const uint64_t* hashes;  // [tokens]
  int64_t unit;
  const Reader* readers;
  int64_t reader_count;
  Tally tally;
};
void run(const Visit& p);

}  // namespace monet::cpu
