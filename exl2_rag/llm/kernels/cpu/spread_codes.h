// Products of many rows: codes spread out to 16 bits, zero subtracted, times whole n of 15 bits, exact in 32 bits.
//
// Codes of a chunk lie as [16 pairs of rows][32 columns][2], 2 KiB that stay in the first cache while all rows of x pass by.
// x has the order of digits.cpp for many rows, chunk by chunk: rows that are multiplied together lie together. At their own
// distance, often a multiple of 4 KiB, they would push each other out of the first cache.
//
// A 16-bit product takes a multiplier; an addition takes any of twice as many units on processors that cut 512-bit vectors
// in halves. There two products are had for one multiplication and two additions (S. Winograd, "A new algorithm for inner
// product", 1968), for four rows a, b, c, d of codes w and numbers n:
//
//     (w_a + n_c)(w_c + n_a) + (w_b + n_d)(w_d + n_b)
//         = w_a n_a + w_b n_b + w_c n_c + w_d n_d  +  (w_a w_c + w_b w_d)  +  (n_a n_c + n_b n_d)
//
// The two brackets depend on the column alone and on the row of x alone; their sums over a chunk are made once, here and in
// digits.cpp, and taken off. Sums of 32 bits wrap around, but what is left in the end is a small number, so it is exact. Two of three rows go that
// way and one goes directly, which keeps both kinds of units busy; no result depends on which.
#pragma once

#include "../exl2_layout.h"
#include "ops.h"
#include "planes.h"
#include "simd.h"

namespace exl2 {
namespace EXL2_LEVEL {
namespace {

constexpr int kPieceChunks = 4;
constexpr int kTileVecs = kTileColumns / kLanes;
constexpr int kSpreadChunks = 4;
constexpr int kPairs = kChunkRows / 2;                    // of rows: what dot2 multiplies
constexpr int kChunkWords = (kPairs + 1) * kTileColumns;  // codes of a chunk, then a word a column: minus the codes' bracket
constexpr int kSpreadWords = kSpreadChunks * kChunkWords;

// Rows of x, and vectors of columns, that are multiplied together.
#if defined(__AVX512F__)
constexpr int kSpreadTokens = 6, kSpreadVecs = 2;  // 12 sums and 12 results of 32 registers
#elif defined(__AVX2__)
constexpr int kSpreadTokens = 4, kSpreadVecs = 2;  // 8 of 16
#else
constexpr int kSpreadTokens = 2, kSpreadVecs = 2;
#endif

// Which of the rows that are multiplied together go by sums, where any do.
constexpr bool goes_by_sums(int token) { return token % 3 != 2; }

// Up to four chunks of one group.
struct Piece {
    int32_t chunks, bits, group;
};

// The codes of one chunk. zero, or zeros [32]: what they are counted from.
template <bool kBySums, int kBits>
void spread_chunk(const uint8_t* units, int32_t zero, const uint8_t* zeros, int16_t* out) {
    for (int column = 0; column < kTileColumns; column += kLanes) {
        const VecInt from = zeros == nullptr ? splat_int(zero) : load_bytes(zeros + column);
        const VecShort both = reinterpret_cast<VecShort>(from | from << 16);
        uint32_t* words = reinterpret_cast<uint32_t*>(out) + column;
        VecInt bracket{};
        for_each_quad<kBits>(units + 4 * column, [&](auto quad, VecUint codes) {
            const VecUint low = (codes & 0xffu) | (codes & 0xff00u) << 8;
            const VecUint high = (codes >> 16 & 0xffu) | (codes >> 8 & 0xff0000u);
            const VecInt first = reinterpret_cast<VecInt>(reinterpret_cast<VecShort>(low) - both);
            const VecInt second = reinterpret_cast<VecInt>(reinterpret_cast<VecShort>(high) - both);
            store_words(words + 2 * quad * kTileColumns, reinterpret_cast<VecUint>(first));
            store_words(words + (2 * quad + 1) * kTileColumns, reinterpret_cast<VecUint>(second));
            if constexpr (kBySums) bracket = dot2(bracket, first, second);
        });
        if constexpr (kBySums) store_words(words + kPairs * kTileColumns, -reinterpret_cast<VecUint>(bracket));
    }
}

// The codes of a piece; returns where those of the next piece go.
template <bool kBySums>
int16_t* spread_piece(const uint8_t* units, Piece piece, const uint8_t* zeros, int16_t* out) {
    const int32_t zero = 1 << (piece.bits - 1);
    for (int chunk = 0; chunk < piece.chunks; ++chunk) {
        switch (piece.bits) {
            case 2: spread_chunk<kBySums, 2>(units, zero, zeros, out); break;
            case 3: spread_chunk<kBySums, 3>(units, zero, zeros, out); break;
            case 4: spread_chunk<kBySums, 4>(units, zero, zeros, out); break;
            case 5: spread_chunk<kBySums, 5>(units, zero, zeros, out); break;
            case 6: spread_chunk<kBySums, 6>(units, zero, zeros, out); break;
            case 8: spread_chunk<kBySums, 8>(units, zero, zeros, out); break;
        }
        units += piece.bits * kUnitBytes;
        out += 2 * kChunkWords;
    }
    return out;
}

// Rows of x, from a chunk and a row on: [chunks][rows] of 32 numbers, of their scale and of their bracket.
struct WholeRows {
    const int16_t* numbers;
    const float* scales;
    const int32_t* brackets;
    int64_t rows;

