// Reading the planes of exl2_layout.h: codes of one chunk as unsigned bytes, four rows a lane, ready for dot4.
#pragma once

#include <type_traits>

#include "../exl2_layout.h"
#include "simd.h"

namespace {

template <int kBits>
struct Planes {
    static constexpr int low_bits = kBits == 8 ? 8 : kBits >= 4 ? 4 : 2;
    static constexpr int high_bits = kBits - low_bits;  // 0, 1 or 2
    static constexpr int low_units = low_bits;          // a plane of b bits takes b units
    static constexpr int chunk_bytes = kBits * exl2::kUnitBytes;
};

constexpr uint32_t every_byte(uint32_t value) { return value * 0x01010101u; }

// Codes of quad kQuad for kLanes columns. `low` and `high` are the units of the two planes that hold it.
template <int kBits, int kQuad>
EXL2_ALWAYS_INLINE VecUint quad_codes(VecUint low, VecUint high) {
    using P = Planes<kBits>;
    VecUint codes = low;
    if constexpr (P::low_bits < 8) {
        constexpr int shift = kQuad * P::low_bits % 8;
        codes = (shift == 0 ? low : low >> shift) & every_byte((1u << P::low_bits) - 1);
    }
    if constexpr (P::high_bits > 0) {
        constexpr int left = P::low_bits - kQuad * P::high_bits % 8;
        const VecUint moved = left > 0 ? high << (left > 0 ? left : 0) : high >> (left < 0 ? -left : 0);
        codes = and_or(moved, every_byte(((1u << P::high_bits) - 1) << P::low_bits), codes);
    }
    return codes;
}

// Calls use(quad, codes) for the eight quads of a chunk in order; quad is a compile-time constant.
//   unit: the first unit of the chunk, at the byte of the first of kLanes columns.
template <int kBits, int kQuad = 0, typename Use>
EXL2_ALWAYS_INLINE void for_each_quad(const uint8_t* unit, Use&& use) {
    using P = Planes<kBits>;
    constexpr int low_unit = kQuad * P::low_bits / 8;
    constexpr int high_unit = P::low_units + kQuad * P::high_bits / 8;
    const VecUint low = load_words(reinterpret_cast<const uint32_t*>(unit + low_unit * exl2::kUnitBytes));
    VecUint high{};
    if constexpr (P::high_bits > 0) high = load_words(reinterpret_cast<const uint32_t*>(unit + high_unit * exl2::kUnitBytes));
    use(std::integral_constant<int, kQuad>{}, quad_codes<kBits, kQuad>(low, high));
    if constexpr (kQuad + 1 < exl2::kQuads) for_each_quad<kBits, kQuad + 1>(unit, use);
}

}  // namespace
