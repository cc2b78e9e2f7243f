// A few rows times the transpose of a plain matrix:  y[t, n] = bias[n] + sum over k of x[t, k] * w[n, k]
//
//     x     [T, K]  float32 or float16, contiguous
//     w     [N, K]  float32, float16 or bfloat16, contiguous
//     bias  [N]     float32, or null
//     y     [T, N]  float32 or float16, rows y_stride numbers apart; with `accumulate` (y float32) the sum is added to it
//
// A warp computes one column n for kRows rows: lane l takes numbers 8l to 8l + 7 of each run of 256, so that a warp
// reads 512 bytes of w in one go, and x, which all warps read, comes from the L1 cache. Bounded by the bytes of w.
//
//     k        0..7 | 8..15 | ... | 248..255 | 256..263 | ...
//     lane       0      1             31          0
//
// Sums are float32, in an order that depends on K alone. blockIdx.x and the warp give n, blockIdx.y the rows.
//
// The caller guarantees: with `vectorised`, K a multiple of 8 and x and w aligned to 16 bytes.
#include "common.cuh"

namespace exl2 {

__device__ __forceinline__ void load_8(const float* at, float (&x)[8]) {
    float half[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        load_4(at + 4 * i, half);
#pragma unroll
        for (int j = 0; j < 4; ++j) x[4 * i + j] = half[j];
    }
}
template <class T>  // 16-bit types
__device__ __forceinline__ void load_8(const T* at, float (&x)[8]) {
    union {
        uint4 words;
        unsigned short bits[8];
    } eight;
    eight.words = *reinterpret_cast<const uint4*>(at);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = to_float(*reinterpret_cast<const T*>(&eight.bits[i]));
}

// kRows: rows of x that share a reading of w.
template <class X, class W, class Y, int kRows>
__device__ __forceinline__ void dense_gemv(const X* x, const W* w, const float* bias, Y* y, int in_features,
                                           int out_features, int rows, long long y_stride, int accumulate,
                                           int vectorised) {
    const int lane = threadIdx.x % kWarpThreads;
    const int n = blockIdx.x * (blockDim.x / kWarpThreads) + threadIdx.x / kWarpThreads;
    const int first_row = blockIdx.y * kRows;
    if (n >= out_features) return;
    w += static_cast<long long>(n) * in_features;
    x += static_cast<long long>(first_row) * in_features;
    float sums[kRows] = {};
#pragma unroll 2
    for (int k = 8 * lane; k < in_features; k += 8 * kWarpThreads) {
        float weights[8], numbers[8];
        if (vectorised) {
            load_8(w + k, weights);
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) weights[i] = k + i < in_features ? to_float(w[k + i]) : 0.0f;
        }
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            if (first_row + row >= rows) break;
            const X* from = x + static_cast<long long>(row) * in_features + k;
            if (vectorised) {
                load_8(from, numbers);
            } else {
#pragma unroll
                for (int i = 0; i < 8; ++i) numbers[i] = k + i < in_features ? to_float(from[i]) : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) sums[row] = fmaf(weights[i], numbers[i], sums[row]);
        }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
        if (first_row + row >= rows) break;
        float sum = warp_sum(sums[row]);
        if (lane == 0) {
            if (bias != nullptr) sum += bias[n];
            Y* at = y + (first_row + row) * y_stride + n;
            if (accumulate) sum += to_float(*at);
            *at = from_float<Y>(sum);
        }
    }
}

}  // namespace exl2

#define EXL2_DENSE_GEMV(name, X, W, Y, kRows)                                                                    \
    extern "C" __global__ void __launch_bounds__(128)                                                            \
        name(const X* x, const W* w, const float* bias, Y* y, int in_features, int out_features, int rows,       \
             long long y_stride, int accumulate, int vectorised) {                                               \
        exl2::dense_gemv<X, W, Y, kRows>(x, w, bias, y, in_features, out_features, rows, y_stride, accumulate,   \
                                         vectorised);                                                            \
    }
#define EXL2_DENSE_GEMV_ROWS(name, X, W, Y)   \
    EXL2_DENSE_GEMV(name##_r1, X, W, Y, 1)    \
    EXL2_DENSE_GEMV(name##_r4, X, W, Y, 4)
EXL2_DENSE_GEMV_ROWS(dense_gemv_f32_f32_f32, float, float, float)
EXL2_DENSE_GEMV_ROWS(dense_gemv_f32_f16_f32, float, __half, float)
EXL2_DENSE_GEMV_ROWS(dense_gemv_f32_bf16_f32, float, __nv_bfloat16, float)
EXL2_DENSE_GEMV_ROWS(dense_gemv_f16_f32_f32, __half, float, float)
EXL2_DENSE_GEMV_ROWS(dense_gemv_f16_f16_f32, __half, __half, float)
EXL2_DENSE_GEMV_ROWS(dense_gemv_f16_bf16_f32, __half, __nv_bfloat16, float)
EXL2_DENSE_GEMV_ROWS(dense_gemv_f16_f32_f16, __half, float, __half)
EXL2_DENSE_GEMV_ROWS(dense_gemv_f16_f16_f16, __half, __half, __half)
EXL2_DENSE_GEMV_ROWS(dense_gemv_f16_bf16_f16, __half, __nv_bfloat16, __half)
