// How a key or value vector is stored in a page: eight numbers at a time, as tensor-core operands.
//
//     float16, bfloat16   D numbers, in order
//     q8                  D bytes, code of number i in byte i
//     q4                  D/2 bytes, a 32-bit word for eight codes
//     q6                  D/2 bytes, the low four bits as in q4, then D/4 bytes, the high two bits, 16 for eight codes
//
// The codes of numbers 0 to 7 in the words of q4 and q6 (bit 0 on the right), so that numbers 2i and 2i + 1 come out in
// the two halves of one register with one shift and one mask:
//
//     low four bits    7777 5555 3333 1111 6666 4444 2222 0000
//     high two bits                        77 55 33 11 66 44 22 00
//
// A code c of b bits stands for  half((c - 2^(b-1)) * scale), rounded to float16; a float16 scale for each 32 numbers:
// scales [P, PS, KH, D/32]. The vectors are in the rotated basis of `hadamard.cuh`.
#pragma once

#include "common.cuh"

namespace exl2 {

constexpr int kFloat16 = 0, kBfloat16 = 1, kQ8 = 2, kQ6 = 3, kQ4 = 4;
constexpr int kQuantGroup = 32;  // numbers that share a scale

__device__ constexpr bool is_quantised(int pages) { return pages >= kQ8; }

// Bytes of a vector of `dim` numbers.
template <int kPages>
__device__ __forceinline__ int vector_bytes(int dim) {
    return kPages == kQ8 ? dim : kPages == kQ6 ? dim * 3 / 4 : kPages == kQ4 ? dim / 2 : dim * 2;
}

// Eight stored numbers, as they are loaded: eight number `index` of the vector number `vector`. Addresses are counted
// in the units of a load, with 32 bits: 64-bit ones of many vectors at a time would fill the registers. So the pages of
// a layer may have up to 2^32 units (64 GiB in float16, 8 GiB in q6).
template <int kPages>
struct Eight {
    uint4 words;

    __device__ __forceinline__ void load(const unsigned char* pages, unsigned vector, int index, int dim) {
        words = __ldg(reinterpret_cast<const uint4*>(pages) + (vector * (dim / 8) + index));
    }
    __device__ __forceinline__ void clear() { words = make_uint4(0, 0, 0, 0); }
    // Register i holds numbers 2i and 2i + 1.
    __device__ __forceinline__ void unpack(__half, unsigned (&pairs)[4]) const {
        pairs[0] = words.x;
        pairs[1] = words.y;
        pairs[2] = words.z;
        pairs[3] = words.w;
    }
};

// Registers of 1024 + code, as float16 bits, to (code - zero) * scale.
__device__ __forceinline__ unsigned scale_codes(unsigned bits, float offset, __half scale) {
    union {
        unsigned word;
        __half2 pair;
    } number;
    number.word = bits;
    number.pair = __hmul2(__hsub2(number.pair, __float2half2_rn(offset)), __half2half2(scale));
    return number.word;
}

template <>
struct Eight<kQ8> {
    uint2 words;

    __device__ __forceinline__ void load(const unsigned char* pages, unsigned vector, int index, int dim) {
        words = __ldg(reinterpret_cast<const uint2*>(pages) + (vector * (dim / 8) + index));
    }
    __device__ __forceinline__ void clear() { words = make_uint2(0, 0); }
    __device__ __forceinline__ void unpack(__half scale, unsigned (&pairs)[4]) const {
        constexpr unsigned kThousands = 0x64646464u;
        pairs[0] = scale_codes(__byte_perm(words.x, kThousands, 0x4140), 1024.0f + 128.0f, scale);
        pairs[1] = scale_codes(__byte_perm(words.x, kThousands, 0x4342), 1024.0f + 128.0f, scale);
        pairs[2] = scale_codes(__byte_perm(words.y, kThousands, 0x4140), 1024.0f + 128.0f, scale);
        pairs[3] = scale_codes(__byte_perm(words.y, kThousands, 0x4342), 1024.0f + 128.0f, scale);
    }
};

template <>
struct Eight<kQ6> {
    unsigned low;
    unsigned short high;

    __device__ __forceinline__ void load(const unsigned char* pages, unsigned vector, int index, int dim) {
        low = __ldg(reinterpret_cast<const unsigned*>(pages) + (vector * (dim / 16 * 3) + index));
        high = __ldg(reinterpret_cast<const unsigned short*>(pages) + (vector * (dim / 8 * 3) + dim / 4 + index));
    }
    __device__ __forceinline__ void clear() { low = high = 0; }
    __device__ __forceinline__ void unpack(__half scale, unsigned (&pairs)[4]) const {
        const unsigned spread = __byte_perm(high, 0, 0x4140);  // bytes 0 and 1 to the halves
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const unsigned top = i < 2 ? spread << (4 - 2 * i) : spread >> (2 * i - 4);
            const unsigned codes = ((low >> (4 * i)) & 0x000F000Fu) | (top & 0x00300030u);
            pairs[i] = scale_codes(codes | 0x64006400u, 1024.0f + 32.0f, scale);
        }
    }
};

template <>
struct Eight<kQ4> {
    unsigned low;

    __device__ __forceinline__ void load(const unsigned char* pages, unsigned vector, int index, int dim) {
        low = __ldg(reinterpret_cast<const unsigned*>(pages) + (vector * (dim / 8) + index));
    }
    __device__ __forceinline__ void clear() { low = 0; }
    __device__ __forceinline__ void unpack(__half scale, unsigned (&pairs)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            pairs[i] = scale_codes(((low >> (4 * i)) & 0x000F000Fu) | 0x64006400u, 1024.0f + 8.0f, scale);
        }
    }
};

}  // namespace exl2
