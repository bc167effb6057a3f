// All kernels for the instruction set this is compiled for. Before including it, define MONET_VECTOR_BYTES,
// MONET_KERNELS (the table), MONET_NAME and the sizes of the tiles: as many sums as the registers hold.
#include "instruction_sets.h"
#include "masked_mixing.inl"
#include "tiles.inl"

namespace monet::cpu {

const KernelsOfInstructionSet MONET_KERNELS = {
    MONET_NAME,
    tiles_table<float>,
    tiles_table<BFloat16>,
    tiles_table<double>,
    scan_table<float>,
    scan_table<double>,
    mixing_table<float>,
    mixing_table<double>,
    masked_mixing_table<float>,
    masked_mixing_table<double>};

}  // namespace monet::cpu
