// The router: from logits to gates over the active pairs.
#include <cmath>

#include "heads.cuh"

namespace monet::cuda {
namespace {

constexpr int kScanThreads = 1024;
constexpr int kPlaceThreads = 512;

// The sum over the threads before this one, once per kernel. workspace: one value per warp.
__device__ int32_t sum_of_earlier(int32_t value, int32_t* workspace) {
  const auto running = [](int32_t sum) {
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int32_t earlier = __shfl_up_sync(kAllLanes, sum, offset);
      if (lane() >= offset) sum += earlier;
    }
    return sum;
  };
  const int32_t sum = running(value);
  if (lane() == kWarp - 1) workspace[warp()] = sum;
  __syncthreads();
  if (warp() == 0) {
    const int32_t of_warps = running(lane() < warps() ? workspace[lane()] : 0);
    if (lane() < warps()) workspace[lane()] = of_warps;
  }
  __syncthreads();
  return sum - value + (warp() > 0 ? workspace[warp() - 1] : 0);
}

// A block per chunk of tokens and head.
template <class T>
__global__ void chunk_moments(const HeadMoments<T> p) {
  SharedMemory memory;
  double* workspace = memory.take<double>(kWarp);
  const int64_t tokens = p.logits.tokens, heads = p.logits.heads, experts = p.logits.experts, h = blockIdx.y;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kMomentTokens;
  const int64_t last = first + kMomentTokens < tokens ? first + kMomentTokens : tokens;
  double sum = 0, square = 0;
  for (int64_t t = first; t < last; ++t) {
    const T* row = p.logits.values + (t * heads + h) * experts;
    for_each_of_block(static_cast<int>(experts), [&](int i) {
      const double value = row[i];
      sum += value;
      square += value * value;
    });
  }
  sum = block_sum(sum, workspace);
  square = block_sum(square, workspace);
  if (threadIdx.x == 0) {
    p.workspace[(blockIdx.x * 2 + 0) * heads + h] = sum;
    p.workspace[(blockIdx.x * 2 + 1) * heads + h] = square;
  }
}

// ---- the three passes

// A block per token, a warp per head. Leaves the number of pairs of each token behind row_start[0].
template <class T>
__global__ void mark_heads(const MarkActive<T, Word> p) {
  const T infinity = INFINITY, nan = NAN;
  const int64_t heads = p.logits.heads, experts = p.logits.experts, token = blockIdx.x;
  const int row_words = static_cast<int>(over(experts, kWarp));
  SharedMemory memory;
  Word* seen = memory.take<Word>(static_cast<int64_t>(warps()) * row_words);  // by each warp
  for_each_head(heads, [&](int h) {
    const T* z = p.logits.values + (token * heads + h) * experts;
    T largest = -infinity;
    for_each_of_warp(static_cast<int>(experts), [&](int i) { largest = larger(largest, z[i]); });
    largest = warp_largest(largest);
    const T wanted = p.threshold[h];
    // The softmax of such a row is NaN in every half-expert, so all of them are kept.
    const bool undefined = !(largest < infinity && largest > -infinity) || wanted != wanted;
    const T cut = undefined ? -infinity : wanted < largest ? wanted : largest;
    for (int word = 0; word < row_words; ++word) {
      const int i = word * kWarp + lane();
      const Word bits = __ballot_sync(kAllLanes, i < experts && (undefined || z[i] >= cut));
      if (lane() == 0) {
        Word& of_warp = seen[warp() * row_words + word];
        of_warp = h == warp() ? bits : of_warp | bits;
      }
    }
    if (lane() == 0) {
      p.marks.largest[token * heads + h] = undefined ? nan : largest;
      p.marks.cut[token * heads + h] = cut;
    }
  });
  __syncthreads();
  if (warp() > 0) return;
  int32_t count = 0;
  for_each_of_warp(row_words, [&](int word) {
    Word bits = 0;
    for (int i = 0; i < warps(); ++i) bits |= seen[i * row_words + word];
    p.marks.active[token * row_words + word] = bits;
    count += __popc(bits);
  });
  count = warp_sum(count);
  if (lane() == 0) p.row_start[token + 1] = count;
}

// values[i] = sum of values[0..i], by one block; each thread owns a run.
__global__ void running_sum(int32_t* values, int64_t count) {
  SharedMemory memory;
  int32_t* workspace = memory.take<int32_t>(kWarp);
  const int64_t each = (count + blockDim.x - 1) / blockDim.x;
  const int64_t first = threadIdx.x * each, last = first + each < count ? first + each : count;
  int32_t sum = 0;
  for (int64_t i = first; i < last; ++i) sum += values[i];
  int32_t before = sum_of_earlier(sum, workspace);
  for (int64_t i = first; i < last; ++i) values[i] = before += values[i];
}

// A block of threads per block of tokens, a warp per word of marks at a time. Lanes are tokens where marks are read,
// and half-experts where pairs are counted: the ballot of a bit is the column of a half-expert.
__global__ void number_pairs(const PlacePairs<Word> p) {
  const int experts = static_cast<int>(p.experts), row_words = static_cast<int>(over(experts, kWarp));
  SharedMemory memory;
  int32_t *start = memory.take<int32_t>(experts), *workspace = memory.take<int32_t>(kWarp);
  const int64_t first_token = blockIdx.x * kBlockTokens;
  const int here = static_cast<int>(p.tokens - first_token < kBlockTokens ? p.tokens - first_token : kBlockTokens);
  const auto marks = [&](int t, int word) { return t < here ? p.active[(first_token + t) * row_words + word] : 0; };

  for (int word = warp(); word < row_words; word += warps()) {
    int32_t count = 0;
    for (int first = 0; first < here; first += kWarp) {
      const Word bits = marks(first + lane(), word);
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
  int32_t before = p.row_start[first_token] + sum_of_earlier(sum, workspace);
  for (int i = first; i < last; ++i) {
    const int32_t count = start[i];
    p.group_start[static_cast<int64_t>(blockIdx.x) * experts + i] = start[i] = before;
    before += count;
  }
  if (blockIdx.x + 1 == gridDim.x && threadIdx.x == 0)
    p.group_start[static_cast<int64_t>(gridDim.x) * experts] = p.row_start[p.tokens];
  __syncthreads();

  for (int word = warp(); word < row_words; word += warps()) {
    int32_t next = word * kWarp + lane() < experts ? start[word * kWarp + lane()] : 0;
    for (int chunk = 0; chunk < here; chunk += kWarp) {
      const int t = chunk + lane();
      const Word bits = marks(t, word), earlier_lanes = (1u << lane()) - 1;
      int32_t entry = t < here ? p.row_start[first_token + t] : 0;
      for (int earlier = 0; earlier < word; ++earlier) entry += __popc(marks(t, earlier));
      for (int b = 0; b < kWarp; ++b) {
        const bool mine = bits >> b & 1;
        const Word users = __ballot_sync(kAllLanes, mine);
        const int32_t pair = __shfl_sync(kAllLanes, next, b) + __popc(users & earlier_lanes);
        if (mine) {
          p.token[pair] = static_cast<int32_t>(first_token + t);
          p.row_pair[entry++] = pair;
        }
        if (lane() == b) next += __popc(users);
      }
    }
  }
}

// A block per token, a warp per head.
template <class T>
__global__ void softmax(const ActiveSoftmax<T, Word> p) {
  const Pairs& pairs = p.pairs;
  const int64_t heads = p.logits.heads, token = blockIdx.x;
  const int row_words = static_cast<int>(over(pairs.experts, kWarp));
  SharedMemory memory;
  int32_t* expert = memory.take<int32_t>(pairs.experts);
  const Word* active = p.marks.active + token * row_words;
  for_each_of_block(row_words, [&](int word) {
    int32_t* out = expert;
    for (int earlier = 0; earlier < word; ++earlier) out += __popc(active[earlier]);
    for (int b = 0; b < kWarp; ++b)
      if (active[word] >> b & 1) *out++ = word * kWarp + b;
  });
  __syncthreads();
  const int32_t* row_pair = pairs.row_pair + pairs.row_start[token];
  const int count = pairs.row_start[token + 1] - pairs.row_start[token];
  for_each_head(heads, [&](int h) {
    const T* z = p.logits.values + (token * heads + h) * pairs.experts;
    const T largest = p.marks.largest[token * heads + h], cut = p.marks.cut[token * heads + h];
    const auto exponential = [&](int i) {
      const T logit = z[expert[i]];
      return logit < cut ? T{0} : std::exp(logit - largest);  // written so that NaN passes the comparison
    };
    T sum = 0;
    for_each_of_warp(count, [&](int i) { sum += exponential(i); });
    sum = warp_sum(sum);
    for_each_of_warp(count, [&](int i) { p.gates[row_pair[i] * heads + h] = exponential(i) / sum; });
  });
}

// A block per token, a warp per head.
template <class T>
__global__ void softmax_backward(const ActiveSoftmaxBackward<T> p) {
  const int64_t heads = p.side.heads, experts = p.side.pairs.experts, token = blockIdx.x;
  SharedMemory memory;
  T* dlogits = p.dlogits + token * heads * experts;
  clear(dlogits, heads * experts);
  const Row row(p.side.pairs, token, memory);
  __syncthreads();
  for_each_head(heads, [&](int h) {
    const auto at = [&](int i) { return row.pair[i] * heads + h; };
    T dot = 0;
    for_each_of_warp(row.count, [&](int i) { dot += p.side.gates[at(i)] * p.dgates[at(i)]; });
    dot = warp_sum(dot);
    for_each_of_warp(row.count, [&](int i) {
      dlogits[h * experts + row.expert[i]] = p.side.gates[at(i)] * (p.dgates[at(i)] - dot);
    });
  });
}

}  // namespace

template <class T>
void run(const HeadMoments<T>& p, Stream stream) {
  const int64_t chunks = moment_chunks(p.logits.tokens), columns = 2 * p.logits.heads;
  const Grid grid{.blocks = chunks, .threads = kValueThreads, .shared = SharedMemory::bytes<double>(kWarp),
                  .rows = p.logits.heads};
  launch(stream, grid, chunk_moments<T>, p);
  launch(stream, columns_grid(columns), sum_rows<double, double>, p.workspace, chunks, columns, p.sums);
}

template <class T>
void run(const MarkActive<T, Word>& p, Stream stream) {
  const int threads = head_threads(p.logits.heads);
  check(cudaMemsetAsync(p.row_start, 0, sizeof *p.row_start, static_cast<cudaStream_t>(stream)));
  const Grid grid{.blocks = p.logits.tokens, .threads = threads,
                  .shared = SharedMemory::bytes<Word>(threads / kWarp * words<Word>(p.logits.experts))};
  launch(stream, grid, mark_heads<T>, p);
  const Grid one{.blocks = 1, .threads = kScanThreads, .shared = SharedMemory::bytes<int32_t>(kWarp)};
  launch(stream, one, running_sum, p.row_start + 1, p.logits.tokens);
}

void run(const PlacePairs<Word>& p, Stream stream) {
  if (p.tokens == 0)
    check(cudaMemsetAsync(p.group_start, 0, sizeof *p.group_start, static_cast<cudaStream_t>(stream)));
  const Grid grid{.blocks = over(p.tokens, kBlockTokens), .threads = kPlaceThreads,
                  .shared = SharedMemory::bytes<int32_t>(p.experts) + SharedMemory::bytes<int32_t>(kWarp)};
  launch(stream, grid, number_pairs, p);
}

template <class T>
void run(const ActiveSoftmax<T, Word>& p, Stream stream) {
  const Grid grid{.blocks = p.pairs.tokens, .threads = head_threads(p.logits.heads),
                  .shared = SharedMemory::bytes<int32_t>(p.pairs.experts)};
  launch(stream, grid, softmax<T>, p);
}

template <class T>
void run(const ActiveSoftmaxBackward<T>& p, Stream stream) {
  const Pairs& pairs = p.side.pairs;
  const Grid grid{.blocks = pairs.tokens, .threads = kValueThreads, .shared = Row::bytes(pairs)};
  launch(stream, grid, softmax_backward<T>, p);
}

#define INSTANTIATE(T)                                     \
  template void run(const HeadMoments<T>&, Stream);         \
  template void run(const MarkActive<T, Word>&, Stream);    \
  template void run(const ActiveSoftmax<T, Word>&, Stream); \
  template void run(const ActiveSoftmaxBackward<T>&, Stream)
INSTANTIATE(float);
INSTANTIATE(double);
#undef INSTANTIATE

}  // namespace monet::cuda
