// Causal attention over pages on tensor cores; one instance a kind of page.
//
//     y[t, h] = sum over keys s that t sees of softmax_s(shape(q[t, h] . k[s, h'])) v[s, h'],   h' = h / (H / KH)
//
//     q            [T, H, terms, D] float16 (bfloat16 with bfloat16 pages); D a multiple of 8 (of 32 for quantised
//                                   pages), at most 256. Two terms are a number and what rounding it left, see below
//     k, v         [P, PS, KH, ...] see kv_pages.cuh; scales [P, PS, KH, D/32] float16 for quantised ones
//     page_table   [B, MP]          int32; PS a multiple of 16, so that 16 keys lie in one page
//     partials     see attention_batch.cuh; `attention_combine.cu` makes y of them
//
// One block of four warps: a tile of up to 64 lines, one key head, one split of 256 keys (or all splits in turn where a
// unit loops). All query heads of a key head, and in the prefix pass all sequences of a group, share its loads.
//
//     unit of few lines (decode)    warp w: all lines, span w of the split; then folded across the warps
//     unit of more lines            warp w: lines 16w to 16w + 15, all four spans in order
//
// Few are up to `apart_lines`: 16, but 8 for heads of more than 128, as shared memory has no more room. A warp takes a
// span as four steps of 16 keys. K, V and Q go straight from global memory to registers, 16 bytes a lane (less when
// quantised): the numbers of a head are permuted so that what a lane needs for its fragments is contiguous. With
// g = lane / 4 and c = lane % 4:
//
//     S = Q K^T    lane loads numbers 32i + 8c to + 7 of keys g and g + 8: of chunk i the first four are its B fragment
//                  of one k16 step, the last four that of the next. Q is permuted alike.
//     O = P V      lane loads numbers 64u + 8g to + 7 of keys 2c, 2c + 1, 2c + 8, 2c + 9: number 8g + t is column g of
//                  n8 tile t, and pairs of keys are made with byte permutes. Of O a lane then has numbers
//                  64u + 16c to + 15 of lines g and g + 8.
//
// The output of the split so far stands in shared memory, in fragments: a lane finds its own numbers there, and in the
// decode layout the same lane of every warp has the same ones.
//
// With two terms, Q and P are each the sum of two 16-bit numbers, which doubles the (few) tensor-core instructions and
// leaves nothing lost but the last bits: 22 with float16, 16 with bfloat16.
//
// The caller guarantees: blockDim.x = 128; contexts and tables in range; dynamic shared memory as
// `cuda_attention.py` computes it; all vectors aligned to 16 bytes.
//
// Idea of online softmax over tiles: flash attention; of splitting the keys: flash decoding. Reading fragments without
// shared memory and the fixed grid of splits are our own.
#pragma once

#include "attention_batch.cuh"
#include "kv_pages.cuh"

#ifndef EXL2_PAGES
#error "define EXL2_PAGES before including paged_attention.cuh"
#endif

namespace exl2 {

constexpr int kTileLines = 64;
constexpr int kWarpLines = 16;
constexpr int kAttentionWarps = 4;
struct Source {
    const unsigned short* q;
    const unsigned char* k;
    const unsigned char* v;
    const __half* k_scales;
    const __half* v_scales;
    const int* page_table;
    int table_width;
    int dim;
};

__device__ __forceinline__ unsigned pack_half(float low, float high, bool bfloat) {
    if (bfloat) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<const unsigned*>(&pair);
    }
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
}

// What pack_half lost.
__device__ __forceinline__ unsigned pack_rest(float low, float high, unsigned packed, bool bfloat) {
    float2 kept;
    if (bfloat) kept = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&packed));
    else kept = __half22float2(*reinterpret_cast<const __half2*>(&packed));
    return pack_half(low - kept.x, high - kept.y, bfloat);
}

template <int kPages>
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    const unsigned b[2] = {b0, b1};
#if EXL2_ARCH >= 80
    if (kPages == kBfloat16) {
        mma_m16n8k16_bf16_f32(c, a, b);
        return;
    }
