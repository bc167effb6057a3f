// All kernels for the instruction set this is compiled for. Before including it, define MONET_VECTOR_BYTES, MONET_KERNELS
// (the table), MONET_NAME and the tile sizes of the products: as many sums as the registers hold.
#include "instruction_sets.h"
#include "masking.inl"
#include "products.inl"

namespace monet::cpu {

const KernelsOfInstructionSet MONET_KERNELS = {
    MONET_NAME,
    products_table<float>,
    products_table<BFloat16>,
    products_table<double>,
    scan_table<float>,
    scan_table<double>,
    mixing_table<float>,
    mixing_table<double>,
    masking_table<float>,
    masking_table<double>};

}  // namespace monet::cpu
