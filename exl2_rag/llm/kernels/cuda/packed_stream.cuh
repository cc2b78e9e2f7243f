// How quantised matrices lie in a card's memory, and how a warp turns them into float16 weights.
//
// A matrix of stored rows x N columns is cut into tiles of 32 columns, the rows of a tile into chunks of 32. Each tile
// is one stream of 16-byte units: for each group of rows its header, then its chunks.
//
//     tile 0:  | header | chunk | chunk | chunk | chunk | header | chunk | ...          then tile 1
//
//     header, EXL2    1 unit    32 nibbles: scale - 1 of each column
//     header, GPTQ    6 units   32 float16 scales, 32 unsigned bytes of zero points (0 to 16)
//     chunk           8b units  32 x 32 codes of b bits
//
// Within a chunk each lane of a warp owns 4 columns x 8 rows, b words of 32 bits; that is what the lane holds of the
// left operand (rows are columns of the matrix) of four mma.m16n8k16:
//
//     g = lane / 4, t = lane % 4      columns 4g + c (c = 0..3), rows 8t + 2j + h (j = 0..3, h = 0, 1)
//     pair p = 4c + j                 two codes, h = 0 in bits 0-15 of a word, h = 1 in bits 16-31
//
// The b words lie in planes, so that a warp reads 512, 256 or 128 consecutive bytes at a time: words 0-3 (and 4-7) of
// lane 0, then of lane 1, ...; then two words of each lane if b & 2; then one of each lane if b & 1.
//
// Where the pairs are in the 16 bits (word i of the lane's; the upper half word likewise):
//
//     b = 2   word i      |p8i |p8i+1| ... |p8i+7|                 2 bits each
//     b = 3   word i      |p5i |p5i+1|p5i+2|p5i+3|p5i+4|x|         3 bits each; x is bit i of p15
//     b = 4   word i      |p4i |p4i+1|p4i+2|p4i+3|                 4 bits each
//     b = 5   word i      |p3i |p3i+1|p3i+2|x|                     5 bits each; x is bit i of p15
//     b = 6   words 3q..  |p8q |p8q+1|low 4 of p8q+6|              6 bits each, q = 0, 1
//                         |p8q+2|p8q+3|low 4 of p8q+7|
//                         |p8q+4|p8q+5|high 2 of p8q+6|high 2 of p8q+7|
//     b = 8   word i      |p2i |p2i+1|                             8 bits each
//
// A code q at bits s to s + b of a half word becomes a number by setting the exponent: 0x6400 | (q << s) is the float16
// 1024 + q * 2^s, and one multiply-add by 2^-s gives q - zero exactly. The weight is then what the format says,
//
//     EXL2    half((q - 2^(b-1)) * half(scale^2 * group_scale))          GPTQ    half((q - zero) * scale)
//
// Sources: the exponent trick is Kim et al. 2022 ("Who Says Elephants Can't Run"); spreading the sixteenth pair of 3
// and 5 bits over the top bits, and 0x6400, are as in ExLlamaV2.
#pragma once

#include "common.cuh"
#include "exl2_layout.h"

