// Causal attention over pages on tensor cores; one instance a kind of page.
//
//     y[t, h] = sum over keys s that t sees of softmax_s(shape(q[t, h] . k[s, h'])) v[s, h'],   h' = h / (H / KH)
//
//     q            [T, H, D]        float16 or float32, D a multiple of 8 (of 32 for quantised pages), at most kDim
//     k, v         [P, PS, KH, ...] see kv_pages.cuh; scales [P, PS, KH, D/32] float16 for quantised ones
//     page_table   [B, MP]          int32; PS a multiple of 16, so that 16 keys lie in one page
//     partials     see attention_batch.cuh; `attention_combine.cu` makes y of them
//
// One block of four warps: a tile of up to 64 lines, one key head, one split of 256 keys (or all splits in turn where a
// unit loops). All query heads of a key head, and in the prefix pass all sequences of a group, share its loads.
//
//     unit of at most 16 lines (decode)     warp w: lines 0 to 15,          span w of the split; folded through shared memory
//     unit of more lines                    warp w: lines 16w to 16w + 15,  all four spans in order
//
// A warp takes a span as four steps of 16 keys. K and V go straight from global memory to registers, 16 bytes a lane
// (less when quantised), without shared memory: the numbers of a head are permuted so that what a lane needs for its
// fragments is contiguous. With g = lane / 4 and c = lane % 4:
//
//     S = Q K^T    lane loads numbers 32i + 8c to + 7 of keys g and g + 8: of chunk i the first four are its B fragment of
//                  one k16 step, the last four that of the next. Q is permuted alike.
//     O = P V      lane loads numbers 64u + 8g to + 7 of keys 2c, 2c + 1, 2c + 8, 2c + 9: number 8g + t is column g of
//                  n8 tile t, and pairs of keys are made with byte permutes. Of O a lane then has numbers
//                  64u + 16c to + 15 of lines g and g + 8.
//
// With float32 queries or bfloat16 pages, Q and P are each the sum of two 16-bit numbers, which doubles the (few)
// tensor-core instructions and leaves nothing lost but the last bits: 22 with float16 pages, 16 with bfloat16 ones.
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
constexpr int kExchangeStride = 64 + 4;  // floats a line in the exchange; 4 more, so that eight lines hit different banks

struct Source {
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

__device__ __forceinline__ void load_query(const float* q, float (&x)[8]) {
    const float4 low = *reinterpret_cast<const float4*>(q), high = *(reinterpret_cast<const float4*>(q) + 1);
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}
__device__ __forceinline__ void load_query(const __half* q, float (&x)[8]) {
    const uint4 words = *reinterpret_cast<const uint4*>(q);
    const unsigned pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 two = __half22float2(*reinterpret_cast<const __half2*>(&pairs[i]));
        x[2 * i] = two.x, x[2 * i + 1] = two.y;
    }
}

// Two lines (g and g + 8 of a warp's 16) on their way through a split.
template <int kDim>
struct Accumulator {
    static constexpr int kColumns = kDim / 64;  // chunks of 64 numbers
    float maximum[2], sum[2];
    float output[kColumns][8][4];  // [u][n8 tile][of the fragment: two of line g, two of line g + 8]

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < 2; ++i) maximum[i] = EXL2_MINUS_INFINITY, sum[i] = 0.0f;
#pragma unroll
        for (int u = 0; u < kColumns; ++u) {
#pragma unroll
            for (int t = 0; t < 8; ++t) {
#pragma unroll
                for (int e = 0; e < 4; ++e) output[u][t][e] = 0.0f;
            }
        }
    }
};

// Fold one span into `state`.
//     queries      fragments of the warp's 16 lines, in shared memory, [chunk][lane][high, rest][two k16 steps] of 16 bytes
//     first, last  keys that the lane's two lines see, half-open
template <int kPages, bool kExact, int kDim>
__device__ __forceinline__ void attend_span(Accumulator<kDim>& state, const Source& from, const uint4* queries,
                                            const int* pages, const Batch& batch, int kv_head, int span_key, int n_keys,
                                            const int (&first)[2], const int (&last)[2], float scale, float softcap) {
    constexpr bool kBfloat = kPages == kBfloat16;
    constexpr int kChunks = kDim / 32;
    constexpr int kTerms = kExact ? 2 : 1;
    const int lane = threadIdx.x % kWarpThreads, g = lane / 4, c = lane % 4;
    const int bytes = vector_bytes<kPages>(from.dim), n_groups = from.dim / kQuantGroup;

    // Lane c finds the row of keys of step c; a step past the end is never read.
    int row_of_step = 0;
    {
        const int key = span_key + 16 * c;
        if (key < n_keys) {
            const int page = key / batch.page_size;
            row_of_step = pages[page] * batch.page_size + key - page * batch.page_size;
        }
    }
    long long vectors[4];  // of the steps: the number of the vector of its first key
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        vectors[j] = static_cast<long long>(__shfl_sync(kAllLanes, row_of_step, j)) * batch.kv_heads + kv_head;
    }
    {  // All of V is wanted soon: bring it to the L2 cache while the scores are computed.
        const int lines = (bytes + 127) / 128;
        for (int i = lane; i < kSpanKeys * lines; i += kWarpThreads) {
            const int key = i / lines, j = key / 16;
            const long long vector = (j < 2 ? (j == 0 ? vectors[0] : vectors[1]) : (j == 2 ? vectors[2] : vectors[3])) +
                                     static_cast<long long>(key % 16) * batch.kv_heads;
            if (span_key + key < n_keys) prefetch_l2(from.v + vector * bytes + 128 * (i % lines));
        }
    }

    float score[8][4];  // [n8 tile of keys][two keys of line g, two of line g + 8]
