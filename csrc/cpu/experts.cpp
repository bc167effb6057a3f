#include "experts.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../parallel.h"

namespace monet::cpu {
namespace {

constexpr int64_t kTaskExperts = 16;   // half-experts of a task
constexpr int64_t kTaskColumns = 256;  // columns of a task: 512 tokens of them fit in a core's second-level cache

constexpr int64_t kTaskSums = 1 << 15;  // sums of a task that owns weights
// With few tokens narrower ones keep all cores busy.
constexpr int64_t kFewTokensColumns = 64;

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

// f(half-expert, first pair, number of pairs) for the groups of a block that are not empty.
template <class F>
inline void for_each_group(const Pairs& pairs, int64_t block, int64_t begin, int64_t end, const F& f) {
  const int32_t* start = pairs.group_start + block * pairs.experts;
  for (int64_t expert = begin; expert < end; ++expert)
    if (start[expert] < start[expert + 1]) f(expert, int64_t{start[expert]}, int64_t{start[expert + 1] - start[expert]});
}

// How many of the terms from the first on go into one scatter: those over the same pairs.
constexpr int64_t kMaxParts = 2;
template <class S>
int64_t parts_together(const Term<S>* first, const Term<S>* end) {
  int64_t count = 1;
  while (count < kMaxParts && first + count < end && &first[count].pairs == &first->pairs &&
         first[count].units == first->units)
    ++count;
  return count;
}

inline void convert(float from, BFloat16& to) {
  uint32_t bits;
  std::memcpy(&bits, &from, sizeof bits);
  const bool nan = from != from;
  to.bits = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to the nearest, ties to even
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
void project(const Projection<S>* jobs, int64_t count) {
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
      products<S>().dot(
          job.x, job.pairs.token + first, pairs, {job.w.row(expert * units), job.w.stride}, units, job.columns,
          {out, units});
    });
  });
}

template <class S>
void combine(const Combination<S>* jobs, int64_t count) {
  const auto chunk_columns = [](const Combination<S>& job) {
    return job.terms[0].pairs.tokens < kFewTokens ? kFewTokensColumns : kTaskColumns;
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
    const Term<S>* end = job.terms + job.term_count;
    for (const Term<S>* term = job.terms; term != end; term += parts_together(term, end)) {
      const int64_t units = term->units, part_count = parts_together(term, end);
      for_each_group(term->pairs, block, 0, term->pairs.experts, [&](int64_t expert, int64_t first, int64_t pairs) {
        ScatterPart<S> parts[kMaxParts];
        for (int64_t i = 0; i < part_count; ++i)
          parts[i] = {{term[i].y + first * units, units}, {term[i].w.row(expert * units) + column, term[i].w.stride}};
        products<S>().scatter(
            parts, part_count, term->pairs.token + first, static_cast<int32_t>(first_token), pairs, units, width,
            {sums.data(), width});
      });
    }
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t k = 0; k < width; ++k) convert(sums[t * width + k], job.out.row(first_token + t)[column + k]);
  });
}

