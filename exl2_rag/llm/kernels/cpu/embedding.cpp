// Rows of the embedding table widened to float32, and adding to the residual stream.
#include <stdint.h>

#include "ops.h"
#include "simd.h"

namespace exl2 {
namespace EXL2_LEVEL {
namespace {

constexpr int64_t kTaskElements = 1 << 14;

template <typename Element>
bool widen_row(const void* context, int64_t row) {
    const Embedding& args = *static_cast<const Embedding*>(context);
    const Element* from = static_cast<const Element*>(args.table) + args.ids[row] * args.columns;
    float* to = args.y + row * args.columns;
    int64_t i = 0;
    for (; i + kLanes <= args.columns; i += kLanes) store(to + i, load_as_float(from + i));
    for (; i < args.columns; ++i) to[i] = to_float(from[i]);
    return true;
}

bool add_part(const void* context, int64_t task) {
    const AddInto& args = *static_cast<const AddInto*>(context);
    const int64_t last = (task + 1) * kTaskElements < args.count ? (task + 1) * kTaskElements : args.count;
    for (int64_t i = task * kTaskElements; i < last; ++i) args.y[i] += args.x[i];
    return true;
}

}  // namespace

int embedding(const Embedding& args) {
    for (int64_t row = 0; row < args.rows; ++row)
        if (args.ids[row] < 0 || args.ids[row] >= args.n_ids) return kOutOfRange;
    Task task = widen_row<float>;
    if (args.dtype == kFloat16) task = widen_row<Half>;
    if (args.dtype == kBfloat16) task = widen_row<Bfloat>;
    return run_tasks(args.rows, args.rows * args.columns, task, &args) ? kOk : kNoMemory;
}

int add_into(const AddInto& args) {
    return run_tasks((args.count + kTaskElements - 1) / kTaskElements, args.count, add_part, &args) ? kOk : kNoMemory;
}

}  // namespace EXL2_LEVEL
}  // namespace exl2