#pragma unroll
    for (int t = 0; t < 8; ++t) {
#pragma unroll
        for (int e = 0; e < 4; ++e) score[t][e] = 0.0f;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        Eight<kPages> stored[2][kChunks];
        __half scales[2][kChunks];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int key = 8 * half + g;
            const long long vector = vectors[j] + static_cast<long long>(key) * batch.kv_heads;
            const bool is_there = span_key + 16 * j + key < n_keys;
#pragma unroll
            for (int i = 0; i < kChunks; ++i) {
                stored[half][i].clear();
                scales[half][i] = __half();
                if (is_there && 32 * i + 8 * c < from.dim) {
                    stored[half][i].load(from.k + vector * bytes, 4 * i + c, from.dim);
                    if (is_quantised(kPages)) scales[half][i] = __ldg(from.k_scales + vector * n_groups + i);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            if (32 * i >= from.dim) continue;
            unsigned pairs[2][4];
            stored[0][i].unpack(scales[0][i], pairs[0]);
            stored[1][i].unpack(scales[1][i], pairs[1]);
#pragma unroll
            for (int term = 0; term < kTerms; ++term) {
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const uint4 words = queries[((i * kTerms + term) * 2 + k) * kWarpThreads + lane];
                    const unsigned a[4] = {words.x, words.y, words.z, words.w};
                    multiply<kPages>(score[2 * j], a, pairs[0][2 * k], pairs[0][2 * k + 1]);
                    multiply<kPages>(score[2 * j + 1], a, pairs[1][2 * k], pairs[1][2 * k + 1]);
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
            const bool is_seen = first[line] <= key && key < last[line];
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
            if (kExact) weights[j][kTerms - 1][i] = pack_rest(low, high, weights[j][0][i], kBfloat);
        }
    }
#pragma unroll
    for (int u = 0; u < kDim / 64; ++u) {
        if (64 * u >= from.dim) continue;
        float output[8][4];
#pragma unroll
        for (int t = 0; t < 8; ++t) {
#pragma unroll
            for (int e = 0; e < 4; ++e) output[t][e] = 0.0f;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            unsigned pairs[4][4];  // [key][two numbers]
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int key = 2 * c + i % 2 + 8 * (i / 2);
                const long long vector = vectors[j] + static_cast<long long>(key) * batch.kv_heads;
                Eight<kPages> stored;
                __half value_scale = __half();
                stored.clear();
                if (span_key + 16 * j + key < n_keys && 64 * u + 8 * g < from.dim) {
                    stored.load(from.v + vector * bytes, 8 * u + g, from.dim);
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
                for (int term = 0; term < kTerms; ++term) multiply<kPages>(output[t], weights[j][term], b0, b1);
            }
        }
#pragma unroll
        for (int t = 0; t < 8; ++t) {
#pragma unroll
            for (int e = 0; e < 4; ++e) state.output[u][t][e] = folded(by[e / 2], state.output[u][t][e], output[t][e]);
        }
    }
}

// Where the result of a line and split goes: the number of the entry in `outputs` and `sums`.
__device__ __forceinline__ long long entry_of(const Batch& batch, const Partials& partials, const Tile& tile, int kv_head,
                                              int line, const Line& at, int split) {
    long long entry = static_cast<long long>(at.row) * batch.heads + at.head;
    if (partials.total_outputs != nullptr) {
        entry = (static_cast<long long>(tile.unit) * batch.kv_heads + kv_head) * partials.loop_above + line;
    }
    return entry * partials.n_slots + split % partials.n_slots;
}

template <int kPages, class Query, int kDim>
__device__ __forceinline__ void paged_attention(const Query* q, const Source& from, const Batch& batch,
                                                const Partials& partials, int pass, float scale, float softcap) {
    constexpr bool kBfloat = kPages == kBfloat16;
    constexpr bool kExact = sizeof(Query) == 4 || kBfloat;
    constexpr int kTerms = kExact ? 2 : 1;
    constexpr int kChunks = kDim / 32, kColumns = kDim / 64;
    constexpr int kQueryWords = kChunks * kTerms * 2 * kWarpThreads;  // of 16 bytes, for 16 lines
    // Queries of the four warps, [4][kQueryWords]; or, where all have the same, of one and then the exchange.
    EXL2_DYNAMIC_SHARED(uint4, queries);
    float* exchange = reinterpret_cast<float*>(queries + kQueryWords);                 // [4][16][kExchangeStride]
    float* exchange_sums = exchange + kAttentionWarps * kWarpLines * kExchangeStride;  // [4][16][2]

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

    // A unit of at most 16 lines has one tile, and its spans go to the warps; otherwise the lines do.
    const bool spans_apart = tile.n_lines <= kWarpLines;
    const int warp_line = spans_apart ? 0 : warp * kWarpLines;
    Line lines[2];
    int first[2], last[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        lines[i] = make_line(batch, tile, kv_head, tile.first_line + warp_line + g + 8 * i);
        first[i] = lines[i].first_key;
        last[i] = lines[i].last_key;
    }
    if (pass == kPassPrefix && !__syncthreads_or(lines[0].touches(split) || lines[1].touches(split))) return;

    uint4* own_queries = queries + (spans_apart ? 0 : warp * kQueryWords);
    if (!spans_apart || warp == 0) {
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            float x[2][8];
#pragma unroll
            for (int line = 0; line < 2; ++line) {
#pragma unroll
                for (int e = 0; e < 8; ++e) x[line][e] = 0.0f;
                if (lines[line].row >= 0 && 32 * i + 8 * c < from.dim) {
                    const long long vector = static_cast<long long>(lines[line].row) * batch.heads + lines[line].head;
                    load_query(q + vector * from.dim + 32 * i + 8 * c, x[line]);
                }
            }
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                unsigned high[4], rest[4];
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    const int e = 4 * k + 2 * (r / 2);
                    high[r] = pack_half(x[r % 2][e], x[r % 2][e + 1], kBfloat);
                    rest[r] = pack_rest(x[r % 2][e], x[r % 2][e + 1], high[r], kBfloat);
                }
                own_queries[((i * kTerms) * 2 + k) * kWarpThreads + lane] = make_uint4(high[0], high[1], high[2], high[3]);
                if (kExact) {
                    own_queries[((i * kTerms + kTerms - 1) * 2 + k) * kWarpThreads + lane] =
                        make_uint4(rest[0], rest[1], rest[2], rest[3]);
                }
            }
        }
    }
    __syncthreads();

    for (; split < last_split; ++split) {
        Accumulator<kDim> state;
        state.clear();
        const int first_span = spans_apart ? warp : 0, last_span = spans_apart ? warp + 1 : kAttentionWarps;
        for (int span = first_span; span < last_span; ++span) {
            const int span_key = split * kSplitKeys + span * kSpanKeys;
            const bool is_seen = (first[0] < span_key + kSpanKeys && last[0] > span_key) ||
                                 (first[1] < span_key + kSpanKeys && last[1] > span_key);
            if (__any_sync(kAllLanes, is_seen)) {
                attend_span<kPages, kExact, kDim>(state, from, own_queries, pages, batch, kv_head, span_key, range.n_keys,
                                                  first, last, scale, softcap);
            }
            // The warps share K and V through the L1 cache: keep them together.
            if (!spans_apart) __syncthreads();
        }

        if (spans_apart) {
            // Thread i folds numbers 8(i % 8) to + 7 of each chunk of 64 of line i / 8, span by span.
            const int line = threadIdx.x / 8, number = threadIdx.x % 8 * 8;
            const Line at = make_line(batch, tile, kv_head, tile.first_line + line);
            const bool is_wanted = at.touches(split);
            const long long entry = entry_of(batch, partials, tile, kv_head, line, at, split);
            if (c == 0) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float* sums = exchange_sums + (warp * kWarpLines + g + 8 * i) * 2;
                    sums[0] = state.maximum[i];
                    sums[1] = state.sum[i];
                }
            }
