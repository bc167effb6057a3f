#include "route.h"

#include <cmath>

#include "device.cuh"

namespace monet::cuda {
namespace {

constexpr int kHeadWarps = 8;       // most warps of a block that takes the heads of a token one by one
constexpr int kTokenWarps = 4;      // tokens of a block that gives each a warp
constexpr int kMomentTokens = 32;   // tokens that one block sums up
constexpr int kScanThreads = 1024;
constexpr int kPlaceThreads = 512;
constexpr int kValueThreads = 256;

int head_threads(int64_t heads) { return kWarp * static_cast<int>(heads < kHeadWarps ? heads : kHeadWarps); }
int64_t over(int64_t count, int64_t each) { return (count + each - 1) / each; }

// f(head) for the heads of this warp.
template <class F>
__device__ void for_each_head(int64_t heads, const F& f) {
  for (int h = warp(); h < heads; h += warps()) f(h);
}

// The sum over the block's threads, in thread 0. room: one value a warp.
__device__ double block_sum(double value, double* room) {
  value = warp_sum(value);
  if (lane() == 0) room[warp()] = value;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0)
    for (int i = 0; i < warps(); ++i) sum += room[i];
  __syncthreads();
  return sum;
}

// The sum over the threads before this one, once a kernel. room: one value a warp.
__device__ int32_t sum_of_earlier(int32_t value, int32_t* room) {
  const auto running = [](int32_t sum) {
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int32_t earlier = __shfl_up_sync(kAllLanes, sum, offset);
      if (lane() >= offset) sum += earlier;
    }
    return sum;
  };
  const int32_t sum = running(value);
  if (lane() == kWarp - 1) room[warp()] = sum;
  __syncthreads();
  if (warp() == 0) {
    const int32_t of_warps = running(lane() < warps() ? room[lane()] : 0);
    if (lane() < warps()) room[lane()] = of_warps;
  }
  __syncthreads();
  return sum - value + (warp() > 0 ? room[warp() - 1] : 0);
}

// ---- moments

template <class T>
__global__ void chunk_moments(
    const T* logits, int64_t tokens, int64_t heads, int64_t experts, double* partial) {
  SharedMemory memory;
  double* room = memory.take<double>(kWarp);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kMomentTokens, h = blockIdx.y;
  const int64_t last = first + kMomentTokens < tokens ? first + kMomentTokens : tokens;
  double sum = 0, square = 0;
  for (int64_t t = first; t < last; ++t) {
    const T* row = logits + (t * heads + h) * experts;
    for_each_of_block(static_cast<int>(experts), [&](int i) {
      const double value = row[i];
      sum += value;
      square += value * value;
    });
  }
  sum = block_sum(sum, room);
  square = block_sum(square, room);
  if (threadIdx.x == 0) {
    partial[(blockIdx.x * 2 + 0) * heads + h] = sum;
    partial[(blockIdx.x * 2 + 1) * heads + h] = square;
  }
}

// totals[column] = sum over the rows of values [rows, columns], a block a column.
template <class T, class U>
__global__ void sum_rows(const T* values, int64_t rows, int64_t columns, U* totals) {
  SharedMemory memory;
  double* room = memory.take<double>(kWarp);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < rows; i += blockDim.x) sum += static_cast<double>(values[i * columns + blockIdx.x]);
  sum = block_sum(sum, room);
  if (threadIdx.x == 0) totals[blockIdx.x] = static_cast<U>(sum);
}

const Grid columns_grid(int64_t columns) {
  return {.blocks = columns, .threads = kValueThreads, .shared = SharedMemory::bytes<double>(kWarp)};
}

// ---- the three passes of the router

