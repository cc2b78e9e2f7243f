// Few rows of activations times a quantised matrix that stays packed:  y[t, n] = sum over k of x[t, k] * w[k, n]
//
//     x        [T, K]   float16 (products on tensor cores) or float32 (multiply-adds); contiguous, K a multiple of 4
//     rows     [K]      int32: the stored row of each input feature, or null where that is the feature itself
//     matrix            packed_stream.cuh has the layout, packed_product.cuh the table of its parts
//     y        [T, N]   see Output
//
// A block takes tiles blockIdx.x, blockIdx.x + gridDim.x, ...; warp s of it sums slice s of each tile's rows. So a tile
// is read by all warps of one block at once, and the block's sums meet in shared memory:
//
//     tile       | slice 0 | slice 1 | ... | slice S-1 |     warp s streams its slice through a ring of its own
//     partial    [S][T][32]                                  one barrier a tile; two buffers, so nobody waits twice
//     y          ((slice 0 + slice 1) + ...) + ((...) + ...)  within sections first, then over sections
//
// The order of additions is fixed by the matrix alone. packed_gemm.cuh uses the same, so a row has the same bits in
// both and in any batch.
//
// Expected to be limited by memory from 4 bits on: a warp keeps 2 to 4 KiB on their way, whatever the widths are, and
// goes on into the next tile without a pause. 32 warps are then 64 KiB a multiprocessor at least; the fastest card
// (H200: 4.8 TB/s, about 0.8 us latency, 132 multiprocessors) needs about 30 KiB. While a chunk of 4 bits (512 bytes)
// arrives there, a multiprocessor can issue about 100 instructions of a warp, and the machine code for sm_90 has about
// that many for it; a chunk of 3 or 2 bits takes hardly fewer, in three quarters and half of the time, so these are
// expected to be limited by instructions. Tensor cores do the products even of one row because plain multiply-adds
// would take 64 instructions more.
//
// Activations are scattered to stored order while the first weights are under way: reads stay coalesced, and only
// writes to shared memory are spread. The weights' first copies wait for one load, that of the span, and for nothing
// else.
//
// On sm_75 copies are not asynchronous and the ring is short; other warps cover the latency.
//
// The caller guarantees: blockDim.x = 32 * n_slices; n_slices a multiple of n_sections; every slice has at least one
// chunk; T <= 8 (float16) or <= kRows (float32, rows blockIdx.y * kRows and on); shared memory of n_slices * ring +
// chunks * rows * 32 numbers + 2 * n_slices * rows * 32 floats.
#pragma once

#include "packed_product.cuh"

namespace exl2 {

// A group of copies is what is queued and waited for at once: kLaneCopies copies of 16 bytes by each lane.
constexpr int kRingGroups = 4;
#if EXL2_ARCH >= 80
constexpr int kLaneCopies = 2;
__device__ constexpr int step_chunks(int bits) { return bits > 4 ? 1 : 2; }  // between one wait and the next
#else
constexpr int kLaneCopies = 1;
__device__ constexpr int step_chunks(int) { return 1; }
#endif
constexpr int kGroupUnits = kLaneCopies * kWarpThreads;
constexpr int kGroupBytes = kGroupUnits * kStreamUnitBytes;
constexpr int kRingBytes = kRingGroups * kGroupBytes;

// Groups that may still be under way when chunks are wanted: the rest of the ring beyond those they may lie in.
__device__ constexpr int groups_under_way(int bits, int header_units) {
    return kRingGroups -
           (kGroupUnits - 1 + header_units + step_chunks(bits) * chunk_units(bits) + kGroupUnits - 1) / kGroupUnits;
}
static_assert(groups_under_way(8, 1) >= 1 && groups_under_way(4, 6) >= 1,
              "the ring must hold more than is wanted at once");

// ---- one warp's stream: its slice of each of the block's tiles, one after the other ---------------------------------
// A slice is preceded by the header of its first group and starts at a new group of copies.

template <int kHeaderUnits>
struct SliceStream {
    const PackedMatrix& matrix;
    const SharedAddress ring;
    const int slice;
    int next_tile;    // the one after that of the next copy
    int4 next;        // its span, fetched one tile ahead
    unsigned unit;    // this lane's next, in the stream of the matrix
    unsigned jump;    // from the last header unit to where that lane goes on, beyond the usual step
    int left;         // units of the slice not yet queued, counted from lane 0; 0: all tiles are queued
    unsigned filled;  // bytes queued since the start

    __device__ __forceinline__ SliceStream(const PackedMatrix& matrix, SharedAddress ring, int slice, int lane)
        : matrix(matrix), ring(ring), slice(slice), next_tile(blockIdx.x), filled(0) {
        fetch();
        advance(lane);
    }

