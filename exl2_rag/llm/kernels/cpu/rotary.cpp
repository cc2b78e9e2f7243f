// Rotates q and k by their positions and writes k and v into the cache. One task per token.
#include <stdint.h>

#include "ops.h"
#include "rotate_head.h"
#include "simd.h"

namespace exl2 {
namespace EXL2_LEVEL {
namespace {

template <typename Element>
bool write_token(const void* context, int64_t row) {
    const RopeCacheWrite& args = *static_cast<const RopeCacheWrite*>(context);
    const float* cos = args.cos + args.positions[row] * args.half;
    const float* sin = args.sin + args.positions[row] * args.half;
    for (int64_t head = 0; head < args.heads; ++head) {
        const int64_t offset = (row * args.heads + head) * args.dim;
        rotate_head(args.q + offset, cos, sin, args.half, args.dim, args.q_rotated + offset);
    }
    for (int64_t head = 0; head < args.kv_heads; ++head) {
        const int64_t source = (row * args.kv_heads + head) * args.dim;
        const int64_t target = (args.slots[row] * args.kv_heads + head) * args.dim;
        rotate_head(args.k + source, cos, sin, args.half, args.dim, static_cast<Element*>(args.k_pages) + target);
        Element* v = static_cast<Element*>(args.v_pages) + target;
        for (int64_t i = 0; i < args.dim; ++i) from_float(args.v[source + i], v + i);
    }
    return true;
}

}  // namespace

int rope_cache_write(const RopeCacheWrite& args) {
    for (int64_t row = 0; row < args.rows; ++row) {
        if (args.positions[row] < 0 || args.positions[row] >= args.n_positions) return kOutOfRange;
        if (args.slots[row] < 0 || args.slots[row] >= args.n_slots) return kOutOfRange;
    }
    Task task = write_token<float>;
    if (args.dtype == kFloat16) task = write_token<Half>;
    if (args.dtype == kBfloat16) task = write_token<Bfloat>;
    const int64_t cost = args.rows * (args.heads + 2 * args.kv_heads) * args.dim * 2;
    return run_tasks(args.rows, cost, task, &args) ? kOk : kNoMemory;
}

}  // namespace EXL2_LEVEL
}  // namespace exl2