#endif
    mma_m16n8k16_f16_f32(c, a, b);
}

// The sum or the maximum over the four lanes that have the columns of one line.
__device__ __forceinline__ float line_sum(float x) {
    x += __shfl_xor_sync(kAllLanes, x, 1);
    return x + __shfl_xor_sync(kAllLanes, x, 2);
}
__device__ __forceinline__ float line_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
    return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// The two lines of a lane, g and g + 8 of a warp's 16: row * heads + head, and the keys [first, last) that they see.
struct OwnLines {
    int query[2];
    int first[2], last[2];

    __device__ __forceinline__ bool touches(int i, int split) const {
        return first[i] < last[i] && first[i] / kSplitKeys <= split && split <= (last[i] - 1) / kSplitKeys;
    }
    __device__ __forceinline__ bool sees(int begin, int end) const {  // whether either sees a key of [begin, end)
        return (first[0] < end && last[0] > begin) || (first[1] < end && last[1] > begin);
    }
};

// What they have of a split so far; their outputs are in shared memory.
struct State {
    float maximum[2], sum[2];
    bool is_empty;  // no span was folded in, and shared memory holds nothing; the same in all lanes
};

// Four numbers of O: numbers 64u + 16c + 8(e % 2) + 4f to + 3 of line g + 8(e / 2), in the fragments of one warp, which
// has `columns` times 64 numbers. The second half of the lines comes after all of the first, and may be missing.
__device__ __forceinline__ float4& output_at(float4* outputs, int columns, int u, int e, int f) {
    const int number = ((e / 2 * columns + u) * 2 + e % 2) * 2 + f;
    return outputs[number * kWarpThreads + threadIdx.x % kWarpThreads];
}

// Fold one span into `state` and `outputs`.
//     all_lines    whether `outputs` has room for lines 8 to 15
//     is_alone     whether no other warp takes the span
//     pages        the row of the page table
template <int kPages, int kTerms>
__device__ __forceinline__ void attend_span(State& state, float4* outputs, const Source& from,
                                            const OwnLines& lines, bool all_lines, bool is_alone, const int* pages,
                                            const Batch& batch, int kv_head, int span_key, int n_keys, float scale,
                                            float softcap) {
    constexpr bool kBfloat = kPages == kBfloat16;
    const int lane = threadIdx.x % kWarpThreads, g = lane / 4, c = lane % 4;
    const int bytes = vector_bytes<kPages>(from.dim), n_groups = from.dim / kQuantGroup, columns = (from.dim + 63) / 64;

    // Lane c finds the row of keys of step c; a step past the end is never read.
    int row_of_step = 0;
    if (span_key + 16 * c < n_keys) {
        const int key = span_key + 16 * c, page = key / batch.page_size;
        row_of_step = pages[page] * batch.page_size + key - page * batch.page_size;
    }
    int vectors[4];  // of the steps: the number of the vector of its first key
#pragma unroll
    for (int j = 0; j < 4; ++j) vectors[j] = __shfl_sync(kAllLanes, row_of_step, j) * batch.kv_heads + kv_head;
    {  // All of K and V is wanted soon: bring it to the L2 cache at once. Lane i: key i / 2 of each step; warps that
       // have the same keys share the steps.
        const int lines = (bytes + 127) / 128;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (span_key + 16 * j + lane / 2 >= n_keys || (!is_alone && j != threadIdx.x / kWarpThreads)) continue;
            const long long at = static_cast<long long>(vectors[j] + lane / 2 * batch.kv_heads) * bytes;
            for (int i = lane % 2; i < lines; i += 2) {
                prefetch_l2(from.k + at + 128 * i);
                prefetch_l2(from.v + at + 128 * i);
            }
        }
    }

    float score[8][4];  // [n8 tile of keys][two keys of line g, two of line g + 8]
