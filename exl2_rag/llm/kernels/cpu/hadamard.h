// The rotation of quantised pages: a Walsh-Hadamard transform of each block of the largest power of two that divides D,
// times 1 / sqrt(block). The twin of kv_format.rotate, addition by addition, so both give the same bits.
#pragma once

#include <stdint.h>

#include "simd.h"

namespace {

// x[0..dim) in place. `factor` is 1 / sqrt(block), rounded to float32.
inline void rotate_basis(float* x, int64_t dim, float factor) {
    const int64_t block = dim & -dim;
    for (int64_t h = 1; h < block; h *= 2) {
        for (int64_t first = 0; first < dim; first += 2 * h) {
            float *a = x + first, *b = a + h;
            int64_t i = 0;
            for (; i + kLanes <= h; i += kLanes) {
                const Vec sum = load(a + i) + load(b + i), difference = load(a + i) - load(b + i);
                store(a + i, sum);
                store(b + i, difference);
            }
            for (; i < h; ++i) {
                const float sum = a[i] + b[i], difference = a[i] - b[i];
                a[i] = sum;
                b[i] = difference;
            }
        }
    }
    for (int64_t i = 0; i < dim; ++i) x[i] *= factor;
}

}  // namespace