    __device__ __forceinline__ void fetch() {
        if (next_tile < matrix.n_tiles) next = matrix.spans[next_tile * matrix.n_slices + slice];
    }

    // A span is {unit of the header, unit of the first chunk, units of header and chunks, 0}.
    __device__ __forceinline__ void advance(int lane) {
        left = 0;
        if (next_tile >= matrix.n_tiles) return;
        const unsigned header = next.x, data = next.y - kHeaderUnits;
        unit = lane + (lane < kHeaderUnits ? header : data);
        jump = lane < kHeaderUnits ? data - header : 0;
        left = next.z;
        next_tile += gridDim.x;
        fetch();
    }

    // Queues one group of copies, empty when all is queued: waiting counts groups.
    __device__ __forceinline__ void issue(int lane) {
        if (left > 0) {
            const SharedAddress target = ring + (filled + lane * kStreamUnitBytes) % kRingBytes;
            cp_async_16_if(target, matrix.stream + unit, lane < left);
            if (kLaneCopies > 1) {
                cp_async_16_if(target + kWarpThreads * kStreamUnitBytes, matrix.stream + (unit + kWarpThreads + jump),
                               lane + kWarpThreads < left);
            }
            unit += kGroupUnits + jump;
            jump = 0;
            left -= kGroupUnits;
            if (left <= 0) advance(lane);
        }
        cp_async_commit();
        filled += kGroupBytes;
    }

    // Makes step_chunks chunks of kBits at byte `position`, and a header before them, readable by all lanes.
    template <int kBits>
    __device__ __forceinline__ void wait(unsigned position, int lane) {
        __syncwarp();  // all lanes are done with what the next copies overwrite
        while (static_cast<int>(filled - position) <= kRingBytes - kGroupBytes) issue(lane);
        cp_async_wait<groups_under_way(kBits, kHeaderUnits)>();
        __syncwarp();  // the copies of the other lanes are there too
    }
};

// ---- products: float16 activations on tensor cores, up to eight rows ------------------------------------------------

struct TensorProduct {
    using Bits = unsigned short;
    static constexpr int kMaxRows = 8;
    float acc[2][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[i / 4][i % 4] = 0.0f;
    }
    // Where the lane finds its activations in a chunk of [rows][32]. Lanes of rows that are not there take the last
    // one's: what comes of it lies in columns of the result that nobody reads.
    __device__ __forceinline__ static int place(int lane, int rows) {
        return min(lane / 4, rows - 1) * kChunkRows + lane % 4 * 8;
    }
    __device__ __forceinline__ void multiply(const unsigned (&weights)[kLaneColumns][kLanePairs],
                                             const unsigned short* activations, int) {
        multiply_chunk(acc, weights, *reinterpret_cast<const uint4*>(activations));
    }
    // partial: [rows][32].
    __device__ __forceinline__ void store(float* partial, int rows, int lane) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
            const int row = lane % 4 * 2 + odd;
            if (row >= rows) continue;
            *reinterpret_cast<float4*>(partial + row * kTileColumns + lane / 4 * 4) = columns_of(acc, odd);
        }
    }
};

// ---- products: float32 activations, one multiply-add after the other ------------------------------------------------

template <int kRows>
struct FloatProduct {
    using Bits = unsigned;
    static constexpr int kMaxRows = kRows;
    float acc[kRows][kLaneColumns];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < kRows * kLaneColumns; ++i) acc[i / kLaneColumns][i % kLaneColumns] = 0.0f;
    }
    __device__ __forceinline__ static int place(int lane, int) { return lane % 4 * 8; }
    __device__ __forceinline__ void multiply(const unsigned (&weights)[kLaneColumns][kLanePairs],
                                             const unsigned* activations, int rows) {
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            if (row >= rows) break;
            const float* const at = reinterpret_cast<const float*>(activations + row * kChunkRows);
            float x[8];
            load_4(at, *reinterpret_cast<float(*)[4]>(&x[0]));
            load_4(at + 4, *reinterpret_cast<float(*)[4]>(&x[4]));
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

// ---- the kernel -----------------------------------------------------------------------------------------------------

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
__device__ __forceinline__ void add_slices(const float* partial, const Output& output, int rows, int first_row,
                                           int column, int n_slices, int n_sections) {
    for (int i = threadIdx.x; i < rows * (kTileColumns / 4); i += blockDim.x) {
        const int row = i / (kTileColumns / 4), quad = i % (kTileColumns / 4) * 4;
        const float* from = partial + row * kTileColumns + quad;
        const int stride = rows * kTileColumns, per_section = n_slices / n_sections;
        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int section = 0; section < n_sections; ++section) {
            float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            for (int s = 0; s < per_section; ++s, from += stride) {
                sum = add_4(sum, *reinterpret_cast<const float4*>(from));
            }
            total = add_4(total, sum);
        }
        output.write_4(first_row + row, column + quad, total);
    }
}

