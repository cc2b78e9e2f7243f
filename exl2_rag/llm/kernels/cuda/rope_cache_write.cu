// Turns queries and keys by their positions and writes keys and values into their pages.
//
//     q          [T, H, D]        float32 or float16; a token's heads are contiguous, tokens q_stride numbers apart
//     k, v       [T, KH, D]       likewise, with k_stride and v_stride
//     cos, sin   [S, R/2]         float32, a row for each position
//     positions  [T]              int64
//     slots      [T]              int64, page * PS + row of the token; a negative one is not written (padding)
//     k_pages, v_pages [P, PS, KH, D]  float32, float16 or bfloat16: slot s begins at number s * KH * D
//     turned_q   [T, H, D]        dtype of q, contiguous
//
// Of a head's D numbers the first R are turned, number i of the first half with number i of the second (NeoX layout):
//
//     0 ... R/2-1 | R/2 ... R-1 | R ... D-1        x'[i] = x[i] cos - x[i+R/2] sin
//       first         second       as it is        x'[i+R/2] = x[i+R/2] cos + x[i] sin
//
// threadIdx.x is i, and beyond R/2 takes two of the rest; threadIdx.y and blockIdx.y give the head, counted through q, k
// and v; blockIdx.x is the token. Arithmetic is float32; each result is rounded once.
//
// The caller guarantees: blockDim.x = D / 2 (D even), R even and at most D, positions < S, slots < P * PS, all different.
#include "common.cuh"

namespace exl2 {

template <class T, class Page>
__device__ __forceinline__ void rope_cache_write(const T* q, const T* k, const T* v, const float* cos, const float* sin,
                                                 const long long* positions, const long long* slots, Page* k_pages,
                                                 Page* v_pages, T* turned_q, int heads, int kv_heads, int head_dim,
                                                 int half, long long q_stride, long long k_stride, long long v_stride) {
    const long long token = blockIdx.x;
    int head = blockIdx.y * blockDim.y + threadIdx.y;
    if (head >= heads + 2 * kv_heads) return;
    const int i = threadIdx.x;
    const bool is_turned = i < half;
    const int first = is_turned ? i : 2 * i, second = is_turned ? i + half : 2 * i + 1;

    const T* source;
    bool turn = is_turned;
    if (head < heads) {
        source = q + token * q_stride + static_cast<long long>(head) * head_dim;
    } else if (head < heads + kv_heads) {
        source = k + token * k_stride + static_cast<long long>(head - heads) * head_dim;
    } else {
        source = v + token * v_stride + static_cast<long long>(head - heads - kv_heads) * head_dim;
        turn = false;
    }
    float a = to_float(source[first]), b = to_float(source[second]);
    if (turn) {
        const long long at = positions[token] * half + i;
        const float c = cos[at], s = sin[at];
        const float turned = a * c - b * s;
        b = b * c + a * s;
        a = turned;
    }
    if (head < heads) {
        T* target = turned_q + (token * heads + head) * head_dim;
        target[first] = from_float<T>(a);
        target[second] = from_float<T>(b);
        return;
    }
    const long long slot = slots[token];
    if (slot < 0) return;
    head -= heads;
    Page* pages = head < kv_heads ? k_pages : v_pages;
    Page* target = pages + (slot * kv_heads + (head < kv_heads ? head : head - kv_heads)) * head_dim;
    target[first] = from_float<Page>(a);
    target[second] = from_float<Page>(b);
}

}  // namespace exl2

#define EXL2_ROPE(name, T, Page)                                                                                       \
    extern "C" __global__ void __launch_bounds__(1024)                                                                 \
        name(const T* q, const T* k, const T* v, const float* cos, const float* sin, const long long* positions,       \
             const long long* slots, Page* k_pages, Page* v_pages, T* turned_q, int heads, int kv_heads, int head_dim, \
             int half, long long q_stride, long long k_stride, long long v_stride) {                                   \
        exl2::rope_cache_write<T, Page>(q, k, v, cos, sin, positions, slots, k_pages, v_pages, turned_q, heads,        \
                                        kv_heads, head_dim, half, q_stride, k_stride, v_stride);                       \
    }
EXL2_ROPE(rope_cache_write_f32_f32, float, float)
EXL2_ROPE(rope_cache_write_f32_f16, float, __half)
EXL2_ROPE(rope_cache_write_f32_bf16, float, __nv_bfloat16)
EXL2_ROPE(rope_cache_write_f16_f32, __half, float)
EXL2_ROPE(rope_cache_write_f16_f16, __half, __half)
EXL2_ROPE(rope_cache_write_f16_bf16, __half, __nv_bfloat16)
