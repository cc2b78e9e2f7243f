// y[T, N] = x[T, K] * weight[N, K]^T, weight in float32, float16 or bfloat16. One task per 16 rows of the weight.
//
// Each y[t][n] is a dot product in 16 lanes along K, added as a fixed tree at the end. Rows of x and of the weight go
// together only to share loads; each pair has sums of its own.
#include <stdint.h>

#include "ops.h"
#include "simd.h"

namespace exl2 {
namespace EXL2_LEVEL {
namespace {

constexpr int kTaskColumns = 16;  // rows of the weight, columns of y
constexpr int kX = 3, kW = 2;     // 3 x 2 dot products: 12 AVX2 registers of sums, 5 loads for 6 products

template <int kXRows, int kWRows, typename Element>
inline void dot_products(const DenseMatmul& args, int64_t row, int64_t column) {
    const int64_t in = args.in;
    const float* x = args.x + row * in;
    const Element* weight = static_cast<const Element*>(args.weight) + column * in;
    Wide sum[kXRows][kWRows];
    for (int t = 0; t < kXRows; ++t)
        for (int n = 0; n < kWRows; ++n) sum[t][n] = wide_zero();
    int64_t k = 0;
    for (; k + kWideLanes <= in; k += kWideLanes) {
        Wide left[kXRows];
        for (int t = 0; t < kXRows; ++t) left[t] = wide_load(x + t * in + k);
        for (int n = 0; n < kWRows; ++n) {
            const Wide right = wide_load(weight + n * in + k);
            for (int t = 0; t < kXRows; ++t) wide_mul_add(left[t], right, sum[t][n]);
        }
    }
    if (k < in) {
        const int count = static_cast<int>(in - k);
        for (int n = 0; n < kWRows; ++n) {
            const Wide right = wide_load_some(weight + n * in + k, count);
            for (int t = 0; t < kXRows; ++t) wide_mul_add(wide_load_some(x + t * in + k, count), right, sum[t][n]);
        }
    }
    for (int t = 0; t < kXRows; ++t) {
        for (int n = 0; n < kWRows; ++n) {
            float* y = args.y + (row + t) * args.out + column + n;
            float value = wide_sum(sum[t][n]);
            if (args.bias != nullptr) value += args.bias[column + n];
            *y = args.accumulate ? *y + value : value;
        }
    }
}

template <int kXRows, typename Element>
inline void multiply_rows(const DenseMatmul& args, int64_t t, int64_t first, int64_t last) {
    int64_t n = first;
    for (; n + kW <= last; n += kW) dot_products<kXRows, kW, Element>(args, t, n);
    for (; n < last; ++n) dot_products<kXRows, 1, Element>(args, t, n);
}

template <typename Element>
bool multiply_columns(const void* context, int64_t task) {
    const DenseMatmul& args = *static_cast<const DenseMatmul*>(context);
    const int64_t first = task * kTaskColumns;
    const int64_t last = first + kTaskColumns < args.out ? first + kTaskColumns : args.out;
    int64_t t = 0;
    for (; t + kX <= args.rows; t += kX) multiply_rows<kX, Element>(args, t, first, last);
    for (; t < args.rows; ++t) multiply_rows<1, Element>(args, t, first, last);
    return true;
}

}  // namespace

int dense_matmul(const DenseMatmul& args) {
    const int64_t tasks = (args.out + kTaskColumns - 1) / kTaskColumns;
    const int64_t cost = args.rows * args.in * args.out;
    Task task = multiply_columns<float>;
    if (args.dtype == kFloat16) task = multiply_columns<Half>;
    if (args.dtype == kBfloat16) task = multiply_columns<Bfloat>;
    return run_tasks(tasks, cost, task, &args) ? kOk : kNoMemory;
}

}  // namespace EXL2_LEVEL
}  // namespace exl2
