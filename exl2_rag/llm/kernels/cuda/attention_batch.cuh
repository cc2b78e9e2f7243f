// Who attends to what: how a ragged batch is cut into work that does not depend on the batch.
//
// The keys of a sequence are cut, from position 0, into splits of 256 and those into spans of 64. A row (one new token
// of one head) has per span a maximum m, a sum l and an output o; spans are folded into their split in order, splits
// into the row in order:
//
//     position   0          256         512         768
//     split      |    0     |     1     |     2     |          row at 700, window 500: [201 ... 700], splits 0 to 2
//     span       |0 |1 |2 |3|
//
//     fold:  m' = max(m, m_s);  a = 2^(m - m');  b = 2^(m_s - m');  l' = l a + l_s b;  o' = o a + o_s b
//
// A key that a row must not see has weight 0, and folding in nothing changes nothing, so the bits of a row's result
// depend on its position and cache alone: not on the other rows, nor on which block or pass computes which split.
//
// A unit is a sequence, or in the pass over a shared prefix all sequences of a group. For one key head its lines are
// rows x (query heads of that key head), numbered row by row; a tile is up to kLines consecutive lines.
//
// The partial result of (row, head, split) goes to
//     entry = (row * heads + head) * n_slots + split % n_slots
// where n_slots is at least the number of splits that any row touches. With `loop`, units of more than
// `loop_above` lines are folded over all their splits by one block and leave one entry, (row * heads + head), in
// `totals`; units of fewer lines use  ((unit * kv_heads + kv_head) * loop_above + line) * n_slots + split % n_slots.
#pragma once

#include "common.cuh"

namespace exl2 {

constexpr int kSplitKeys = 256;
constexpr int kSpanKeys = 64;

// What a launch computes.
constexpr int kPassAll = 0;     // every split of every sequence
constexpr int kPassPrefix = 1;  // splits that lie whole in the shared pages of a group; units are groups
constexpr int kPassRest = 2;    // the other splits; units are sequences

#define EXL2_MINUS_INFINITY (-__int_as_float(0x7f800000))

struct Batch {
    const int* query_starts;        // [B + 1]
    const int* context_lens;        // [B]
    const int* group_starts;        // [n_groups + 1], sequences of each group; null without groups
    const int* group_prefix_pages;  // [n_groups], pages that all sequences of the group share
    int n_sequences;
    int n_groups;
    int page_size;
    int heads;
    int kv_heads;
    int window;  // 0, or keys that a row sees
};

struct Partials {
    float* outputs;        // [entries, dim]
    float* sums;           // [entries, 2]: m in powers of two, l
    float* total_outputs;  // as above, for units that loop; null without
    float* total_sums;
    int n_slots;
    int loop_above;
};

// The sequence that has a row, or -1. All lanes of a warp call it.
__device__ __forceinline__ int find_sequence(const Batch& batch, int row) {
    const int lane = threadIdx.x % kWarpThreads;
    for (int base = 0; base < batch.n_sequences; base += kWarpThreads) {
        const int b = base + lane;
        const unsigned found = __ballot_sync(kAllLanes, b < batch.n_sequences && batch.query_starts[b + 1] > row);
        if (found != 0) return base + __ffs(found) - 1;
    }
    return -1;
}

// The group of a sequence.
__device__ __forceinline__ int find_group(const Batch& batch, int sequence) {
    int low = 0, high = batch.n_groups;  // group_starts[low] <= sequence < group_starts[high]
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (batch.group_starts[middle] <= sequence) low = middle;
        else high = middle;
    }
    return low;
}

// Splits that the prefix pass computes for a group. A group of one has nothing to share.
__device__ __forceinline__ int prefix_splits(const Batch& batch, int group) {
    if (batch.group_starts[group + 1] - batch.group_starts[group] < 2) return 0;
    return batch.group_prefix_pages[group] * batch.page_size / kSplitKeys;
}

// One tile of one unit.
struct Tile {
    int unit;                          // -1: there is no such tile
    int first_sequence, last_sequence;  // half-open
    int first_row;
    int n_lines;     // of the unit
    int first_line;  // of the tile, counted in the unit
};

