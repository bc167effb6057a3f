#define MONET_VECTOR_BYTES 16
#define MONET_KERNELS kernels_portable
#define MONET_NAME "portable"
#define DOT_PAIRS 3
#define DOT_UNITS 3
#define SCATTER_PAIRS 4
#define SCATTER_VECTORS 2
#define OUTER_UNITS 4
#define OUTER_VECTORS 2
#define GATHER_VECTORS 4
#include "kernels.inl"
