// EXL2, few rows: see packed_gemv.cuh. Widths of 2 to 8 bits in any order, groups of any multiple of 32 rows.
//
// exl2_gemv_f16: x float16, up to 8 rows; gridDim.y = 1.
#include "packed_gemv.cuh"

#define EXL2_GEMV(name, Product, min_blocks)                                                                           \
    extern "C" __global__ void __launch_bounds__(512, min_blocks)                                                      \
        name(const exl2::Product::Bits* x, const int* stored_rows, const uint4* stream, const int2* tiles,             \
             const int4* chunks, const int* slices, const int4* spans, const float* bias, void* y, long long y_stride, \
             int epilogue, int n_tiles, int features, int n_chunks, int n_rows, int n_slices, int n_sections) {        \
        exl2::packed_gemv<exl2::Exl2Format, exl2::Product>(                                                            \
            x, stored_rows, {stream, tiles, chunks, slices, n_tiles, n_slices, spans}, {y, bias, y_stride, epilogue},  \
            features, n_chunks, n_rows, n_sections);                                                                   \
    }
EXL2_GEMV(exl2_gemv_f16, TensorProduct, 2)
