// EXL2 to plain numbers: see packed_dequantise.cuh.
#include "packed_dequantise.cuh"

#define EXL2_DEQUANTISE(name, Out)                                                                                     \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        name(const uint4* stream, const int2* tiles, const int4* chunks, const int* features, Out* w, int first_tile,  \
             int n_chunks) {                                                                                           \
        exl2::packed_dequantise<exl2::Exl2Format>({stream, tiles, chunks, nullptr, 0, 0, nullptr}, features, w,        \
                                                  first_tile, n_chunks);                                               \
    }
EXL2_DEQUANTISE(exl2_dequantise_f16, __half)
EXL2_DEQUANTISE(exl2_dequantise_f32, float)