#pragma unroll
    for (int t = 0; t < 8; ++t) {
#pragma unroll
        for (int e = 0; e < 4; ++e) score[t][e] = 0.0f;
    }
    // Not unrolled: eight loads of 16 bytes a lane are enough on their way, and more would not fit the registers.
#pragma unroll 1
    for (int i = 0; i < (from.dim + 31) / 32; ++i) {
        const bool is_inside = 32 * i + 8 * c < from.dim;
        uint4 query[kTerms][2];  // [line]
#pragma unroll
        for (int term = 0; term < kTerms; ++term) {
#pragma unroll
            for (int line = 0; line < 2; ++line) {
                query[term][line] = make_uint4(0, 0, 0, 0);
                if (is_inside) {
                    const unsigned at = (lines.query[line] * kTerms + term) * (from.dim / 8) + 4 * i + c;
                    query[term][line] = __ldg(reinterpret_cast<const uint4*>(from.q) + at);
                }
            }
        }
        Eight<kPages> stored[4][2];
        __half scales[4][2];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int key = 8 * half + g;
                const unsigned vector = vectors[j] + key * batch.kv_heads;
                stored[j][half].clear();
                scales[j][half] = __half();
                if (is_inside && span_key + 16 * j + key < n_keys) {
                    stored[j][half].load(from.k, vector, 4 * i + c, from.dim);
                    if (is_quantised(kPages)) scales[j][half] = __ldg(from.k_scales + vector * n_groups + i);
                }
            }
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                unsigned pairs[4];
                stored[j][half].unpack(scales[j][half], pairs);
#pragma unroll
                for (int term = 0; term < kTerms; ++term) {
                    const uint4 g0 = query[term][0], g8 = query[term][1];
                    const unsigned a0[4] = {g0.x, g8.x, g0.y, g8.y}, a1[4] = {g0.z, g8.z, g0.w, g8.w};
                    multiply<kPages>(score[2 * j + half], a0, pairs[0], pairs[1]);
                    multiply<kPages>(score[2 * j + half], a1, pairs[2], pairs[3]);
                }
            }
        }
    }

    float maximum[2] = {EXL2_MINUS_INFINITY, EXL2_MINUS_INFINITY}, sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int t = 0; t < 8; ++t) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int key = span_key + 8 * t + 2 * c + e % 2, line = e / 2;
            const bool is_seen = lines.first[line] <= key && key < lines.last[line];
            score[t][e] = is_seen ? shape_score(score[t][e], scale, softcap) : EXL2_MINUS_INFINITY;
            maximum[line] = fmaxf(maximum[line], score[t][e]);
        }
    }
#pragma unroll
    for (int line = 0; line < 2; ++line) maximum[line] = line_max(maximum[line]);
#pragma unroll
    for (int t = 0; t < 8; ++t) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int line = e / 2;
            // Where nothing is seen there is nothing to subtract.
            score[t][e] = exp2_approx(score[t][e] - (maximum[line] == EXL2_MINUS_INFINITY ? 0.0f : maximum[line]));
            sum[line] += score[t][e];
        }
    }
    Fold by[2];
#pragma unroll
    for (int line = 0; line < 2; ++line) {
        by[line] = fold(state.maximum[line], state.sum[line], maximum[line], line_sum(sum[line]));
        state.maximum[line] = by[line].maximum;
        state.sum[line] = by[line].sum;
    }

    unsigned weights[4][kTerms][4];  // P as A fragments, by step
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float low = score[2 * j + i / 2][2 * (i % 2)], high = score[2 * j + i / 2][2 * (i % 2) + 1];
            weights[j][0][i] = pack_half(low, high, kBfloat);
            if (kTerms > 1) weights[j][kTerms - 1][i] = pack_rest(low, high, weights[j][0][i], kBfloat);
        }
    }
