// y[T, N] = x[T, K] * W[K, N], W in EXL2 form (exl2_layout.h). One task per tile of 32 columns.
//
// A task decodes up to 128 rows of its tile into 16 KiB of scratch, multiplies all T rows of x by them, and goes on. So
// codes are decoded once per call, whatever T is, and never more than one piece of a tile per thread is dense.
// Weights are exactly the format's float16 values; sums are float32, in the order tile_multiply.h names.
#include <stdint.h>

#include "../exl2_layout.h"
#include "chunk_codes.h"
#include "ops.h"
#include "simd.h"
#include "tile_multiply.h"

namespace exl2 {
namespace EXL2_LEVEL {
namespace {

constexpr float kLargestHalf = 65504.0f;

template <int kBits, int kRow>
inline void decode_rows(const uint32_t* words, Vec scale, float* out) {
    const VecInt centred = reinterpret_cast<VecInt>(code_of_row<kBits, kRow>(words, kTileColumns)) - (1 << (kBits - 1));
    store(out + kRow * kTileColumns, round_to_half(__builtin_convertvector(centred, Vec) * scale));
    if constexpr (kRow + 1 < kChunkRows) decode_rows<kBits, kRow + 1>(words, scale, out);
}

// 32 rows x 32 columns. words: [kBits][32]. scales: [32]. out: [32][32].
template <int kBits>
void decode_chunk(const uint32_t* words, const float* scales, float* out) {
    for (int column = 0; column < kTileColumns; column += kLanes)
        decode_rows<kBits, 0>(words + column, load(scales + column), out + column);
}

// The same number by number, for groups whose weights may exceed float16: those become infinite.
void decode_chunk_carefully(int bits, const uint32_t* words, const float* scales, float* out) {
    for (int row = 0; row < kChunkRows; ++row) {
        const int word = row * bits / 32, shift = row * bits % 32;
        for (int column = 0; column < kTileColumns; ++column) {
            uint32_t code = words[word * kTileColumns + column] >> shift;
            if (shift + bits > 32) code |= words[(word + 1) * kTileColumns + column] << (32 - shift);
            const int centred = static_cast<int>(code & ((1u << bits) - 1)) - (1 << (bits - 1));
            const float product = static_cast<float>(centred) * scales[column];
            out[row * kTileColumns + column] = float_from_half(half_from_float(product));
        }
    }
}

void decode_any_chunk(int bits, bool careful, const uint32_t* words, const float* scales, float* out) {
    if (careful) return decode_chunk_carefully(bits, words, scales, out);
    switch (bits) {
        case 2: return decode_chunk<2>(words, scales, out);
        case 3: return decode_chunk<3>(words, scales, out);
        case 4: return decode_chunk<4>(words, scales, out);
        case 5: return decode_chunk<5>(words, scales, out);
        case 6: return decode_chunk<6>(words, scales, out);
        case 8: return decode_chunk<8>(words, scales, out);
    }
}

// half(scale^2 * group_scale) for the 32 columns of a tile. Returns whether weights of the group may exceed float16.
bool column_scales(const uint32_t* words, float group_scale, int bits, float* out) {
    float largest = 0.0f;
    for (int column = 0; column < kTileColumns; ++column) {
        const float scale = static_cast<float>((words[column / 8] >> (4 * (column % 8)) & 15u) + 1u);
        out[column] = scale * scale * group_scale;
    }
    for (int column = 0; column < kTileColumns; ++column) {
        const float magnitude = out[column] < 0.0f ? -out[column] : out[column];
        largest = magnitude > largest ? magnitude : largest;
    }
    if (largest * static_cast<float>(1 << (bits - 1)) > kLargestHalf) {
        for (int column = 0; column < kTileColumns; ++column)
            out[column] = float_from_half(half_from_float(out[column]));
        return true;
    }
    for (int column = 0; column < kTileColumns; column += kLanes)
        store(out + column, round_to_half(load(out + column)));
    return false;
}

struct Job {
    Exl2Matmul args;
    const float* x;  // in stored order
};

bool multiply_tile(const void* context, int64_t tile) {
    const Job& job = *static_cast<const Job*>(context);
    const Exl2Matmul& args = job.args;
    float* piece = scratch(0, kPieceRows * kTileColumns);
    if (piece == nullptr) return false;
    const uint32_t* words = args.codes + tile * args.packed_rows * kTileColumns;
    const uint32_t* scale_words = args.scales + tile * args.n_groups * kScaleWords;
    float* y = args.y + tile * kTileColumns;
    float scales[kTileColumns];
    int64_t done = 0;  // rows multiplied
    int filled = 0;    // rows decoded and waiting
    for (int64_t group = 0; group < args.n_groups; ++group) {
        const int bits = args.groups[2 * group], chunks = args.groups[2 * group + 1] / kChunkRows;
        const bool careful = column_scales(scale_words + group * kScaleWords,
                                           float_from_half(args.group_scales[group]), bits, scales);
        for (int chunk = 0; chunk < chunks; ++chunk) {
            decode_any_chunk(bits, careful, words, scales, piece + filled * kTileColumns);
            words += bits * kTileColumns;
            filled += kChunkRows;
            if (filled == kPieceRows) {
                multiply_piece(piece, filled, job.x + done, args.in, args.rows, done == 0, y, args.out);
                done += filled;
                filled = 0;
            }
        }
    }
    if (filled > 0) multiply_piece(piece, filled, job.x + done, args.in, args.rows, done == 0, y, args.out);
    return true;
}

struct Gather {
    const float* x;
    const int32_t* perm;
    int64_t in;
    float* out;
};

bool gather_row(const void* context, int64_t row) {
    const Gather& job = *static_cast<const Gather*>(context);
    const float* x = job.x + row * job.in;
    float* out = job.out + row * job.in;
    for (int64_t k = 0; k < job.in; ++k) out[k] = x[job.perm[k]];
    return true;
}

}  // namespace

int exl2_matmul(const Exl2Matmul& args) {
    Job job{args, args.x};
    if (args.perm != nullptr) {
        float* ordered = scratch(1, static_cast<size_t>(args.rows * args.in));
        if (ordered == nullptr) return kNoMemory;
        const Gather gather{args.x, args.perm, args.in, ordered};
        run_tasks(args.rows, args.rows * args.in, gather_row, &gather);
        job.x = ordered;
    }
    // Decoding a weight costs about as much as four multiply-adds.
    const int64_t cost = args.in * args.out * (args.rows + 4);
    return run_tasks(args.out / kTileColumns, cost, multiply_tile, &job) ? kOk : kNoMemory;
}

}  // namespace EXL2_LEVEL
}  // namespace exl2
