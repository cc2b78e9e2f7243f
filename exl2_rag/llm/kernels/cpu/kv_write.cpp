// Rotates q and k by their positions and q, k and v into the basis of quantised pages; writes k and v as codes and scales.
// One task per token.
//
// The format: docs/kv-cache-format.md. Of each 32 numbers x* is the one of largest magnitude, of equals the first:
//     scale = float16(x* / -2^(b-1))
//     code  = clamp(round(x / scale), -2^(b-1), 2^(b-1) - 1) + 2^(b-1)
// Bit for bit what kv_format.py computes.
#include <stdint.h>
#include <string.h>

#include "hadamard.h"
#include "ops.h"
#include "pages.h"
#include "rotate_head.h"
#include "simd.h"

namespace exl2 {
namespace EXL2_LEVEL {
namespace {

constexpr float kLargestHalf = 65504.0f;

// The 32 codes of a group, and its scale.
inline uint16_t quantise_group(const float* x, int zero, uint8_t* codes) {
    float largest = 0.0f, extreme = x[0];
    for (int i = 0; i < kQuantGroup; ++i) {
        const float magnitude = __builtin_fabsf(x[i]);
        if (magnitude > largest) {
            largest = magnitude;
            extreme = x[i];
        }
    }
    float wanted = extreme * (-1.0f / static_cast<float>(zero));
    wanted = wanted > kLargestHalf ? kLargestHalf : wanted < -kLargestHalf ? -kLargestHalf : wanted;
    const uint16_t half = half_from_float(wanted);
    const float scale = float_from_half(half), low = static_cast<float>(-zero), high = static_cast<float>(zero - 1);
    for (int i = 0; i < kQuantGroup; i += kLanes) {
        Vec number = load(x + i) / splat(scale);
        number = select(number > high, splat(high), number);
        number = select(number < low, splat(low), number);
        // Adding 1.5 * 2^23 leaves whole numbers, ties to even.
        const Vec magic = splat(12582912.0f);
        const VecInt code = as_int(number + magic) - as_int(magic) + zero;
        const VecInt stored = scale == 0.0f || scale != scale ? splat_int(zero) : code;
        store_bytes(reinterpret_cast<int8_t*>(codes + i), stored);
    }
    return half;
}

// Eight codes to their word of low bits and, with six bits, their word of high bits.
inline uint32_t pack_low(const uint8_t* codes) {
    uint32_t word = 0;
    for (int i = 0; i < 8; ++i) word |= static_cast<uint32_t>(codes[i] & 15) << low_shift(i);
    return word;
}

inline uint16_t pack_high(const uint8_t* codes) {
    uint32_t word = 0;
    for (int i = 0; i < 8; ++i) word |= static_cast<uint32_t>(codes[i] >> 4) << high_shift(i);
    return static_cast<uint16_t>(word);
}

// x: [dim], rotated into the basis of the pages; codes: room for one vector of 8-bit codes.
inline void quantise_vector(const float* x, int64_t dim, int bits, uint8_t* codes, uint8_t* to, uint16_t* scales) {
    const int zero = 1 << (bits - 1);
    for (int64_t d = 0; d < dim; d += kQuantGroup) scales[d / kQuantGroup] = quantise_group(x + d, zero, codes + d);
    if (bits == 8) {
        memcpy(to, codes, static_cast<size_t>(dim));
        return;
    }
    for (int64_t d = 0; d < dim; d += 8) {
        const uint32_t low = pack_low(codes + d);
        memcpy(to + d / 2, &low, 4);
        if (bits == 4) continue;
        const uint16_t high = pack_high(codes + d);
        memcpy(to + dim / 2 + d / 4, &high, 2);
    }
}

bool write_token(const void* context, int64_t row) {
    const QuantiseKvWrite& args = *static_cast<const QuantiseKvWrite*>(context);
    float* x = scratch(0, static_cast<size_t>(2 * args.dim));
    if (x == nullptr) return false;
    uint8_t* codes = reinterpret_cast<uint8_t*>(x + args.dim);
    const float* cos = args.cos + args.positions[row] * args.half;
    const float* sin = args.sin + args.positions[row] * args.half;
    for (int64_t head = 0; head < args.heads; ++head) {
        const int64_t offset = (row * args.heads + head) * args.dim;
        rotate_head(args.q + offset, cos, sin, args.half, args.dim, args.q_rotated + offset);
        rotate_basis(args.q_rotated + offset, args.dim, args.rotation_factor);
    }
    const int64_t row_bytes = args.dim * args.bits / 8, row_scales = args.dim / kQuantGroup;
    for (int64_t head = 0; head < args.kv_heads; ++head) {
        const int64_t source = (row * args.kv_heads + head) * args.dim, target = args.slots[row] * args.kv_heads + head;
        rotate_head(args.k + source, cos, sin, args.half, args.dim, x);
        rotate_basis(x, args.dim, args.rotation_factor);
        quantise_vector(x, args.dim, args.bits, codes, args.k_codes + target * row_bytes, args.k_scales + target * row_scales);
        for (int64_t d = 0; d < args.dim; ++d) x[d] = args.v[source + d];
        rotate_basis(x, args.dim, args.rotation_factor);
        quantise_vector(x, args.dim, args.bits, codes, args.v_codes + target * row_bytes, args.v_scales + target * row_scales);
    }
    return true;
}

}  // namespace

int quantise_kv_write(const QuantiseKvWrite& args) {
    for (int64_t row = 0; row < args.rows; ++row) {
        if (args.positions[row] < 0 || args.positions[row] >= args.n_positions) return kOutOfRange;
        if (args.slots[row] < 0 || args.slots[row] >= args.n_slots) return kOutOfRange;
    }
    const int64_t cost = args.rows * (args.heads + 2 * args.kv_heads) * args.dim * 16;
    return run_tasks(args.rows, cost, write_token, &args) ? kOk : kNoMemory;
}

}  // namespace EXL2_LEVEL
}  // namespace exl2