#pragma unroll 1
    for (int u = 0; u < columns; ++u) {
        float output[8][4];
#pragma unroll
        for (int t = 0; t < 8; ++t) {
#pragma unroll
            for (int e = 0; e < 4; ++e) output[t][e] = 0.0f;
        }
        const bool is_inside = 64 * u + 8 * g < from.dim;
        // Not unrolled, for the same reason. Registers have no index: the steps move up by one instead.
#pragma unroll 1
        for (int j = 0; j < 4; ++j) {
            unsigned pairs[4][4];  // [key][two numbers]
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int key = 2 * c + i % 2 + 8 * (i / 2);
                const unsigned vector = vectors[0] + key * batch.kv_heads;
                Eight<kPages> stored;
                __half value_scale = __half();
                stored.clear();
                if (is_inside && span_key + 16 * j + key < n_keys) {
                    stored.load(from.v, vector, 8 * u + g, from.dim);
                    if (is_quantised(kPages)) value_scale = __ldg(from.v_scales + vector * n_groups + 2 * u + g / 4);
                }
                stored.unpack(value_scale, pairs[i]);
            }
#pragma unroll
            for (int t = 0; t < 8; ++t) {
                const unsigned halves = t % 2 == 0 ? 0x5410u : 0x7632u;
                const unsigned b0 = __byte_perm(pairs[0][t / 2], pairs[1][t / 2], halves);
                const unsigned b1 = __byte_perm(pairs[2][t / 2], pairs[3][t / 2], halves);
#pragma unroll
                for (int term = 0; term < kTerms; ++term) multiply<kPages>(output[t], weights[0][term], b0, b1);
            }
            const int vector = vectors[0];
#pragma unroll
            for (int n = 0; n < 3; ++n) vectors[n] = vectors[n + 1];
            vectors[3] = vector;
#pragma unroll
            for (int term = 0; term < kTerms; ++term) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const unsigned word = weights[0][term][i];
#pragma unroll
                    for (int n = 0; n < 3; ++n) weights[n][term][i] = weights[n + 1][term][i];
                    weights[3][term][i] = word;
                }
            }
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            if (e == 2 && !all_lines) break;
#pragma unroll
            for (int f = 0; f < 2; ++f) {
                float4& at = output_at(outputs, columns, u, e, f);
                const float4 old = state.is_empty ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : at;
                const Fold& line = by[e / 2];
                at = make_float4(folded(line, old.x, output[4 * f][e]), folded(line, old.y, output[4 * f + 1][e]),
                                 folded(line, old.z, output[4 * f + 2][e]), folded(line, old.w, output[4 * f + 3][e]));
            }
        }
    }
    state.is_empty = false;
}

// Where the result of line `line` of a unit goes: the number of the entry in `outputs` and `sums`.
__device__ __forceinline__ long long entry_of(const Batch& batch, const Partials& partials, int unit, int kv_head,
                                              int line, int query, int split) {
    long long entry = query;
    if (partials.total_outputs != nullptr) {
        entry = static_cast<long long>(unit * batch.kv_heads + kv_head) * partials.loop_above + line;
    }
    return entry * partials.n_slots + split % partials.n_slots;
}

// Fold the spans of all warps, in order, and write the lines' partial results; warp w takes every fourth float4.
__device__ __forceinline__ void write_spans(float4* shared, const float* span_sums, const Source& from,
                                            const Batch& batch, const Partials& partials, int unit, int kv_head,
                                            const OwnLines& lines, int split, int apart_lines) {
    const int columns = (from.dim + 63) / 64, region = columns * (apart_lines / 2) * kWarpThreads;
    const int warp = threadIdx.x / kWarpThreads, g = threadIdx.x % kWarpThreads / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (8 * i >= apart_lines || !lines.touches(i, split)) continue;
        Fold by[kAttentionWarps];
        float maximum = EXL2_MINUS_INFINITY, sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kAttentionWarps; ++w) {
            const float* sums = span_sums + (w * kWarpLines + g + 8 * i) * 2;
            by[w] = fold(maximum, sum, sums[0], sums[1]);
            maximum = by[w].maximum;
            sum = by[w].sum;
        }
        const long long entry = entry_of(batch, partials, unit, kv_head, g + 8 * i, lines.query[i], split);
        if (warp == 0 && c == 0) {
            partials.sums[2 * entry] = maximum;
            partials.sums[2 * entry + 1] = sum;
        }
        const int e = warp / 2, f = warp % 2;  // of the two times two float4 of a line and 64 numbers
        for (int u = 0; u < columns; ++u) {
            const int number = 64 * u + 16 * c + 8 * e + 4 * f;
            if (number >= from.dim) continue;
            float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
            for (int w = 0; w < kAttentionWarps; ++w) {
                // What a warp did not see it did not write.
                float4 one = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (span_sums[(w * kWarpLines + g + 8 * i) * 2] != EXL2_MINUS_INFINITY) {
                    one = output_at(shared + w * region, columns, u, 2 * i + e, f);
                }
                total = make_float4(folded(by[w], total.x, one.x), folded(by[w], total.y, one.y),
                                    folded(by[w], total.z, one.z), folded(by[w], total.w, one.w));
            }
            *reinterpret_cast<float4*>(partials.outputs + entry * from.dim + number) = total;
        }
    }
}

