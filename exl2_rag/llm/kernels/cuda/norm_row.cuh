// The second half of a norm, for the kernels that share it:  y[c] = x[c] * factor * weight[c]
//
// One block a row; thread i takes columns 4i to 4i + 3, then those 4 * blockDim further on, as in the first half that
// summed the squares. `vectorised` as in rms_norm.cu.
#pragma once

#include "common.cuh"

namespace exl2 {

template <class In, class Out>
__device__ __forceinline__ void scale_row(const In* x, const float* weight, Out* y, int columns, float factor, int vectorised) {
    const int step = 4 * blockDim.x;
    for (int c = 4 * threadIdx.x; c < columns; c += step) {
        if (vectorised) {
            float four[4], scale[4];
            load_4(x + c, four);
            load_4(weight + c, scale);
#pragma unroll
            for (int i = 0; i < 4; ++i) four[i] = four[i] * factor * scale[i];
            store_4(y + c, four);
        } else {
            for (int i = 0; i < 4 && c + i < columns; ++i) {
                y[c + i] = from_float<Out>(to_float(x[c + i]) * factor * weight[c + i]);
            }
        }
    }
}

}  // namespace exl2
