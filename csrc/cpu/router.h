// The router and the functions of its gates on the CPU. See ../router.h. T is float or double.
#pragma once

#include "../router.h"

namespace monet::cpu {

using Word = uint64_t;  // of marks

constexpr int64_t kMomentTokens = 64;  // tokens that one task sums up
inline int64_t moment_chunks(int64_t tokens) { return (tokens + kMomentTokens - 1) / kMomentTokens; }

template <class T>
void run(const HeadMoments<T>& p);
template <class T>
void run(const MarkActive<T, Word>& p);
void run(const PlacePairs<Word>& p);
template <class T>
void run(const ActiveSoftmax<T, Word>& p);
template <class T>
void run(const ActiveSoftmaxBackward<T>& p);

template <class T>
void run(const DenseGates<T>& p);
template <class T>
void run(const DenseGatesBackward<T>& p);
template <class T>
void run(const SumOverTokens<T>& p);
template <class T>
void run(const SumOverTokensBackward<T>& p);
template <class T>
void run(const SumOfLargest<T>& p);
template <class T>
void run(const SumOfLargestBackward<T>& p);

}  // namespace monet::cpu
