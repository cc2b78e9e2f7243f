// Root-mean-square norm of rows:  y[t, c] = x[t, c] / sqrt(mean over c of x[t, c]^2 + eps) * weight[c]
//
//     x       [T, C]  float32 or float16, rows x_stride numbers apart, each row contiguous
//     weight  [C]     float32
//     y       [T, C]  float32 or float16, contiguous
//
// One block a row. Thread i takes columns 4i to 4i + 3, then those 4 * blockDim further on:
//
//     columns   0 1 2 3 | 4 5 6 7 | ...
//     thread       0         1      ...
//
// The row is read twice; the second time it comes from the L1 cache. Sums are float32, in an order that depends on C
// alone, so a row's result does not depend on the others, nor on whether `vectorised` is set.
//
// The caller guarantees: blockDim.x a multiple of 32, at most 1024, and a function of C alone; gridDim.x = T;
// with `vectorised`, C and x_stride multiples of 4 and all pointers aligned to four numbers.
#include "norm_row.cuh"

namespace exl2 {

template <class In, class Out>
__device__ __forceinline__ void rms_norm_row(const In* x, const float* weight, Out* y, int columns, long long x_stride,
                                             float eps, int vectorised) {
    EXL2_SHARED(float, scratch, kWarpThreads);
    x += static_cast<long long>(blockIdx.x) * x_stride;
    y += static_cast<long long>(blockIdx.x) * columns;
    const int step = 4 * blockDim.x;
    float squares = 0.0f;
    for (int c = 4 * threadIdx.x; c < columns; c += step) {
        float four[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (vectorised) {
            load_4(x + c, four);
        } else {
            for (int i = 0; i < 4 && c + i < columns; ++i) four[i] = to_float(x[c + i]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) squares = fmaf(four[i], four[i], squares);
    }
    const float factor = rsqrtf(block_sum(squares, scratch) / columns + eps);
    scale_row(x, weight, y, columns, factor, vectorised);
}

}  // namespace exl2

#define EXL2_RMS_NORM(name, In, Out)                                                                               \
    extern "C" __global__ void __launch_bounds__(1024)                                                             \
        name(const In* x, const float* weight, Out* y, int columns, long long x_stride, float eps, int vectorised) { \
        exl2::rms_norm_row<In, Out>(x, weight, y, columns, x_stride, eps, vectorised);                             \
    }
EXL2_RMS_NORM(rms_norm_f32_f32, float, float)
EXL2_RMS_NORM(rms_norm_f32_f16, float, __half)
EXL2_RMS_NORM(rms_norm_f16_f32, __half, float)
EXL2_RMS_NORM(rms_norm_f16_f16, __half, __half)
