// Adds to the residual stream and norms the sum:
//
//     residual[t, c] += delta[t, c]
//     y[t, c] = residual[t, c] / sqrt(mean over c of residual[t, c]^2 + eps) * weight[c]
//
//     residual [T, C]  float32, rows residual_stride numbers apart; updated in place, in float32
//     delta    [T, C]  float32 or float16, rows delta_stride numbers apart
//     weight   [C]     float32
//     y        [T, C]  float32 or float16, contiguous
//
// One block a row, threads as in rms_norm.cu; a thread reads back in the second pass what it wrote itself in the first,
// so the barrier of the sum is the only one. y is bit for bit what rms_norm gives for the new residual.
//
// The caller guarantees what it guarantees for rms_norm.
#include "norm_row.cuh"

namespace exl2 {

template <class In, class Out>
__device__ __forceinline__ void add_rms_norm_row(float* residual, const In* delta, const float* weight, Out* y,
                                                 int columns, long long residual_stride, long long delta_stride,
                                                 float eps, int vectorised) {
    EXL2_SHARED(float, scratch, kWarpThreads);
    residual += static_cast<long long>(blockIdx.x) * residual_stride;
    delta += static_cast<long long>(blockIdx.x) * delta_stride;
    y += static_cast<long long>(blockIdx.x) * columns;
    const int step = 4 * blockDim.x;
    float squares = 0.0f;
    for (int c = 4 * threadIdx.x; c < columns; c += step) {
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (vectorised) {
            float more[4];
            load_4(residual + c, sum);
            load_4(delta + c, more);
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[i] += more[i];
            store_4(residual + c, sum);
        } else {
            for (int i = 0; i < 4 && c + i < columns; ++i) {
                sum[i] = residual[c + i] + to_float(delta[c + i]);
                residual[c + i] = sum[i];
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) squares = fmaf(sum[i], sum[i], squares);
    }
    const float factor = rsqrtf(block_sum(squares, scratch) / columns + eps);
    scale_row(residual, weight, y, columns, factor, vectorised);
}

}  // namespace exl2

#define EXL2_ADD_RMS_NORM(name, In, Out)                                                                             \
    extern "C" __global__ void __launch_bounds__(1024)                                                               \
        name(float* residual, const In* delta, const float* weight, Out* y, int columns, long long residual_stride,  \
             long long delta_stride, float eps, int vectorised) {                                                    \
        exl2::add_rms_norm_row<In, Out>(residual, delta, weight, y, columns, residual_stride, delta_stride, eps,     \
                                        vectorised);                                                                 \
    }
EXL2_ADD_RMS_NORM(add_rms_norm_f32_f32, float, float)
EXL2_ADD_RMS_NORM(add_rms_norm_f32_f16, float, __half)
EXL2_ADD_RMS_NORM(add_rms_norm_f16_f32, __half, float)
EXL2_ADD_RMS_NORM(add_rms_norm_f16_f16, __half, __half)
