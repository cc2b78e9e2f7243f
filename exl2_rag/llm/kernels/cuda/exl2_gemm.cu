// EXL2, some dozens of rows on tensor cores: see packed_gemm.cuh. exl2_gemm_rR takes R rows a block.
#include "packed_gemm.cuh"

#define EXL2_GEMM(name, row_tiles, min_blocks)                                                                         \
    extern "C" __global__ void __launch_bounds__(256, min_blocks)                                                      \
        name(const __half* x, const uint4* stream, const int2* tiles, const int4* chunks, const int* slices,           \
             const float* bias, void* y, float* partial, long long y_stride, int epilogue, int n_tiles, int n_chunks,  \
             int n_rows, int n_slices, int n_sections, int slot_units) {                                               \
        exl2::packed_gemm<exl2::Exl2Format, row_tiles>(                                                                \
            x, {stream, tiles, chunks, slices, n_tiles, n_slices, nullptr}, {y, bias, y_stride, epilogue}, partial,    \
            n_chunks, n_rows, n_sections, slot_units);                                                                 \
    }
EXL2_GEMM(exl2_gemm_r8, 1, 2)
EXL2_GEMM(exl2_gemm_r16, 2, 2)
EXL2_GEMM(exl2_gemm_r32, 4, exl2::kBlocksOf32Rows)
EXL2_GEMM(exl2_gemm_r64, 8, 1)
