// Causal attention over float32 pages, in float32 throughout: the exact twin of paged_attention.cuh, for checking and
// for the `exact` precision. Tensor cores take no float32, so this one uses none.
//
//     q            [T, H, D]        float32 or float16, D at most 256
//     k, v         [P, PS, KH, D]   float32; any page size
//     page_table   [B, MP]          int32
//     partials     see attention_batch.cuh; a unit that loops does so whatever its size (loop_above = 0)
//
// One block of four warps: a tile of up to 16 lines, one key head, one split of 256 keys (or all in turn). Keys and
// then values go through shared memory, 32 at a time; warp w has lines w, w + 4, w + 8, w + 12:
//
//     scores    lane i: key i of the 32, the whole dot product
//     output    lane i: numbers i, i + 32, ... of D, all keys
//
// Each 32 keys are folded into the split as attention_batch.cuh says for spans.
//
// The caller guarantees: blockDim.x = 128; dynamic shared memory of (16 + 32) * (D + 1) floats and 16 * 32.
#include "attention_batch.cuh"

namespace exl2 {

constexpr int kTileLines = 16;
constexpr int kWarps = 4;
constexpr int kOwnLines = kTileLines / kWarps;
constexpr int kStepKeys = 32;
constexpr int kColumns = 256 / kWarpThreads;  // numbers of a line in a lane, at most

template <class Query>
__device__ __forceinline__ void paged_attention_f32(const Query* q, const float* k, const float* v,
                                                    const int* page_table, int table_width, int dim, const Batch& batch,
                                                    const Partials& partials, int pass, float scale, float softcap) {
    EXL2_DYNAMIC_SHARED(float, queries);  // [16][dim + 1]
    const int stride = dim + 1;           // one more, so that equal numbers of different keys are in different banks
    float* vectors = queries + kTileLines * stride;      // [32][dim + 1]
    float* weights = vectors + kStepKeys * stride;       // [16][32]
    const int warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads, kv_head = blockIdx.y;
    const Tile tile = find_tile<kTileLines>(batch, pass, blockIdx.z);
    if (tile.unit < 0) return;
    const SplitRange range = split_range<kTileLines>(batch, tile, pass, kv_head);
    const bool loops = partials.total_outputs != nullptr;
    int split = range.first + blockIdx.x;
    const int last_split = loops ? range.last : split + 1;
    if (split >= range.last || (loops && blockIdx.x > 0)) return;
    const int* pages = page_table + static_cast<long long>(tile.first_sequence) * table_width;

    Line lines[kOwnLines];
#pragma unroll
    for (int n = 0; n < kOwnLines; ++n) {
        lines[n] = make_line(batch, tile, kv_head, tile.first_line + warp + kWarps * n);
        const long long vector = static_cast<long long>(lines[n].row) * batch.heads + lines[n].head;
        for (int i = lane; i < dim; i += kWarpThreads) {
            queries[(warp + kWarps * n) * stride + i] = lines[n].row < 0 ? 0.0f : to_float(q[vector * dim + i]);
        }
    }
    for (; split < last_split; ++split) {
        float maximum[kOwnLines], sum[kOwnLines], output[kOwnLines][kColumns];
#pragma unroll
        for (int n = 0; n < kOwnLines; ++n) {
            maximum[n] = EXL2_MINUS_INFINITY, sum[n] = 0.0f;
#pragma unroll
            for (int i = 0; i < kColumns; ++i) output[n][i] = 0.0f;
        }
        const int end = min((split + 1) * kSplitKeys, range.n_keys);
        for (int step = split * kSplitKeys; step < end; step += kStepKeys) {
            const int n_keys = min(kStepKeys, end - step);
            Fold by[kOwnLines];
            for (int part = 0; part < 2; ++part) {  // keys, then values
                const float* from = part == 0 ? k : v;
                __syncthreads();
                for (int key = warp; key < n_keys; key += kWarps) {
                    const int page = (step + key) / batch.page_size;
                    const long long slot =
                        static_cast<long long>(pages[page]) * batch.page_size + (step + key) % batch.page_size;
#pragma unroll 2
                    for (int i = lane; i < dim; i += kWarpThreads) {
                        vectors[key * stride + i] = from[(slot * batch.kv_heads + kv_head) * dim + i];
                    }
                }
                __syncthreads();
                if (part == 0) {
#pragma unroll
                    for (int n = 0; n < kOwnLines; ++n) {
                        const int key = step + lane;
                        const bool is_seen = lane < n_keys && lines[n].first_key <= key && key < lines[n].last_key;
                        float score = 0.0f;
                        if (is_seen) {
                            const float *a = queries + (warp + kWarps * n) * stride, *b = vectors + lane * stride;
#pragma unroll 4
                            for (int i = 0; i < dim; ++i) score = fmaf(a[i], b[i], score);
                        }
                        score = is_seen ? shape_score(score, scale, softcap) : EXL2_MINUS_INFINITY;
                        const float new_maximum = warp_max(score);
                        const float weight = exp2f(score - (new_maximum == EXL2_MINUS_INFINITY ? 0.0f : new_maximum));
                        weights[(warp + kWarps * n) * kStepKeys + lane] = weight;
                        by[n] = fold(maximum[n], sum[n], new_maximum, warp_sum(weight));
                        maximum[n] = by[n].maximum;
                        sum[n] = by[n].sum;
                    }
                    __syncwarp();
                } else {
#pragma unroll
                    for (int n = 0; n < kOwnLines; ++n) {
                        const float* own = weights + (warp + kWarps * n) * kStepKeys;
#pragma unroll
                        for (int i = 0; i < kColumns; ++i) {
                            const int number = lane + kWarpThreads * i;
                            if (number >= dim) continue;
                            float added = 0.0f;
#pragma unroll 4
                            for (int key = 0; key < n_keys; ++key) {
                                added = fmaf(own[key], vectors[key * stride + number], added);
                            }
                            output[n][i] = folded(by[n], output[n][i], added);
                        }
                    }
                }
            }
        }
#pragma unroll
        for (int n = 0; n < kOwnLines; ++n) {
            if (!lines[n].touches(split)) continue;
            float *outputs = partials.outputs, *sums = partials.sums;
            long long entry = static_cast<long long>(lines[n].row) * batch.heads + lines[n].head;
            bool is_first = true;
            if (loops) {
                outputs = partials.total_outputs;
                sums = partials.total_sums;
                is_first = split == lines[n].first_key / kSplitKeys;
            } else {
                entry = entry * partials.n_slots + split % partials.n_slots;
            }
            const Fold by = is_first ? fold(EXL2_MINUS_INFINITY, 0.0f, maximum[n], sum[n])
                                     : fold(sums[2 * entry], sums[2 * entry + 1], maximum[n], sum[n]);
            __syncwarp();  // all lanes have read the sums
            if (lane == 0) {
                sums[2 * entry] = by.maximum;
                sums[2 * entry + 1] = by.sum;
            }
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                const int number = lane + kWarpThreads * i;
                if (number >= dim) continue;
                float* to = outputs + entry * dim + number;
                *to = folded(by, is_first ? 0.0f : *to, output[n][i]);
            }
        }
    }
}

}  // namespace exl2

#define EXL2_PAGED_ATTENTION_F32(name, Query)                                                                          \
    extern "C" __global__ void __launch_bounds__(128, 2)                                                               \
        name(const Query* q, const float* k, const float* v, const __half* k_scales, const __half* v_scales,           \
             const int* page_table, const int* query_starts, const int* context_lens, const int* group_starts,         \
             const int* group_prefix_pages, float* outputs, float* sums, float* total_outputs, float* total_sums,      \
             int n_sequences, int n_groups, int page_size, int table_width, int heads, int kv_heads, int dim,          \
             int window, int n_slots, int loop_above, int pass, float scale, float softcap) {                          \
        exl2::paged_attention_f32<Query>(                                                                              \
            q, k, v, page_table, table_width, dim,                                                                     \
            exl2::Batch{query_starts, context_lens, group_starts, group_prefix_pages, n_sequences, n_groups,           \
                        page_size, heads, kv_heads, window},                                                           \
            exl2::Partials{outputs, sums, total_outputs, total_sums, n_slots, loop_above}, pass, scale, softcap);      \
    }
EXL2_PAGED_ATTENTION_F32(paged_attention_f16, __half)
EXL2_PAGED_ATTENTION_F32(paged_attention_f32, float)
