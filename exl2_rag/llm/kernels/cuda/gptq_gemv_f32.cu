// GPTQ of 4 bits, few rows: see packed_gemv.cuh. Rows sorted by group, groups padded to a multiple of 32 rows.
//
// gptq_gemv_f32_rR: x float32, R rows a block; gridDim.y = T / R, rounded up. A module of its own, since few need it.
#include "packed_gemv.cuh"

#define GPTQ_GEMV(name, Product, min_blocks)                                                                           \
    extern "C" __global__ void __launch_bounds__(512, min_blocks)                                                      \
        name(const exl2::Product::Bits* x, const int* stored_rows, const uint4* stream, const int2* tiles,             \
             const int4* chunks, const int* slices, const int4* spans, const float* bias, void* y, long long y_stride, \
             int epilogue, int n_tiles, int features, int n_chunks, int n_rows, int n_slices, int n_sections) {        \
        exl2::packed_gemv<exl2::GptqFormat, exl2::Product>(                                                            \
            x, stored_rows, {stream, tiles, chunks, slices, n_tiles, n_slices, spans}, {y, bias, y_stride, epilogue},  \
            features, n_chunks, n_rows, n_sections);                                                                   \
    }
GPTQ_GEMV(gptq_gemv_f32_r1, FloatProduct<1>, 2)
GPTQ_GEMV(gptq_gemv_f32_r4, FloatProduct<4>, 1)