    WholeRows at(int64_t chunk, int64_t row) const {
        const int64_t index = chunk * rows + row;
        return {numbers + index * kChunkRows, scales + index, brackets + index, rows};
    }
};

inline VecInt splat_pair(const int16_t* from) {
    int32_t word;
    __builtin_memcpy(&word, from, 4);
    return splat_int(word);
}

inline VecInt add_shorts(VecInt a, VecInt b) {
    return reinterpret_cast<VecInt>(reinterpret_cast<VecShort>(a) + reinterpret_cast<VecShort>(b));
}

// sums[t][v] += the products of one chunk, and of rows that go by sums the brackets too. codes: at the first of the vectors.
template <bool kBySums, int kTokens>
EXL2_ALWAYS_INLINE void multiply_chunk(const int16_t* codes, const int16_t* numbers, VecInt (&sums)[kTokens][kSpreadVecs]) {
#pragma GCC unroll 2
    for (int quad = 0; quad < kQuads; ++quad) {
        VecInt first[kSpreadVecs], second[kSpreadVecs];
        for (int v = 0; v < kSpreadVecs; ++v) {
            const uint32_t* words = reinterpret_cast<const uint32_t*>(codes) + 2 * quad * kTileColumns + v * kLanes;
            first[v] = reinterpret_cast<VecInt>(load_words(words));
            second[v] = reinterpret_cast<VecInt>(load_words(words + kTileColumns));
        }
        for (int t = 0; t < kTokens; ++t) {
            const int16_t* pair = numbers + t * kChunkRows + 2 * quad;
            const VecInt x_first = splat_pair(pair), x_second = splat_pair(pair + kChunkRows / 2);
            for (int v = 0; v < kSpreadVecs; ++v) {
                if (kBySums && goes_by_sums(t)) {
                    sums[t][v] = dot2(sums[t][v], add_shorts(first[v], x_second), add_shorts(second[v], x_first));
                } else {
                    sums[t][v] = dot2(dot2(sums[t][v], first[v], x_first), second[v], x_second);
                }
            }
        }
    }
}

// result[t][v] += scale of x * the products of one chunk.
template <bool kBySums, int kTokens>
EXL2_ALWAYS_INLINE void add_chunk(const int16_t* codes, WholeRows x, Vec (&result)[kTokens][kSpreadVecs]) {
    VecInt sums[kTokens][kSpreadVecs];
    for (int v = 0; v < kSpreadVecs; ++v) {
        VecUint bracket{};
        if constexpr (kBySums) bracket = load_words(reinterpret_cast<const uint32_t*>(codes) + kPairs * kTileColumns + v * kLanes);
        for (int t = 0; t < kTokens; ++t) {
            VecUint start{};
            if (kBySums && goes_by_sums(t)) start = bracket - reinterpret_cast<VecUint>(splat_int(x.brackets[t]));
            sums[t][v] = reinterpret_cast<VecInt>(start);
        }
    }
    multiply_chunk<kBySums, kTokens>(codes, x.numbers, sums);
    for (int t = 0; t < kTokens; ++t)
        for (int v = 0; v < kSpreadVecs; ++v)
            result[t][v] = mul_add(__builtin_convertvector(sums[t][v], Vec), splat(x.scales[t]), result[t][v]);
}

// y[t][0..32) += what the pieces give, for kTokens rows of x that start at the first piece.
template <bool kBySums, int kTokens>
void add_spread(const int16_t* codes, const Piece* pieces, int count, const float* scales, WholeRows x, float* y) {
    for (int p = 0; p < count; ++p) {
        const float* piece_scales = scales + pieces[p].group * kTileColumns;
        for (int v = 0; v < kTileVecs; v += kSpreadVecs) {
            Vec result[kTokens][kSpreadVecs];
            for (int t = 0; t < kTokens; ++t)
                for (int i = 0; i < kSpreadVecs; ++i) result[t][i] = Vec{};
            const int16_t* from = codes + 2 * v * kLanes;
            // Pieces of one chunk, which are common, go without a loop: its results would not fit the registers beside the sums.
            if (pieces[p].chunks == 1) {
                add_chunk<kBySums, kTokens>(from, x, result);
            } else {
                for (int chunk = 0; chunk < pieces[p].chunks; ++chunk)
                    add_chunk<kBySums, kTokens>(from + chunk * 2 * kChunkWords, x.at(chunk, 0), result);
            }
            Vec column_scales[kSpreadVecs];
            for (int i = 0; i < kSpreadVecs; ++i) column_scales[i] = load(piece_scales + (v + i) * kLanes);
            for (int t = 0; t < kTokens; ++t) {
                for (int i = 0; i < kSpreadVecs; ++i) {
                    float* target = y + t * kTileColumns + (v + i) * kLanes;
                    store(target, mul_add(result[t][i], column_scales[i], load(target)));
                }
            }
        }
        codes += pieces[p].chunks * 2 * kChunkWords;
        x = x.at(pieces[p].chunks, 0);
    }
}

template <bool kBySums, int kTokens = kSpreadTokens>
void add_spread_some(int tokens, const int16_t* codes, const Piece* pieces, int count, const float* scales, WholeRows x, float* y) {
    if (tokens == kTokens) return add_spread<kBySums, kTokens>(codes, pieces, count, scales, x, y);
    if constexpr (kTokens > 1) add_spread_some<kBySums, kTokens - 1>(tokens, codes, pieces, count, scales, x, y);
}

}  // namespace
}  // namespace EXL2_LEVEL
}  // namespace exl2
