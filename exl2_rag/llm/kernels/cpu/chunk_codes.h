// Reading the file's bit strings (exl2_layout.h): the code of one row of a chunk, for neighbouring columns.
#pragma once

#include "../exl2_layout.h"
#include "simd.h"

namespace {

// words: word 0 of the first of kLanes columns. word_stride: words from one packed row to the next.
template <int kBits, int kRow>
inline VecUint code_of_row(const uint32_t* words, int64_t word_stride) {
    constexpr int word = kRow * kBits / 32, shift = kRow * kBits % 32;
    VecUint code = load_words(words + word * word_stride) >> shift;
    if constexpr (shift + kBits > 32) code |= load_words(words + (word + 1) * word_stride) << (32 - shift);
    return code & ((1u << kBits) - 1);
}

}  // namespace
