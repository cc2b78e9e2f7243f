// Few rows of activations times a quantised matrix that stays packed:  y[t, n] = sum over k of x[t, k] * w[k, n]
//
//     x        [T, K]   float16 (products on tensor cores) or float32 (multiply-adds); contiguous, K a multiple of 4
//     rows     [K]      int32: the stored row of each input feature, or null where that is the feature itself
//     matrix            packed_stream.cuh has the layout, packed_product.cuh the table of its parts
//     y        [T, N]   see Output
//
// A block takes tiles blockIdx.x, blockIdx.x + gridDim.x, ...; warp s of it sums slice s of each tile's rows. So a tile is
// read by all warps of one block at once, and the block's sums meet in shared memory:
//
//     tile       | slice 0 | slice 1 | ... | slice S-1 |     warp s streams its slice through a ring of its own
//     partial    [S][T][32]                                  one barrier a tile; two buffers, so nobody waits twice
//     y          ((slice 0 + slice 1) + ...) + ((...) + ...)  sections first, then the sum of sections: always this order
//
// The order of additions is fixed by the matrix alone. packed_gemm.cuh uses the same, so a row has the same bits in both
// and in any batch.
//
// Expected to be limited by memory: a warp keeps kRingGroups groups of 512 bytes on their way, whatever the widths of the
// codes are, and goes on into the next tile without a pause. 32 warps of 2.5 KiB at least are 80 KiB a multiprocessor; the
// fastest card (H200: 4.8 TB/s, about 0.8 us latency, 132 multiprocessors) needs about 30 KiB. On tensor cores a weight
// costs about 1.5 instructions at 4 bits, less than half of what the card can issue while the weight arrives; with plain
// multiply-adds it would be twice that, since two conversions and two multiply-adds follow each pair. Activations are
// scattered to stored order while the first weights are under way: reads stay coalesced, and only writes to shared memory
// are spread.
//
// On sm_75 copies are not asynchronous and the ring is short; other warps cover the latency.
//
// The caller guarantees: blockDim.x = 32 * n_slices; n_slices a multiple of n_sections; every slice has at least one chunk;
// T <= 8 (float16) or <= kRows (float32, rows blockIdx.y * kRows and on); shared memory of
// n_slices * ring + chunks * rows * 32 numbers + 2 * n_slices * rows * 32 floats.
#pragma once

#include "packed_product.cuh"

namespace exl2 {

#if EXL2_ARCH >= 80
constexpr int kRingGroups = 8;
#else
constexpr int kRingGroups = 4;
#endif
constexpr int kGroupUnits = kWarpThreads;  // one 16-byte copy a lane
constexpr int kRingBytes = kRingGroups * kGroupUnits * kUnitBytes;

// Groups that may still be under way when a chunk is wanted: the rest of the ring beyond those it may lie in.
__device__ constexpr int groups_under_way(int bits, int header_units) {
    return kRingGroups - (kGroupUnits - 1 + header_units + chunk_units(bits) + kGroupUnits - 1) / kGroupUnits;
}
static_assert(groups_under_way(8, 1) >= 1 && groups_under_way(4, 6) >= 1, "the ring must hold more than one chunk");

// ---- one warp's stream: its slice of each of the block's tiles, one after the other --------------------------------------
// A slice is preceded by the header of its first group and starts at a new group of copies.

template <int kHeaderUnits>
struct SliceStream {
    const PackedMatrix& matrix;
    unsigned char* const ring;
    int first_chunk, last_chunk;  // of the slice, both included
    int tile, next_tile;
    int2 next;          // of next_tile, fetched one tile ahead
    int table;          // the table that the offsets below came from
    unsigned base;      // first unit of the tile
    unsigned header, data;
    int length;         // units of the slice, header included
    int at;             // units queued
    int issued;         // groups queued since the start

    __device__ __forceinline__ SliceStream(const PackedMatrix& matrix, unsigned char* ring, int slice)
        : matrix(matrix), ring(ring), table(-1), at(0), issued(0) {
        first_chunk = matrix.slices[slice];
        last_chunk = matrix.slices[slice + 1] - 1;
        next_tile = blockIdx.x;
        if (next_tile < matrix.n_tiles) next = matrix.tiles[next_tile];
        advance();
    }

    __device__ __forceinline__ void advance() {
        tile = next_tile;
        if (tile >= matrix.n_tiles) return;
        base = next.x;
        if (next.y != table) {
            table = next.y;
            const int4 first = matrix.chunks[table + first_chunk], last = matrix.chunks[table + last_chunk];
            header = first.z;
            data = first.y - kHeaderUnits;
            length = kHeaderUnits + last.y + chunk_units(1) * info_bits(last.x) - first.y;
        }
        at = 0;
        next_tile = tile + gridDim.x;
        if (next_tile < matrix.n_tiles) next = matrix.tiles[next_tile];
    }

