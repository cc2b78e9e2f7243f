// Attention over float16 pages; everything is in paged_attention.cuh.
#define EXL2_PAGES exl2::kFloat16
#include "paged_attention.cuh"
