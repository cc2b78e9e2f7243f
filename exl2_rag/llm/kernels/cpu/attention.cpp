// Causal attention over the paged cache. One task: up to 16 query rows of one sequence, with all query heads that share
// one key head.
//
// Keys are taken in tiles of 64, on a grid that starts at position 0, and widened to float32 once per task:
//
//     position   0         64        128       192
//     tile       |    0    |    1    |    2    |
//     row at 150           [ window of 100:  51 ... 150 ]      -> tiles 0, 1 and 2, each in part
//
// Per row and head a running maximum m, sum l and output o (the online softmax of flash attention):
//     m' = max(m, scores of the tile);  o = o * exp(m - m') + sum of exp(s - m') v;  l likewise;  result o / l
// A row meets the same tiles with the same keys in the same order whatever rows it shares a task with, so its result
// depends on its own position and cache alone.
#include <stdint.h>

#include "ops.h"
#include "simd.h"

namespace exl2 {
namespace EXL2_LEVEL {
namespace {

constexpr int kQueryRows = 16;
constexpr int kTileKeys = 64;
constexpr int kStrip = 4 * kLanes;  // numbers of o that are summed together: four independent chains
constexpr float kMinusInfinity = -__builtin_inff();

static_assert(kTileKeys % kWideLanes == 0, "scores of a tile are whole wide vectors");

struct Block {
    int32_t sequence, first, last;  // rows of q
};

struct Job {
    PagedAttention args;
    const Block* blocks;
    int64_t padded_dim;
};

// One row and head on its way.
struct Line {
    float maximum, sum;
    float* output;
    const float* query;
    int64_t first_key, last_key;  // half-open
};

template <typename Element>
void widen(const Element* from, int64_t dim, int64_t padded_dim, float* to) {
    int64_t i = 0;
    for (; i + kLanes <= dim; i += kLanes) store(to + i, load_as_float(from + i));
    for (; i < dim; ++i) to[i] = to_float(from[i]);
    for (; i < padded_dim; ++i) to[i] = 0.0f;
}

// Keys `first` to `last` of a sequence into rows of `keys` and `values`, the first of them at row 0.
template <typename Element>
void load_tile(const Job& job, int64_t sequence, int64_t kv_head, int64_t first, int64_t last, float* keys,
               float* values) {
    const PagedAttention& args = job.args;
    const int32_t* pages = args.page_table + sequence * args.table_width;
    for (int64_t key = first; key < last; ++key) {
        const int64_t slot = pages[key / args.page_size] * args.page_size + key % args.page_size;
        const int64_t offset = (slot * args.kv_heads + kv_head) * args.dim;
        widen(static_cast<const Element*>(args.k_pages) + offset, args.dim, job.padded_dim, keys);
        widen(static_cast<const Element*>(args.v_pages) + offset, args.dim, job.padded_dim, values);
        keys += job.padded_dim;
        values += job.padded_dim;
    }
}

inline float dot(const float* a, const float* b, int64_t padded_dim) {
    Wide sum = wide_zero();
    for (int64_t i = 0; i < padded_dim; i += kWideLanes) wide_mul_add(wide_load(a + i), wide_load(b + i), sum);
    return wide_sum(sum);
}

// Take the keys [first, last) of a tile, counted from its start, into a line.
void attend(Line& line, const float* keys, const float* values, int first, int last, int64_t padded_dim, float scale) {
    float weights[kTileKeys];
    float maximum = line.maximum;
    for (int key = 0; key < kTileKeys; ++key) weights[key] = kMinusInfinity;
    for (int key = first; key < last; ++key) {
        weights[key] = dot(line.query, keys + key * padded_dim, padded_dim) * scale;
        maximum = weights[key] > maximum ? weights[key] : maximum;
    }
    // With every score at minus infinity there is nothing to subtract.
    const float shift = maximum == kMinusInfinity ? 0.0f : maximum;
    Wide sum = wide_zero();
    for (int key = 0; key < kTileKeys; key += kWideLanes) {
        for (int i = 0; i < kWideParts; ++i) {
            const Vec weight = exp_vec(load(weights + key + i * kLanes) - shift);
            store(weights + key + i * kLanes, weight);
            sum.part[i] += weight;
        }
    }
    float fade[kLanes];
    store(fade, exp_vec(splat(line.maximum - shift)));
    line.sum = line.sum * fade[0] + wide_sum(sum);
    line.maximum = maximum;
    for (int64_t d = 0; d < padded_dim; d += kStrip) {
        Vec output[4];
        for (int i = 0; i < 4; ++i) output[i] = load(line.output + d + i * kLanes) * splat(fade[0]);
        for (int key = first; key < last; ++key) {
            const float* value = values + key * padded_dim + d;
            for (int i = 0; i < 4; ++i) output[i] = mul_add(splat(weights[key]), load(value + i * kLanes), output[i]);
        }
        for (int i = 0; i < 4; ++i) store(line.output + d + i * kLanes, output[i]);
    }
}

template <typename Element>
bool attend_block(const void* context, int64_t task) {
    const Job& job = *static_cast<const Job*>(context);
    const PagedAttention& args = job.args;
    const Block block = job.blocks[task / args.kv_heads];
    const int64_t kv_head = task % args.kv_heads, repeats = args.heads / args.kv_heads;
    const int64_t n_lines = (block.last - block.first) * repeats;
    const int64_t line_floats = (n_lines * static_cast<int64_t>(sizeof(Line)) + 63) / 64 * 16;
    const int64_t tile_floats = kTileKeys * job.padded_dim;
    float* memory = scratch(0, static_cast<size_t>(line_floats + 2 * tile_floats + 2 * n_lines * job.padded_dim));
    if (memory == nullptr) return false;
    Line* lines = reinterpret_cast<Line*>(memory);
    float* keys = memory + line_floats;
    float* values = keys + tile_floats;
    float* queries = values + tile_floats;
    float* outputs = queries + n_lines * job.padded_dim;

    const int64_t context_len = args.context_lens[block.sequence];
    const int64_t position_of_row_0 = context_len - args.query_starts[block.sequence + 1];
    int64_t last_key = 0, first_key = context_len;
    for (int64_t i = 0; i < n_lines; ++i) {
        const int64_t row = block.first + i / repeats, head = kv_head * repeats + i % repeats;
        const int64_t position = position_of_row_0 + row;
        Line& line = lines[i];
        line = {kMinusInfinity, 0.0f, outputs + i * job.padded_dim, queries + i * job.padded_dim, 0, position + 1};
        if (args.window > 0 && position + 1 > args.window) line.first_key = position + 1 - args.window;
        widen(args.q + (row * args.heads + head) * args.dim, args.dim, job.padded_dim, queries + i * job.padded_dim);
        for (int64_t d = 0; d < job.padded_dim; ++d) line.output[d] = 0.0f;
        first_key = line.first_key < first_key ? line.first_key : first_key;
        last_key = line.last_key > last_key ? line.last_key : last_key;
    }
    for (int64_t start = first_key / kTileKeys * kTileKeys; start < last_key; start += kTileKeys) {
        const int64_t from = start > first_key ? start : first_key;
        const int64_t to = start + kTileKeys < last_key ? start + kTileKeys : last_key;
        load_tile<Element>(job, block.sequence, kv_head, from, to, keys + (from - start) * job.padded_dim,
                           values + (from - start) * job.padded_dim);
        for (int64_t i = 0; i < n_lines; ++i) {
            const int64_t first = lines[i].first_key > from ? lines[i].first_key : from;
            const int64_t last = lines[i].last_key < to ? lines[i].last_key : to;
            if (first < last)
                attend(lines[i], keys, values, static_cast<int>(first - start), static_cast<int>(last - start),
                       job.padded_dim, args.softmax_scale);
        }
    }
    for (int64_t i = 0; i < n_lines; ++i) {
        const int64_t row = block.first + i / repeats, head = kv_head * repeats + i % repeats;
        float* y = args.y + (row * args.heads + head) * args.dim;
        for (int64_t d = 0; d < args.dim; ++d) y[d] = lines[i].output[d] / lines[i].sum;
    }
    return true;
}

// Whether all lengths and pages are in range; counts the blocks and the multiply-adds on the way.
bool check_batch(const PagedAttention& args, int64_t& n_blocks, int64_t& cost) {
    n_blocks = cost = 0;
    if (args.query_starts[0] != 0 || args.query_starts[args.batch] != args.rows) return false;
    for (int64_t b = 0; b < args.batch; ++b) {
        const int64_t count = int64_t{args.query_starts[b + 1]} - args.query_starts[b];
        const int64_t context_len = args.context_lens[b];
        if (count < 0 || count > context_len || context_len > args.table_width * args.page_size) return false;
        if (count == 0) continue;
        for (int64_t page = 0; page * args.page_size < context_len; ++page) {
            const int32_t index = args.page_table[b * args.table_width + page];
            if (index < 0 || index >= args.n_pages) return false;
        }
        n_blocks += (count + kQueryRows - 1) / kQueryRows;
        cost += count * context_len * args.heads * args.dim * 2;
    }
    return true;
}

}  // namespace

int paged_attention(const PagedAttention& args) {
    int64_t n_blocks, cost;
    if (!check_batch(args, n_blocks, cost)) return kOutOfRange;
    static_assert(sizeof(Block) % sizeof(float) == 0, "blocks are counted in floats");
    Block* blocks = reinterpret_cast<Block*>(scratch(1, static_cast<size_t>(n_blocks + 1) * sizeof(Block) / sizeof(float)));
    if (blocks == nullptr) return kNoMemory;
    int64_t next = 0;
    for (int32_t b = 0; b < args.batch; ++b) {
        for (int32_t row = args.query_starts[b]; row < args.query_starts[b + 1]; row += kQueryRows) {
            const int32_t end = args.query_starts[b + 1];
            blocks[next++] = {b, row, row + kQueryRows < end ? row + kQueryRows : end};
        }
    }
    const Job job{args, blocks, (args.dim + kStrip - 1) / kStrip * kStrip};
    Task task = attend_block<float>;
    if (args.dtype == kFloat16) task = attend_block<Half>;
    if (args.dtype == kBfloat16) task = attend_block<Bfloat>;
    return run_tasks(n_blocks * args.kv_heads, cost, task, &job) ? kOk : kNoMemory;
}

}  // namespace EXL2_LEVEL
}  // namespace exl2