    // Queues one group of copies, empty when all is queued: waiting counts groups.
    __device__ __forceinline__ void issue(int lane) {
        if (tile < matrix.n_tiles) {
            const int unit = at + lane;
            if (unit < length) {
                const unsigned source = base + (unit < kHeaderUnits ? header : data) + unit;
                cp_async_16(ring + (issued * (kGroupUnits * kUnitBytes) + lane * kUnitBytes) % kRingBytes,
                            matrix.stream + source);
            }
            at += kGroupUnits;
            if (at >= length) advance();
        }
        cp_async_commit();
        ++issued;
    }
};

// ---- products: float16 activations on tensor cores, up to eight rows ---------------------------------------------------

struct TensorProduct {
    using Activation = __half;
    static constexpr int kMaxRows = 8;
    float acc[2][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[i / 4][i % 4] = 0.0f;
    }
    // activations: [rows][32] of this chunk.
    __device__ __forceinline__ void multiply(const unsigned (&weights)[kLaneColumns][kLanePairs],
                                             const __half* activations, int rows, int lane) {
        uint4 x = make_uint4(0, 0, 0, 0);
        if (lane / 4 < rows) x = *reinterpret_cast<const uint4*>(activations + lane / 4 * kChunkRows + lane % 4 * 8);
        multiply_chunk(acc, weights, x);
    }
    // partial: [rows][32].
    __device__ __forceinline__ void store(float* partial, int rows, int lane) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
            const int row = lane % 4 * 2 + odd;
            if (row < rows) *reinterpret_cast<float4*>(partial + row * kTileColumns + lane / 4 * 4) = columns_of(acc, odd);
        }
    }
};

// ---- products: float32 activations, one multiply-add after the other ------------------------------------------------------

template <int kRows>
struct FloatProduct {
    using Activation = float;
    static constexpr int kMaxRows = kRows;
    float acc[kRows][kLaneColumns];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < kRows * kLaneColumns; ++i) acc[i / kLaneColumns][i % kLaneColumns] = 0.0f;
    }
    __device__ __forceinline__ void multiply(const unsigned (&weights)[kLaneColumns][kLanePairs], const float* activations,
                                             int rows, int lane) {
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            if (row >= rows) break;
            float x[8];
            load_4(activations + row * kChunkRows + lane % 4 * 8, *reinterpret_cast<float(*)[4]>(&x[0]));
            load_4(activations + row * kChunkRows + lane % 4 * 8 + 4, *reinterpret_cast<float(*)[4]>(&x[4]));
#pragma unroll
            for (int j = 0; j < kLanePairs; ++j) {
#pragma unroll
                for (int c = 0; c < kLaneColumns; ++c) {
                    const float2 w = __half22float2(as_half2(weights[c][j]));
                    acc[row][c] = fmaf(w.x, x[2 * j], acc[row][c]);
                    acc[row][c] = fmaf(w.y, x[2 * j + 1], acc[row][c]);
                }
            }
        }
    }
    __device__ __forceinline__ void store(float* partial, int rows, int lane) {
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            if (row >= rows) break;
#pragma unroll
            for (int c = 0; c < kLaneColumns; ++c) {  // the four lanes t hold different rows of the chunk
                acc[row][c] += __shfl_xor_sync(kAllLanes, acc[row][c], 1);
                acc[row][c] += __shfl_xor_sync(kAllLanes, acc[row][c], 2);
            }
            if (lane % 4 == 0) {
                *reinterpret_cast<float4*>(partial + row * kTileColumns + lane) =
                    make_float4(acc[row][0], acc[row][1], acc[row][2], acc[row][3]);
            }
        }
    }
};

// ---- the kernel ---------------------------------------------------------------------------------------------------------

template <class Bits>
struct alignas(4 * sizeof(Bits)) FourNumbers {
    Bits numbers[4];
};

// Writes x to shared memory as [chunk][rows][32] in stored order, zeros where no feature is stored. Moves bits only.
template <class Bits>
__device__ __forceinline__ void scatter_activations(Bits* target, const Bits* x, const int* stored_rows, int rows,
                                                    int features, int n_chunks) {
    if (features < n_chunks * kChunkRows) {
        for (int i = threadIdx.x; i < n_chunks * rows * kChunkRows; i += blockDim.x) target[i] = 0;
        __syncthreads();
    }
    for (int row = 0; row < rows; ++row) {
        const Bits* source = x + static_cast<long long>(row) * features;
#pragma unroll 2
        for (int k = threadIdx.x * 4; k < features; k += blockDim.x * 4) {
            const FourNumbers<Bits> four = *reinterpret_cast<const FourNumbers<Bits>*>(source + k);
            int4 at = make_int4(k, k + 1, k + 2, k + 3);
            if (stored_rows != nullptr) at = *reinterpret_cast<const int4*>(stored_rows + k);
            const int places[4] = {at.x, at.y, at.z, at.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                target[(places[i] / kChunkRows * rows + row) * kChunkRows + places[i] % kChunkRows] = four.numbers[i];
            }
        }
    }
}

