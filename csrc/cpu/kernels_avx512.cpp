#if defined(__AVX512F__)
#define MONET_VECTOR_BYTES 64
#define MONET_KERNELS kernels_avx512
#define MONET_NAME "AVX-512"
#define DOT_PAIRS 4
#define DOT_UNITS 6
#define SCATTER_PAIRS 4
#define SCATTER_VECTORS 4
#define OUTER_UNITS 6
#define OUTER_VECTORS 4
#define GATHER_VECTORS 4
#include "kernels.inl"
#endif
