// y[T, N] = x[T, K] * W[K, N], W in 4-bit GPTQ form (exl2_layout.h). One task per tile of 32 columns.
//
// As exl2_matmul.cpp, but each row names its group, so rows stay in input order whatever order they were grouped in.
#include <stdint.h>

#include "../exl2_layout.h"
#include "ops.h"
#include "simd.h"
#include "tile_multiply.h"

namespace exl2 {
namespace EXL2_LEVEL {
namespace {

// Scales and zero points of one group of one tile, as numbers.
struct Group {
    int32_t index = -1;
    float scales[kTileColumns];
    float zeros[kTileColumns];

    void load_from(const GptqMatmul& args, int64_t tile, int32_t group) {
        if (group == index) return;
        const int64_t offset = (tile * args.n_groups + group) * kTileColumns;
        for (int column = 0; column < kTileColumns; ++column) {
            scales[column] = float_from_half(args.scales[offset + column]);
            zeros[column] = static_cast<float>(args.zeros[offset + column]);
        }
        index = group;
    }
};

// One row of 32 columns: nibble `shift / 4` of each word.
void decode_row(const uint32_t* words, int shift, const Group& group, float* out) {
    for (int column = 0; column < kTileColumns; column += kLanes) {
        const VecInt code = reinterpret_cast<VecInt>((load_words(words + column) >> shift) & 15u);
        const Vec centred = __builtin_convertvector(code, Vec) - load(group.zeros + column);
        const Vec weight = round_to_half(centred * load(group.scales + column));
        // 65536 is what overflow rounds to: infinity in float16, keeping the sign.
        const VecInt infinite = as_int(weight) & 0x7fffffff;
        const Vec infinity = as_float((as_int(weight) & splat_int(INT32_MIN)) | 0x7f800000);
        store(out + column, select(infinite >= 0x47800000, infinity, weight));
    }
}

bool multiply_tile(const void* context, int64_t tile) {
    const GptqMatmul& args = *static_cast<const GptqMatmul*>(context);
    float* piece = scratch(0, kPieceRows * kTileColumns);
    if (piece == nullptr) return false;
    const uint32_t* words = args.codes + tile * (args.in / kGptqRowsPerWord) * kTileColumns;
    Group group;
    for (int64_t done = 0; done < args.in; done += kPieceRows) {
        const int rows = static_cast<int>(args.in - done < kPieceRows ? args.in - done : kPieceRows);
        for (int row = 0; row < rows; ++row) {
            group.load_from(args, tile, args.row_groups[done + row]);
            decode_row(words + (done + row) / kGptqRowsPerWord * kTileColumns, 4 * (row % kGptqRowsPerWord), group,
                       piece + row * kTileColumns);
        }
        multiply_piece(piece, rows, args.x + done, args.in, args.rows, done == 0, args.y + tile * kTileColumns,
                       args.out);
    }
    return true;
}

}  // namespace

int gptq_matmul(const GptqMatmul& args) {
    const int64_t cost = args.in * args.out * (args.rows + 4);
    return run_tasks(args.out / kTileColumns, cost, multiply_tile, &args) ? kOk : kNoMemory;
}

}  // namespace EXL2_LEVEL
}  // namespace exl2