// Write what the warp's lines have of this split; where the unit loops, fold it into what they have of those before.
__device__ __forceinline__ void write_lines(const State& state, float4* shared, const Source& from, const Batch& batch,
                                            const Partials& partials, int unit, int kv_head, const OwnLines& lines,
                                            int split, bool loops) {
    const int c = threadIdx.x % 4, columns = (from.dim + 63) / 64;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const bool is_wanted = lines.touches(i, split);
        float *outputs = partials.outputs, *sums = partials.sums;
        long long entry = lines.query[i];
        bool is_first = true;  // of the splits that are folded into the entry
        if (loops) {
            outputs = partials.total_outputs;
            sums = partials.total_sums;
            is_first = split == lines.first[i] / kSplitKeys;
        } else {
            entry = entry_of(batch, partials, unit, kv_head, 0, lines.query[i], split);
        }
        float old_maximum = EXL2_MINUS_INFINITY, old_sum = 0.0f;
        if (is_wanted && !is_first) old_maximum = sums[2 * entry], old_sum = sums[2 * entry + 1];
        const Fold by = fold(old_maximum, old_sum, state.maximum[i], state.sum[i]);
        __syncwarp();  // all four lanes of the line have read its sums
        if (!is_wanted) continue;
        if (c == 0) {
            sums[2 * entry] = by.maximum;
            sums[2 * entry + 1] = by.sum;
        }
        for (int u = 0; u < columns; ++u) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
#pragma unroll
                for (int f = 0; f < 2; ++f) {
                    const int number = 64 * u + 16 * c + 8 * e + 4 * f;
                    if (number >= from.dim) continue;
                    float4* to = reinterpret_cast<float4*>(outputs + entry * from.dim + number);
                    const float4 old = is_first ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : *to;
                    const float4 one = output_at(shared, columns, u, 2 * i + e, f);
                    *to = make_float4(folded(by, old.x, one.x), folded(by, old.y, one.y), folded(by, old.z, one.z),
                                      folded(by, old.w, one.w));
                }
            }
        }
    }
}

