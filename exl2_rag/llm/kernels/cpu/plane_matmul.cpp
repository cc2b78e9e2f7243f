// y[T, N] = x[T, K] * W[K, N] with x as whole numbers (digits.cpp) and W as planes (exl2_layout.h). One task per tile.
//
// Within a chunk of 32 rows everything is exact integer arithmetic: sum of (code - zero) * n, as two sums of byte products,
// one for each digit. Beyond, in float32 and in this order, whatever T is:
//
//     chunk:   f = float(128 * high_sum + low_sum - zero * sum(n));   piece += s * f        s: scale of x in the chunk
//     piece:   up to 128 rows of one group;                            y += scale[n] * piece
//
// Few rows (x in digits, T <= FEW_ROWS of weights.py) multiply codes as they come out of the planes, four rows at a time, so
// memory is read once, front to back. With more, 128 rows of codes at a time are spread out to 16 bits and multiplied by
// whole n (spread_codes.h): the same integers, with half as many sums to end. Both ways give the same bits.
#include <stdint.h>

#include "../exl2_layout.h"
#include "ops.h"
#include "planes.h"
#include "simd.h"
#include "spread_codes.h"

namespace exl2 {
namespace EXL2_LEVEL {
namespace {

constexpr int kMostTokens = 4;  // rows of x that are multiplied together from the planes: 16 sums of 32 AVX-512 registers
constexpr int kDigitBytes = 2 * kChunkRows;  // of a chunk

// Vectors of columns that share the loads of x.
#if defined(__AVX512F__)
constexpr int vecs_together(int) { return 2; }
#else
constexpr int vecs_together(int tokens) { return tokens == 1 ? 2 : 1; }
#endif

// The part of x that a piece meets, from a token and a chunk on.
struct Numbers {
    const int8_t* digits;
    const float* scales;
    const int32_t* sums;
    int64_t stride;  // chunks of a token

