// Causal attention over the paged cache. One task: up to 16 query rows of one sequence, with all query heads that share
// one key head; a row with one of those heads is a line.
//
// Keys are taken in tiles of 64, on a grid that starts at position 0, widened to float32 and turned on their side once per
// task, so that scores of neighbouring keys lie in one vector:
//
//     position   0         64        128       192
//     tile       |    0    |    1    |    2    |
//     row at 150           [ window of 100:  51 ... 150 ]      -> tiles 0, 1 and 2, each in part
//
//     scores [line][64]   += q[line][d] * keys[d][64]            for d = 0, 1, ...
//     output [line][D]    += weights[line][key] * values[key][D] for key = 0, 1, ...
//
// Both are small matrix products of a few lines at a time. Per line a running maximum m, sum l and output o (the online
// softmax of flash attention):
//     m' = max(m, scores of the tile);  o = o * exp(m - m') + sum of exp(s - m') v;  l likewise;  result o / l
// A line meets the same tiles with the same keys in the same order whatever it shares a task with, so its result depends
// on its own position and cache alone. Keys that it must not see get the weight 0.
#include <stdint.h>

#include <type_traits>

#include "ops.h"
#include "simd.h"

namespace exl2 {
namespace EXL2_LEVEL {
namespace {

constexpr int kQueryRows = 16;
constexpr int kTileKeys = 64;
constexpr int kStripVecs = 4;  // vectors of a row that are summed together: independent chains of additions
constexpr float kMinusInfinity = -__builtin_inff();

// Lines that go together: with four vectors each, as many sums as the registers hold.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kLinesTogether = 4;
#elif defined(__AVX2__)
constexpr int kLinesTogether = 2;
#else
constexpr int kLinesTogether = 1;
#endif

static_assert(kTileKeys % (kStripVecs * kLanes) == 0, "the scores of a line are whole strips");

struct Block {
    int32_t sequence, first, last;  // rows of q
};

struct Job {
    PagedAttention args;
    const Block* blocks;
    int64_t padded_dim;  // whole vectors
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

// Where a tile's numbers are: all of one task.
struct Tile {
    float* keys;     // [padded_dim, 64]
    float* values;   // [64, padded_dim]
    float* weights;  // [lines, 64]
};

// Walks over the keys of a sequence: the offset of one key head's row in the pages.
class KeyWalk {
public:
    KeyWalk(const PagedAttention& args, int64_t sequence, int64_t kv_head, int64_t key)
        : page_(args.page_table + sequence * args.table_width + key / args.page_size),
          row_(key % args.page_size),
          page_size_(args.page_size),
          row_stride_(args.kv_heads * args.dim),
          head_offset_(kv_head * args.dim) {}

    int64_t offset() const { return (int64_t{*page_} * page_size_ + row_) * row_stride_ + head_offset_; }

