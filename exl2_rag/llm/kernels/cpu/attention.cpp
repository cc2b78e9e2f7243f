// Causal attention over the paged cache, plain or quantised. One task: a block of query rows, with all query heads that
// share one key head; a row with one of those heads is a line. The rows of a block are up to 16 of one sequence, or those
// of several sequences that share pages.
//
// Keys are taken in tiles of 64, on a grid that starts at position 0. The tiles of shared pages are read once for all lines of
// the block, the rest for the lines of each sequence:
//
//     position      0      64     128    192    256
//     tile          |  0   |  1   |  2   |  3   |  4 ...
//     sequence 0    [-- shared pages --]xxxxxxxxx              tiles 0 and 1: once, with the lines of both
//     sequence 1    [-- shared pages --]yyyyy                  tile 2 on: each for itself
//
//     scores [line][64]   += q[line][d] * keys[d][64]            for d = 0, 1, ...
//     output [line][D]    += weights[line][key] * values[key][D] for key = 0, 1, ...
//
// Both are small matrix products of a few lines at a time: sums stay in registers, and of keys and values so much is widened
// to float32 at a time (32 keys, turned on their side; a strip of columns of the values) as the first cache holds. Lines that
// fit the registers together take values straight from the page.
//
// Per line a running maximum m, sum l and output o (the online softmax of flash attention):
//     m' = max(m, scores of the tile);  o = o * exp(m - m') + sum of exp(s - m') v;  l likewise;  result o / l
// A sink is one more score at the end, without a value. A line meets the same tiles with the same keys in the same order
// whatever it shares a task with, so its result depends on its own position and cache alone, bit for bit. Keys that it must
// not see get the weight 0.
#include <stdint.h>

#include <type_traits>

#include "hadamard.h"
#include "ops.h"
#include "pages.h"
#include "simd.h"

namespace exl2 {
namespace EXL2_LEVEL {
namespace {

constexpr int kQueryRows = 16;
constexpr int kTileKeys = 64;
constexpr int kBlockKeys = 32;   // turned on their side at a time: 16 KiB with heads of 128
constexpr int kSharedLines = 128;  // of a block that shares pages: beside them, loading a tile costs 3 %
constexpr int kLeastSharedLines = 32;
constexpr int kEnoughTasks = 16;   // of an op: threads that start together then end together
constexpr float kMinusInfinity = -__builtin_inff();

// Lines that go together, and how many vectors of each: as many sums as the registers hold, independent of each other.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMostLines = 8;
#else
constexpr int kMostLines = 4;
#endif
constexpr int strip_vecs(int lines) { return lines > kMostLines / 2 ? 2 : 4; }
constexpr int kStrip = 4 * kLanes;  // columns of the values that are widened at a time

static_assert(kBlockKeys % (2 * kLanes) == 0 && kTileKeys % kBlockKeys == 0, "keys are taken in whole vectors");

struct Block {
    int32_t first_sequence, last_sequence, first_row, last_row;  // half-open; rows of q
    int64_t shared_keys;  // whole tiles that are the same for all its sequences
};

struct Job {
    PagedAttention args;
    const Block* blocks;
    int64_t n_blocks;
    int64_t padded_dim;  // whole vectors, and a multiple of 16
};

// One row and head on its way.
struct Line {
    float maximum, sum;
    float *output, *scores;
    const float* query;
    int64_t first_key, last_key;  // half-open
};

// Memory of one task.
struct Buffers {
    float* keys;    // [dim, 32]
    float* values;  // [64, kStrip]
};

// The rows in the pages of keys start to start + 64 that lie before `end`.
struct TileRows {
    int64_t start, count;
    int64_t row[kTileKeys];

    TileRows(const PagedAttention& args, int64_t sequence, int64_t kv_head, int64_t start_key, int64_t end) : start(start_key) {
        fill(args, sequence, kv_head, end);
    }