// The sums of all slices of one tile, in the fixed order, to their place in y.
__device__ __forceinline__ void add_slices(const float* partial, const Output& output, int rows, int first_row, int column,
                                           int n_slices, int n_sections) {
    for (int i = threadIdx.x; i < rows * (kTileColumns / 4); i += blockDim.x) {
        const int row = i / (kTileColumns / 4), quad = i % (kTileColumns / 4) * 4;
        const float* from = partial + row * kTileColumns + quad;
        const int stride = rows * kTileColumns, per_section = n_slices / n_sections;
        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int section = 0; section < n_sections; ++section) {
            float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            for (int s = 0; s < per_section; ++s, from += stride) sum = add_4(sum, *reinterpret_cast<const float4*>(from));
            total = add_4(total, sum);
        }
        output.write_4(first_row + row, column + quad, total);
    }
}

template <class Format, class Product, class Bits>
__device__ __forceinline__ void packed_gemv(const Bits* x, const int* stored_rows, const PackedMatrix& matrix,
                                            const Output& output, int features, int n_chunks, int n_rows, int n_sections) {
    using Activation = typename Product::Activation;
    static_assert(sizeof(Bits) == sizeof(Activation), "");
    EXL2_DYNAMIC_SHARED(unsigned char, shared);
    const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads, n_slices = blockDim.x / kWarpThreads;
    const int first_row = blockIdx.y * Product::kMaxRows, rows = min(Product::kMaxRows, n_rows - first_row);
    unsigned char* const ring = shared + warp * kRingBytes;
    Bits* const activations = reinterpret_cast<Bits*>(shared + n_slices * kRingBytes);
    float* partial = reinterpret_cast<float*>(activations + n_chunks * rows * kChunkRows);
    float* other_partial = partial + n_slices * rows * kTileColumns;

    SliceStream<Format::kHeaderUnits> stream(matrix, ring, warp);
    for (int i = 0; i < kRingGroups; ++i) stream.issue(lane);
    scatter_activations(activations, x + static_cast<long long>(first_row) * features, stored_rows, rows, features, n_chunks);
    __syncthreads();

    const RingSource<kRingBytes> source{ring};
    const int first = stream.first_chunk, last = stream.last_chunk;
    Format format;
    Product product;
    unsigned position = 0;  // in the stream of units, counted from the start
    int infos = 0, infos_table = -1;  // lane i holds the information of the i-th chunk of 32
    int table = matrix.tiles[blockIdx.x].y;
    for (int tile = blockIdx.x; tile < matrix.n_tiles; tile += gridDim.x) {
        const int next_tile = tile + gridDim.x;
        const int next_table = next_tile < matrix.n_tiles ? matrix.tiles[next_tile].y : 0;
        position = (position + kGroupUnits - 1) / kGroupUnits * kGroupUnits;
        product.clear();
        for (int chunk = first; chunk <= last; ++chunk) {
            const int turn = (chunk - first) % kWarpThreads;
            if (turn == 0 && (table != infos_table || last - first >= kWarpThreads)) {
                infos = chunk + lane <= last ? matrix.chunks[table + chunk + lane].x : 0;
                infos_table = table;
            }
            const int info = __shfl_sync(kAllLanes, infos, turn), bits = info_bits(info);
            __syncwarp();  // all lanes are done with what the next copies overwrite
            while (stream.issued < static_cast<int>(position / kGroupUnits) + kRingGroups) stream.issue(lane);
            if (Format::kMaxBits > 4 && bits > 4) {
                cp_async_wait<groups_under_way(Format::kMaxBits, Format::kHeaderUnits)>();
            } else {
                cp_async_wait<groups_under_way(4, Format::kHeaderUnits)>();
            }
            __syncwarp();  // the copies of the other lanes are there too
            if (chunk == first || info_starts_group(info)) {
                format.load(source, position * kUnitBytes, info, lane);
                position += Format::kHeaderUnits;
            }
            unsigned weights[kLaneColumns][kLanePairs];
            load_weights_of(bits, weights, format, source, position * kUnitBytes, lane);
            position += chunk_units(1) * bits;
            product.multiply(weights, reinterpret_cast<const Activation*>(activations + chunk * rows * kChunkRows), rows, lane);
        }
        product.store(partial + warp * rows * kTileColumns, rows, lane);
        __syncthreads();
        // The next tile's sums go to the other buffer; its barrier is passed only when this one has been read.
        add_slices(partial, output, rows, first_row, tile * kTileColumns, n_slices, n_sections);
        float* const swap = partial;
        partial = other_partial;
        other_partial = swap;
        table = next_table;
    }
}

}  // namespace exl2