    void next() {
        if (++row_ < page_size_) return;
        row_ = 0;
        ++page_;
    }

private:
    const int32_t* page_;
    int64_t row_, page_size_, row_stride_, head_offset_;
};

// Rows of one key head lie apart, so the processor does not fetch the next ones by itself.
template <typename Element>
inline void prefetch_row(const PagedAttention& args, int64_t offset) {
    const char* k = reinterpret_cast<const char*>(static_cast<const Element*>(args.k_pages) + offset);
    const char* v = reinterpret_cast<const char*>(static_cast<const Element*>(args.v_pages) + offset);
    for (int64_t i = 0; i < args.dim * static_cast<int64_t>(sizeof(Element)); i += 64) {
        __builtin_prefetch(k + i);
        __builtin_prefetch(v + i);
    }
}

// Element d of row i, for kLanes rows and kLanes numbers from d = 0 on, to to[d * to_stride + i]. A null row is zeros.
template <typename Element>
inline void transpose_block(const Element* const* rows, int64_t first, float* to, int64_t to_stride) {
#if defined(__AVX512F__)
    __m512 row[16], pair[16];
    for (int i = 0; i < 16; ++i) row[i] = rows[i] == nullptr ? _mm512_setzero_ps() : load_as_float(rows[i] + first);
    for (int i = 0; i < 16; i += 2) {
        pair[i] = _mm512_unpacklo_ps(row[i], row[i + 1]);
        pair[i + 1] = _mm512_unpackhi_ps(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        row[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(pair[i]), _mm512_castps_pd(pair[i + 2])));
        row[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(pair[i]), _mm512_castps_pd(pair[i + 2])));
        row[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(pair[i + 1]), _mm512_castps_pd(pair[i + 3])));
        row[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(pair[i + 1]), _mm512_castps_pd(pair[i + 3])));
    }
    // row[4g + j] holds, in its quarters, columns j, 4 + j, 8 + j and 12 + j of rows 4g to 4g + 3.
    for (int j = 0; j < 4; ++j) {
        const __m512 a = _mm512_shuffle_f32x4(row[j], row[4 + j], 0x88), b = _mm512_shuffle_f32x4(row[8 + j], row[12 + j], 0x88);
        const __m512 c = _mm512_shuffle_f32x4(row[j], row[4 + j], 0xdd), d = _mm512_shuffle_f32x4(row[8 + j], row[12 + j], 0xdd);
        store(to + j * to_stride, _mm512_shuffle_f32x4(a, b, 0x88));
        store(to + (4 + j) * to_stride, _mm512_shuffle_f32x4(c, d, 0x88));
        store(to + (8 + j) * to_stride, _mm512_shuffle_f32x4(a, b, 0xdd));
        store(to + (12 + j) * to_stride, _mm512_shuffle_f32x4(c, d, 0xdd));
    }
#else
    for (int i = 0; i < kLanes; ++i) {
        float row[kLanes] = {};
        if (rows[i] != nullptr) store(row, load_as_float(rows[i] + first));
        for (int j = 0; j < kLanes; ++j) to[j * to_stride + i] = row[j];
    }
#endif
}

// Keys `first` to `last` of a sequence into a tile that starts at key `start`; the rest of the tile becomes zeros. On the way
// the rows of the next tile are fetched, as far as there are keys: before `end`.
template <typename Element>
void load_tile(const Job& job, int64_t sequence, int64_t kv_head, int64_t start, int64_t first, int64_t last, int64_t end,
               Tile tile) {
    const PagedAttention& args = job.args;
    const Element* keys[kTileKeys];
    KeyWalk walk(args, sequence, kv_head, first), ahead(args, sequence, kv_head, start + kTileKeys < end ? start + kTileKeys : first);
    for (int64_t key = 0; key < kTileKeys; ++key) {
        if (start + kTileKeys + key < end) {
            prefetch_row<Element>(args, ahead.offset());
            ahead.next();
        }
        float* v = tile.values + key * job.padded_dim;
        keys[key] = nullptr;
        if (start + key < first || start + key >= last) {
            for (int64_t i = 0; i < job.padded_dim; ++i) v[i] = 0.0f;
            continue;
        }
        const int64_t offset = walk.offset();
        walk.next();
        keys[key] = static_cast<const Element*>(args.k_pages) + offset;
        widen(static_cast<const Element*>(args.v_pages) + offset, args.dim, job.padded_dim, v);
    }
    int64_t d = 0;
    for (; d + kLanes <= args.dim; d += kLanes)
        for (int64_t key = 0; key < kTileKeys; key += kLanes) transpose_block(keys + key, d, tile.keys + d * kTileKeys + key, kTileKeys);
    for (; d < job.padded_dim; ++d)
        for (int64_t key = 0; key < kTileKeys; ++key)
            tile.keys[d * kTileKeys + key] = d < args.dim && keys[key] != nullptr ? to_float(keys[key][d]) : 0.0f;
}

// sums[line][0..kVecs vectors) += a[line][0..count) * b[count][kVecs vectors), for kLines lines; each first times fade[line].
template <int kLines, int kVecs>
EXL2_ALWAYS_INLINE void multiply_strip(const float* const* a, int count, const float* b, int64_t b_stride, const float* fade,
                                       float* const* sums) {
    Vec sum[kLines][kVecs];
    for (int line = 0; line < kLines; ++line)
        for (int v = 0; v < kVecs; ++v) sum[line][v] = load(sums[line] + v * kLanes) * splat(fade[line]);
    for (int i = 0; i < count; ++i) {
        Vec row[kVecs];
        for (int v = 0; v < kVecs; ++v) row[v] = load(b + i * b_stride + v * kLanes);
        for (int line = 0; line < kLines; ++line) {
            const Vec factor = splat(a[line][i]);
            for (int v = 0; v < kVecs; ++v) sum[line][v] = mul_add(factor, row[v], sum[line][v]);
        }
    }
    for (int line = 0; line < kLines; ++line)
        for (int v = 0; v < kVecs; ++v) store(sums[line] + v * kLanes, sum[line][v]);
}

// The same for rows of `width` numbers, whole vectors, strip by strip.
template <int kLines>
void multiply_lines(const float* const* a, int count, const float* b, int64_t width, const float* fade, float* const* sums) {
    int64_t n = 0;
    float* at[kLines];
    const auto strip = [&](auto vecs) {
        for (int line = 0; line < kLines; ++line) at[line] = sums[line] + n;
        multiply_strip<kLines, decltype(vecs)::value>(a, count, b + n, width, fade, at);
        n += decltype(vecs)::value * kLanes;
    };
    while (n + kStripVecs * kLanes <= width) strip(std::integral_constant<int, kStripVecs>{});
    while (n < width) strip(std::integral_constant<int, 1>{});
}

// Take the keys of a tile into kLines lines. `weights`: [kLines, 64].
template <int kLines>
void attend(const Job& job, Line* lines, int64_t start, Tile tile, float* weights) {
    const float *query[kLines], *weight[kLines];
    float *scores[kLines], *output[kLines], fade[kLines] = {};
    for (int line = 0; line < kLines; ++line) {
        query[line] = lines[line].query;
        output[line] = lines[line].output;
        weight[line] = scores[line] = weights + line * kTileKeys;
        for (int key = 0; key < kTileKeys; ++key) scores[line][key] = 0.0f;
    }
    multiply_lines<kLines>(query, static_cast<int>(job.padded_dim), tile.keys, kTileKeys, fade, scores);
    for (int i = 0; i < kLines; ++i) {
        Line& line = lines[i];
        // Keys of the tile that this line sees: those from `first` on, before `last`.
        const int64_t first = line.first_key > start ? line.first_key - start : 0, last = line.last_key - start;
        Vec largest = splat(line.maximum);
        for (int key = 0; key < kTileKeys; key += kLanes) {
            const VecInt place = lane_numbers() + key;
            const VecInt seen = (place >= static_cast<int32_t>(first)) & (place < static_cast<int32_t>(last < kTileKeys ? last : kTileKeys));
            const Vec score = select(seen, load(scores[i] + key) * splat(job.args.softmax_scale), splat(kMinusInfinity));
            store(scores[i] + key, score);
            largest = select(score > largest, score, largest);
        }
        const float maximum = lane_maximum(largest);
        // With every score at minus infinity there is nothing to subtract.
        const float shift = maximum == kMinusInfinity ? 0.0f : maximum;
        Wide sum = wide_zero();
        for (int key = 0; key < kTileKeys; key += kWideLanes) {
            for (int part = 0; part < kWideParts; ++part) {
                const Vec one = exp_vec(load(scores[i] + key + part * kLanes) - shift);
                store(scores[i] + key + part * kLanes, one);
                sum.part[part] += one;
            }
        }
        float faded[kLanes];
        store(faded, exp_vec(splat(line.maximum - shift)));
        fade[i] = faded[0];
        line.sum = line.sum * fade[i] + wide_sum(sum);
        line.maximum = maximum;
    }
    multiply_lines<kLines>(weight, kTileKeys, tile.values, job.padded_dim, fade, output);
}

template <int kLines>
void attend_some(int64_t count, const Job& job, Line* lines, int64_t start, Tile tile) {
    if (count == kLines) return attend<kLines>(job, lines, start, tile, tile.weights);
    if constexpr (kLines > 1) attend_some<kLines - 1>(count, job, lines, start, tile);
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
    float* memory = scratch(0, static_cast<size_t>(line_floats + 2 * tile_floats + kLinesTogether * kTileKeys +
                                                   2 * n_lines * job.padded_dim));
    if (memory == nullptr) return false;
    Line* lines = reinterpret_cast<Line*>(memory);
    const Tile tile{memory + line_floats, memory + line_floats + tile_floats, memory + line_floats + 2 * tile_floats};
    float* queries = tile.weights + kLinesTogether * kTileKeys;
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
        const int64_t from = start > first_key ? start : first_key, next = start + kTileKeys;
        const int64_t to = next < last_key ? next : last_key;
        load_tile<Element>(job, block.sequence, kv_head, start, from, to, last_key, tile);
        for (int64_t i = 0; i < n_lines; i += kLinesTogether)
            attend_some<kLinesTogether>(n_lines - i < kLinesTogether ? n_lines - i : kLinesTogether, job, lines + i, start, tile);
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
    const Job job{args, blocks, (args.dim + kWideLanes - 1) / kWideLanes * kWideLanes};
    Task task = attend_block<float>;
    if (args.dtype == kFloat16) task = attend_block<Half>;
    if (args.dtype == kBfloat16) task = attend_block<Bfloat>;
    return run_tasks(n_blocks * args.kv_heads, cost, task, &job) ? kOk : kNoMemory;
}

}  // namespace EXL2_LEVEL
}  // namespace exl2