    Numbers at(int64_t token, int64_t chunk) const {
        const int64_t index = token * stride + chunk;
        return {digits + index * kDigitBytes, scales + index, sums + index, stride};
    }
};

inline VecInt four_digits(const int8_t* from) {
    int32_t word;
    __builtin_memcpy(&word, from, 4);
    return splat_int(word);
}

// All quads of a chunk: sums[t][v][digit] += codes * digits.
template <int kBits, bool kWide, int kTokens, int kVecs, int kQuad = 0>
EXL2_ALWAYS_INLINE void multiply_quads(const uint8_t* unit, const int8_t* digits, int64_t token_bytes, VecInt (&sums)[kTokens][kVecs][2]) {
    using P = Planes<kBits>;
    constexpr int low_unit = kQuad * P::low_bits / 8;
    constexpr int high_unit = P::low_units + kQuad * P::high_bits / 8;
    VecUint codes[kVecs];
    for (int v = 0; v < kVecs; ++v) {
        const uint8_t* from = unit + v * kLanes * 4;
        const VecUint low = load_words(reinterpret_cast<const uint32_t*>(from + low_unit * kUnitBytes));
        VecUint high{};
        if constexpr (P::high_bits > 0) high = load_words(reinterpret_cast<const uint32_t*>(from + high_unit * kUnitBytes));
        codes[v] = quad_codes<kBits, kQuad>(low, high);
    }
    for (int t = 0; t < kTokens; ++t) {
        for (int digit = 0; digit < 2; ++digit) {
            const VecInt four = four_digits(digits + t * token_bytes + digit * kChunkRows + 4 * kQuad);
            for (int v = 0; v < kVecs; ++v) sums[t][v][digit] = dot4<kWide>(sums[t][v][digit], codes[v], four);
        }
    }
    if constexpr (kQuad + 1 < kQuads)
        multiply_quads<kBits, kWide, kTokens, kVecs, kQuad + 1>(unit, digits, token_bytes, sums);
}

// The processor's own prefetching does not reach far enough: at 2 and 3 bits, reading and computing then took turns. From
// 6 KiB ahead, 3 bits went from 18 to 23 GB/s where memory gave 28, two threads (docs/log.md). Past the end of the last
// tile the address may lie outside the matrix, which a prefetch may.
constexpr int kPrefetchBytes = 6144;

template <int kBytes>
EXL2_ALWAYS_INLINE void prefetch(const uint8_t* unit) {
    for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(unit + kPrefetchBytes + i, 0, 2);
}

// What belongs to the groups of one tile.
struct TileTables {
    const float* scales;   // [n_groups, 32]
    const uint8_t* zeros;  // [n_groups, 32], what codes are counted from; or null: from 2^(bits - 1)
};

// sums[t][v] of one piece, in float32.
//   unit: first unit of the piece, at the first column of the kVecs vectors.
template <int kBits, bool kWide, bool kZeros, int kTokens, int kVecs>
EXL2_ALWAYS_INLINE void multiply_piece(const uint8_t* unit, Piece piece, const uint8_t* column_zeros, Numbers x,
                                       Vec (&result)[kTokens][kVecs]) {
    VecInt zeros[kVecs];
    for (int v = 0; v < kVecs; ++v) {
        if constexpr (kZeros) zeros[v] = load_bytes(column_zeros + v * kLanes);
        for (int t = 0; t < kTokens; ++t) result[t][v] = Vec{};
    }
    const int32_t zero = 1 << (piece.bits - 1);
    const int64_t token_bytes = x.stride * kDigitBytes;
    for (int chunk = 0; chunk < piece.chunks; ++chunk) {
        if constexpr (kBits != 8) prefetch<Planes<kBits>::chunk_bytes>(unit);
        VecInt sums[kTokens][kVecs][2];
        for (int t = 0; t < kTokens; ++t) {
            const int32_t sum = x.sums[t * x.stride + chunk];
            for (int v = 0; v < kVecs; ++v) {
                sums[t][v][0] = VecInt{};
                if constexpr (kZeros) sums[t][v][1] = zeros[v] * splat_int(-sum);
                else sums[t][v][1] = splat_int(-zero * sum);
            }
        }
        multiply_quads<kBits, kWide, kTokens, kVecs>(unit, x.digits + chunk * kDigitBytes, token_bytes, sums);
        for (int t = 0; t < kTokens; ++t) {
            const Vec scale = splat(x.scales[t * x.stride + chunk]);
            for (int v = 0; v < kVecs; ++v) {
                const Vec whole = __builtin_convertvector((sums[t][v][0] << 7) + sums[t][v][1], Vec);
                result[t][v] = mul_add(whole, scale, result[t][v]);
            }
        }
        unit += Planes<kBits>::chunk_bytes;
    }
}

// y[t][0..32) += what the pieces give, for kTokens rows of x that start at the first piece.
template <int kBits, bool kWide, bool kZeros, int kTokens>
void add_pieces(const uint8_t* units, const Piece* pieces, int count, TileTables tables, Numbers x, float* y) {
    constexpr int kVecs = vecs_together(kTokens);
    for (int p = 0; p < count; ++p) {
        const Piece piece = pieces[p];
        const float* scales = tables.scales + piece.group * kTileColumns;
        for (int v = 0; v < kTileVecs; v += kVecs) {
            Vec result[kTokens][kVecs];
            const uint8_t* zeros = kZeros ? tables.zeros + piece.group * kTileColumns + v * kLanes : nullptr;
            multiply_piece<kBits, kWide, kZeros, kTokens, kVecs>(units + v * kLanes * 4, piece, zeros, x, result);
            for (int t = 0; t < kTokens; ++t) {
                for (int i = 0; i < kVecs; ++i) {
                    float* target = y + t * kTileColumns + (v + i) * kLanes;
                    store(target, mul_add(result[t][i], load(scales + (v + i) * kLanes), load(target)));
                }
            }
        }
        units += piece.chunks * Planes<kBits>::chunk_bytes;
        x = x.at(0, piece.chunks);
    }
}

using AddPieces = void (*)(const uint8_t*, const Piece*, int, TileTables, Numbers, float*);

template <int kBits, bool kWide, bool kZeros>
AddPieces for_tokens(int tokens) {
    static constexpr AddPieces table[kMostTokens] = {
        add_pieces<kBits, kWide, kZeros, 1>, add_pieces<kBits, kWide, kZeros, 2>, add_pieces<kBits, kWide, kZeros, 3>,
        add_pieces<kBits, kWide, kZeros, 4>};
    return table[tokens - 1];
}

// Straight from the planes.
AddPieces packed_function(int bits, bool zeros, int tokens) {
    switch (bits) {
        case 2: return for_tokens<2, false, false>(tokens);
        case 3: return for_tokens<3, false, false>(tokens);
        case 4: return zeros ? for_tokens<4, false, true>(tokens) : for_tokens<4, false, false>(tokens);
        case 5: return for_tokens<5, false, false>(tokens);
        case 6: return for_tokens<6, false, false>(tokens);
        default: return for_tokens<8, true, false>(tokens);
    }
}

// The squares of 1 to 16, for vectors that can look up sixteen numbers at once.
alignas(64) constexpr float kSquares[16] = {1, 4, 9, 16, 25, 36, 49, 64, 81, 100, 121, 144, 169, 196, 225, 256};

// kSquares[low four bits of each lane]
inline Vec squares_of(VecInt nibbles) {
#if defined(__AVX512F__)
    return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(nibbles), _mm512_load_ps(kSquares));
#else
    const Vec scale = __builtin_convertvector((nibbles & 15) + 1, Vec);
    return scale * scale;
#endif
}

struct Job {
    PlaneMatmul args;
    const Piece* pieces;
    int n_pieces;
    const float* group_scales;  // as float32
};

// The scales of a tile, [n_groups, 32], rounded as the format rounds them.
void tile_scales(const Job& job, int64_t tile, float* out) {
    const PlaneMatmul& args = job.args;
    constexpr int kHalf = kTileColumns / 2;
    if (args.zeros != nullptr) {
        const Half* halves = reinterpret_cast<const Half*>(args.scales) + tile * args.n_groups * kTileColumns;
        for (int64_t i = 0; i < args.n_groups * kTileColumns; i += kLanes) store(out + i, load_as_float(halves + i));
        return;
    }
    const uint8_t* nibbles = args.scales + tile * args.n_groups * kHalf;
    for (int64_t group = 0; group < args.n_groups; ++group, nibbles += kHalf, out += kTileColumns) {
        const Vec group_scale = splat(job.group_scales[group]);
        for (int column = 0; column < kHalf; column += kLanes) {
            const VecInt bytes = load_bytes(nibbles + column);
            store(out + column, through_half(squares_of(bytes) * group_scale));
            store(out + kHalf + column, through_half(squares_of(bytes >> 4) * group_scale));
        }
    }
}

// y [T, 32] of a tile straight from the planes; x in digits. The second four rows find the tile in the cache.
void multiply_packed(const Job& job, const uint8_t* units, TileTables tables, float* y) {
    Numbers x{static_cast<const int8_t*>(job.args.numbers), job.args.x_scales, job.args.sums, job.args.in / kChunkRows};
    for (int next = 0; next < job.n_pieces;) {
        const Piece* pieces = job.pieces + next;
        const int bits = pieces->bits;
        int n = 0, chunks = 0;
        while (next + n < job.n_pieces && pieces[n].bits == bits) chunks += pieces[n++].chunks;
        for (int64_t t = 0; t < job.args.rows; t += kMostTokens) {
            const int tokens = static_cast<int>(job.args.rows - t < kMostTokens ? job.args.rows - t : kMostTokens);
            packed_function(bits, tables.zeros != nullptr, tokens)(units, pieces, n, tables, x.at(t, 0), y + t * kTileColumns);
        }
        units += static_cast<int64_t>(chunks) * bits * kUnitBytes;
        x = x.at(0, chunks);
        next += n;
    }
}

// The same for any T, x in whole numbers. spread: room for kSpreadChunks chunks.
template <bool kBySums>
void multiply_spread(const Job& job, const uint8_t* units, TileTables tables, int16_t* spread, float* y) {
    WholeRows x{static_cast<const int16_t*>(job.args.numbers), job.args.x_scales, job.args.sums, job.args.rows};
    for (int next = 0; next < job.n_pieces;) {
        const Piece* pieces = job.pieces + next;
        int n = 0, chunks = 0;
        for (int16_t* out = spread; next + n < job.n_pieces && chunks + pieces[n].chunks <= kSpreadChunks; ++n) {
            const uint8_t* zeros = tables.zeros == nullptr ? nullptr : tables.zeros + pieces[n].group * kTileColumns;
            out = spread_piece<kBySums>(units, pieces[n], zeros, out);
            units += pieces[n].chunks * pieces[n].bits * kUnitBytes;
            chunks += pieces[n].chunks;
        }
        for (int64_t t = 0; t < job.args.rows; t += kSpreadTokens) {
            const int tokens = static_cast<int>(job.args.rows - t < kSpreadTokens ? job.args.rows - t : kSpreadTokens);
            add_spread_some<kBySums>(tokens, spread, pieces, n, tables.scales, x.at(0, t), y + t * kTileColumns);
        }
        x = x.at(chunks, 0);
        next += n;
    }
}

template <bool kBySums>
bool multiply_tile(const void* context, int64_t tile) {
    const Job& job = *static_cast<const Job*>(context);
    const PlaneMatmul& args = job.args;
    const int64_t scale_floats = args.n_groups * kTileColumns;
    float* memory = scratch(0, static_cast<size_t>(kSpreadWords + scale_floats + args.rows * kTileColumns));
    if (memory == nullptr) return false;
    float* scales = memory + kSpreadWords;
    float* y = scales + scale_floats;
    for (int64_t i = 0; i < args.rows * kTileColumns; ++i) y[i] = 0.0f;
    tile_scales(job, tile, scales);
    const TileTables tables{scales, args.zeros == nullptr ? nullptr : args.zeros + tile * args.n_groups * kTileColumns};
    const uint8_t* units = args.planes + tile * args.packed_rows * kUnitBytes;
    if (args.whole == 0) multiply_packed(job, units, tables, y);
    else multiply_spread<kBySums>(job, units, tables, reinterpret_cast<int16_t*>(memory), y);

    const int64_t first = tile * kTileColumns;
    const int64_t width = args.out - first < kTileColumns ? args.out - first : kTileColumns;
    for (int64_t t = 0; t < args.rows; ++t) {
        float* target = args.y + t * args.out + first;
        for (int64_t n = 0; n < width; ++n) {
            const float value = args.bias == nullptr ? y[t * kTileColumns + n] : y[t * kTileColumns + n] + args.bias[first + n];
            target[n] = args.accumulate ? target[n] + value : value;
        }
    }
    return true;
}

template <bool kBySums>
int multiply(const PlaneMatmul& args) {
    static_assert(alignof(Piece) <= alignof(float), "pieces lie behind floats");
    const int64_t chunks = args.in / kChunkRows;
    const int64_t piece_words = chunks * static_cast<int64_t>(sizeof(Piece) / sizeof(float));
    float* group_scales = scratch(1, static_cast<size_t>(args.n_groups + piece_words));
    if (group_scales == nullptr) return kNoMemory;
    Piece* pieces = reinterpret_cast<Piece*>(group_scales + args.n_groups);
    int n_pieces = 0;
    for (int64_t group = 0; group < args.n_groups; ++group) {
        if (args.zeros == nullptr) group_scales[group] = float_from_half(args.group_scales[group]);
        for (int left = args.groups[2 * group + 1] / kChunkRows; left > 0; left -= kPieceChunks)
            pieces[n_pieces++] = {left < kPieceChunks ? left : kPieceChunks, args.groups[2 * group], static_cast<int32_t>(group)};
    }
    const Job job{args, pieces, n_pieces, group_scales};
    // Reading a weight from memory costs about as much as sixteen of these multiply-adds.
    const int64_t cost = args.in * args.out * (args.rows + 16) / 8;
    return run_tasks((args.out + kTileColumns - 1) / kTileColumns, cost, multiply_tile<kBySums>, &job) ? kOk : kNoMemory;
}

}  // namespace

int plane_matmul(const PlaneMatmul& args) { return multiply<false>(args); }

#if defined(__AVX512VNNI__)
int plane_matmul_by_sums(const PlaneMatmul& args) { return multiply<true>(args); }
#endif

}  // namespace EXL2_LEVEL
}  // namespace exl2
