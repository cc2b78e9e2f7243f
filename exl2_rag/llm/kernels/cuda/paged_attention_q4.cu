// Attention over q4 pages; everything is in paged_attention.cuh.
#define EXL2_PAGES exl2::kQ4
#include "paged_attention.cuh"