// A block a token, a warp a head.
template <class T>
__global__ void mark_heads(
    const T* logits, const T* threshold, int64_t heads, int64_t experts, Marks<T> marks, int words, int32_t* row_count) {
  const T infinity = INFINITY, nan = NAN;
  SharedMemory memory;
  uint32_t* seen = memory.take<uint32_t>(static_cast<int64_t>(warps()) * words);  // by each warp
  const int64_t token = blockIdx.x;
  for_each_head(heads, [&](int h) {
    const T* z = logits + (token * heads + h) * experts;
    T largest = -infinity;
    for_each_of_warp(static_cast<int>(experts), [&](int i) { largest = larger(largest, z[i]); });
    largest = warp_largest(largest);
    const T wanted = threshold[h];
    // The softmax of such a row is NaN in every half-expert, so all of them are kept.
    const bool undefined = !(largest < infinity && largest > -infinity) || wanted != wanted;
    const T cut = undefined ? -infinity : wanted < largest ? wanted : largest;
    for (int word = 0; word < words; ++word) {
      const int i = word * kWarp + lane();
      const uint32_t bits = __ballot_sync(kAllLanes, i < experts && (undefined || z[i] >= cut));
      if (lane() == 0) {
        uint32_t& of_warp = seen[warp() * words + word];
        of_warp = h == warp() ? bits : of_warp | bits;
      }
    }
    if (lane() == 0) {
      marks.largest[token * heads + h] = undefined ? nan : largest;
      marks.cut[token * heads + h] = cut;
    }
  });
  __syncthreads();
  if (warp() > 0) return;
  int32_t count = 0;
  for_each_of_warp(words, [&](int word) {
    uint32_t bits = 0;
    for (int i = 0; i < warps(); ++i) bits |= seen[i * words + word];
    marks.active[token * words + word] = bits;
    count += __popc(bits);
  });
  count = warp_sum(count);
  if (lane() == 0) row_count[token] = count;
}

// values[i] = sum of values[0..i], by one block; each thread owns a run.
__global__ void running_sum(int32_t* values, int64_t count) {
  SharedMemory memory;
  int32_t* room = memory.take<int32_t>(kWarp);
  const int64_t each = (count + blockDim.x - 1) / blockDim.x;
  const int64_t first = threadIdx.x * each, last = first + each < count ? first + each : count;
  int32_t sum = 0;
  for (int64_t i = first; i < last; ++i) sum += values[i];
  int32_t before = sum_of_earlier(sum, room);
  for (int64_t i = first; i < last; ++i) values[i] = before += values[i];
}

// A block a block of tokens, a warp a word of marks at a time. Lanes are tokens where marks are read, and half-experts
// where pairs are counted: the ballot of a bit is the column of a half-expert.
__global__ void number_pairs(
    const uint32_t* active, int64_t tokens, int experts, int words, const int32_t* row_start, int32_t* token,
    int32_t* group_start, int32_t* row_pair) {
  SharedMemory memory;
  int32_t *start = memory.take<int32_t>(experts), *room = memory.take<int32_t>(kWarp);
  const int64_t first_token = blockIdx.x * kBlockTokens;
  const int here = static_cast<int>(tokens - first_token < kBlockTokens ? tokens - first_token : kBlockTokens);
  const auto marks = [&](int t, int word) { return t < here ? active[(first_token + t) * words + word] : 0; };

  for (int word = warp(); word < words; word += warps()) {
    int32_t count = 0;
    for (int first = 0; first < here; first += kWarp) {
      const uint32_t bits = marks(first + lane(), word);
      for (int b = 0; b < kWarp; ++b) {
        const int32_t users = __popc(__ballot_sync(kAllLanes, bits >> b & 1));
        if (lane() == b) count += users;
      }
    }
    if (word * kWarp + lane() < experts) start[word * kWarp + lane()] = count;
  }
  __syncthreads();

  const int each = (experts + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x);
  const int first = static_cast<int>(threadIdx.x) * each, last = first + each < experts ? first + each : experts;
  int32_t sum = 0;
  for (int i = first; i < last; ++i) sum += start[i];
  int32_t before = row_start[first_token] + sum_of_earlier(sum, room);
  for (int i = first; i < last; ++i) {
    const int32_t count = start[i];
    group_start[static_cast<int64_t>(blockIdx.x) * experts + i] = start[i] = before;
    before += count;
  }
  if (blockIdx.x + 1 == gridDim.x && threadIdx.x == 0)
    group_start[static_cast<int64_t>(gridDim.x) * experts] = row_start[tokens];
  __syncthreads();

  for (int word = warp(); word < words; word += warps()) {
    int32_t next = word * kWarp + lane() < experts ? start[word * kWarp + lane()] : 0;
    for (int chunk = 0; chunk < here; chunk += kWarp) {
      const int t = chunk + lane();
      const uint32_t bits = marks(t, word), earlier_lanes = (1u << lane()) - 1;
      int32_t entry = t < here ? row_start[first_token + t] : 0;
      for (int earlier = 0; earlier < word; ++earlier) entry += __popc(marks(t, earlier));
      for (int b = 0; b < kWarp; ++b) {
        const bool mine = bits >> b & 1;
        const uint32_t users = __ballot_sync(kAllLanes, mine);
        const int32_t pair = __shfl_sync(kAllLanes, next, b) + __popc(users & earlier_lanes);
        if (mine) {
          token[pair] = static_cast<int32_t>(first_token + t);
          row_pair[entry++] = pair;
        }
        if (lane() == b) next += __popc(users);
      }
    }
  }
}

