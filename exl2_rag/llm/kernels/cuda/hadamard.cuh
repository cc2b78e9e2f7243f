// The rotation of quantised keys and values: a normalised Walsh-Hadamard transform of each block of n numbers of a
// head, n the largest power of two that divides D.
//
//     for h = 1, 2, 4 ... n/2:  (x[i], x[i + h]) := (x[i] + x[i + h], x[i] - x[i + h])   for every i with bit h clear
//     x := x * (1 / sqrt(n))
//
// It is its own inverse and keeps dot products, so scores do not change when queries are rotated too. It spreads
// outliers over the block, which is what makes few bits suffice. Float32 throughout and no fused operations, so that
// the bits equal those of the reference.
#pragma once

#include "common.cuh"

namespace exl2 {

// Thread i of the block has number i of one head; all threads of the block call it. `room`: blockDim.x floats of shared
// memory, free again when it returns. `n` a power of two, `factor` 1 / sqrt(n).
__device__ __forceinline__ float hadamard(float x, int n, float factor, float* room) {
    const int i = threadIdx.x;
    for (int h = 1; h < n; h *= 2) {
        float other;
        if (h < kWarpThreads) {
            other = __shfl_xor_sync(kAllLanes, x, h);
        } else {
            __syncthreads();
            room[i] = x;
            __syncthreads();
            other = room[i ^ h];
        }
        x = (i & h) != 0 ? __fsub_rn(other, x) : __fadd_rn(x, other);
    }
    __syncthreads();
    return __fmul_rn(x, factor);
}

}  // namespace exl2
