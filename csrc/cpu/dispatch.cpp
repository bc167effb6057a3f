// The instruction set is chosen when the program runs, so that one build serves every x86-64.
#include <atomic>
#include <cstring>

#include "products.h"

namespace monet::cpu {
namespace {

bool runs_here(const ProductsOfAllTypes& products) {
  if (&products == &products_portable) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (&products == &products_avx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

// Best first.
constexpr const ProductsOfAllTypes* kCandidates[] = {
#if defined(__x86_64__)
    &products_avx512, &products_avx2,
#endif
    &products_portable};

const ProductsOfAllTypes* best() {
  for (const ProductsOfAllTypes* candidate : kCandidates)
    if (runs_here(*candidate)) return candidate;
  return &products_portable;
}

std::atomic<const ProductsOfAllTypes*>& chosen() {
  static std::atomic<const ProductsOfAllTypes*> products{best()};
  return products;
}

}  // namespace

const char* instruction_set() { return chosen().load()->instruction_set; }

bool select_instruction_set(const char* name) {
  for (const ProductsOfAllTypes* candidate : kCandidates)
    if (!std::strcmp(candidate->instruction_set, name) && runs_here(*candidate)) {
      chosen() = candidate;
      return true;
    }
  return false;
}

template <>
const Products<float>& products<float>() {
  return chosen().load()->fp32;
}
template <>
const Products<BFloat16>& products<BFloat16>() {
  return chosen().load()->bf16;
}
template <>
const Products<double>& products<double>() {
  return chosen().load()->fp64;
}

template <>
const Scan<float>& scan<float>() {
  return chosen().load()->scan_fp32;
}
template <>
const Scan<double>& scan<double>() {
  return chosen().load()->scan_fp64;
}

}  // namespace monet::cpu