// A block a token, a warp a head.
template <class T>
__global__ void softmax_of_active(const T* logits, Marks<T> marks, int words, Pairs pairs, int64_t heads, T* gates) {
  SharedMemory memory;
  int32_t* expert = memory.take<int32_t>(pairs.experts);
  const int64_t token = blockIdx.x;
  const uint32_t* active = marks.active + token * words;
  for_each_of_block(words, [&](int word) {
    int32_t* out = expert;
    for (int earlier = 0; earlier < word; ++earlier) out += __popc(active[earlier]);
    for (int b = 0; b < kWarp; ++b)
      if (active[word] >> b & 1) *out++ = word * kWarp + b;
  });
  __syncthreads();
  const int32_t* row_pair = pairs.row_pair + pairs.row_start[token];
  const int count = pairs.row_start[token + 1] - pairs.row_start[token];
  for_each_head(heads, [&](int h) {
    const T* z = logits + (token * heads + h) * pairs.experts;
    const T largest = marks.largest[token * heads + h], cut = marks.cut[token * heads + h];
    const auto exponential = [&](int i) {
      const T logit = z[expert[i]];
      return logit < cut ? T{0} : std::exp(logit - largest);  // written so that NaN passes the comparison
    };
    T sum = 0;
    for_each_of_warp(count, [&](int i) { sum += exponential(i); });
    sum = warp_sum(sum);
    for_each_of_warp(count, [&](int i) { gates[row_pair[i] * heads + h] = exponential(i) / sum; });
  });
}

// ---- gates

// f(token, first entry, entries) for the token of this warp.
template <class F>
__device__ void with_token_of_warp(const Pairs& pairs, const F& f) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * warps() + warp();
  if (token >= pairs.tokens) return;
  f(token, pairs.row_pair + pairs.row_start[token], pairs.row_start[token + 1] - pairs.row_start[token]);
}
Grid token_warps_grid(const Pairs& pairs) {
  return {.blocks = over(pairs.tokens, kTokenWarps), .threads = kTokenWarps * kWarp};
}

template <class T>
__global__ void softmax_backward(const T* gates, const T* dgates, Pairs pairs, int64_t heads, T* dlogits) {
  with_token_of_warp(pairs, [&](int64_t, const int32_t* pair, int count) {
    for (int64_t h = 0; h < heads; ++h) {
      T dot = 0;
      for_each_of_warp(count, [&](int i) { dot += gates[pair[i] * heads + h] * dgates[pair[i] * heads + h]; });
      dot = warp_sum(dot);
      for_each_of_warp(count, [&](int i) {
        const int64_t at = pair[i] * heads + h;
        dlogits[at] = gates[at] * (dgates[at] - dot);
      });
    }
  });
}

template <class T>
__global__ void scatter(const T* values, Pairs pairs, int64_t heads, T* dense) {
  SharedMemory memory;
  const int64_t token = blockIdx.x;
  T* row = dense + token * heads * pairs.experts;
  clear(row, heads * pairs.experts);
  const Row active(pairs, token, memory);
  __syncthreads();
  for_each_of_block(active.count * static_cast<int>(heads), [&](int at) {
    const int i = at / static_cast<int>(heads), h = at % static_cast<int>(heads);
    row[h * pairs.experts + active.expert[i]] = values[active.pair[i] * heads + h];
  });
}

// values[pair, head] = dense[token of the pair * token_stride + head * experts + half-expert], a thread a value.
template <class T>
__global__ void gather(const T* dense, int64_t token_stride, Pairs pairs, int64_t heads, T* values) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= pairs.count * heads) return;
  const int pair = static_cast<int>(at / heads);
  const int64_t token = pairs.token[pair];
  values[at] = dense[token * token_stride + at % heads * pairs.experts + expert_of(pairs, token, pair)];
}

