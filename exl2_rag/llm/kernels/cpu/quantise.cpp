// The two inner loops of making EXL2 matrices. Columns are independent in both, so a task is a strip of neighbouring
// columns, which stays in the first cache:
//
//     rounding_costs    what rounding a group with each of several steps costs each column:
//                       costs[s, n] = sum over rows of weight[r] * |round(x[r, n] / t) * t - x[r, n]|^2,  t = steps[s, n]
//                       or, with `peaks`, of the same without weights to the power 3.5
//     gptq_rows         a group's rows one after the other; each row's error, divided by U[r, r], is taken off the rows
//                       after it:  x[r', n] -= U[r, r'] * error[r, n]
//
// Codes are whole numbers from -2^(bits-1) to 2^(bits-1) - 1. A column whose step is 0 rounds to 0.
#include <math.h>
#include <stdint.h>

#include "ops.h"
#include "simd.h"

namespace exl2 {
namespace EXL2_LEVEL {
namespace {

constexpr int64_t kStripVecs = 4;
constexpr int64_t kStripColumns = kStripVecs * kLanes;
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves whole numbers, ties to even

// Columns of a strip that are there, and one vector of them; the rest reads as zeros and is not written.
inline Vec load_columns(const float* from, int64_t count) {
    if (count >= kLanes) return load(from);
    float some[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) some[i] = from[i];
    return load(some);
}

inline void store_columns(float* to, int64_t count, Vec value) {
    if (count >= kLanes) return store(to, value);
    float some[kLanes];
    store(some, value);
    for (int64_t i = 0; i < count; ++i) to[i] = some[i];
}

// round(x / step), clamped, as a number; 0 where the step is 0.
inline Vec whole_number(Vec x, Vec safe_step, VecInt usable, Vec least, Vec most) {
    Vec whole = select(usable, x / safe_step, Vec{});
    whole = select(whole < least, least, whole);
    whole = select(whole > most, most, whole);
    return (whole + splat(kRounder)) - splat(kRounder);
}

inline Vec square_root(Vec x) {
#if defined(__AVX512F__)
    return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
    return _mm256_sqrt_ps(x);
#elif defined(__aarch64__)
    return vsqrtq_f32(x);
#else
    Vec result;
    for (int i = 0; i < kLanes; ++i) result[i] = sqrtf(x[i]);
    return result;
#endif
}

bool cost_strip(const void* context, int64_t strip) {
    const RoundingCosts& args = *static_cast<const RoundingCosts*>(context);
    const Vec least = splat(-static_cast<float>(1 << (args.bits - 1))), most = splat(static_cast<float>((1 << (args.bits - 1)) - 1));
    for (int64_t n = strip * kStripColumns; n < args.columns && n < (strip + 1) * kStripColumns; n += kLanes) {
        const int64_t count = args.columns - n;
        for (int64_t s = 0; s < args.n_steps; ++s) {
            const Vec step = load_columns(args.steps + s * args.columns + n, count);
            const VecInt usable = step != Vec{};
            const Vec safe = select(usable, step, splat(1.0f));
            Vec sum{};
            for (int64_t r = 0; r < args.rows; ++r) {
                const Vec x = load_columns(args.x + r * args.columns + n, count);
                const Vec error = whole_number(x, safe, usable, least, most) * step - x;
                if (args.peaks != 0) {
                    const Vec size = select(error < Vec{}, -error, error);
                    sum = mul_add(square_root(size) * size, size * size, sum);
                } else {
                    sum = mul_add(splat(args.row_weights[r]) * error, error, sum);
                }
            }
            store_columns(args.costs + s * args.columns + n, count, sum);
        }
    }
    return true;
}

bool quantise_strip(const void* context, int64_t strip) {
    const GptqRows& args = *static_cast<const GptqRows*>(context);
    float* memory = scratch(0, static_cast<size_t>(args.rows * kLanes));
    if (memory == nullptr) return false;
    const float zero = static_cast<float>(1 << (args.bits - 1));
    const Vec least = splat(-zero), most = splat(zero - 1.0f);
    for (int64_t n = strip * kStripColumns; n < args.columns && n < (strip + 1) * kStripColumns; n += kLanes) {
        const int64_t count = args.columns - n;
        const Vec step = load_columns(args.steps + n, count);
        const VecInt usable = step != Vec{};
        const Vec safe = select(usable, step, splat(1.0f));
        for (int64_t r = 0; r < args.rows; ++r) store(memory + r * kLanes, load_columns(args.x + r * args.columns + n, count));
        for (int64_t r = 0; r < args.rows; ++r) {
            const float* upper = args.upper + r * args.upper_stride;
            const Vec x = load(memory + r * kLanes), whole = whole_number(x, safe, usable, least, most);
            const Vec value = through_half(whole * step), error = (x - value) / splat(upper[r]);
            store_columns(args.values + r * args.columns + n, count, value);
            store_columns(args.errors + r * args.columns + n, count, error);
            float codes[kLanes];
            store(codes, whole + splat(zero));
            for (int64_t i = 0; i < (count < kLanes ? count : kLanes); ++i)
                args.codes[r * args.columns + n + i] = static_cast<uint8_t>(codes[i]);
            if (args.feedback == 0) continue;
            for (int64_t later = r + 1; later < args.rows; ++later)
                store(memory + later * kLanes, load(memory + later * kLanes) - splat(upper[later]) * error);
        }
    }
    return true;
}

int64_t strips(int64_t columns) { return (columns + kStripColumns - 1) / kStripColumns; }

}  // namespace

int rounding_costs(const RoundingCosts& args) {
    const int64_t cost = args.rows * args.columns * args.n_steps * 8;
    return run_tasks(strips(args.columns), cost, cost_strip, &args) ? kOk : kNoMemory;
}

int gptq_rows(const GptqRows& args) {
    const int64_t cost = args.rows * args.columns * (8 + (args.feedback != 0 ? args.rows / 2 : 0));
    return run_tasks(strips(args.columns), cost, quantise_strip, &args) ? kOk : kNoMemory;
}

}  // namespace EXL2_LEVEL
}  // namespace exl2