namespace exl2 {

constexpr int kStreamUnitBytes = 16;
constexpr unsigned kMagic = 0x64006400u;  // 1024.0 twice: its last mantissa bit is worth 1
constexpr int kLaneColumns = 4;
constexpr int kLanePairs = 4;  // of one column

static_assert(kLaneColumns * kLanePairs * 2 * kWarpThreads == kChunkRows * kTileColumns, "a warp holds one chunk");

__device__ constexpr int chunk_units(int bits) { return kChunkRows * kTileColumns * bits / 8 / kStreamUnitBytes; }

// ---- the table of chunks --------------------------------------------------------------------------------------------
// One int4 a chunk: {information, first unit in the tile's stream, first unit of its group's header, 0}. Information:
//
//     bits 0-3    width of the codes
//     bits 4-14   chunks left in the group, this one included: at most 2047, since rows are numbered in 16 bits
//     bits 16-31  EXL2: the group's multiplier, float16

__device__ __forceinline__ int info_bits(int info) { return info & 15; }
__device__ __forceinline__ int info_chunks_left(int info) { return info >> 4 & 0x7FF; }
__device__ __forceinline__ unsigned info_group_scale(int info) { return static_cast<unsigned>(info) >> 16; }

// ---- float16 pairs as words -----------------------------------------------------------------------------------------

__device__ __forceinline__ __half2 as_half2(unsigned bits) { return *reinterpret_cast<const __half2*>(&bits); }
__device__ __forceinline__ unsigned as_bits(__half2 pair) { return *reinterpret_cast<const unsigned*>(&pair); }
__device__ __forceinline__ unsigned twice(unsigned half_bits) { return half_bits | half_bits << 16; }

// The float16 bits of a whole number 1 to 2047.
__device__ constexpr unsigned whole_number_bits(unsigned number) {
    unsigned exponent = 0;
    while (number >> (exponent + 1)) ++exponent;
    return (exponent + 15) << 10 | ((number << (10 - exponent)) & 0x3FFu);
}
static_assert(whole_number_bits(1) == 0x3C00 && whole_number_bits(1024) == 0x6400 && whole_number_bits(66) == 0x5420,
              "");

// code_bits holds 1024 + q * 2^kShift twice; gives q * 1 + (minus_zero - 2^(10 - kShift)), with that sum ready made.
template <int kShift>
__device__ __forceinline__ __half2 centre(unsigned code_bits, unsigned minus_offset) {
    if constexpr (kShift == 0) {
        return __hadd2(as_half2(code_bits), as_half2(minus_offset));
    } else {
        constexpr unsigned factor = (15u - kShift) << 10;  // 2^-kShift
        return __hfma2(as_half2(code_bits), as_half2(factor | factor << 16), as_half2(minus_offset));
    }
}

// kMagic, by a way that hides it from the compiler. `count`: any number that is not negative, known only at run time.
__device__ __forceinline__ unsigned hidden_magic(int count) { return kMagic | static_cast<unsigned>(count >> 31); }

// The same number in all lanes, by a way that the compiler understands.
__device__ __forceinline__ int uniform(int number) { return __shfl_sync(kAllLanes, number, 0); }

// ---- the two formats: scales of the lane's four columns in one group ------------------------------------------------

struct Exl2Format {
    static constexpr int kHeaderUnits = 1;
    static constexpr int kMaxBits = 8;
    __half2 scales[kLaneColumns];  // each twice
    unsigned magic;  // kMagic in a register: if the compiler knew, it would move it there again for each use

    // The header starts at byte `offset` of the source.
    template <class Source>
    __device__ __forceinline__ void load(const Source& source, unsigned offset, int info, int lane) {
        const unsigned nibbles = source.template load<unsigned short>(offset + lane / 4 * 2);
        const __half2 group_scale = as_half2(twice(info_group_scale(info)));
        const unsigned first = (nibbles & 0xFu) | (nibbles & 0xF0u) << 12 | kMagic;
        const unsigned second = (nibbles >> 8 & 0xFu) | (nibbles & 0xF000u) << 4 | kMagic;
        constexpr unsigned minus_1023 = 0x8000u | whole_number_bits(1023);
        const __half2 a = __hadd2(as_half2(first), as_half2(minus_1023 | minus_1023 << 16));
        const __half2 b = __hadd2(as_half2(second), as_half2(minus_1023 | minus_1023 << 16));
        const __half2 scale_a = __hmul2_rn(__hmul2_rn(a, a), group_scale);  // a^2 <= 256 is exact: one rounding
        const __half2 scale_b = __hmul2_rn(__hmul2_rn(b, b), group_scale);
        scales[0] = __low2half2(scale_a);
        scales[1] = __high2half2(scale_a);
        scales[2] = __low2half2(scale_b);
        scales[3] = __high2half2(scale_b);
    }

    template <int kBits, int kShift>
    __device__ __forceinline__ unsigned weights(unsigned code_bits, int column) const {
        constexpr unsigned offset = 0x8000u | whole_number_bits((1024u >> kShift) + (1u << (kBits - 1)));
        return as_bits(__hmul2_rn(centre<kShift>(code_bits, offset | offset << 16), scales[column]));
    }
};

struct GptqFormat {
    static constexpr int kHeaderUnits = 6;
    static constexpr int kMaxBits = 4;
    static constexpr int kZerosOffset = kTileColumns * 2;
    __half2 scales[kLaneColumns];
    unsigned magic;  // kMagic in a register: if the compiler knew, it would move it there again for each use
    unsigned zeros;  // a byte each

    template <class Source>
    __device__ __forceinline__ void load(const Source& source, unsigned offset, int, int lane) {
        const uint2 pairs = source.template load<uint2>(offset + lane / 4 * 8);
        zeros = source.template load<unsigned>(offset + kZerosOffset + lane / 4 * 4);
        scales[0] = __low2half2(as_half2(pairs.x));
        scales[1] = __high2half2(as_half2(pairs.x));
        scales[2] = __low2half2(as_half2(pairs.y));
        scales[3] = __high2half2(as_half2(pairs.y));
    }

