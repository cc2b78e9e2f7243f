// Up to some dozens of rows of activations times a quantised matrix that stays packed:
//
//     y[t, n] = sum over k of x[t, k] * w[k, n]
//
//     x        [T / R][K / 32][R][32]  float16, from permute_rows.cu: stored order, in blocks of R = 8 * kRowTiles
//                                      rows and chunks of 32 numbers, so that what one step needs lies together
//     matrix                           packed_stream.cuh has the layout, packed_product.cuh the table of its parts
//     y        [T, N]                  see Output; or, with more than one section, partial [n_sections][T][N] float32
//
// A block of eight warps takes eight tiles of columns (a warp each), one section of the rows of the matrix and one
// block of R rows of x. It walks the section two chunks at a time, kStages steps ahead of itself:
//
//     stage    | x: 2 chunks x R x 32 |  warp 0: header, 2 chunks of codes |  warp 1: ... |
//
// so x is read once for 256 columns. Each warp decodes a chunk once, in registers, and multiplies it by all R rows:
//
//     weights 32 x 32  ->  left operands of 4 mma, in the layout the lane has them      (multiply_chunk)
//     x  8 rows x 32   ->  right operands, one 16-byte load a lane; 512 consecutive bytes a warp, no bank conflicts
//
// Sums run as in packed_gemv.cuh: a slice front to back, then slice by slice within the section, then (add_sections.cu)
// section by section. So a row has the same bits as there, whatever R is.
//
// Expected to be limited by memory up to about 32 rows and by mma.sync beyond. With R = 64 the sums of the slice and of
// the section take 128 registers, so one block of 256 threads runs on a multiprocessor; its 3 stages under way are 24
// KiB of 4-bit codes and 24 KiB of x.
//
// The caller guarantees: blockDim.x = 256; gridDim = (tiles / 8 rounded up, n_sections, row blocks); x padded with zero
// rows to whole blocks; shared memory of kStages * (x stage + 8 * slot_units units), where a slot holds a header and
// any two neighbouring chunks with the header between them.
#pragma once

#include "packed_product.cuh"

