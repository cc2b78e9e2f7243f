// Rows of the cache's pages as vectors of float32, whatever they are stored as. A row: the key or value of one head of one
// token. Every kind of page has
//
//     Vec load(row, d)                    numbers d to d + kLanes of a row; d a multiple of kLanes, all of them within it
//     float one(row, d)                   number d
//     void prefetch(row, d)               fetch what load(row, d) reads, if it is the first vector of its cache line
//
// so what reads a tile is written once. Quantised pages are read as they are; docs/kv-cache-format.md draws them.
#pragma once

#include <stdint.h>
#include <string.h>

#include "simd.h"

namespace {

constexpr int kQuantGroup = 32;  // numbers that share a scale

constexpr int kLineBytes = 64;

// float32, float16 or bfloat16.
template <typename Element>
class PlainPages {
public:
    PlainPages(const void* numbers, const uint16_t*, int64_t dim) : numbers_(static_cast<const Element*>(numbers)), dim_(dim) {}

    Vec load(int64_t row, int64_t d) const { return load_as_float(numbers_ + row * dim_ + d); }
    float one(int64_t row, int64_t d) const { return to_float(numbers_[row * dim_ + d]); }
    void prefetch(int64_t row, int64_t d) const {
        if (d % static_cast<int64_t>(kLineBytes / sizeof(Element)) == 0) __builtin_prefetch(numbers_ + row * dim_ + d);
    }

private:
    const Element* numbers_;
    int64_t dim_;
};

// Where code i of each eight starts in their word of low bits, and in that of high bits.
constexpr int low_shift(int i) { return 4 * (i / 2) + 16 * (i % 2); }
constexpr int high_shift(int i) { return 2 * (i / 2) + 8 * (i % 2); }

inline uint32_t load_word(const uint8_t* from) {
    uint32_t word;
    memcpy(&word, from, 4);
    return word;
}

inline uint32_t load_half_word(const uint8_t* from) {
    uint16_t word;
    memcpy(&word, from, 2);
    return word;
}

// q8, q6 and q4: numbers in the rotated basis, float16((code - 2^(b-1)) * scale) of a float16 scale for each 32.
template <int kBits>
class QuantisedPages {
public:
    QuantisedPages(const void* codes, const uint16_t* scales, int64_t dim)
        : codes_(static_cast<const uint8_t*>(codes)), scales_(scales), dim_(dim), row_bytes_(dim * kBits / 8) {}

    Vec load(int64_t row, int64_t d) const {
        const float scale = float_from_half_quick(scales_[(row * dim_ + d) / kQuantGroup]);
        return through_half(__builtin_convertvector(code_vector(codes_ + row * row_bytes_, d) - (1 << (kBits - 1)), Vec) * splat(scale));
    }

    float one(int64_t row, int64_t d) const { return load(row, d / kLanes * kLanes)[d % kLanes]; }

    void prefetch(int64_t row, int64_t d) const {
        if (d != 0) return;
        for (int64_t i = 0; i < row_bytes_; i += kLineBytes) __builtin_prefetch(codes_ + row * row_bytes_ + i);
        __builtin_prefetch(scales_ + row * (dim_ / kQuantGroup));
    }

private:
    static float float_from_half_quick(uint16_t half) {
#if defined(__AVX2__)
        return _cvtsh_ss(half);
#elif defined(__aarch64__)
        __fp16 value;
        memcpy(&value, &half, 2);
        return value;
#else
        return float_from_half(half);
#endif
    }

    // Codes d to d + kLanes, one a lane.
    VecInt code_vector(const uint8_t* row, int64_t d) const {
        if constexpr (kBits == 8) return load_bytes(row + d);
        VecInt low_shifts, high_shifts, low, high = {};
        const uint8_t* high_bytes = row + dim_ / 2;
        for (int i = 0; i < kLanes; ++i) {
            const int place = kLanes >= 8 ? i % 8 : static_cast<int>((d + i) % 8);
            low_shifts[i] = low_shift(place);
            high_shifts[i] = high_shift(place);
        }
        if constexpr (kLanes == 16) {
            const VecInt is_first = lane_numbers() < 8;
            low = is_first ? splat_int(load_word(row + d / 2)) : splat_int(load_word(row + d / 2 + 4));
            if constexpr (kBits == 6) {
                const uint32_t both = load_word(high_bytes + d / 4);
                high = splat_int(both);
                high_shifts += is_first ? VecInt{} : splat_int(16);
            }
        } else {
            low = splat_int(load_word(row + d / 8 * 4));
            if constexpr (kBits == 6) high = splat_int(load_half_word(high_bytes + d / 8 * 2));
        }
        VecInt codes = shift_right(low, low_shifts) & 15;
        if constexpr (kBits == 6) codes |= (shift_right(high, high_shifts) & 3) << 4;
        return codes;
    }

    static VecInt shift_right(VecInt value, VecInt by) {
        return reinterpret_cast<VecInt>(reinterpret_cast<VecUint>(value) >> reinterpret_cast<VecUint>(by));
    }

    const uint8_t* codes_;
    const uint16_t* scales_;
    int64_t dim_, row_bytes_;
};

}  // namespace