// The tile with this number. All lanes of a warp call it.
template <int kLines>
__device__ __forceinline__ Tile find_tile(const Batch& batch, int pass, int number) {
    const int lane = threadIdx.x % kWarpThreads;
    const int n_units = pass == kPassPrefix ? batch.n_groups : batch.n_sequences;
    const int repeats = batch.heads / batch.kv_heads;
    for (int base = 0; base < n_units; base += kWarpThreads) {
        const int unit = base + lane;
        int first_sequence = unit, last_sequence = unit + 1, first_row = 0, n_lines = 0;
        if (unit < n_units) {
            if (pass == kPassPrefix) {
                first_sequence = batch.group_starts[unit];
                last_sequence = batch.group_starts[unit + 1];
            }
            first_row = batch.query_starts[first_sequence];
            n_lines = (batch.query_starts[last_sequence] - first_row) * repeats;
        }
        const int n_tiles = (n_lines + kLines - 1) / kLines;
        int last_tile = n_tiles;  // inclusive prefix sum
#pragma unroll
        for (int distance = 1; distance < kWarpThreads; distance *= 2) {
            const int other = __shfl_up_sync(kAllLanes, last_tile, distance);
            if (lane >= distance) last_tile += other;
        }
        const unsigned found = __ballot_sync(kAllLanes, number < last_tile);
        if (found != 0) {
            const int source = __ffs(found) - 1;
            Tile tile;
            tile.unit = base + source;
            tile.first_sequence = __shfl_sync(kAllLanes, first_sequence, source);
            tile.last_sequence = __shfl_sync(kAllLanes, last_sequence, source);
            tile.first_row = __shfl_sync(kAllLanes, first_row, source);
            tile.n_lines = __shfl_sync(kAllLanes, n_lines, source);
            tile.first_line = (number - __shfl_sync(kAllLanes, last_tile - n_tiles, source)) * kLines;
            return tile;
        }
        number -= __shfl_sync(kAllLanes, last_tile, kWarpThreads - 1);
    }
    return Tile{-1, 0, 0, 0, 0, 0};
}

// One line: a row, a head, and the keys [first_key, last_key) that it sees; none if there is no such line.
struct Line {
    int row, head;
    int first_key, last_key;

    __device__ __forceinline__ bool touches(int split) const {
        return first_key < last_key && first_key / kSplitKeys <= split && split <= (last_key - 1) / kSplitKeys;
    }
};

__device__ __forceinline__ Line make_line(const Batch& batch, const Tile& tile, int kv_head, int line) {
    const int repeats = batch.heads / batch.kv_heads;
    if (line >= tile.n_lines) return Line{-1, 0, 0, 0};
    Line result;
    result.row = tile.first_row + line / repeats;
    result.head = kv_head * repeats + line % repeats;
    int low = tile.first_sequence, high = tile.last_sequence;  // query_starts[low] <= row < query_starts[high]
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (batch.query_starts[middle] <= result.row) low = middle;
        else high = middle;
    }
    result.last_key = batch.context_lens[low] - batch.query_starts[low + 1] + result.row + 1;
    result.first_key = batch.window > 0 && result.last_key > batch.window ? result.last_key - batch.window : 0;
    return result;
}

// The splits [first, last) that a launch computes for a tile, and the keys [0, n_keys) that may be read.
struct SplitRange {
    int first, last;
    int n_keys;
};

template <int kLines>
__device__ __forceinline__ SplitRange split_range(const Batch& batch, const Tile& tile, int pass, int kv_head) {
    if (pass == kPassPrefix) {
        const int n_splits = prefix_splits(batch, tile.unit);
        return SplitRange{0, n_splits, n_splits * kSplitKeys};
    }
    // The rows of a sequence are in order of their positions: the first line sees the first key, the last the last.
    const int last_line = min(tile.first_line + kLines, tile.n_lines) - 1;
    const Line first = make_line(batch, tile, kv_head, tile.first_line);
    const Line last = make_line(batch, tile, kv_head, last_line);
    SplitRange range{first.first_key / kSplitKeys, (last.last_key + kSplitKeys - 1) / kSplitKeys,
                     batch.context_lens[tile.first_sequence]};
    if (pass == kPassRest) range.first = max(range.first, prefix_splits(batch, find_group(batch, tile.unit)));
    return range;
}

// ---- folding: the same operations wherever it happens ---------------------------------------------------------------

struct Fold {
    float maximum, sum;  // after folding
    float old_factor, new_factor;
};

__device__ __forceinline__ Fold fold(float maximum, float sum, float new_maximum, float new_sum) {
    Fold result;
    result.maximum = fmaxf(maximum, new_maximum);
    result.old_factor = maximum == EXL2_MINUS_INFINITY ? 0.0f : exp2_approx(maximum - result.maximum);
    result.new_factor = new_maximum == EXL2_MINUS_INFINITY ? 0.0f : exp2_approx(new_maximum - result.maximum);
    result.sum = __fmaf_rn(new_sum, result.new_factor, __fmul_rn(sum, result.old_factor));
    return result;
}

__device__ __forceinline__ float folded(const Fold& by, float old_number, float new_number) {
    return __fmaf_rn(new_number, by.new_factor, __fmul_rn(old_number, by.old_factor));
}

// softcap * tanh(score / softcap), to powers of two: what exp2 takes. `scale` is softmax_scale, times log2(e) without
// softcap.
__device__ __forceinline__ float shape_score(float score, float scale, float softcap) {
    if (softcap == 0.0f) return score * scale;
    constexpr float kLog2E = 1.44269504f;
    return softcap * kLog2E * tanhf(score * scale / softcap);
}

}  // namespace exl2