template <class S>
void weight_gradients(const WeightGradient<S>* jobs, int64_t count) {
  // As many half-experts a task as keep its sums in cache.
  const auto task_experts = [](const WeightGradient<S>& job) {
    return std::max<int64_t>(1, kTaskSums / (job.units * kTaskColumns));
  };
  const auto tasks_of = [&](const WeightGradient<S>& job) {
    return ceil_div(job.columns, kTaskColumns) * ceil_div(job.pairs.experts, task_experts(job));
  };
  for_each_task_of_jobs(jobs, count, tasks_of, [&](const WeightGradient<S>& job, int64_t task) {
    const int64_t ranges = ceil_div(job.pairs.experts, task_experts(job)), units = job.units;
    const int64_t column = task / ranges * kTaskColumns, width = smaller(kTaskColumns, job.columns - column);
    const int64_t begin = task % ranges * task_experts(job), end = smaller(job.pairs.experts, begin + task_experts(job));
    const int64_t rows = (end - begin) * units;
    std::vector<Accumulator<S>> sums(rows * width);
    for (int64_t block = 0; block < job.pairs.blocks(); ++block)
      for_each_group(job.pairs, block, begin, end, [&](int64_t expert, int64_t first, int64_t pairs) {
        products<S>().outer(
            {job.y + first * units, units}, job.x.from_column(column), job.pairs.token + first, pairs, units, width,
            {sums.data() + (expert - begin) * units * width, width});
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
void multiply(const SparseProduct<S>& job) {
  constexpr int64_t task_columns = 64, task_tokens = 128;
  const int64_t ranges = ceil_div(job.tokens, task_tokens);
  for_each_task(ceil_div(job.columns, task_columns) * ranges, [&](int64_t task) {
    const int64_t column = task / ranges * task_columns, width = smaller(task_columns, job.columns - column);
    const int64_t begin = task % ranges * task_tokens, end = smaller(job.tokens, begin + task_tokens);
    Accumulator<S> sums[task_columns];
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = job.row_start[t], entries = job.row_start[t + 1] - first;
      products<S>().gather(job.y + first, job.row + first, entries, job.w.from_column(column), width, sums);
      for (int64_t k = 0; k < width; ++k) convert(sums[k], job.out.row(t)[column + k]);
    }
  });
}

template <class C>
void bias_gradient(const Pairs& pairs, const C* y, int64_t units, C* out) {
  for_each_task(ceil_div(pairs.experts, kTaskExperts), [&](int64_t task) {
    const int64_t begin = task * kTaskExperts, end = smaller(pairs.experts, begin + kTaskExperts);
    std::fill(out + begin * units, out + end * units, C{0});
    for (int64_t block = 0; block < pairs.blocks(); ++block)
      for_each_group(pairs, block, begin, end, [&](int64_t expert, int64_t first, int64_t count) {
        for (int64_t pair = first; pair < first + count; ++pair)
          for (int64_t u = 0; u < units; ++u) out[expert * units + u] += y[pair * units + u];
      });
  });
}

template <class S>
void transpose(const S* in, int64_t rows, int64_t columns, S* out) {
  constexpr int64_t tile = 32;
  const int64_t across = ceil_div(columns, tile);
  for_each_task(across, [&](int64_t task) {
    const int64_t left = task * tile, width = smaller(tile, columns - left);
    // Through a buffer: rows of a matrix are often a multiple of the page size apart, and would evict each other.
    S buffer[tile][tile];
    for (int64_t top = 0; top < rows; top += tile) {
      const int64_t height = smaller(tile, rows - top);
      for (int64_t i = 0; i < height; ++i)
        for (int64_t j = 0; j < width; ++j) buffer[j][i] = in[(top + i) * columns + left + j];
      for (int64_t j = 0; j < width; ++j) std::copy_n(buffer[j], height, out + (left + j) * rows + top);
    }
  });
}

template <class S>
void transpose_used(const S* in, int64_t rows, const Pairs& pairs, int64_t units, S* out) {
  std::vector<int64_t> used;
  for (int64_t block = 0; block < pairs.blocks(); ++block)
    for_each_group(pairs, block, 0, pairs.experts, [&](int64_t expert, int64_t, int64_t) { used.push_back(expert); });
  constexpr int64_t task_rows = 16;
  const int64_t columns = pairs.experts * units;
  for_each_task(ceil_div(rows, task_rows), [&](int64_t task) {
    for (int64_t i = task * task_rows; i < smaller(rows, (task + 1) * task_rows); ++i)
      for (const int64_t expert : used)
        for (int64_t j = expert * units; j < (expert + 1) * units; ++j) out[j * rows + i] = in[i * columns + j];
  });
}

#define INSTANTIATE(S)                                                                                           \
  template void project(const Projection<S>*, int64_t);                                                          \
  template void combine(const Combination<S>*, int64_t);                                                         \
  template void weight_gradients(const WeightGradient<S>*, int64_t);                                             \
  template void multiply(const SparseProduct<S>&);                                                               \
  template void transpose(const S*, int64_t, int64_t, S*);                                                       \
  template void transpose_used(const S*, int64_t, const Pairs&, int64_t, S*)
INSTANTIATE(float);
INSTANTIATE(BFloat16);
INSTANTIATE(double);
#undef INSTANTIATE

template void bias_gradient(const Pairs&, const float*, int64_t, float*);
template void bias_gradient(const Pairs&, const double*, int64_t, double*);
}  // namespace monet::cpu
