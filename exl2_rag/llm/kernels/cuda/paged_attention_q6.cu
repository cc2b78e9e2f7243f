// Attention over q6 pages; everything is in paged_attention.cuh.
#define EXL2_PAGES exl2::kQ6
#include "paged_attention.cuh"
