// The middle of a gated MLP:  y[t, i] = f(gate[t, i]) * up[t, i], with f one of
//
//     silu       x / (1 + exp(-x))
//     gelu_tanh  x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))
//     gelu       x/2 * (1 + erf(x / sqrt(2)))
//
//     gate, up  [T, I]  float32 or float16, rows gate_stride and up_stride numbers apart: two halves of one matrix, or two
//     y         [T, I]  dtype of gate, contiguous
//
// A thread takes four columns of one row. blockIdx.x is the row, blockIdx.y the run of 4 * blockDim columns.
//
// The caller guarantees: with `vectorised`, I and the strides multiples of 4 and all pointers aligned to four numbers.
#include "common.cuh"

namespace exl2 {

struct Silu {
    static __device__ __forceinline__ float of(float x) { return x / (1.0f + expf(-x)); }
};
struct GeluTanh {
    static __device__ __forceinline__ float of(float x) {
        constexpr float kSqrtTwoOverPi = 0.7978845608028654f;
        return 0.5f * x * (1.0f + tanhf(kSqrtTwoOverPi * fmaf(0.044715f * x * x, x, x)));
    }
};
struct Gelu {
    static __device__ __forceinline__ float of(float x) {
        constexpr float kSqrtHalf = 0.7071067811865476f;
        return 0.5f * x * (1.0f + erff(x * kSqrtHalf));
    }
};

template <class F, class T>
__device__ __forceinline__ void gated_activation(const T* gate, const T* up, T* y, int columns, long long gate_stride,
                                                 long long up_stride, int vectorised) {
    const long long row = blockIdx.x;
    const int c = 4 * (blockIdx.y * blockDim.x + threadIdx.x);
    gate += row * gate_stride;
    up += row * up_stride;
    y += row * columns;
    if (c >= columns) return;
    if (vectorised) {
        float a[4], b[4];
        load_4(gate + c, a);
        load_4(up + c, b);
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = F::of(a[i]) * b[i];
        store_4(y + c, a);
    } else {
        for (int i = 0; i < 4 && c + i < columns; ++i) {
            y[c + i] = from_float<T>(F::of(to_float(gate[c + i])) * to_float(up[c + i]));
        }
    }
}

}  // namespace exl2

#define EXL2_GATED(name, F, T)                                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                                               \
        name(const T* gate, const T* up, T* y, int columns, long long gate_stride, long long up_stride, int vectorised) { \
        exl2::gated_activation<exl2::F, T>(gate, up, y, columns, gate_stride, up_stride, vectorised);               \
    }
EXL2_GATED(silu_mul_f32, Silu, float)
EXL2_GATED(silu_mul_f16, Silu, __half)
EXL2_GATED(gelu_tanh_mul_f32, GeluTanh, float)
EXL2_GATED(gelu_tanh_mul_f16, GeluTanh, __half)
EXL2_GATED(gelu_mul_f32, Gelu, float)
EXL2_GATED(gelu_mul_f16, Gelu, __half)