    template <int kBits, int kShift>
    __device__ __forceinline__ unsigned weights(unsigned code_bits, int column) const {
        static_assert(kBits == 4 && (kShift == 0 || kShift == 4), "");
        // 0xE400 | zero is -(1024 + zero). -(64 + zero) has the same mantissa times 16: 0xD400 | zero << 4.
        const unsigned low = __byte_perm(zeros, 0xE4u, column | 0x40 | column << 8 | 0x4000);
        const unsigned offset = kShift == 0 ? low : (low & 0x001F001Fu) << 4 | 0xD400D400u;
        return as_bits(__hmul2_rn(centre<kShift>(code_bits, offset), scales[column]));
    }
};

// ---- where a warp reads the stream: `load` takes a byte offset ------------------------------------------------------

struct FlatSource {
    const unsigned char* from;
    template <class Word>
    __device__ __forceinline__ Word load(unsigned offset) const {
        return *reinterpret_cast<const Word*>(from + offset);
    }
};

// A ring of kBytes (a power of two) in shared memory; offsets count from its very first byte and wrap.
template <int kBytes>
struct RingSource {
    SharedAddress ring;
    template <class Word>
    __device__ __forceinline__ Word load(unsigned offset) const {
        static_assert((kBytes & (kBytes - 1)) == 0, "offsets wrap by a mask");
        return ld_shared<Word>(ring + (offset & (kBytes - 1)));
    }
};

// ---- a chunk's words and weights ------------------------------------------------------------------------------------

template <int kBits, class Source>
__device__ __forceinline__ void load_words(unsigned (&words)[kBits], const Source& source, unsigned offset, int lane) {
#pragma unroll
    for (int plane = 0; plane < kBits / 4; ++plane) {
        const uint4 four = source.template load<uint4>(offset + plane * 512 + lane * 16);
        words[4 * plane] = four.x;
        words[4 * plane + 1] = four.y;
        words[4 * plane + 2] = four.z;
        words[4 * plane + 3] = four.w;
    }
    constexpr int kWhole = kBits / 4 * 4;
    if constexpr ((kBits & 2) != 0) {
        const uint2 two = source.template load<uint2>(offset + kWhole * 128 + lane * 8);
        words[kWhole] = two.x;
        words[kWhole + 1] = two.y;
    }
    if constexpr ((kBits & 1) != 0) {
        words[kBits - 1] = source.template load<unsigned>(offset + (kBits - 1) * 128 + lane * 4);
    }
}

// Bits kShift to kShift + kBits of both half words, made numbers: one instruction, with the mask in it and `magic` in a
// register.
template <int kBits, int kShift>
__device__ __forceinline__ unsigned numbers(unsigned word, unsigned magic) {
    constexpr unsigned mask = ((1u << kBits) - 1) << kShift;
    static_assert(kShift + kBits <= 10, "a float16 has ten bits below its first");
    return (word & (mask | mask << 16)) | magic;
}

// weights[c][j]: the pair of rows 8t + 2j of column 4g + c, exactly as the format defines them.
template <int kBits, class Format>
__device__ __forceinline__ void decode(unsigned (&weights)[kLaneColumns][kLanePairs], const unsigned (&words)[kBits],
                                       const Format& format) {
    const unsigned magic = format.magic;
#define EXL2_PAIR(p, shift, value) weights[(p) / 4][(p) % 4] = format.template weights<kBits, shift>(value, (p) / 4)
    if constexpr (kBits == 2) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const unsigned low = words[i], high = low >> 10;
            EXL2_PAIR(8 * i, 0, (numbers<2, 0>(low, magic)));
            EXL2_PAIR(8 * i + 1, 2, (numbers<2, 2>(low, magic)));
            EXL2_PAIR(8 * i + 2, 4, (numbers<2, 4>(low, magic)));
            EXL2_PAIR(8 * i + 3, 6, (numbers<2, 6>(low, magic)));
            EXL2_PAIR(8 * i + 4, 8, (numbers<2, 8>(low, magic)));
            EXL2_PAIR(8 * i + 5, 0, (numbers<2, 0>(high, magic)));
            EXL2_PAIR(8 * i + 6, 2, (numbers<2, 2>(high, magic)));
            EXL2_PAIR(8 * i + 7, 4, (numbers<2, 4>(high, magic)));
        }
    } else if constexpr (kBits == 3) {
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            const unsigned low = words[i], high = low >> 9;
            EXL2_PAIR(5 * i, 0, (numbers<3, 0>(low, magic)));
            EXL2_PAIR(5 * i + 1, 3, (numbers<3, 3>(low, magic)));
            EXL2_PAIR(5 * i + 2, 6, (numbers<3, 6>(low, magic)));
            EXL2_PAIR(5 * i + 3, 0, (numbers<3, 0>(high, magic)));
            EXL2_PAIR(5 * i + 4, 3, (numbers<3, 3>(high, magic)));
        }
        EXL2_PAIR(15, 0,
                  (words[0] >> 15 & 0x00010001u) | (words[1] >> 14 & 0x00020002u) | (words[2] >> 13 & 0x00040004u) |
                      magic);
    } else if constexpr (kBits == 4) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const unsigned low = words[c], high = low >> 8;
            EXL2_PAIR(4 * c, 0, (numbers<4, 0>(low, magic)));
            EXL2_PAIR(4 * c + 1, 4, (numbers<4, 4>(low, magic)));
            EXL2_PAIR(4 * c + 2, 0, (numbers<4, 0>(high, magic)));
            EXL2_PAIR(4 * c + 3, 4, (numbers<4, 4>(high, magic)));
        }
    } else if constexpr (kBits == 5) {
        unsigned last = magic;
#pragma unroll
        for (int i = 0; i < 5; ++i) {
            const unsigned low = words[i], high = low >> 10;
            EXL2_PAIR(3 * i, 0, (numbers<5, 0>(low, magic)));
            EXL2_PAIR(3 * i + 1, 5, (numbers<5, 5>(low, magic)));
            EXL2_PAIR(3 * i + 2, 0, (numbers<5, 0>(high, magic)));
            last |= low >> (15 - i) & (0x00010001u << i);
        }
        EXL2_PAIR(15, 0, last);
    } else if constexpr (kBits == 6) {
#pragma unroll
        for (int q = 0; q < 2; ++q) {
            const unsigned a = words[3 * q], b = words[3 * q + 1], c = words[3 * q + 2];
            EXL2_PAIR(8 * q, 0, (numbers<6, 0>(a, magic)));
            EXL2_PAIR(8 * q + 1, 4, (numbers<6, 4>(a >> 2, magic)));
            EXL2_PAIR(8 * q + 2, 0, (numbers<6, 0>(b, magic)));
            EXL2_PAIR(8 * q + 3, 4, (numbers<6, 4>(b >> 2, magic)));
            EXL2_PAIR(8 * q + 4, 0, (numbers<6, 0>(c, magic)));
            EXL2_PAIR(8 * q + 5, 4, (numbers<6, 4>(c >> 2, magic)));
            EXL2_PAIR(8 * q + 6, 0, (a >> 12 & 0x000F000Fu) | (c >> 8 & 0x00300030u) | magic);
            EXL2_PAIR(8 * q + 7, 0, (b >> 12 & 0x000F000Fu) | (c >> 10 & 0x00300030u) | magic);
        }
    } else {
        static_assert(kBits == 8, "EXL2 has codes of 2, 3, 4, 5, 6 and 8 bits");
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            EXL2_PAIR(2 * i, 0, (__byte_perm(words[i], magic, 0x7250)));      // bytes 0 and 2, each below a 0x64
            EXL2_PAIR(2 * i + 1, 0, (__byte_perm(words[i], magic, 0x7351)));  // bytes 1 and 3
        }
    }