    // On to the next tile. Beyond the last one `row` stays as it is, and `count` is 0.
    void advance(const PagedAttention& args, int64_t sequence, int64_t kv_head, int64_t end) {
        start += kTileKeys;
        fill(args, sequence, kv_head, end);
    }

private:
    void fill(const PagedAttention& args, int64_t sequence, int64_t kv_head, int64_t end) {
        count = end - start < kTileKeys ? end - start : kTileKeys;
        if (count <= 0) return;
        const int32_t* page = args.page_table + sequence * args.table_width + start / args.page_size;
        int64_t place = start % args.page_size;
        for (int64_t i = 0; i < count; ++i) {
            row[i] = (int64_t{*page} * args.page_size + place) * args.kv_heads + kv_head;
            if (++place == args.page_size) {
                place = 0;
                ++page;
            }
        }
    }
};

// Numbers d to d + kLanes of kLanes rows, number j of row i to to[j * to_stride + i]. Of rows from `count` on, unless kWhole:
// zeros.
template <bool kWhole, typename Pages>
inline void transpose_block(const Pages& pages, const int64_t* rows, int64_t count, int64_t d, float* to, int64_t to_stride) {
#if defined(__AVX512F__)
    __m512 row[16], pair[16];
    for (int i = 0; i < 16; ++i) row[i] = kWhole || i < count ? pages.load(rows[i], d) : _mm512_setzero_ps();
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
        const __m512 c = _mm512_shuffle_f32x4(row[j], row[4 + j], 0xdd), e = _mm512_shuffle_f32x4(row[8 + j], row[12 + j], 0xdd);
        store(to + j * to_stride, _mm512_shuffle_f32x4(a, b, 0x88));
        store(to + (4 + j) * to_stride, _mm512_shuffle_f32x4(c, e, 0x88));
        store(to + (8 + j) * to_stride, _mm512_shuffle_f32x4(a, b, 0xdd));
        store(to + (12 + j) * to_stride, _mm512_shuffle_f32x4(c, e, 0xdd));
    }
#else
    for (int i = 0; i < kLanes; ++i) {
        float row[kLanes] = {};
        if (kWhole || i < count) store(row, pages.load(rows[i], d));
        for (int j = 0; j < kLanes; ++j) to[j * to_stride + i] = row[j];
    }
#endif
}

// Keys first to first + 32 of a tile, turned on their side. On the way their values are fetched: rows of one key head lie
// apart, so the processor does not see them coming, and it can wait for some twenty lines at a time, not for a whole tile.
template <typename Pages>
void load_keys(const Pages& pages, const Pages& values, const TileRows& tile, int64_t first, int64_t dim, float* keys) {
    for (int64_t key = 0; key < kBlockKeys; key += kLanes) {
        const int64_t* rows = tile.row + first + key;
        const int64_t count = tile.count - first - key;
        int64_t d = 0;
        if (count >= kLanes) {
            for (; d + kLanes <= dim; d += kLanes) {
                for (int i = 0; i < kLanes; ++i) values.prefetch(rows[i], d);
                transpose_block<true>(pages, rows, count, d, keys + d * kBlockKeys + key, kBlockKeys);
            }
        } else {
            for (; d + kLanes <= dim; d += kLanes)
                transpose_block<false>(pages, rows, count, d, keys + d * kBlockKeys + key, kBlockKeys);
        }
        for (; d < dim; ++d)
            for (int64_t i = 0; i < kLanes; ++i) keys[d * kBlockKeys + key + i] = i < count ? pages.one(rows[i], d) : 0.0f;
    }
}

// Columns first to first + kStrip of a tile's values, as far as there are any. On the way the next keys are fetched.
template <typename Pages>
void load_values(const Pages& pages, const Pages& keys, const TileRows& tile, const TileRows& next, int64_t first, int64_t dim,
                 float* values) {
    for (int64_t key = 0; key < tile.count; ++key) {
        float* to = values + key * kStrip;
        for (int v = 0; v < kStrip; v += kLanes) {
            const int64_t d = first + v;
            if (d + kLanes <= dim) {
                if (key < next.count) keys.prefetch(next.row[key], d);
                store(to + v, pages.load(tile.row[key], d));
            } else {
                for (int i = 0; i < kLanes; ++i) to[v + i] = d + i < dim ? pages.one(tile.row[key], d + i) : 0.0f;
            }
        }
    }
}

// sums[line][v] = start(line, v) + a[line][0..count) * b(0..count, v), for kLines lines and kVecs vectors v of each.
template <int kLines, int kVecs, typename Start, typename Load>
EXL2_ALWAYS_INLINE void multiply_strip(const float* const* a, int64_t count, Start start, Load b, float* const* sums) {
    Vec sum[kLines][kVecs];
    for (int line = 0; line < kLines; ++line)
        for (int v = 0; v < kVecs; ++v) sum[line][v] = start(line, v);
    for (int64_t i = 0; i < count; ++i) {
        Vec row[kVecs];
        for (int v = 0; v < kVecs; ++v) row[v] = b(i, v);
        for (int line = 0; line < kLines; ++line) {
            const Vec factor = splat(a[line][i]);
            for (int v = 0; v < kVecs; ++v) sum[line][v] = mul_add(factor, row[v], sum[line][v]);
        }
    }
    for (int line = 0; line < kLines; ++line)
        for (int v = 0; v < kVecs; ++v) store(sums[line] + v * kLanes, sum[line][v]);
}

// Scores of 32 keys, for kLines lines.
template <int kLines>
struct Scores {
    static void take(const Line* lines, const float* keys, int64_t dim, int64_t first) {
        const float* query[kLines];
        float* scores[kLines];
        for (int line = 0; line < kLines; ++line) query[line] = lines[line].query;
        constexpr int kVecs = strip_vecs(kLines) * kLanes <= kBlockKeys ? strip_vecs(kLines) : kBlockKeys / kLanes;
        for (int key = 0; key < kBlockKeys; key += kVecs * kLanes) {
            for (int line = 0; line < kLines; ++line) scores[line] = lines[line].scores + first + key;
            multiply_strip<kLines, kVecs>(
                query, dim, [](int, int) { return Vec{}; },
                [&](int64_t d, int v) { return load(keys + d * kBlockKeys + key + v * kLanes); }, scores);
        }
    }
};

// Columns `column` to `column` + n_vecs vectors of the outputs, for kLines lines: each first times its fade, which is kept
// where its weights end.
template <int kLines, typename Load>
EXL2_ALWAYS_INLINE void mix_values(const Line* lines, const float* fades, int64_t count, int64_t column, int64_t n_vecs, Load b) {
    const float* weights[kLines];
    float* outputs[kLines];
    int64_t done = 0;
    for (int line = 0; line < kLines; ++line) weights[line] = lines[line].scores;
    const auto strip = [&](auto vecs) {
        for (int line = 0; line < kLines; ++line) outputs[line] = lines[line].output + column + done * kLanes;
        multiply_strip<kLines, decltype(vecs)::value>(
            weights, count, [&](int line, int v) { return load(outputs[line] + v * kLanes) * splat(fades[line]); },
            [&](int64_t key, int v) { return b(key, done + v); }, outputs);
        done += decltype(vecs)::value;
    };
    while (done + strip_vecs(kLines) <= n_vecs) strip(std::integral_constant<int, strip_vecs(kLines)>{});
    while (done < n_vecs) strip(std::integral_constant<int, 1>{});
}

template <int kLines>
struct StripOfValues {
    static void take(const Line* lines, const float* fades, const float* values, int64_t count, int64_t column, int64_t n_vecs) {
        mix_values<kLines>(lines, fades, count, column, n_vecs, [&](int64_t key, int64_t v) { return load(values + key * kStrip + v * kLanes); });
    }
};

template <int kLines>
struct ValuesOfPages {
    template <typename Pages>
    static void take(const Line* lines, const float* fades, const Pages& pages, const Pages& keys, const TileRows& tile,
                     const TileRows& next, int64_t dim) {
        // Where there is no next tile, its rows are those of this one.
        mix_values<kLines>(lines, fades, tile.count, 0, dim / kLanes, [&](int64_t key, int64_t v) {
            keys.prefetch(next.row[key], v * kLanes);
            return pages.load(tile.row[key], v * kLanes);
        });
    }
};

// Call Step<count>::take(arguments...), 1 <= count <= kLines.
template <template <int> class Step, int kLines = kMostLines, typename... Arguments>
void take_some(int64_t count, const Arguments&... arguments) {
    if (count == kLines) return Step<kLines>::take(arguments...);
    if constexpr (kLines > 1) take_some<Step, kLines - 1>(count, arguments...);
}

// tanh to about an ulp: an odd polynomial near 0 (Cephes' coefficients), elsewhere 1 - 2 / (e^2x + 1).
inline Vec tanh_vec(Vec x) {
    const Vec square = x * x;
    Vec p = splat(-5.70498872745e-3f);
    p = mul_add(p, square, splat(2.06390887954e-2f));
    p = mul_add(p, square, splat(-5.37397155531e-2f));
    p = mul_add(p, square, splat(1.33314422036e-1f));
    p = mul_add(p, square, splat(-3.33332819422e-1f));
    const Vec near = mul_add(p * square, x, x), magnitude = select(x < 0.0f, -x, x);
    const Vec far = 1.0f - splat(2.0f) / (exp_vec(magnitude + magnitude) + 1.0f);
    return select(magnitude < 0.625f, near, select(x < 0.0f, -far, far));
}

// From the scores of a tile to the weights of its keys. Returns what earlier sums are to be multiplied by.
float weigh(const PagedAttention& args, Line& line, int64_t start) {
    // Keys of the tile that this line sees: those from `first` on, before `last`.
    const int64_t first = line.first_key > start ? line.first_key - start : 0;
    const int64_t last = line.last_key - start < kTileKeys ? line.last_key - start : kTileKeys;
    Vec largest = splat(line.maximum);
    for (int key = 0; key < kTileKeys; key += kLanes) {
        const VecInt place = lane_numbers() + key;
        const VecInt seen = (place >= static_cast<int32_t>(first)) & (place < static_cast<int32_t>(last));
        Vec score = load(line.scores + key) * splat(args.softmax_scale);
        if (args.softcap > 0.0f) score = splat(args.softcap) * tanh_vec(score / splat(args.softcap));
        score = select(seen, score, splat(kMinusInfinity));
        store(line.scores + key, score);
        largest = select(score > largest, score, largest);
    }
    const float maximum = lane_maximum(largest);
    // With every score at minus infinity there is nothing to subtract.
    const float shift = maximum == kMinusInfinity ? 0.0f : maximum;
    Wide sum = wide_zero();
    for (int key = 0; key < kTileKeys; key += kWideLanes) {
        for (int part = 0; part < kWideParts; ++part) {
            const Vec one = exp_vec(load(line.scores + key + part * kLanes) - shift);
            store(line.scores + key + part * kLanes, one);
            sum.part[part] += one;
        }
    }
    const float fade = exp_vec(splat(line.maximum - shift))[0];
    line.sum = line.sum * fade + wide_sum(sum);
    line.maximum = maximum;
    return fade;
}

// Take the keys of a tile into lines.
template <typename Pages>
void attend_tile(const Job& job, const Pages& k, const Pages& v, Line* lines, int64_t n_lines, const TileRows& tile,
                 const TileRows& next, const Buffers& buffers, float* fades) {
    const int64_t dim = job.args.dim;
    for (int64_t first = 0; first < kTileKeys; first += kBlockKeys) {
        load_keys(k, v, tile, first, dim, buffers.keys);
        for (int64_t i = 0; i < n_lines; i += kMostLines)
            take_some<Scores>(n_lines - i < kMostLines ? n_lines - i : kMostLines, lines + i, buffers.keys, dim, first);
    }
    for (int64_t i = 0; i < n_lines; ++i) fades[i] = weigh(job.args, lines[i], tile.start);
    if (n_lines <= kMostLines && dim % kLanes == 0) return take_some<ValuesOfPages>(n_lines, lines, fades, v, k, tile, next, dim);
    for (int64_t column = 0; column < job.padded_dim; column += kStrip) {
        load_values(v, k, tile, next, column, dim, buffers.values);
        const int64_t left = (job.padded_dim - column) / kLanes, n_vecs = left < kStrip / kLanes ? left : kStrip / kLanes;
        for (int64_t i = 0; i < n_lines; i += kMostLines)
            take_some<StripOfValues>(n_lines - i < kMostLines ? n_lines - i : kMostLines, lines + i, fades + i, buffers.values,
                                     tile.count, column, n_vecs);
    }
}

// Keys first to last of a sequence, half-open, into lines.
template <typename Pages>
void attend_keys(const Job& job, const Pages& k, const Pages& v, int64_t sequence, int64_t kv_head, int64_t first, int64_t last,
                 Line* lines, int64_t n_lines, const Buffers& buffers, float* fades) {
    if (first >= last || n_lines == 0) return;
    TileRows next(job.args, sequence, kv_head, first / kTileKeys * kTileKeys, last);
    while (next.count > 0) {
        const TileRows tile = next;
        next.advance(job.args, sequence, kv_head, last);
        attend_tile(job, k, v, lines, n_lines, tile, next, buffers, fades);
    }
}

template <typename Pages>
bool attend_block(const void* context, int64_t task) {
    const Job& job = *static_cast<const Job*>(context);
    const PagedAttention& args = job.args;
    // Neighbouring tasks: the key heads of a block, whose rows lie side by side.
    const Block block = job.blocks[task / args.kv_heads];
    const int64_t kv_head = task % args.kv_heads, repeats = args.heads / args.kv_heads;
    const int64_t n_lines = (block.last_row - block.first_row) * repeats;
    const int64_t line_floats = (n_lines * static_cast<int64_t>(sizeof(Line)) + 63) / 64 * 16;
    const int64_t per_line = 2 * job.padded_dim + kTileKeys + 1;
    float* memory = scratch(0, static_cast<size_t>(line_floats + job.padded_dim * kBlockKeys + kTileKeys * kStrip + n_lines * per_line));
    if (memory == nullptr) return false;
    Line* lines = reinterpret_cast<Line*>(memory);
    const Buffers buffers{memory + line_floats, memory + line_floats + job.padded_dim * kBlockKeys};
    float* queries = buffers.values + kTileKeys * kStrip;
    float* outputs = queries + n_lines * job.padded_dim;
    float* scores = outputs + n_lines * job.padded_dim;
    float* fades = scores + n_lines * kTileKeys;
    const Pages k(args.k_pages, args.k_scales, args.dim), v(args.v_pages, args.v_scales, args.dim);

    int64_t first_key = INT64_MAX, sequence = block.first_sequence;
    for (int64_t i = 0; i < n_lines; ++i) {
        const int64_t row = block.first_row + i / repeats, head = kv_head * repeats + i % repeats;
        while (row >= args.query_starts[sequence + 1]) ++sequence;
        const int64_t position = row + args.context_lens[sequence] - args.query_starts[sequence + 1];
        Line& line = lines[i];
        line = {kMinusInfinity, 0.0f, outputs + i * job.padded_dim, scores + i * kTileKeys, queries + i * job.padded_dim, 0, position + 1};
        if (args.window > 0 && position + 1 > args.window) line.first_key = position + 1 - args.window;
        const float* q = args.q + (row * args.heads + head) * args.dim;
        for (int64_t d = 0; d < args.dim; ++d) queries[i * job.padded_dim + d] = q[d];
        for (int64_t d = 0; d < job.padded_dim; ++d) line.output[d] = 0.0f;
        first_key = line.first_key < first_key ? line.first_key : first_key;
    }
    attend_keys(job, k, v, block.first_sequence, kv_head, first_key, block.shared_keys, lines, n_lines, buffers, fades);
    int64_t done = 0;
    for (sequence = block.first_sequence; sequence < block.last_sequence; ++sequence) {
        const int64_t row_end = args.query_starts[sequence + 1];
        const int64_t end = ((row_end < block.last_row ? row_end : block.last_row) - block.first_row) * repeats;
        if (end <= done) continue;
        // The first row's window begins first, the last row sees most.
        const int64_t first = lines[done].first_key > block.shared_keys ? lines[done].first_key : block.shared_keys;
        attend_keys(job, k, v, sequence, kv_head, first, lines[end - 1].last_key, lines + done, end - done, buffers, fades);
        done = end;
    }
    for (int64_t i = 0; i < n_lines; ++i) {
        const int64_t row = block.first_row + i / repeats, head = kv_head * repeats + i % repeats;
        Line& line = lines[i];
        float fade = 1.0f;
        if (args.sinks != nullptr) {
            const float sink = args.sinks[head], maximum = sink > line.maximum ? sink : line.maximum;
            fade = exp_vec(splat(line.maximum - maximum))[0];
            line.sum = line.sum * fade + exp_vec(splat(sink - maximum))[0];
        }
        float* y = args.y + (row * args.heads + head) * args.dim;
        for (int64_t d = 0; d < args.dim; ++d) y[d] = line.output[d] * fade / line.sum;
        if (args.k_scales != nullptr) rotate_basis(y, args.dim, args.rotation_factor);
    }
    return true;
}

// Whether all lengths and pages are in range; counts the multiply-adds on the way.
bool check_batch(const PagedAttention& args, int64_t& cost) {
    cost = 0;
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
        cost += count * context_len * args.heads * args.dim * 2;
    }
    return true;
}

// Whether the groups are a partition of the batch whose sequences share what they say.
bool check_groups(const PagedAttention& args) {
    if (args.group_starts[0] != 0 || args.group_starts[args.n_groups] != args.batch) return false;
    for (int64_t group = 0; group < args.n_groups; ++group) {
        const int32_t first = args.group_starts[group], last = args.group_starts[group + 1], n_pages = args.group_prefix_pages[group];
        if (first > last || n_pages < 0 || n_pages > args.table_width) return false;
        for (int32_t b = first + 1; b < last; ++b)
            for (int32_t page = 0; page < n_pages; ++page)
                if (args.page_table[b * args.table_width + page] != args.page_table[first * args.table_width + page]) return false;
    }
    return true;
}

// The blocks of sequences first to last, half-open, each up to `most_rows` rows.
int64_t cut(const PagedAttention& args, int32_t first, int32_t last, int64_t most_rows, int64_t shared_keys, Block* to) {
    int64_t n_blocks = 0;
    int32_t b = first;
    for (int32_t row = args.query_starts[first]; row < args.query_starts[last];) {
        const int64_t left = args.query_starts[last] - row;
        const int32_t end = row + static_cast<int32_t>(left < most_rows ? left : most_rows);
        while (args.query_starts[b + 1] <= row) ++b;
        int32_t last_b = b + 1;
        while (args.query_starts[last_b] < end) ++last_b;
        if (to != nullptr) to[n_blocks] = {b, last_b, row, end, shared_keys};
        ++n_blocks;
        row = end;
    }
    return n_blocks;
}

// All blocks, counted or written. `shared_rows`: most rows of a block whose sequences share pages.
int64_t make_blocks(const PagedAttention& args, int64_t shared_rows, Block* to) {
    int64_t n_blocks = 0;
    for (int64_t group = 0; group < args.n_groups; ++group) {
        const int32_t first = args.group_starts[group], last = args.group_starts[group + 1];
        int64_t shared_keys = int64_t{args.group_prefix_pages[group]} * args.page_size;
        for (int32_t b = first; b < last; ++b) {
            // Every new token of the group sees all keys before its sequence's first new one.
            const int64_t old = args.context_lens[b] - (args.query_starts[b + 1] - args.query_starts[b]);
            shared_keys = old < shared_keys ? old : shared_keys;
        }
        shared_keys = last - first < 2 ? 0 : shared_keys / kTileKeys * kTileKeys;
        if (shared_keys > 0) {
            n_blocks += cut(args, first, last, shared_rows, shared_keys, to == nullptr ? nullptr : to + n_blocks);
            continue;
        }
        for (int32_t b = first; b < last; ++b) n_blocks += cut(args, b, b + 1, kQueryRows, 0, to == nullptr ? nullptr : to + n_blocks);
    }
    if (args.n_groups == 0)
        for (int32_t b = 0; b < args.batch; ++b) n_blocks += cut(args, b, b + 1, kQueryRows, 0, to == nullptr ? nullptr : to + n_blocks);
    return n_blocks;
}

}  // namespace