// A block a half-expert, a warp a head.
template <class T>
__global__ void sum_groups(const T* gates, Pairs pairs, int64_t blocks, int64_t heads, T* totals) {
  const int64_t expert = blockIdx.x;
  for_each_head(heads, [&](int h) {
    double sum = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      const int32_t* start = pairs.group_start + block * pairs.experts + expert;
      for (int64_t pair = start[0] + lane(); pair < start[1]; pair += kWarp)
        sum += static_cast<double>(gates[pair * heads + h]);
    }
    sum = warp_sum(sum);
    if (lane() == 0) totals[h * pairs.experts + expert] = static_cast<T>(sum);
  });
}

// The largest gate of a head among the pairs of a token, in every lane; NaN if any is.
template <class T>
__device__ T largest_gate(const T* gates, int64_t heads, int64_t h, const int32_t* pair, int count) {
  T largest = 0;
  for_each_of_warp(count, [&](int i) { largest = larger(largest, gates[pair[i] * heads + h]); });
  return warp_largest(largest);
}

template <class T>
__global__ void largest_gates(const T* gates, Pairs pairs, int64_t heads, T* largest) {
  with_token_of_warp(pairs, [&](int64_t token, const int32_t* pair, int count) {
    for (int64_t h = 0; h < heads; ++h) {
      const T found = largest_gate(gates, heads, h, pair, count);
      if (lane() == 0) largest[token * heads + h] = found;
    }
  });
}

template <class T>
__global__ void largest_backward(const T* gates, const T* dtotals, Pairs pairs, int64_t heads, T* dgates) {
  with_token_of_warp(pairs, [&](int64_t, const int32_t* pair, int count) {
    for (int64_t h = 0; h < heads; ++h) {
      const T largest = largest_gate(gates, heads, h, pair, count);
      int equal = 0;
      for_each_of_warp(count, [&](int i) { equal += gates[pair[i] * heads + h] == largest; });
      equal = warp_sum(equal);
      for_each_of_warp(count, [&](int i) {
        const int64_t at = pair[i] * heads + h;
        dgates[at] = gates[at] == largest ? dtotals[h] / static_cast<T>(equal) : T{0};
      });
    }
  });
}

}  // namespace

int64_t moment_chunks(int64_t tokens) { return over(tokens, kMomentTokens); }

template <class T>
void head_moments(
    Stream stream, const T* logits, int64_t tokens, int64_t heads, int64_t experts, double* partial, double* sums) {
  const Grid grid{.blocks = moment_chunks(tokens), .threads = kValueThreads,
                  .shared = SharedMemory::bytes<double>(kWarp), .rows = heads};
  launch(stream, grid, chunk_moments<T>, logits, tokens, heads, experts, partial);
  launch(stream, columns_grid(2 * heads), sum_rows<double, double>, partial, moment_chunks(tokens), 2 * heads, sums);
}

template <class T>
void mark_active(
    Stream stream, const T* logits, const T* threshold, int64_t tokens, int64_t heads, int64_t experts,
    const Marks<T>& marks, int32_t* row_start) {
  const int words = static_cast<int>(mark_words(experts)), threads = head_threads(heads);
  check(cudaMemsetAsync(row_start, 0, sizeof *row_start, static_cast<cudaStream_t>(stream)));
  const Grid grid{.blocks = tokens, .threads = threads, .shared = SharedMemory::bytes<uint32_t>(threads / kWarp * words)};
  launch(stream, grid, mark_heads<T>, logits, threshold, heads, experts, marks, words, row_start + 1);
  const Grid one{.blocks = 1, .threads = kScanThreads, .shared = SharedMemory::bytes<int32_t>(kWarp)};
  launch(stream, one, running_sum, row_start + 1, tokens);
}

void place_pairs(
    Stream stream, const uint32_t* active, int64_t tokens, int64_t experts, const int32_t* row_start, int32_t* token,
    int32_t* group_start, int32_t* row_pair) {
  if (tokens == 0) check(cudaMemsetAsync(group_start, 0, sizeof *group_start, static_cast<cudaStream_t>(stream)));
  const Grid grid{.blocks = over(tokens, kBlockTokens), .threads = kPlaceThreads,
                  .shared = SharedMemory::bytes<int32_t>(experts) + SharedMemory::bytes<int32_t>(kWarp)};
  launch(
      stream, grid, number_pairs, active, tokens, experts, mark_words(experts), row_start, token, group_start, row_pair);
}

