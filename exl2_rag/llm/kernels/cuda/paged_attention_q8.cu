// Attention over q8 pages; everything is in paged_attention.cuh.
#define EXL2_PAGES exl2::kQ8
#include "paged_attention.cuh"
