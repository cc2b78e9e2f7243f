// y = x / sqrt(mean(x^2) + eps) * weight, a row at a time. Squares are summed in 16 lanes, added as a fixed tree.
#include <math.h>
#include <stdint.h>

#include "ops.h"
#include "simd.h"

namespace exl2 {
namespace EXL2_LEVEL {
namespace {

bool normalise_row(const void* context, int64_t row) {
    const RmsNorm& args = *static_cast<const RmsNorm*>(context);
    const float* x = args.x + row * args.columns;
    float* y = args.y + row * args.columns;
    Wide sum = wide_zero();
    int64_t i = 0;
    for (; i + kWideLanes <= args.columns; i += kWideLanes) {
        const Wide part = wide_load(x + i);
        wide_mul_add(part, part, sum);
    }
    if (i < args.columns) {
        const Wide part = wide_load_some(x + i, static_cast<int>(args.columns - i));
        wide_mul_add(part, part, sum);
    }
    const float factor = 1.0f / sqrtf(wide_sum(sum) / static_cast<float>(args.columns) + args.eps);
    for (i = 0; i < args.columns; ++i) y[i] = x[i] * factor * args.weight[i];
    return true;
}

}  // namespace

int rms_norm(const RmsNorm& args) {
    return run_tasks(args.rows, args.rows * args.columns, normalise_row, &args) ? kOk : kNoMemory;
}

}  // namespace EXL2_LEVEL
}  // namespace exl2
