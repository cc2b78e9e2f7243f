// Write each number of the queries as the sum of two 16-bit numbers, for attention that must not lose bits.
//
//     terms[i, 0] = round(q[i]),  terms[i, 1] = round(q[i] - terms[i, 0])
//
//     q      [n, D]     float16 or float32, contiguous
//     terms  [n, 2, D]  float16 or bfloat16
//
// One thread a number; the caller guarantees a grid of at least n * D threads.
#include "common.cuh"

namespace exl2 {

template <class In, class Term>
__device__ __forceinline__ void attention_terms(const In* q, Term* terms, int dim, long long count) {
    const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const float x = to_float(q[i]);
    const Term first = from_float<Term>(x);
    Term* to = terms + i / dim * 2 * dim + i % dim;
    to[0] = first;
    to[dim] = from_float<Term>(x - to_float(first));
}

}  // namespace exl2

#define EXL2_ATTENTION_TERMS(name, In, Term)                                                                           \
    extern "C" __global__ void __launch_bounds__(256) name(const In* q, Term* terms, int dim, long long count) {       \
        exl2::attention_terms<In, Term>(q, terms, dim, count);                                                         \
    }
EXL2_ATTENTION_TERMS(attention_terms_f32_f16, float, __half)
EXL2_ATTENTION_TERMS(attention_terms_f32_bf16, float, __nv_bfloat16)
EXL2_ATTENTION_TERMS(attention_terms_f16_bf16, __half, __nv_bfloat16)
