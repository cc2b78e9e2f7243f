// Activations in the order in which a quantised matrix stores its rows, laid out for packed_gemm.cuh.
//
//     y[t / R][r / 32][t % R][r % 32] = x[t, k]  where r = stored_rows[k]; 0 where no k is stored and in rows t >= T
//
//     x            [T, K]                  float16, contiguous, K a multiple of 4
//     stored_rows  [K]                     int32, or null: r = k
//     y            [T / R][C][R][32]       float16; T rounded up to whole blocks of R rows, C chunks
//
// One block a row of y. The row is scattered into shared memory, so that both reads and writes of global memory are
// consecutive (64 bytes at a time in y).
//
// The caller guarantees: gridDim.x = T rounded up to a multiple of R; shared memory of C * 32 float16.
#include "packed_stream.cuh"

extern "C" __global__ void __launch_bounds__(512)
    permute_rows_f16(const unsigned short* x, const int* stored_rows, uint2* y, int features, int n_chunks, int n_rows,
                     int block_rows) {
    using namespace exl2;
    EXL2_DYNAMIC_SHARED(unsigned short, stored);
    const int row = blockIdx.x, stored_numbers = n_chunks * kChunkRows;
    if (features < stored_numbers || row >= n_rows) {
        for (int i = threadIdx.x; i < stored_numbers; i += blockDim.x) stored[i] = 0;
        __syncthreads();
    }
    if (row < n_rows) {
        const unsigned short* const source = x + static_cast<long long>(row) * features;
        for (int k = threadIdx.x * 4; k < features; k += blockDim.x * 4) {
            const ushort4 four = *reinterpret_cast<const ushort4*>(source + k);
            int4 at = make_int4(k, k + 1, k + 2, k + 3);
            if (stored_rows != nullptr) at = *reinterpret_cast<const int4*>(stored_rows + k);
            stored[at.x] = four.x;
            stored[at.y] = four.y;
            stored[at.z] = four.z;
            stored[at.w] = four.w;
        }
    }
    __syncthreads();
    constexpr int kQuads = kChunkRows / 4;
    const long long first = static_cast<long long>(row / block_rows) * n_chunks * block_rows + row % block_rows;
    uint2* const target = y + first * kQuads;
    for (int i = threadIdx.x; i < n_chunks * kQuads; i += blockDim.x) {
        target[static_cast<long long>(i / kQuads) * block_rows * kQuads + i % kQuads] =
            *reinterpret_cast<const uint2*>(stored + i * 4);
    }
}
