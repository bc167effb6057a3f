// What is compiled once for each instruction set (kernels_*.cpp) and chosen when the program runs (dispatch.cpp).
#pragma once

#include "mixing.h"
#include "products.h"

namespace monet::cpu {

struct KernelsOfInstructionSet {
  const char* name;
  Products<float> products_fp32;
  Products<BFloat16> products_bf16;
  Products<double> products_fp64;
  Scan<float> scan_fp32;
  Scan<double> scan_fp64;
  Mixing<float> mixing_fp32;
  Mixing<double> mixing_fp64;
  Masking<float> masking_fp32;
  Masking<double> masking_fp64;
};
extern const KernelsOfInstructionSet kernels_portable, kernels_avx2, kernels_avx512;  // AVX on x86-64 only

// "AVX-512", "AVX2" or "portable".
const char* instruction_set();
// Takes another one from now on, to test it or to compare; false where the machine does not have it.
bool select_instruction_set(const char* name);

}  // namespace monet::cpu
