// Make the result of attention from the partial results of its splits.
//
//     y[t, h] = o / l   of the fold of all splits of (t, h) in order, see attention_batch.cuh
//
//     partials   see attention_batch.cuh
//     sinks      [H] float32 or null: a score that takes part in the softmax of every row of the head and has no value
//     y          [T, H, D] float32 or float16, contiguous; zeros for rows beyond the last sequence's
//
// One block a row and head, thread i number i of D. With `block_size`, y is rotated back from the basis of quantised
// pages (hadamard.cuh).
//
// The caller guarantees: blockDim.x = D rounded up to a multiple of 32, at most 256; grid (T, H).
#include "attention_batch.cuh"
#include "hadamard.cuh"

namespace exl2 {

constexpr int kMaxHeadDim = 256;
constexpr int kAhead = 8;  // partial outputs on their way at a time

template <class Number>
__device__ __forceinline__ void combine(const Partials& partials, const Batch& batch, const float* sinks, Number* y,
                                        int dim, int block_size, float factor) {
    EXL2_SHARED(float, room, kMaxHeadDim);
    const int i = threadIdx.x, row = blockIdx.x, head = blockIdx.y, repeats = batch.heads / batch.kv_heads;
    const int sequence = find_sequence(batch, row);
    float output = 0.0f;
    if (sequence >= 0) {
        const int first_row = batch.query_starts[sequence], last_row = batch.query_starts[sequence + 1];
        const int last_key = batch.context_lens[sequence] - last_row + row + 1;
        const int first_key = batch.window > 0 && last_key > batch.window ? last_key - batch.window : 0;
        int first_split = first_key / kSplitKeys, last_split = (last_key - 1) / kSplitKeys;  // inclusive
        const float *outputs = partials.outputs, *sums = partials.sums;
        long long entry = (static_cast<long long>(row) * batch.heads + head) * partials.n_slots;
        if (partials.total_outputs != nullptr) {
            const int line = (row - first_row) * repeats + head % repeats;
            if ((last_row - first_row) * repeats > partials.loop_above) {
                outputs = partials.total_outputs;
                sums = partials.total_sums;
                entry = static_cast<long long>(row) * batch.heads + head;
                first_split = last_split = 0;
            } else {
                const long long unit = static_cast<long long>(sequence) * batch.kv_heads + head / repeats;
                entry = (unit * partials.loop_above + line) * partials.n_slots;
            }
        }
        float maximum = EXL2_MINUS_INFINITY, sum = 0.0f;
        for (int base = first_split; base <= last_split; base += kAhead) {
            float numbers[kAhead], maxima[kAhead], new_sums[kAhead];
#pragma unroll
            for (int n = 0; n < kAhead; ++n) {
                const int split = base + n;
                numbers[n] = 0.0f, maxima[n] = EXL2_MINUS_INFINITY, new_sums[n] = 0.0f;
                if (split <= last_split) {
                    const long long at = entry + split % partials.n_slots;
                    maxima[n] = sums[2 * at];
                    new_sums[n] = sums[2 * at + 1];
                    if (i < dim) numbers[n] = outputs[at * dim + i];
                }
            }
#pragma unroll
            for (int n = 0; n < kAhead; ++n) {
                if (base + n > last_split) continue;
                const Fold by = fold(maximum, sum, maxima[n], new_sums[n]);
                maximum = by.maximum;
                sum = by.sum;
                output = folded(by, output, numbers[n]);
            }
        }
        if (sinks != nullptr) {
            const Fold by = fold(maximum, sum, sinks[head] * 1.44269504f, 1.0f);
            sum = by.sum;
            output = folded(by, output, 0.0f);
        }
        output = __fdiv_rn(output, sum);
    }
    if (block_size > 0) output = hadamard(output, block_size, factor, room);
    if (i < dim) y[(static_cast<long long>(row) * batch.heads + head) * dim + i] = from_float<Number>(output);
}

}  // namespace exl2

#define EXL2_ATTENTION_COMBINE(name, Number)                                                                           \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        name(float* outputs, float* sums, float* total_outputs, float* total_sums, const int* query_starts,            \
             const int* context_lens, const float* sinks, Number* y, int n_sequences, int heads, int kv_heads,         \
             int dim, int window, int n_slots, int loop_above, int block_size, float factor) {                         \
        exl2::combine<Number>(exl2::Partials{outputs, sums, total_outputs, total_sums, n_slots, loop_above},           \
                              exl2::Batch{query_starts, context_lens, nullptr, nullptr, n_sequences, 0, 0, heads,      \
                                          kv_heads, window},                                                           \
                              sinks, y, dim, block_size, factor);                                                      \
    }
EXL2_ATTENTION_COMBINE(attention_combine_f32, float)
EXL2_ATTENTION_COMBINE(attention_combine_f16, __half)
