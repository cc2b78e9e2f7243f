// Rotary positions of one head.
//
// NeoX layout over the first R = 2 * half numbers of a head, the rest unchanged:
//     y[i]        = x[i] * cos[i] - x[i + half] * sin[i]
//     y[i + half] = x[i + half] * cos[i] + x[i] * sin[i]
#pragma once

#include <stdint.h>

#include "simd.h"

namespace {

template <typename Element>
inline void rotate_head(const float* x, const float* cos, const float* sin, int64_t half, int64_t dim, Element* y) {
    for (int64_t i = 0; i < half; ++i) {
        from_float(x[i] * cos[i] - x[i + half] * sin[i], y + i);
        from_float(x[i + half] * cos[i] + x[i] * sin[i], y + i + half);
    }
    for (int64_t i = 2 * half; i < dim; ++i) from_float(x[i], y + i);
}

}  // namespace
