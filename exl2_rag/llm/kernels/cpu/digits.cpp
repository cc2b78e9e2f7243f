// Activations as whole numbers for the dot products of plane_matmul.cpp.
//
// Each 32 stored rows of a token have a scale of their own; every value becomes a whole number n of 15 bits:
//
//     s = max |x| / 16256,   n = round(x / s)
//
// Few tokens are multiplied by codes as they lie in memory, by dot products of bytes, and so n becomes two signed digits to
// the base 128: n = 128 * high + low, high in -127..127, low in -64..63.
//
//     digits [T][K/32][64]     32 high digits, then 32 low ones: one cache line a chunk
//     scales [T][K/32]         float32 s;   sums [T][K/32]   int32, the sum of n
//
// Many tokens are multiplied by codes of 16 bits (spread_codes.h). There tokens lie side by side, for one chunk after the
// other, and within a chunk come the first two of each four rows (0, 1, 4, 5, ..., 28, 29), then the last two:
//
//     numbers [K/32][T][32]    int16 n: one cache line as well
//     scales [K/32][T]         float32 s;   sums [K/32][T]   int32, the sum of the products of a number of the first half and
//                              its counterpart in the second, modulo 2^32
//
// With one digit (8 bits) top-1 agreement of the demo model fell to .987; with 15 bits it is .9998 (docs/log.md).
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

// The whole numbers of a chunk; returns their scale.
inline float whole_numbers(const Vec* x, VecInt* numbers) {
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
    const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number, ties to even
    for (int v = 0; v < kChunkVecs; ++v)
        numbers[v] = finite ? as_int(x[v] * splat(factor) + magic) - as_int(magic) : VecInt{};
    return !finite ? __builtin_nanf("") : factor == 0.0f ? 0.0f : maximum / kLargestNumber;
}

// Element i of a chunk of whole numbers is stored row whole_order(i).
constexpr int whole_order(int i) { return i % 16 / 2 * 4 + i % 2 + i / 16 * 2; }

// Chunks that are put in order before they become whole numbers: vectors that are loaded right behind the single numbers in
// them would wait for those.
constexpr int kOrderedChunks = 8;

// The numbers of `count` chunks in the order in which they are stored; `perm` may be null.
template <bool kWhole>
void order_chunks(const float* x, const int32_t* perm, int64_t first, int64_t count, float* to) {
    for (int64_t chunk = first; chunk < first + count; ++chunk, to += kChunkRows) {
#pragma GCC unroll 32
        for (int i = 0; i < kChunkRows; ++i) {
            const int64_t stored = chunk * kChunkRows + (kWhole ? whole_order(i) : i);
            to[i] = x[perm == nullptr ? stored : perm[stored]];
            asm volatile("");  // or the compiler makes a gather of it, which is slower on many processors
        }
    }
}

void write_whole(const Digits& args, int64_t row, int64_t chunk, const float* x) {
    Vec values[kChunkVecs];
    VecInt numbers[kChunkVecs], sum{};
    for (int v = 0; v < kChunkVecs; ++v) values[v] = load(x + v * kLanes);
    const int64_t index = chunk * args.rows + row;
    args.scales[index] = whole_numbers(values, numbers);
    int16_t* to = static_cast<int16_t*>(args.numbers) + index * kChunkRows;
    for (int v = 0; v < kChunkVecs; ++v) store_shorts(to + v * kLanes, numbers[v]);
    for (int v = 0; v < kChunkVecs / 2; ++v) sum = wrapping_mul_add(numbers[v], numbers[v + kChunkVecs / 2], sum);
    args.sums[index] = wrapping_lane_sum(sum);
}

void write_digits(const Digits& args, int64_t row, int64_t chunk, const float* x) {
    Vec values[kChunkVecs];
    VecInt numbers[kChunkVecs], sum{};
    for (int v = 0; v < kChunkVecs; ++v) values[v] = load(x + v * kLanes);
    const int64_t index = row * (args.in / kChunkRows) + chunk;
    args.scales[index] = whole_numbers(values, numbers);
    int8_t* to = static_cast<int8_t*>(args.numbers) + index * 2 * kChunkRows;
    for (int v = 0; v < kChunkVecs; ++v) {
        const VecInt high = (numbers[v] + 64) >> 7;
        sum += numbers[v];
        store_bytes(to + v * kLanes, high);
        store_bytes(to + kChunkRows + v * kLanes, numbers[v] - (high << 7));
    }
    args.sums[index] = lane_sum(sum);
}

// Rows of one task: their numbers of a chunk lie side by side, those of one row a power of two apart, where they would push
// each other out of the caches.
constexpr int64_t kRowsTogether = 4;

template <bool kWhole>
bool quantise_rows(const void* context, int64_t task) {
    const Digits& args = *static_cast<const Digits*>(context);
    constexpr int64_t kRows = kWhole ? kRowsTogether : 1;
    const int64_t chunks = args.in / kChunkRows, last_row = (task + 1) * kRows < args.rows ? (task + 1) * kRows : args.rows;
    for (int64_t first = 0; first < chunks; first += kOrderedChunks) {
        const int64_t count = chunks - first < kOrderedChunks ? chunks - first : kOrderedChunks;
        for (int64_t row = task * kRows; row < last_row; ++row) {
            alignas(64) float ordered[kOrderedChunks * kChunkRows];
            order_chunks<kWhole>(args.x + row * args.in, args.perm, first, count, ordered);
            for (int64_t chunk = 0; chunk < count; ++chunk) {
                if constexpr (kWhole) write_whole(args, row, first + chunk, ordered + chunk * kChunkRows);
                else write_digits(args, row, first + chunk, ordered + chunk * kChunkRows);
            }
        }
    }
    return true;
}

}  // namespace

int digits(const Digits& args) {
    if (args.whole == 0) run_tasks(args.rows, args.rows * args.in * 8, quantise_rows<false>, &args);
    else run_tasks((args.rows + kRowsTogether - 1) / kRowsTogether, args.rows * args.in * 8, quantise_rows<true>, &args);
    return kOk;
}

}  // namespace EXL2_LEVEL
}  // namespace exl2