#pragma unroll
            for (int u = 0; u < kColumns; ++u) {
                if (64 * u >= from.dim) continue;
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float* to = exchange + (warp * kWarpLines + g + 8 * (e / 2)) * kExchangeStride + 16 * c + 8 * (e % 2);
#pragma unroll
                    for (int t = 0; t < 8; t += 4) {
                        *reinterpret_cast<float4*>(to + t) =
                            make_float4(state.output[u][t][e], state.output[u][t + 1][e], state.output[u][t + 2][e],
                                        state.output[u][t + 3][e]);
                    }
                }
                __syncthreads();
                float total[8], maximum = EXL2_MINUS_INFINITY, sum = 0.0f;
#pragma unroll
                for (int n = 0; n < 8; ++n) total[n] = 0.0f;
#pragma unroll
                for (int w = 0; w < kAttentionWarps; ++w) {
                    const float* sums = exchange_sums + (w * kWarpLines + line) * 2;
                    const Fold by = fold(maximum, sum, sums[0], sums[1]);
                    maximum = by.maximum;
                    sum = by.sum;
                    const float* numbers = exchange + (w * kWarpLines + line) * kExchangeStride + number;
#pragma unroll
                    for (int n = 0; n < 8; ++n) total[n] = folded(by, total[n], numbers[n]);
                }
                if (is_wanted && 64 * u + number < from.dim) {
                    float4* to = reinterpret_cast<float4*>(partials.outputs + entry * from.dim + 64 * u + number);
                    to[0] = make_float4(total[0], total[1], total[2], total[3]);
                    to[1] = make_float4(total[4], total[5], total[6], total[7]);
                    if (u == 0 && number == 0) {
                        partials.sums[2 * entry] = maximum;
                        partials.sums[2 * entry + 1] = sum;
                    }
                }
                __syncthreads();
            }
        } else {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const bool is_wanted = lines[i].touches(split);
                float *outputs = partials.outputs, *sums = partials.sums;
                long long entry;
                bool is_first = true;  // of the splits that are folded into the entry
                if (loops) {
                    outputs = partials.total_outputs;
                    sums = partials.total_sums;
                    entry = static_cast<long long>(lines[i].row) * batch.heads + lines[i].head;
                    is_first = split == lines[i].first_key / kSplitKeys;
                } else {
                    entry = entry_of(batch, partials, tile, kv_head, 0, lines[i], split);
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
#pragma unroll
                for (int u = 0; u < kColumns; ++u) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int number = 64 * u + 16 * c + 8 * e;
                        if (number >= from.dim) continue;
                        float4* to = reinterpret_cast<float4*>(outputs + entry * from.dim + number);
#pragma unroll
                        for (int t = 0; t < 8; t += 4) {
                            const float4 old = is_first ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : to[t / 4];
                            to[t / 4] = make_float4(folded(by, old.x, state.output[u][t][2 * i + e]),
                                                    folded(by, old.y, state.output[u][t + 1][2 * i + e]),
                                                    folded(by, old.z, state.output[u][t + 2][2 * i + e]),
                                                    folded(by, old.w, state.output[u][t + 3][2 * i + e]));
                        }
                    }
                }
            }
        }
    }
}

}  // namespace exl2

