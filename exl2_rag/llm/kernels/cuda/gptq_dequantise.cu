// GPTQ of 4 bits to plain numbers: see packed_dequantise.cuh.
#include "packed_dequantise.cuh"

#define GPTQ_DEQUANTISE(name, Out)                                                                                     \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        name(const uint4* stream, const int2* tiles, const int4* chunks, const int* features, Out* w, int first_tile,  \
             int n_chunks) {                                                                                           \
        exl2::packed_dequantise<exl2::GptqFormat>({stream, tiles, chunks, nullptr, 0, 0, nullptr}, features, w,        \
                                                  first_tile, n_chunks);                                               \
    }
GPTQ_DEQUANTISE(gptq_dequantise_f16, __half)
GPTQ_DEQUANTISE(gptq_dequantise_f32, float)
