// The instruction set is chosen when the program runs, so that one build serves every x86-64.
#include <atomic>
#include <cstring>

#include "instruction_sets.h"

namespace monet::cpu {
namespace {

bool runs_here(const KernelsOfInstructionSet& kernels) {
  if (&kernels == &kernels_portable) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (&kernels == &kernels_avx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

// Best first.
constexpr const KernelsOfInstructionSet* kCandidates[] = {
#if defined(__x86_64__)
    &kernels_avx512, &kernels_avx2,
#endif
    &kernels_portable};

const KernelsOfInstructionSet* best() {
  for (const KernelsOfInstructionSet* candidate : kCandidates)
    if (runs_here(*candidate)) return candidate;
  return &kernels_portable;
}

std::atomic<const KernelsOfInstructionSet*>& chosen() {
  static std::atomic<const KernelsOfInstructionSet*> kernels{best()};
  return kernels;
}

}  // namespace

const char* instruction_set() { return chosen().load()->name; }

bool select_instruction_set(const char* name) {
  for (const KernelsOfInstructionSet* candidate : kCandidates)
    if (!std::strcmp(candidate->name, name) && runs_here(*candidate)) {
      chosen() = candidate;
      return true;
    }
  return false;
}

template <>
const Tiles<float>& tiles<float>() {
  return chosen().load()->tiles_fp32;
}
template <>
const Tiles<BFloat16>& tiles<BFloat16>() {
  return chosen().load()->tiles_bf16;
}
template <>
const Tiles<double>& tiles<double>() {
  return chosen().load()->tiles_fp64;
}

template <>
const Scan<float>& scan<float>() {
  return chosen().load()->scan_fp32;
}
template <>
const Scan<double>& scan<double>() {
  return chosen().load()->scan_fp64;
}

template <>
const Mixing<float>& mixing<float>() {
  return chosen().load()->mixing_fp32;
}
template <>
const Mixing<double>& mixing<double>() {
  return chosen().load()->mixing_fp64;
}

template <>
const MaskedMixing<float>& masked_mixing<float>() {
  return chosen().load()->masked_mixing_fp32;
}
template <>
const MaskedMixing<double>& masked_mixing<double>() {
  return chosen().load()->masked_mixing_fp64;
}

}  // namespace monet::cpu