// One warp's slice of one tile.
template <class Format, class Product>
struct SliceSum {
    SliceStream<Format::kHeaderUnits>& stream;
    const RingSource<kRingBytes> source;
    const int lane, rows;
    Format format;
    Product product;
    unsigned position;  // in bytes of the stream, counted from the start
    const typename Product::Bits* activations;  // of the next chunk, at the lane's place

    // Chunks that follow each other in one group, the first of them after the group's header.
    template <int kBits>
    __device__ __forceinline__ void add_chunks(int count, int info) {
        stream.template wait<kBits>(position, lane);
        format.load(source, position, info, lane);
        position += Format::kHeaderUnits * kStreamUnitBytes;
        while (true) {
#pragma unroll
            for (int i = 0; i < step_chunks(kBits); ++i) {
                unsigned weights[kLaneColumns][kLanePairs];
                load_weights<kBits>(weights, format, source, position, lane);
                product.multiply(weights, activations, rows);
                position += chunk_units(kBits) * kStreamUnitBytes;
                activations += rows * kChunkRows;
                if (--count == 0) return;
            }
            stream.template wait<kBits>(position, lane);
        }
    }

    __device__ __forceinline__ void add_chunks_of(const Exl2Format&, int count, int info) {
        switch (info_bits(info)) {
            case 4: add_chunks<4>(count, info); break;
            case 3: add_chunks<3>(count, info); break;
            case 2: add_chunks<2>(count, info); break;
            case 5: add_chunks<5>(count, info); break;
            case 6: add_chunks<6>(count, info); break;
            default: add_chunks<8>(count, info); break;
        }
    }
    __device__ __forceinline__ void add_chunks_of(const GptqFormat&, int count, int info) {
        add_chunks<4>(count, info);
    }
};

template <class Format, class Product>
__device__ __forceinline__ void packed_gemv(const typename Product::Bits* x, const int* stored_rows,
                                            const PackedMatrix& matrix, const Output& output, int features,
                                            int n_chunks, int n_rows, int n_sections) {
    using Bits = typename Product::Bits;
    EXL2_DYNAMIC_SHARED(unsigned char, shared);
    const int lane = threadIdx.x % kWarpThreads, warp = uniform(threadIdx.x / kWarpThreads), n_slices = matrix.n_slices;
    const int first_row = blockIdx.y * Product::kMaxRows, rows = min(Product::kMaxRows, n_rows - first_row);
    const SharedAddress ring = shared_address(shared + warp * kRingBytes);
    Bits* const activations = reinterpret_cast<Bits*>(shared + n_slices * kRingBytes);
    float* partial = reinterpret_cast<float*>(activations + n_chunks * rows * kChunkRows);
    float* other_partial = partial + n_slices * rows * kTileColumns;

    SliceStream<Format::kHeaderUnits> stream(matrix, ring, warp, lane);
#pragma unroll 1
    for (int i = 0; i < kRingGroups; ++i) stream.issue(lane);
    const int first = uniform(matrix.slices[warp]), last = uniform(matrix.slices[warp + 1]) - 1;
    const Bits* const own_x = x + static_cast<long long>(first_row) * features;
    scatter_activations(activations, own_x, stored_rows, rows, features, n_chunks);
    __syncthreads();

    const Bits* const own_activations = activations + first * rows * kChunkRows + Product::place(lane, rows);
    SliceSum<Format, Product> sum{stream, {ring}, lane, rows};
    sum.format.magic = hidden_magic(n_chunks);
    sum.position = 0;
    int infos = 0, infos_table = -1, infos_first = 0;  // lane i holds the information of chunk infos_first + i
    int table = matrix.tiles[blockIdx.x].y;
#pragma unroll 1
    for (int tile = blockIdx.x; tile < matrix.n_tiles; tile += gridDim.x) {
        const int next_tile = tile + gridDim.x;
        const int next_table = next_tile < matrix.n_tiles ? matrix.tiles[next_tile].y : 0;
        sum.position = (sum.position + kGroupBytes - 1) / kGroupBytes * kGroupBytes;
        sum.activations = own_activations;
        sum.product.clear();
#pragma unroll 1
        for (int chunk = first; chunk <= last;) {
            if (table != infos_table || chunk < infos_first || chunk >= infos_first + kWarpThreads) {
                infos = chunk + lane <= last ? matrix.chunks[table + chunk + lane].x : 0;
                infos_table = table;
                infos_first = chunk;
            }
            const int info = __shfl_sync(kAllLanes, infos, chunk - infos_first);
            const int count = min(info_chunks_left(info), last + 1 - chunk);
            sum.add_chunks_of(sum.format, count, info);
            chunk += count;
        }
        sum.product.store(partial + warp * rows * kTileColumns, rows, lane);
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
