// y = gate * sigmoid(gate) * up, element by element. The last few go through the same vector code as the rest.
#include <stdint.h>

#include "ops.h"
#include "simd.h"

namespace exl2 {
namespace EXL2_LEVEL {
namespace {

constexpr int64_t kTaskElements = 4096;

inline Vec silu_mul_vec(Vec gate, Vec up) { return gate / (exp_vec(-gate) + 1.0f) * up; }

bool activate(const void* context, int64_t task) {
    const SiluMul& args = *static_cast<const SiluMul*>(context);
    const int64_t last = (task + 1) * kTaskElements < args.count ? (task + 1) * kTaskElements : args.count;
    int64_t i = task * kTaskElements;
    for (; i + kLanes <= last; i += kLanes) store(args.y + i, silu_mul_vec(load(args.gate + i), load(args.up + i)));
    if (i < last) {
        float gate[kLanes] = {}, up[kLanes] = {}, y[kLanes];
        for (int j = 0; i + j < last; ++j) {
            gate[j] = args.gate[i + j];
            up[j] = args.up[i + j];
        }
        store(y, silu_mul_vec(load(gate), load(up)));
        for (int j = 0; i + j < last; ++j) args.y[i + j] = y[j];
    }
    return true;
}

}  // namespace

int silu_mul(const SiluMul& args) {
    const int64_t tasks = (args.count + kTaskElements - 1) / kTaskElements;
    return run_tasks(tasks, args.count * 4, activate, &args) ? kOk : kNoMemory;
}

}  // namespace EXL2_LEVEL
}  // namespace exl2
