// Attention over bfloat16 pages; everything is in paged_attention.cuh.
#define EXL2_PAGES exl2::kBfloat16
#define EXL2_ONLY_EXACT
#include "paged_attention.cuh"