#undef EXL2_PAIR
}

template <int kBits, class Format, class Source>
__device__ __forceinline__ void load_weights(unsigned (&weights)[kLaneColumns][kLanePairs], const Format& format,
                                             const Source& source, unsigned offset, int lane) {
    unsigned words[kBits];
    load_words<kBits>(words, source, offset, lane);
    decode<kBits>(weights, words, format);
}

// As above for a width known at run time. All lanes agree on it.
template <class Source>
__device__ __forceinline__ void load_weights_of(int bits, unsigned (&weights)[kLaneColumns][kLanePairs],
                                                const Exl2Format& format, const Source& source, unsigned offset,
                                                int lane) {
    switch (bits) {
        case 4: load_weights<4>(weights, format, source, offset, lane); break;
        case 3: load_weights<3>(weights, format, source, offset, lane); break;
        case 2: load_weights<2>(weights, format, source, offset, lane); break;
        case 5: load_weights<5>(weights, format, source, offset, lane); break;
        case 6: load_weights<6>(weights, format, source, offset, lane); break;
        default: load_weights<8>(weights, format, source, offset, lane); break;
    }
}
template <class Source>
__device__ __forceinline__ void load_weights_of(int, unsigned (&weights)[kLaneColumns][kLanePairs],
                                                const GptqFormat& format, const Source& source, unsigned offset,
                                                int lane) {
    load_weights<4>(weights, format, source, offset, lane);
}

}  // namespace exl2