int paged_attention(const PagedAttention& args) {
    int64_t cost;
    if (!check_batch(args, cost) || (args.n_groups > 0 && !check_groups(args))) return kOutOfRange;
    const int64_t repeats = args.heads / args.kv_heads;
    int64_t shared_lines = kSharedLines, n_blocks;
    const auto rows_of = [&](int64_t lines) { return lines < repeats ? 1 : lines / repeats; };
    for (;; shared_lines /= 2) {
        n_blocks = make_blocks(args, rows_of(shared_lines), nullptr);
        if (n_blocks * args.kv_heads >= kEnoughTasks || shared_lines <= kLeastSharedLines) break;
    }
    static_assert(sizeof(Block) % sizeof(float) == 0, "blocks are counted in floats");
    Block* blocks = reinterpret_cast<Block*>(scratch(1, static_cast<size_t>(n_blocks + 1) * sizeof(Block) / sizeof(float)));
    if (blocks == nullptr) return kNoMemory;
    make_blocks(args, rows_of(shared_lines), blocks);
    const Job job{args, blocks, n_blocks, (args.dim + kWideLanes - 1) / kWideLanes * kWideLanes};
    Task task = attend_block<PlainPages<float>>;
    if (args.dtype == kFloat16) task = attend_block<PlainPages<Half>>;
    if (args.dtype == kBfloat16) task = attend_block<PlainPages<Bfloat>>;
    if (args.dtype == kQ8) task = attend_block<QuantisedPages<8>>;
    if (args.dtype == kQ6) task = attend_block<QuantisedPages<6>>;
    if (args.dtype == kQ4) task = attend_block<QuantisedPages<4>>;
    return run_tasks(n_blocks * args.kv_heads, cost, task, &job) ? kOk : kNoMemory;
}

}  // namespace EXL2_LEVEL
}  // namespace exl2
