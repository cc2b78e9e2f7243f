// What a warp does with a chunk of weights, and how results leave: shared by the kernels that multiply.
#pragma once

#include "packed_stream.cuh"

namespace exl2 {

// The matrix as kernels get it; see `CudaWeights` in cuda_weights.py.
struct PackedMatrix {
    const uint4* stream;  // units of all tiles
    const int2* tiles;    // [N / 32]: first unit of the tile's stream, first row of its table of chunks
    const int4* chunks;   // tables of chunks, see packed_stream.cuh
    const int* slices;    // [n_slices + 1]: first chunk of each slice; a slice is summed by one warp, front to back
    int n_tiles;
    int n_slices;
    const int4* spans;    // [N / 32][n_slices]: where each slice of each tile is; may be null where a kernel says so
};

// Where and how a number of the result is written.
enum Epilogue : int { kStoreHalf = 0, kStoreFloat = 1, kAddFloat = 2 };

struct Output {
    void* y;            // [T, N] float16 (kStoreHalf) or float32; rows `stride` numbers apart
    const float* bias;  // [N], or null
    long long stride;
    int epilogue;

    // Four columns: `column` is a multiple of four, and so is `stride`.
    __device__ __forceinline__ void write_4(int row, int column, float4 value) const {
        if (bias != nullptr) {
            const float4 b = *reinterpret_cast<const float4*>(bias + column);
            value = make_float4(value.x + b.x, value.y + b.y, value.z + b.z, value.w + b.w);
        }
        const long long at = row * stride + column;
        if (epilogue == kStoreHalf) {
            const float four[4] = {value.x, value.y, value.z, value.w};
            store_4(static_cast<__half*>(y) + at, four);
            return;
        }
        float4* target = reinterpret_cast<float4*>(static_cast<float*>(y) + at);
        if (epilogue == kAddFloat) {
            const float4 old = *target;
            value = make_float4(value.x + old.x, value.y + old.y, value.z + old.z, value.w + old.w);
        }
        *target = value;
    }
};

__device__ __forceinline__ float4 add_4(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// acc[i] += (columns 4g + 2i and 4g + 2i + 1 of the chunk) times eight rows of activations.
//
//     left operand, row g: column 4g + 2i of the tile; row g + 8: column 4g + 2i + 1; k = row of the chunk
//     right operand, column g: activations of token g
//
// The instruction's k is a permutation of the chunk's rows, the same on both sides: step s multiplies rows 8t + 4s to
// 8t + 4s + 3 of lane t. So a lane's activations are eight consecutive numbers, one 16-byte load.
// Afterwards acc[i] holds {token 2t, token 2t + 1} of column 4g + 2i, then the same of column 4g + 2i + 1.
__device__ __forceinline__ void multiply_chunk(float (&acc)[2][4], const unsigned (&weights)[kLaneColumns][kLanePairs],
                                               uint4 activations) {
    const unsigned rows[4] = {activations.x, activations.y, activations.z, activations.w};
#pragma unroll
    for (int s = 0; s < 2; ++s) {
        const unsigned b[2] = {rows[2 * s], rows[2 * s + 1]};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const unsigned a[4] = {weights[2 * i][2 * s], weights[2 * i + 1][2 * s], weights[2 * i][2 * s + 1],
                                   weights[2 * i + 1][2 * s + 1]};
            mma_m16n8k16_f16_f32(acc[i], a, b);
        }
    }
}

// The four columns 4g to 4g + 3 of token 2t + `odd`.
__device__ __forceinline__ float4 columns_of(const float (&acc)[2][4], int odd) {
    return make_float4(acc[0][odd], acc[0][odd + 2], acc[1][odd], acc[1][odd + 2]);
}

}  // namespace exl2
