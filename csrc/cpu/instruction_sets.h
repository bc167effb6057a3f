// What is compiled once for each instruction set (kernels_*.cpp) and chosen when the program runs (dispatch.cpp).
#pragma once

#include "mixing.h"
#include "tiles.h"

namespace monet::cpu {

struct KernelsOfInstructionSet {
  const char* name;
  Tiles<float> tiles_fp32;
  Tiles<BFloat16> tiles_bf16;
  Tiles<double> tiles_fp64;
  Scan<float> scan_fp32;
  Scan<double> scan_fp64;
  Mixing<float> mixing_fp32;
  Mixing<double> mixing_fp64;
  MaskedMixing<float> masked_mixing_fp32;
  MaskedMixing<double> masked_mixing_fp64;
};
extern const KernelsOfInstructionSet kernels_portable, kernels_avx2, kernels_avx512;  // AVX on x86-64 only

// "AVX-512", "AVX2" or "portable".
const char* instruction_set();
// Takes another one from now on, to test it or to compare; false where the machine does not have it.
bool select_instruction_set(const char* name);

}  // namespace monet::cpu
