#include "pair_products.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "groups.h"
#include "tasks.h"
#include "tiles.h"

namespace monet::cpu {
namespace {

constexpr int64_t kTaskExperts = 16;   // half-experts of a task
constexpr int64_t kTaskColumns = 256;  // columns of a task: 512 tokens of them fit in a core's second-level cache
constexpr int64_t kTaskSums = 1 << 15;  // sums of a task that owns weights
constexpr int64_t kDecodeColumns = 64;  // columns of a task in decoding: narrower ones keep all cores busy

// f(job, task of the job) for the tasks of all jobs.
template <class Job, class TasksOf, class F>
void for_each_task_of_jobs(const Job* jobs, int64_t count, const TasksOf& tasks_of, const F& f) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += tasks_of(jobs[i]);
  for_each_task(total, [&](int64_t task) {
    const Job* job = jobs;
    for (; task >= tasks_of(*job); ++job) task -= tasks_of(*job);
    f(*job, task);
  });
}

// How many of the terms from this one on go into one scatter: those over the same pairs.
template <class S>
int terms_together(const Combination<S>& job, int term) {
  const Term<S>& first = job.terms[term];
  int count = 1;
  for (; term + count < job.term_count; ++count) {
    const Term<S>& next = job.terms[term + count];
    if (next.pairs.token != first.pairs.token || next.units != first.units) break;
  }
  return count;
}

// To the nearest, ties to even.
inline void convert(float from, BFloat16& to) {
  uint32_t bits;
  std::memcpy(&bits, &from, sizeof bits);
  const bool nan = from != from;
  to.bits = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void convert(float from, float& to) { to = from; }
inline void convert(double from, double& to) { to = from; }

inline float widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
inline float widen(float value) { return value; }
inline double widen(double value) { return value; }

}  // namespace

template <class S>
void run(const Projection<S>* jobs, int64_t count) {
  const auto tasks_of = [](const Projection<S>& job) {
    return job.pairs.blocks() * ceil_div(job.pairs.experts, kTaskExperts);
  };
  for_each_task_of_jobs(jobs, count, tasks_of, [](const Projection<S>& job, int64_t task) {
    const int64_t ranges = ceil_div(job.pairs.experts, kTaskExperts), units = job.units;
    const int64_t begin = task % ranges * kTaskExperts, end = smaller(job.pairs.experts, begin + kTaskExperts);
    for_each_group(job.pairs, task / ranges, begin, end, [&](int64_t expert, int64_t first, int64_t pairs) {
      Accumulator<S>* out = job.out + first * units;
      for (int64_t pair = 0; pair < pairs; ++pair)
        for (int64_t u = 0; u < units; ++u) out[pair * units + u] = job.bias ? widen(job.bias[expert * units + u]) : 0;
      tiles<S>().dot({
          .x = job.x, .token = job.pairs.token + first, .w = {job.w.row(expert * units), job.w.stride}, .pairs = pairs,
          .units = units, .columns = job.columns, .out = {out, units}});
    });
  });
}

template <class S>
void run(const Combination<S>* jobs, int64_t count) {
  const auto chunk_columns = [](const Combination<S>& job) {
    return job.terms[0].pairs.tokens < kDecodeTokens ? kDecodeColumns : kTaskColumns;
  };
  const auto tasks_of = [&](const Combination<S>& job) {
    return job.terms[0].pairs.blocks() * ceil_div(job.columns, chunk_columns(job));
  };
  for_each_task_of_jobs(jobs, count, tasks_of, [&](const Combination<S>& job, int64_t task) {
    const int64_t chunk = chunk_columns(job), chunks = ceil_div(job.columns, chunk), block = task / chunks;
    const int64_t first_token = block * kBlockTokens;
    const int64_t tokens = smaller(kBlockTokens, job.terms[0].pairs.tokens - first_token);
    const int64_t column = task % chunks * chunk, width = smaller(chunk, job.columns - column);
    std::vector<Accumulator<S>> sums(tokens * width);
    for (int term = 0; term < job.term_count; term += terms_together(job, term)) {
      const Term<S>* terms = job.terms + term;
      const int64_t units = terms->units;
      Scatter<S> scatter{
          .terms = {}, .term_count = terms_together(job, term), .token = nullptr,
          .first_token = static_cast<int32_t>(first_token), .pairs = 0, .units = units, .columns = width,
          .out = {sums.data(), width}};
      for_each_group(terms->pairs, block, [&](int64_t expert, int64_t first, int64_t pairs) {
        for (int i = 0; i < scatter.term_count; ++i)
          scatter.terms[i] = {
              {terms[i].y + first * units, units}, {terms[i].w.row(expert * units) + column, terms[i].w.stride}};
        scatter.token = terms->pairs.token + first;
        scatter.pairs = pairs;
        tiles<S>().scatter(scatter);
      });
    }
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t k = 0; k < width; ++k) convert(sums[t * width + k], job.out.row(first_token + t)[column + k]);
  });
}