template <class T>
void active_softmax(
    Stream stream, const T* logits, const Marks<T>& marks, const Pairs& pairs, int64_t heads, T* gates) {
  const Grid grid{
      .blocks = pairs.tokens, .threads = head_threads(heads), .shared = SharedMemory::bytes<int32_t>(pairs.experts)};
  launch(stream, grid, softmax_of_active<T>, logits, marks, mark_words(pairs.experts), pairs, heads, gates);
}

template <class T>
void active_softmax_backward(
    Stream stream, const T* gates, const T* dgates, const Pairs& pairs, int64_t heads, T* dlogits) {
  launch(stream, token_warps_grid(pairs), softmax_backward<T>, gates, dgates, pairs, heads, dlogits);
}

template <class T>
void scatter_dense(Stream stream, const T* values, const Pairs& pairs, int64_t heads, T* dense) {
  const Grid grid{.blocks = pairs.tokens, .threads = kValueThreads, .shared = Row::bytes(pairs)};
  launch(stream, grid, scatter<T>, values, pairs, heads, dense);
}

template <class T>
void gather_dense(Stream stream, const T* dense, const Pairs& pairs, int64_t heads, T* values) {
  const Grid grid{.blocks = over(pairs.count * heads, kValueThreads), .threads = kValueThreads};
  launch(stream, grid, gather<T>, dense, heads * pairs.experts, pairs, heads, values);
}

template <class T>
void sum_over_tokens(Stream stream, const T* gates, const Pairs& pairs, int64_t heads, T* totals) {
  const Grid grid{.blocks = pairs.experts, .threads = head_threads(heads)};
  launch(stream, grid, sum_groups<T>, gates, pairs, pairs.blocks(), heads, totals);
}

template <class T>
void sum_over_tokens_backward(Stream stream, const T* dtotals, const Pairs& pairs, int64_t heads, T* dgates) {
  const Grid grid{.blocks = over(pairs.count * heads, kValueThreads), .threads = kValueThreads};
  launch(stream, grid, gather<T>, dtotals, 0, pairs, heads, dgates);
}

template <class T>
void sum_of_largest(Stream stream, const T* gates, const Pairs& pairs, int64_t heads, T* largest, T* totals) {
  launch(stream, token_warps_grid(pairs), largest_gates<T>, gates, pairs, heads, largest);
  launch(stream, columns_grid(heads), sum_rows<T, T>, largest, pairs.tokens, heads, totals);
}

template <class T>
void sum_of_largest_backward(
    Stream stream, const T* gates, const T* dtotals, const Pairs& pairs, int64_t heads, T* dgates) {
  launch(stream, token_warps_grid(pairs), largest_backward<T>, gates, dtotals, pairs, heads, dgates);
}

#define INSTANTIATE(T)                                                                                           \
  template void head_moments(Stream, const T*, int64_t, int64_t, int64_t, double*, double*);                     \
  template void mark_active(                                                                                     \
      Stream, const T*, const T*, int64_t, int64_t, int64_t, const Marks<T>&, int32_t*);                         \
  template void active_softmax(Stream, const T*, const Marks<T>&, const Pairs&, int64_t, T*);                    \
  template void active_softmax_backward(Stream, const T*, const T*, const Pairs&, int64_t, T*);                  \
  template void scatter_dense(Stream, const T*, const Pairs&, int64_t, T*);                                      \
  template void gather_dense(Stream, const T*, const Pairs&, int64_t, T*);                                       \
  template void sum_over_tokens(Stream, const T*, const Pairs&, int64_t, T*);                                    \
  template void sum_over_tokens_backward(Stream, const T*, const Pairs&, int64_t, T*);                           \
  template void sum_of_largest(Stream, const T*, const Pairs&, int64_t, T*, T*);                                 \
  template void sum_of_largest_backward(Stream, const T*, const T*, const Pairs&, int64_t, T*)
INSTANTIATE(float);
INSTANTIATE(double);
#undef INSTANTIATE

}  // namespace monet::cuda
