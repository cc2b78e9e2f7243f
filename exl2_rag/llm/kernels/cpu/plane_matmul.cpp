// y[T, N] = x[T, K] * W[K, N] with x as whole numbers (digits.cpp) and W as planes (exl2_layout.h). One task per tile.
//
// Within a chunk of 32 rows everything is exact integer arithmetic: sum of (code - zero) * n, as two sums of byte products,
// one for each digit. Beyond, in float32 and in this order, whatever T is:
//
//     chunk:   f = float(128 * high_sum + low_sum - zero * sum(n));   piece += s * f        s: scale of x in the chunk
//     piece:   up to 128 rows of one group;                            y += scale[n] * piece
//
// Few rows (T <= 4) multiply codes as they come out of the planes: memory is read once, front to back. With more rows a
// piece is spread out to a byte a code (4 KiB, in the first cache) and multiplied by four rows at a time.
#include <stdint.h>

#include "../exl2_layout.h"
#include "ops.h"
#include "planes.h"
#include "simd.h"

namespace exl2 {
namespace EXL2_LEVEL {
namespace {

constexpr int kPieceChunks = 4;
constexpr int kMostTokens = 4;  // rows of x that are multiplied together: 16 sums of 32 AVX-512 registers
constexpr int kTileVecs = kTileColumns / kLanes;
constexpr int kDigitBytes = 2 * kChunkRows;  // of a chunk
constexpr int kSpreadBytes = kPieceChunks * kQuads * kUnitBytes;

// Vectors of columns that share the loads of x.
#if defined(__AVX512F__)
constexpr int vecs_together(int) { return 2; }
#else
constexpr int vecs_together(int tokens) { return tokens == 1 ? 2 : 1; }
#endif

// The part of x that a piece meets: token t at `digits + t * digit_stride`, `scales + t * stride`, `sums + t * stride`.
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

// What a group subtracts from its codes: one number (EXL2), or one a column (GPTQ).
struct Zero {
    int32_t number;
    const uint8_t* columns;  // of the tile, or null
};

// sums[t][v] of one piece, in float32.
//   unit: first unit of the piece, at the first column of the kVecs vectors.
template <int kBits, bool kWide, bool kZeros, int kTokens, int kVecs>
EXL2_ALWAYS_INLINE void multiply_piece(const uint8_t* unit, int chunks, Numbers x, Zero zero, int column, Vec (&piece)[kTokens][kVecs]) {
    VecInt zeros[kVecs];
    for (int v = 0; v < kVecs; ++v) {
        if constexpr (kZeros) zeros[v] = load_bytes(zero.columns + column + v * kLanes);
        for (int t = 0; t < kTokens; ++t) piece[t][v] = Vec{};
    }
    const int64_t token_bytes = x.stride * kDigitBytes;
    for (int chunk = 0; chunk < chunks; ++chunk) {
        if constexpr (kBits != 8) prefetch<Planes<kBits>::chunk_bytes>(unit);
        VecInt sums[kTokens][kVecs][2];
        for (int t = 0; t < kTokens; ++t) {
            const int32_t sum = x.sums[t * x.stride + chunk];
            for (int v = 0; v < kVecs; ++v) {
                sums[t][v][0] = VecInt{};
                if constexpr (kZeros) sums[t][v][1] = zeros[v] * splat_int(-sum);
                else sums[t][v][1] = splat_int(-zero.number * sum);
            }
        }
        multiply_quads<kBits, kWide, kTokens, kVecs>(unit, x.digits + chunk * kDigitBytes, token_bytes, sums);
        for (int t = 0; t < kTokens; ++t) {
            const Vec scale = splat(x.scales[t * x.stride + chunk]);
            for (int v = 0; v < kVecs; ++v) {
                const Vec whole = __builtin_convertvector((sums[t][v][0] << 7) + sums[t][v][1], Vec);
                piece[t][v] = mul_add(whole, scale, piece[t][v]);
            }
        }
        unit += Planes<kBits>::chunk_bytes;
    }
}

// y[t][0..32) += scales * piece, for kTokens rows.
template <int kBits, bool kWide, bool kZeros, int kTokens>
void add_piece(const uint8_t* units, int chunks, Numbers x, Zero zero, const float* scales, float* y) {
    constexpr int kVecs = vecs_together(kTokens);
    for (int v = 0; v < kTileVecs; v += kVecs) {
        Vec piece[kTokens][kVecs];
        multiply_piece<kBits, kWide, kZeros, kTokens, kVecs>(units + v * kLanes * 4, chunks, x, zero, v * kLanes, piece);
        for (int t = 0; t < kTokens; ++t) {
            for (int i = 0; i < kVecs; ++i) {
                float* target = y + t * kTileColumns + (v + i) * kLanes;
                store(target, mul_add(piece[t][i], load(scales + (v + i) * kLanes), load(target)));
            }
        }
    }
}

using AddPiece = void (*)(const uint8_t*, int, Numbers, Zero, const float*, float*);

template <int kBits, bool kWide, bool kZeros>
AddPiece for_tokens(int tokens) {
    static constexpr AddPiece table[kMostTokens] = {
        add_piece<kBits, kWide, kZeros, 1>, add_piece<kBits, kWide, kZeros, 2>, add_piece<kBits, kWide, kZeros, 3>,
        add_piece<kBits, kWide, kZeros, 4>};
    return table[tokens - 1];
}

// Straight from the planes.
AddPiece packed_function(int bits, bool zeros, int tokens) {
    switch (bits) {
        case 2: return for_tokens<2, false, false>(tokens);
        case 3: return for_tokens<3, false, false>(tokens);
        case 4: return zeros ? for_tokens<4, false, true>(tokens) : for_tokens<4, false, false>(tokens);
        case 5: return for_tokens<5, false, false>(tokens);
        case 6: return for_tokens<6, false, false>(tokens);
        default: return for_tokens<8, true, false>(tokens);
    }
}

// From codes spread out to bytes, which are the planes of 8-bit codes.
AddPiece spread_function(int bits, bool zeros, int tokens) {
    if (zeros) return for_tokens<8, false, true>(tokens);
    return bits == 8 ? for_tokens<8, true, false>(tokens) : for_tokens<8, false, false>(tokens);
}

template <int kBits>
void spread_chunks(const uint8_t* units, int chunks, uint8_t* out) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
        for (int column = 0; column < kTileColumns; column += kLanes) {
            for_each_quad<kBits>(units + 4 * column, [&](auto quad, VecUint codes) {
                uint32_t* words = reinterpret_cast<uint32_t*>(out + quad * kUnitBytes + 4 * column);
                *reinterpret_cast<VecUintUnaligned*>(words) = codes;
            });
        }
        units += Planes<kBits>::chunk_bytes;
        out += kQuads * kUnitBytes;
    }
}

void spread_any(int bits, const uint8_t* units, int chunks, uint8_t* out) {
    switch (bits) {
        case 2: return spread_chunks<2>(units, chunks, out);
        case 3: return spread_chunks<3>(units, chunks, out);
        case 4: return spread_chunks<4>(units, chunks, out);
        case 5: return spread_chunks<5>(units, chunks, out);
        case 6: return spread_chunks<6>(units, chunks, out);
    }
}

// The scales of a group for the 32 columns of a tile, rounded as the format rounds them.
void group_column_scales(const PlaneMatmul& args, int64_t tile, int64_t group, float* out) {
    const int64_t index = tile * args.n_groups + group;
    if (args.zeros != nullptr) {
        const Half* halves = reinterpret_cast<const Half*>(args.scales) + index * kTileColumns;
        for (int column = 0; column < kTileColumns; column += kLanes) store(out + column, load_as_float(halves + column));
        return;
    }
    const uint8_t* nibbles = args.scales + index * kTileColumns / 2;
    const Vec group_scale = splat(float_from_half(args.group_scales[group]));
    for (int column = 0; column < kTileColumns; column += kLanes) {
        const VecInt nibble = (load_bytes(nibbles + column % 16) >> (column / 16 * 4)) & 15;
        const Vec scale = __builtin_convertvector(nibble + 1, Vec);
        store(out + column, through_half(scale * scale * group_scale));
    }
}

bool multiply_tile(const void* context, int64_t tile) {
    const PlaneMatmul& args = *static_cast<const PlaneMatmul*>(context);
    const bool spread = args.rows > kMostTokens;
    float* memory = scratch(0, static_cast<size_t>(args.rows * kTileColumns) + kSpreadBytes / sizeof(float));
    if (memory == nullptr) return false;
    uint8_t* bytes = reinterpret_cast<uint8_t*>(memory);
    float* y = memory + kSpreadBytes / sizeof(float);
    for (int64_t i = 0; i < args.rows * kTileColumns; ++i) y[i] = 0.0f;

    const Numbers x{args.digits, args.x_scales, args.sums, args.in / kChunkRows};
    const uint8_t* units = args.planes + tile * args.packed_rows * kUnitBytes;
    int64_t first_chunk = 0;
    for (int64_t group = 0; group < args.n_groups; ++group) {
        const int bits = args.groups[2 * group];
        int left = args.groups[2 * group + 1] / kChunkRows;
        const bool zeros = args.zeros != nullptr;
        const Zero zero{1 << (bits - 1), zeros ? args.zeros + (tile * args.n_groups + group) * kTileColumns : nullptr};
        float scales[kTileColumns];
        group_column_scales(args, tile, group, scales);
        while (left > 0) {
            const int chunks = left < kPieceChunks ? left : kPieceChunks;
            if (!spread) {
                packed_function(bits, zeros, static_cast<int>(args.rows))(units, chunks, x.at(0, first_chunk), zero, scales, y);
            } else {
                const uint8_t* codes = units;
                if (bits != 8) {
                    spread_any(bits, units, chunks, bytes);
                    codes = bytes;
                }
                for (int64_t t = 0; t < args.rows; t += kMostTokens) {
                    const int tokens = static_cast<int>(args.rows - t < kMostTokens ? args.rows - t : kMostTokens);
                    spread_function(bits, zeros, tokens)(codes, chunks, x.at(t, first_chunk), zero, scales, y + t * kTileColumns);
                }
            }
            units += chunks * bits * kUnitBytes;
            first_chunk += chunks;
            left -= chunks;
        }
    }

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

}  // namespace

int plane_matmul(const PlaneMatmul& args) {
    // Reading a weight from memory costs about as much as sixteen of these multiply-adds.
    const int64_t cost = args.in * args.out * (args.rows + 16) / 8;
    return run_tasks((args.out + kTileColumns - 1) / kTileColumns, cost, multiply_tile, &args) ? kOk : kNoMemory;
}

}  // namespace EXL2_LEVEL
}  // namespace exl2
