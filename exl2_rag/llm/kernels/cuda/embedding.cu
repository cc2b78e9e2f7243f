// Rows of the embedding table, widened to float32:  y[t, c] = table[ids[t], c]
//
//     table  [V, C]  float32, float16 or bfloat16, contiguous
//     ids    [T]     int64, each 0 to V - 1
//     y      [T, C]  float32, contiguous
//
// A thread takes four columns of one row. blockIdx.x is the row, blockIdx.y the run of 4 * blockDim columns.
//
// The caller guarantees: with `vectorised`, C a multiple of 4 and all pointers aligned to four numbers.
#include "common.cuh"

namespace exl2 {

template <class T>
__device__ __forceinline__ void embedding(const T* table, const long long* ids, float* y, int columns, int vectorised) {
    const int c = 4 * (blockIdx.y * blockDim.x + threadIdx.x);
    if (c >= columns) return;
    table += ids[blockIdx.x] * columns;
    y += static_cast<long long>(blockIdx.x) * columns;
    if (vectorised) {
        float four[4];
        load_4(table + c, four);
        store_4(y + c, four);
    } else {
        for (int i = 0; i < 4 && c + i < columns; ++i) y[c + i] = to_float(table[c + i]);
    }
}

}  // namespace exl2

#define EXL2_EMBEDDING(name, T)                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                            \
        name(const T* table, const long long* ids, float* y, int columns, int vectorised) {      \
        exl2::embedding<T>(table, ids, y, columns, vectorised);                                  \
    }
EXL2_EMBEDDING(embedding_f32, float)
EXL2_EMBEDDING(embedding_f16, __half)
EXL2_EMBEDDING(embedding_bf16, __nv_bfloat16)
