// Rotate queries and keys by their positions, rotate everything into the basis of quantised pages, and write keys and
// values into the pages: the twin of rope_cache_write for q8, q6 and q4.
//
//     q            [T, H, D]         float32 or float16, token stride q_stride;   D a multiple of 32, at most 256
//     k, v         [T, KH, D]        as q, strides k_stride and v_stride
//     cos, sin     [S, R/2]          float32: number i of the first half of R turns with number i of the second
//     positions    [T]               int64
//     slots        [T]               int64, page * PS + row; negative: the token is not written
//     k_codes, v_codes [P, PS, KH, bytes] uint8; k_scales, v_scales [P, PS, KH, D/32] float16: see kv_pages.cuh
//     q_rotated    [T, H, D]         as q, contiguous
//
// One block a token and head, thread i its number i, so that a warp has one group of 32 numbers:
//
//     scale = half(x* / -2^(b-1)),  x* the number of largest magnitude, the first of equals
//     code  = min(max(rint(x / scale), -2^(b-1)), 2^(b-1) - 1) + 2^(b-1)
//
// so the largest number gets the code that the two's-complement range has one more of. No fused operations: the
// codes equal those of the reference bit for bit.
//
// The caller guarantees: blockDim.x = D; grid (T, H + 2 KH).
#include "hadamard.cuh"
#include "kv_pages.cuh"

namespace exl2 {

constexpr int kMaxHeadDim = 256;

// Or over each eight lanes, in all of them.
__device__ __forceinline__ unsigned or_of_eight(unsigned x) {
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2) x |= __shfl_xor_sync(kAllLanes, x, distance);
    return x;
}

template <int kPages>
__device__ __forceinline__ void write_codes(float x, unsigned char* vector, __half* scales, int dim) {
    constexpr int kBits = kPages == kQ8 ? 8 : kPages == kQ6 ? 6 : 4;
    constexpr int kZero = 1 << (kBits - 1);
    const int i = threadIdx.x, e = i % 8;
    // NaN counts as the largest and makes the scale NaN, so that what went wrong stays visible.
    const unsigned no_numbers = __ballot_sync(kAllLanes, x != x);
    const float magnitude = warp_max(fabsf(x));
    const unsigned largest_lanes = __ballot_sync(kAllLanes, fabsf(x) == magnitude);
    const int source = __ffs(no_numbers != 0 ? no_numbers : largest_lanes) - 1;
    float unrounded = __fmul_rn(__shfl_sync(kAllLanes, x, source), -1.0f / kZero);
    if (fabsf(unrounded) > 65504.0f) unrounded = copysignf(65504.0f, unrounded);
    const __half scale = __float2half_rn(unrounded);
    const float wide = __half2float(scale);
    const float number = wide == 0.0f || wide != wide ? 0.0f : rintf(__fdiv_rn(x, wide));
    const unsigned code = static_cast<unsigned>(static_cast<int>(fminf(fmaxf(number, -kZero), kZero - 1)) + kZero);
    if (i % kQuantGroup == 0) scales[i / kQuantGroup] = scale;
    if (kPages == kQ8) {
        vector[i] = static_cast<unsigned char>(code);
        return;
    }
    const unsigned low = or_of_eight((code & 15u) << (4 * (e / 2) + 16 * (e % 2)));
    if (e == 0) reinterpret_cast<unsigned*>(vector)[i / 8] = low;
    if (kPages == kQ6) {
        const unsigned high = or_of_eight((code >> 4) << (2 * (e / 2) + 8 * (e % 2)));
        if (e == 0) reinterpret_cast<unsigned short*>(vector + dim / 2)[i / 8] = static_cast<unsigned short>(high);
    }
}

template <int kPages, class Number>
__device__ __forceinline__ void kv_quantise(const Number* q, const Number* k, const Number* v, long long q_stride,
                                            long long k_stride, long long v_stride, const float* cos, const float* sin,
                                            const long long* positions, const long long* slots,
                                            unsigned char* k_codes, __half* k_scales, unsigned char* v_codes,
                                            __half* v_scales, Number* q_rotated, int heads, int kv_heads, int dim,
                                            int half, int block_size, float factor) {
    EXL2_SHARED(float, room, kMaxHeadDim);
    const int i = threadIdx.x, head = blockIdx.y;
    const long long token = blockIdx.x;
    const bool is_query = head < heads, is_value = head >= heads + kv_heads;
    const int kv_head = is_query ? 0 : (head - heads) % kv_heads;
    const Number* from = is_query ? q + token * q_stride : is_value ? v + token * v_stride : k + token * k_stride;
    float x = to_float(from[static_cast<long long>(is_query ? head : kv_head) * dim + i]);
    if (!is_value) {
        room[i] = x;
        __syncthreads();
        if (i < 2 * half) {
            const int turn = i % half;
            const float c = cos[positions[token] * half + turn], s = sin[positions[token] * half + turn];
            x = i < half ? __fsub_rn(__fmul_rn(x, c), __fmul_rn(room[i + half], s))
                         : __fadd_rn(__fmul_rn(x, c), __fmul_rn(room[i - half], s));
        }
        __syncthreads();
    }
    x = hadamard(x, block_size, factor, room);
    if (is_query) {
        q_rotated[(token * heads + head) * dim + i] = from_float<Number>(x);
        return;
    }
    if (slots[token] < 0) return;
    const long long vector = slots[token] * kv_heads + kv_head;
    write_codes<kPages>(x, (is_value ? v_codes : k_codes) + vector * vector_bytes<kPages>(dim),
                        (is_value ? v_scales : k_scales) + vector * (dim / kQuantGroup), dim);
}

}  // namespace exl2

#define EXL2_KV_QUANTISE(name, kPages, Number)                                                                         \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        name(const Number* q, const Number* k, const Number* v, long long q_stride, long long k_stride,                \
             long long v_stride, const float* cos, const float* sin, const long long* positions,                       \
             const long long* slots, unsigned char* k_codes, __half* k_scales, unsigned char* v_codes,                 \
             __half* v_scales, Number* q_rotated, int heads, int kv_heads, int dim, int half, int block_size,          \
             float factor) {                                                                                           \
        exl2::kv_quantise<exl2::kPages, Number>(q, k, v, q_stride, k_stride, v_stride, cos, sin, positions, slots,     \
                                                k_codes, k_scales, v_codes, v_scales, q_rotated, heads, kv_heads, dim, \
                                                half, block_size, factor);                                             \
    }
EXL2_KV_QUANTISE(kv_quantise_q8_f32, kQ8, float)
EXL2_KV_QUANTISE(kv_quantise_q6_f32, kQ6, float)
EXL2_KV_QUANTISE(kv_quantise_q4_f32, kQ4, float)
EXL2_KV_QUANTISE(kv_quantise_q8_f16, kQ8, __half)
EXL2_KV_QUANTISE(kv_quantise_q6_f16, kQ6, __half)
EXL2_KV_QUANTISE(kv_quantise_q4_f16, kQ4, __half)