template <int kPages, int kTerms>
__device__ __forceinline__ void paged_attention(const Source& from, const Batch& batch, const Partials& partials,
                                                int pass, float scale, float softcap, int apart_lines) {
    EXL2_DYNAMIC_SHARED(float4, shared);  // [4][lines of a warp][64 columns] numbers, in fragments; then span_sums

    const int warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads, g = lane / 4, c = lane % 4;
    const int kv_head = blockIdx.y;
    const Tile tile = find_tile<kTileLines>(batch, pass, blockIdx.z);
    if (tile.unit < 0) return;
    const SplitRange range = split_range<kTileLines>(batch, tile, pass, kv_head);
    const bool loops = partials.total_outputs != nullptr && tile.n_lines > partials.loop_above;
    int split = range.first + blockIdx.x;
    const int last_split = loops ? range.last : split + 1;
    if (split >= range.last || (loops && blockIdx.x > 0)) return;
    const int* pages = from.page_table + static_cast<long long>(tile.first_sequence) * from.table_width;

    // A unit of few lines has one tile, and its spans go to the warps; otherwise the lines do.
    const bool spans_apart = tile.n_lines <= apart_lines;
    const int warp_line = spans_apart ? 0 : warp * kWarpLines;
    const int room_lines = spans_apart ? apart_lines : kWarpLines;
    const int region = (from.dim + 63) / 64 * (room_lines / 2) * kWarpThreads;         // float4 of a warp
    float* span_sums = reinterpret_cast<float*>(shared + kAttentionWarps * region);  // [4][16][2] where spans are apart
    OwnLines lines;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const Line line = make_line(batch, tile, kv_head, tile.first_line + warp_line + g + 8 * i);
        lines.first[i] = line.first_key;
        lines.last[i] = line.last_key;
        lines.query[i] = max(line.row, 0) * batch.heads + line.head;  // scores of no line are masked: any query will do
    }
    if (pass == kPassPrefix && !__syncthreads_or(lines.touches(0, split) || lines.touches(1, split))) return;
    float4* outputs = shared + warp * region;

    for (; split < last_split; ++split) {
        State state{{EXL2_MINUS_INFINITY, EXL2_MINUS_INFINITY}, {0.0f, 0.0f}, true};
        const int first_span = spans_apart ? warp : 0, last_span = spans_apart ? warp + 1 : kAttentionWarps;
        for (int span = first_span; span < last_span; ++span) {
            const int span_key = split * kSplitKeys + span * kSpanKeys;
            if (__any_sync(kAllLanes, lines.sees(span_key, span_key + kSpanKeys))) {
                attend_span<kPages, kTerms>(state, outputs, from, lines, room_lines > 8, spans_apart, pages, batch,
                                            kv_head, span_key, range.n_keys, scale, softcap);
            }
            // The warps share K and V through the L1 cache: keep them together.
            if (!spans_apart) __syncthreads();
        }
        if (spans_apart) {
            if (c == 0) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float* sums = span_sums + (warp * kWarpLines + g + 8 * i) * 2;
                    sums[0] = state.maximum[i];
                    sums[1] = state.sum[i];
                }
            }
            __syncthreads();
            write_spans(shared, span_sums, from, batch, partials, tile.unit, kv_head, lines, split, apart_lines);
        } else {
            write_lines(state, outputs, from, batch, partials, tile.unit, kv_head, lines, split, loops);
        }
    }
}

}  // namespace exl2

#define EXL2_PAGED_ATTENTION(name, kTerms)                                                                             \
    extern "C" __global__ void __launch_bounds__(128, 3)                                                               \
        name(const unsigned short* q, const unsigned char* k, const unsigned char* v, const __half* k_scales,          \
             const __half* v_scales, const int* page_table, const int* query_starts, const int* context_lens,          \
             const int* group_starts, const int* group_prefix_pages, float* outputs, float* sums,                      \
             float* total_outputs, float* total_sums, int n_sequences, int n_groups, int page_size, int table_width,   \
             int heads, int kv_heads, int dim, int window, int n_slots, int apart_lines, int pass, float scale,        \
             float softcap) {                                                                                          \
        exl2::paged_attention<EXL2_PAGES, kTerms>(                                                                     \
            exl2::Source{q, k, v, k_scales, v_scales, page_table, table_width, dim},                                   \
            exl2::Batch{query_starts, context_lens, group_starts, group_prefix_pages, n_sequences, n_groups,           \
                        page_size, heads, kv_heads, window},                                                           \
            exl2::Partials{outputs, sums, total_outputs, total_sums, n_slots, apart_lines}, pass, scale, softcap,      \
            apart_lines);                                                                                              \
    }
EXL2_PAGED_ATTENTION(paged_attention_exact, 2)
#ifndef EXL2_ONLY_EXACT
EXL2_PAGED_ATTENTION(paged_attention_fast, 1)
#endif
