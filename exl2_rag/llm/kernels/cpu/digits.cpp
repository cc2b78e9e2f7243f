// Activations as whole numbers for the byte dot products of plane_matmul.cpp.
//
// Each 32 stored rows of a token have a scale of their own; every value becomes a whole number n of 15 bits, and that two
// signed digits to the base 128, because the dot product instructions take signed bytes:
//
//     s = max |x| / 16256,   n = round(x / s),   n = 128 * high + low,   high in -127..127, low in -64..63
//
//     digits [T][K/32][64]     32 high digits, then 32 low ones: one cache line a chunk
//     scales [T][K/32]         float32 s;   sums [T][K/32]   int32, the sum of n
//
// With one digit (8 bits) top-1 agreement of the demo model fell to .987; with two it is .9998 (docs/log.md).
// A chunk that holds an infinity or NaN gets the scale NaN, so that what comes out is NaN. One task per token.
#include <stdint.h>

#include "../exl2_layout.h"
#include "ops.h"
#include "simd.h"

namespace exl2 {
namespace EXL2_LEVEL {
namespace {

constexpr float kLargestNumber = 16256.0f;  // 127 * 128
constexpr float kSmallestMaximum = 0x1p-100f;  // below, a chunk is all zeros: 16256 / max would overflow
constexpr int kChunkVecs = kChunkRows / kLanes;

void write_chunk(const Vec* x, int8_t* digits, float* scale, int32_t* sum) {
    VecInt largest{};
    for (int v = 0; v < kChunkVecs; ++v) {
        const VecInt magnitude = as_int(x[v]) & 0x7fffffff;  // ordered like the numbers; NaN above all
        largest = magnitude > largest ? magnitude : largest;
    }
    const int32_t bits = lane_maximum(largest);
    float maximum;
    __builtin_memcpy(&maximum, &bits, 4);
    const bool finite = bits < 0x7f800000;
    const float factor = finite && maximum >= kSmallestMaximum ? kLargestNumber / maximum : 0.0f;
    *scale = !finite ? __builtin_nanf("") : factor == 0.0f ? 0.0f : maximum / kLargestNumber;
    const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number, ties to even
    VecInt total{};
    for (int v = 0; v < kChunkVecs; ++v) {
        VecInt number = as_int(x[v] * splat(factor) + magic) - as_int(magic);
        if (!finite) number = VecInt{};
        const VecInt high = (number + 64) >> 7;
        total += number;
        store_bytes(digits + v * kLanes, high);
        store_bytes(digits + kChunkRows + v * kLanes, number - (high << 7));
    }
    *sum = lane_sum(total);
}

bool quantise_row(const void* context, int64_t row) {
    const Digits& args = *static_cast<const Digits*>(context);
    const float* x = args.x + row * args.in;
    const int64_t chunks = args.in / kChunkRows;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        // One number after the other: gather instructions are slower than the loads they stand for on many processors.
        float ordered[kChunkRows];
        const float* from = x + chunk * kChunkRows;
        if (args.perm != nullptr) {
            const int32_t* perm = args.perm + chunk * kChunkRows;
            for (int i = 0; i < kChunkRows; ++i) {
                ordered[i] = x[perm[i]];
                asm volatile("");  // or the compiler makes a gather of it
            }
            from = ordered;
        }
        Vec values[kChunkVecs];
        for (int v = 0; v < kChunkVecs; ++v) values[v] = load(from + v * kLanes);
        const int64_t index = row * chunks + chunk;
        write_chunk(values, args.digits + index * 2 * kChunkRows, args.scales + index, args.sums + index);
    }
    return true;
}

}  // namespace

int digits(const Digits& args) { return run_tasks(args.rows, args.rows * args.in * 8, quantise_row, &args) ? kOk : kNoMemory; }

}  // namespace EXL2_LEVEL
}  // namespace exl2