namespace exl2 {

constexpr int kGemmWarps = 8;
constexpr int kStepChunks = 2;
#if EXL2_ARCH >= 80
constexpr int kStages = 4;
#else
constexpr int kStages = 2;  // copies are not asynchronous: a third stage would only take shared memory
#endif

// Blocks of 32 rows that should fit a multiprocessor together. sm_86, sm_89 and sm_120 have shared memory for one
// alone, and it may as well have the registers.
#if EXL2_ARCH == 86 || EXL2_ARCH == 89 || EXL2_ARCH == 120
constexpr int kBlocksOf32Rows = 1;
#else
constexpr int kBlocksOf32Rows = 2;
#endif

template <class Format, int kRowTiles>
__device__ __forceinline__ void packed_gemm(const __half* x, const PackedMatrix& matrix, const Output& output,
                                            float* partial, int n_chunks, int n_rows, int n_sections, int slot_units) {
    constexpr int kRows = 8 * kRowTiles;
    constexpr int kChunkUnitsX = kRows * kChunkRows * 2 / kStreamUnitBytes;  // of x in one chunk
    EXL2_DYNAMIC_SHARED(unsigned char, shared);
    const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
    const int tile = blockIdx.x * kGemmWarps + warp, section = blockIdx.y, row_block = blockIdx.z;
    const bool has_tile = tile < matrix.n_tiles;  // the last block's spare warps only help to copy x
    const int per_section = matrix.n_slices / n_sections;
    const int first = matrix.slices[section * per_section], end = matrix.slices[(section + 1) * per_section];
    const int n_steps = (end - first + kStepChunks - 1) / kStepChunks;

    const int stage_bytes = kStepChunks * kChunkUnitsX * kStreamUnitBytes + kGemmWarps * slot_units * kStreamUnitBytes;
    const int slot_offset = kStepChunks * kChunkUnitsX * kStreamUnitBytes + warp * slot_units * kStreamUnitBytes;
    const uint4* const x_units =
        reinterpret_cast<const uint4*>(x) + static_cast<long long>(row_block) * n_chunks * kChunkUnitsX;
    const int2 place = has_tile ? matrix.tiles[tile] : make_int2(0, 0);
    const int4* const chunks = matrix.chunks + place.y;
    const uint4* const stream = matrix.stream + static_cast<unsigned>(place.x);

    const auto issue = [&](int step) {
        if (step < n_steps) {
            unsigned char* const stage = shared + step % kStages * stage_bytes;
            const int chunk = first + step * kStepChunks, last = min(chunk + kStepChunks, end) - 1;
            const uint4* const from = x_units + static_cast<long long>(chunk) * kChunkUnitsX;
            for (int i = threadIdx.x; i < (last - chunk + 1) * kChunkUnitsX; i += kGemmWarps * kWarpThreads) {
                cp_async_16(stage + i * kStreamUnitBytes, from + i);
            }
            if (has_tile) {
                const int4 a = chunks[chunk], b = chunks[last];
                const int header = a.z, data = a.y - Format::kHeaderUnits;
                const int length = Format::kHeaderUnits + b.y + chunk_units(1) * info_bits(b.x) - a.y;
                for (int i = lane; i < length; i += kWarpThreads) {
                    const int unit = (i < Format::kHeaderUnits ? header : data) + i;
                    cp_async_16(stage + slot_offset + i * kStreamUnitBytes, stream + unit);
                }
            }
        }
        cp_async_commit();
    };

    float acc[kRowTiles][2][4], total[kRowTiles][2][4];
#pragma unroll
    for (int i = 0; i < kRowTiles * 8; ++i) acc[i / 8][i / 4 % 2][i % 4] = total[i / 8][i / 4 % 2][i % 4] = 0.0f;
    Format format;
    format.magic = hidden_magic(n_chunks);
    int header_chunk = first;  // where the next scales are due
    int slice = section * per_section, slice_end = matrix.slices[slice + 1];

    for (int step = 0; step < kStages - 1; ++step) issue(step);
    for (int step = 0; step < n_steps; ++step) {
        cp_async_wait<kStages - 2>();
        __syncthreads();  // the copies of all are there, and all are done with the stage that is filled next
        issue(step + kStages - 1);
        if (!has_tile) continue;
        const unsigned char* const stage = shared + step % kStages * stage_bytes;
        const FlatSource source{stage + slot_offset};
        unsigned position = Format::kHeaderUnits;
        for (int i = 0; i < kStepChunks; ++i) {
            const int chunk = first + step * kStepChunks + i;
            if (chunk >= end) break;
            const int info = chunks[chunk].x, bits = info_bits(info);
            if (chunk == header_chunk) {
                header_chunk += info_chunks_left(info);
                if (i > 0) position += Format::kHeaderUnits;  // the header lies between the two chunks
                format.load(source, (position - Format::kHeaderUnits) * kStreamUnitBytes, info, lane);
            }
            unsigned weights[kLaneColumns][kLanePairs];
            load_weights_of(bits, weights, format, source, position * kStreamUnitBytes, lane);
            position += chunk_units(1) * bits;
            const uint4* const x_chunk = reinterpret_cast<const uint4*>(stage) + i * kChunkUnitsX + lane;
#pragma unroll
            for (int n = 0; n < kRowTiles; ++n) multiply_chunk(acc[n], weights, x_chunk[n * kWarpThreads]);
            if (chunk + 1 == slice_end) {
#pragma unroll
                for (int n = 0; n < kRowTiles * 8; ++n) {
                    total[n / 8][n / 4 % 2][n % 4] += acc[n / 8][n / 4 % 2][n % 4];
                    acc[n / 8][n / 4 % 2][n % 4] = 0.0f;
                }
                slice += 1;
                if (chunk + 1 < end) slice_end = matrix.slices[slice + 1];
            }
        }
    }
    if (!has_tile) return;

    const int column = tile * kTileColumns + lane / 4 * 4;
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
            const int row = row_block * kRows + n * 8 + lane % 4 * 2 + odd;
            if (row >= n_rows) continue;
            const float4 four = columns_of(total[n], odd);
            if (partial == nullptr) {
                output.write_4(row, column, four);
            } else {
                const long long to_row = static_cast<long long>(section) * n_rows + row;
                const long long at = to_row * (matrix.n_tiles * kTileColumns) + column;
                *reinterpret_cast<float4*>(partial + at) = four;
            }
        }
    }
}

}  // namespace exl2