#define EXL2_PAGED_ATTENTION(name, Query, kDim)                                                                         \
    extern "C" __global__ void __launch_bounds__(128)                                                                   \
        name(const Query* q, const unsigned char* k, const unsigned char* v, const __half* k_scales,                    \
             const __half* v_scales, const int* page_table, const int* query_starts, const int* context_lens,           \
             const int* group_starts, const int* group_prefix_pages, float* outputs, float* sums, float* total_outputs, \
             float* total_sums, int n_sequences, int n_groups, int page_size, int table_width, int heads, int kv_heads, \
             int dim, int window, int n_slots, int loop_above, int pass, float scale, float softcap) {                  \
        exl2::paged_attention<EXL2_PAGES, Query, kDim>(                                                                 \
            q, exl2::Source{k, v, k_scales, v_scales, page_table, table_width, dim},                                    \
            exl2::Batch{query_starts, context_lens, group_starts, group_prefix_pages, n_sequences, n_groups, page_size, \
                        heads, kv_heads, window},                                                                       \
            exl2::Partials{outputs, sums, total_outputs, total_sums, n_slots, loop_above}, pass, scale, softcap);       \
    }
EXL2_PAGED_ATTENTION(paged_attention_q16_d64, __half, 64)
EXL2_PAGED_ATTENTION(paged_attention_q16_d128, __half, 128)
EXL2_PAGED_ATTENTION(paged_attention_q16_d256, __half, 256)
EXL2_PAGED_ATTENTION(paged_attention_q32_d64, float, 64)
EXL2_PAGED_ATTENTION(paged_attention_q32_d128, float, 128)
EXL2_PAGED_ATTENTION(paged_attention_q32_d256, float, 256)