template <class S>
void run(const WeightGradient<S>* jobs, int64_t count) {
  // As many half-experts per task as keep its sums in cache.
  const auto task_experts = [](const WeightGradient<S>& job) {
    return std::max<int64_t>(1, kTaskSums / (job.units * kTaskColumns));
  };
  const auto tasks_of = [&](const WeightGradient<S>& job) {
    return ceil_div(job.columns, kTaskColumns) * ceil_div(job.pairs.experts, task_experts(job));
  };
  for_each_task_of_jobs(jobs, count, tasks_of, [&](const WeightGradient<S>& job, int64_t task) {
    const int64_t ranges = ceil_div(job.pairs.experts, task_experts(job)), units = job.units;
    const int64_t column = task / ranges * kTaskColumns, width = smaller(kTaskColumns, job.columns - column);
    const int64_t begin = task % ranges * task_experts(job);
    const int64_t end = smaller(job.pairs.experts, begin + task_experts(job));
    const int64_t rows = (end - begin) * units;
    std::vector<Accumulator<S>> sums(rows * width);
    for (int64_t block = 0; block < job.pairs.blocks(); ++block)
      for_each_group(job.pairs, block, begin, end, [&](int64_t expert, int64_t first, int64_t pairs) {
        tiles<S>().outer({
            .y = {job.y + first * units, units}, .x = job.x.from_column(column), .token = job.pairs.token + first,
            .pairs = pairs, .units = units, .columns = width,
            .out = {sums.data() + (expert - begin) * units * width, width}});
      });
    if (job.transposed) {
      S* out = job.out + column * job.pairs.experts * units + begin * units;
      for (int64_t k = 0; k < width; ++k, out += job.pairs.experts * units)
        for (int64_t i = 0; i < rows; ++i) convert(sums[i * width + k], out[i]);
    } else {
      S* out = job.out + begin * units * job.columns + column;
      for (int64_t i = 0; i < rows; ++i, out += job.columns)
        for (int64_t k = 0; k < width; ++k) convert(sums[i * width + k], out[k]);
    }
  });
}

template <class S>
void run(const SparseProduct<S>& p) {
  constexpr int64_t task_columns = 64, task_tokens = 128;
  const int64_t ranges = ceil_div(p.tokens, task_tokens);
  for_each_task(ceil_div(p.columns, task_columns) * ranges, [&](int64_t task) {
    const int64_t column = task / ranges * task_columns, width = smaller(task_columns, p.columns - column);
    const int64_t begin = task % ranges * task_tokens, end = smaller(p.tokens, begin + task_tokens);
    Accumulator<S> sums[task_columns];
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = p.row_start[t], entries = p.row_start[t + 1] - first;
      tiles<S>().gather({
          .y = p.y + first, .row = p.row + first, .entries = entries, .w = p.w.from_column(column), .columns = width,
          .out = sums});
      for (int64_t k = 0; k < width; ++k) convert(sums[k], p.out.row(t)[column + k]);
    }
  });
}

template <class C>
void run(const BiasGradient<C>& p) {
  for_each_range(p.pairs.experts, kTaskExperts, [&](int64_t begin, int64_t end) {
    std::fill(p.out + begin * p.units, p.out + end * p.units, C{0});
    for (int64_t block = 0; block < p.pairs.blocks(); ++block)
      for_each_group(p.pairs, block, begin, end, [&](int64_t expert, int64_t first, int64_t count) {
        for (int64_t pair = first; pair < first + count; ++pair)
          for (int64_t u = 0; u < p.units; ++u) p.out[expert * p.units + u] += p.y[pair * p.units + u];
      });
  });
}

template <class S>
void run(const Transposition<S>& p) {
  constexpr int64_t tile = 32;
  for_each_range(p.columns, tile, [&](int64_t left, int64_t right) {
    const int64_t width = right - left;
    // Through a buffer: rows of a matrix are often a multiple of the page size apart, and would evict each other.
    S buffer[tile][tile];
    for (int64_t top = 0; top < p.rows; top += tile) {
      const int64_t height = smaller(tile, p.rows - top);
      for (int64_t i = 0; i < height; ++i)
        for (int64_t j = 0; j < width; ++j) buffer[j][i] = p.in[(top + i) * p.columns + left + j];
      for (int64_t j = 0; j < width; ++j) std::copy_n(buffer[j], height, p.out + (left + j) * p.rows + top);
    }
  });
}

template <class S>
void run_for_pairs(const Transposition<S>& p, const Pairs& pairs) {
  std::vector<int64_t> used;
  for (int64_t block = 0; block < pairs.blocks(); ++block)
    for_each_group(pairs, block, [&](int64_t expert, int64_t, int64_t) { used.push_back(expert); });
  constexpr int64_t task_rows = 16;
  const int64_t units = p.columns / pairs.experts;
  for_each_range(p.rows, task_rows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (const int64_t expert : used)
        for (int64_t j = expert * units; j < (expert + 1) * units; ++j) p.out[j * p.rows + i] = p.in[i * p.columns + j];
  });
}

#define INSTANTIATE(S)                                    \
  template void run(const Projection<S>*, int64_t);        \
  template void run(const Combination<S>*, int64_t);       \
  template void run(const WeightGradient<S>*, int64_t);    \
  template void run(const SparseProduct<S>&);              \
  template void run(const Transposition<S>&);              \
  template void run_for_pairs(const Transposition<S>&, const Pairs&)
INSTANTIATE(float);
INSTANTIATE(BFloat16);
INSTANTIATE(double);
#undef INSTANTIATE

template void run(const BiasGradient<float>&);
template void run(const BiasGradient<double>&);

}  // namespace monet::cpu
