// From a matrix as it is in the file to the planes of exl2_layout.h; once, at load. One task per tile.
#include <stdint.h>
#include <string.h>

#include "../exl2_layout.h"
#include "chunk_codes.h"
#include "ops.h"
#include "planes.h"
#include "simd.h"

namespace exl2 {
namespace EXL2_LEVEL {
namespace {

inline void or_words(uint8_t* to, VecUint bits) {
    uint32_t* words = reinterpret_cast<uint32_t*>(to);
    store_words(words, load_words(words) | bits);
}

// Put the codes of a quad, one byte a row, into the two planes of a chunk, which start as zeros.
template <int kBits>
inline void put_quad(VecUint codes, int quad, uint8_t* unit) {
    using P = Planes<kBits>;
    const int low = quad * P::low_bits, high = quad * P::high_bits;
    or_words(unit + low / 8 * kUnitBytes, (codes & every_byte((1u << P::low_bits) - 1)) << low % 8);
    if constexpr (P::high_bits > 0) {
        const VecUint top = (codes >> P::low_bits) & every_byte((1u << P::high_bits) - 1);
        or_words(unit + (P::low_units + high / 8) * kUnitBytes, top << high % 8);
    }
}

template <int kBits, int kQuad = 0>
inline void put_quads(const uint32_t* words, int64_t word_stride, uint8_t* unit) {
    put_quad<kBits>(code_of_row<kBits, 4 * kQuad>(words, word_stride) |
                        code_of_row<kBits, 4 * kQuad + 1>(words, word_stride) << 8 |
                        code_of_row<kBits, 4 * kQuad + 2>(words, word_stride) << 16 |
                        code_of_row<kBits, 4 * kQuad + 3>(words, word_stride) << 24,
                    kQuad, unit);
    if constexpr (kQuad + 1 < kQuads) put_quads<kBits, kQuad + 1>(words, word_stride, unit);
}

template <int kBits>
void repack_chunk(const uint32_t* words, int64_t word_stride, uint8_t* units) {
    memset(units, 0, Planes<kBits>::chunk_bytes);
    for (int column = 0; column < kTileColumns; column += kLanes)
        put_quads<kBits>(words + column, word_stride, units + 4 * column);
}

void repack_any_chunk(int bits, const uint32_t* words, int64_t word_stride, uint8_t* units) {
    switch (bits) {
        case 2: return repack_chunk<2>(words, word_stride, units);
        case 3: return repack_chunk<3>(words, word_stride, units);
        case 4: return repack_chunk<4>(words, word_stride, units);
        case 5: return repack_chunk<5>(words, word_stride, units);
        case 6: return repack_chunk<6>(words, word_stride, units);
        case 8: return repack_chunk<8>(words, word_stride, units);
    }
}

bool repack_exl2_tile(const void* context, int64_t tile) {
    const Exl2Planes& args = *static_cast<const Exl2Planes*>(context);
    const uint32_t* words = args.words + tile * kTileColumns;
    uint8_t* units = args.planes + tile * args.packed_rows * kUnitBytes;
    uint8_t* scales = args.scales + tile * args.n_groups * kTileColumns / 2;
    for (int64_t group = 0; group < args.n_groups; ++group) {
        const int bits = args.groups[2 * group];
        for (int chunk = 0; chunk < args.groups[2 * group + 1] / kChunkRows; ++chunk) {
            repack_any_chunk(bits, words, args.out, units);
            words += bits * args.out;
            units += bits * kUnitBytes;
        }
        const uint32_t* nibbles = args.scale_words + group * args.out / 8 + tile * kScaleWords;
        for (int column = 0; column < kTileColumns / 2; ++column) {
            const uint32_t first = nibbles[column / 8] >> (4 * (column % 8)) & 15u;
            const uint32_t second = nibbles[2 + column / 8] >> (4 * (column % 8)) & 15u;
            scales[column] = static_cast<uint8_t>(first | second << 4);
        }
        scales += kTileColumns / 2;
    }
    return true;
}

bool repack_gptq_tile(const void* context, int64_t tile) {
    const GptqPlanes& args = *static_cast<const GptqPlanes*>(context);
    const uint32_t* words = args.words + tile * kTileColumns;
    uint8_t* units = args.planes + tile * (args.in / kGptqRowsPerWord) * kUnitBytes;
    for (int64_t chunk = 0; chunk < args.in; chunk += kChunkRows, units += Planes<4>::chunk_bytes) {
        memset(units, 0, Planes<4>::chunk_bytes);
        for (int column = 0; column < kTileColumns; column += kLanes) {
            for (int quad = 0; quad < kQuads; ++quad) {
                VecUint codes{};
                for (int i = 0; i < 4; ++i) {
                    const int64_t stored = chunk + 4 * quad + i;
                    const int64_t row = args.perm == nullptr ? stored : args.perm[stored];
                    const VecUint word = load_words(words + row / kGptqRowsPerWord * args.out + column);
                    codes |= ((word >> static_cast<int>(4 * (row % kGptqRowsPerWord))) & 15u) << (8 * i);
                }
                put_quad<4>(codes, quad, units + 4 * column);
            }
        }
    }
    return true;
}

}  // namespace

int exl2_planes(const Exl2Planes& args) {
    return run_tasks(args.out / kTileColumns, args.packed_rows * args.out * 8, repack_exl2_tile, &args) ? kOk : kNoMemory;
}

int gptq_planes(const GptqPlanes& args) {
    return run_tasks(args.out / kTileColumns, args.in * args.out, repack_gptq_tile, &args) ? kOk : kNoMemory;
}

}  // namespace EXL2_LEVEL
}  // namespace exl2
