// x times a decoded piece of one tile: what EXL2 and GPTQ matmuls share.
//
// Every y[t][n] is a sum over pieces of `kPieceRows` stored rows, in order, and within a piece over its rows, in order.
// That holds for any number of rows t, since each lane belongs to one n and each row t has accumulators of its own.
#pragma once

#include "../exl2_layout.h"
#include "simd.h"

namespace {

constexpr int kPieceRows = 128;  // 16 KiB of decoded weights: half of a common L1 cache
constexpr int kTileVecs = exl2::kTileColumns / kLanes;

// Rows of x that go together: as many accumulators as the registers hold, with two to spare for operands.
#if defined(__AVX512F__)
constexpr int kTogether = 8;   // 16 of 32 registers
#elif defined(__AVX2__)
constexpr int kTogether = 3;   // 12 of 16
#elif defined(__aarch64__)
constexpr int kTogether = 3;   // 24 of 32
#else
constexpr int kTogether = 1;   // 8 of 16
#endif

template <int kRows>
inline void multiply_rows(const float* weights, int piece_rows, const float* x, int64_t x_stride, bool first, float* y,
                          int64_t y_stride) {
    Vec sum[kRows][kTileVecs];
    for (int t = 0; t < kRows; ++t)
        for (int v = 0; v < kTileVecs; ++v) sum[t][v] = Vec{};
    for (int k = 0; k < piece_rows; ++k) {
        for (int t = 0; t < kRows; ++t) {
            const Vec value = splat(x[t * x_stride + k]);
            for (int v = 0; v < kTileVecs; ++v)
                sum[t][v] = mul_add(value, load(weights + k * exl2::kTileColumns + v * kLanes), sum[t][v]);
        }
    }
    for (int t = 0; t < kRows; ++t) {
        for (int v = 0; v < kTileVecs; ++v) {
            float* target = y + t * y_stride + v * kLanes;
            store(target, first ? sum[t][v] : load(target) + sum[t][v]);
        }
    }
}

// y[t][0..32) += x[t][0..piece_rows) * weights[piece_rows][32], or = if this is the first piece.
inline void multiply_piece(const float* weights, int piece_rows, const float* x, int64_t x_stride, int64_t n_rows,
                           bool first, float* y, int64_t y_stride) {
    int64_t t = 0;
    for (; t + kTogether <= n_rows; t += kTogether)
        multiply_rows<kTogether>(weights, piece_rows, x + t * x_stride, x_stride, first, y + t * y_stride, y_stride);
    for (; t < n_rows; ++t)
        multiply_rows<1>(weights, piece_rows, x + t * x_stride, x_stride, first, y + t * y_stride, y_stride);
}

}  // namespace
