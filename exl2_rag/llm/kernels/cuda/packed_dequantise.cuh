// Some columns of a quantised matrix as plain numbers, for a library to multiply by:
//
//     w[features[r], n] = weight of stored row r in column n
//
//     matrix             packed_stream.cuh has the layout
//     features  [C * 32]  int32, the input feature that each stored row belongs to, -1 for none; null: the row itself
//     w         [K, N']   float16 or float32, tiles first_tile to first_tile + N' / 32, rows in order of features
//
// Bit for bit what the format says (float16; float32 holds the same numbers). A warp decodes one chunk. A lane has
// eight rows of four columns and writes the four together, so a warp writes 64 (float16) consecutive bytes of four rows
// at once:
//
//     lane      0  4  8 ... 28       row 8t + i      (i = 0..7, one store each)
//     columns   0  4  8 ... 28       t = lane % 4
//
// The caller guarantees: blockDim.x = 256; gridDim = (chunks / 8 rounded up, N' / 32).
#pragma once

#include "packed_product.cuh"

namespace exl2 {

constexpr int kDequantiseWarps = 8;

template <class Format, class Out>
__device__ __forceinline__ void packed_dequantise(const PackedMatrix& matrix, const int* features, Out* w,
                                                  int first_tile, int n_chunks) {
    const int lane = threadIdx.x % kWarpThreads, chunk = blockIdx.x * kDequantiseWarps + threadIdx.x / kWarpThreads;
    if (chunk >= n_chunks) return;
    const int2 place = matrix.tiles[first_tile + blockIdx.y];
    const int4 entry = matrix.chunks[place.y + chunk];
    const FlatSource source{reinterpret_cast<const unsigned char*>(matrix.stream + static_cast<unsigned>(place.x))};
    Format format;
    format.magic = hidden_magic(n_chunks);
    format.load(source, static_cast<unsigned>(entry.z) * kStreamUnitBytes, entry.x, lane);
    unsigned weights[kLaneColumns][kLanePairs];
    load_weights_of(info_bits(entry.x), weights, format, source, static_cast<unsigned>(entry.y) * kStreamUnitBytes,
                    lane);

    const int columns = gridDim.y * kTileColumns, column = blockIdx.y * kTileColumns + lane / 4 * 4;
#pragma unroll
    for (int j = 0; j < kLanePairs; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = chunk * kChunkRows + lane % 4 * 8 + 2 * j + h;
            const int feature = features == nullptr ? row : features[row];
            if (feature < 0) continue;
            float four[4];
#pragma unroll
            for (int c = 0; c < kLaneColumns; ++c) {
                const __half2 pair = as_half2(weights[c][j]);
                four[c] = __half2float(h == 0 ? __low2half(pair) : __high2half(pair));
            }
            store_4(w + static_cast<long long>(feature) * columns + column, four);
        }
    }
}

}  // namespace exl2
