// The last sum of packed_gemm.cuh:  y[t, n] = partial[0][t][n] + partial[1][t][n] + ..., in this order
//
//     partial  [n_sections][T][N]   float32
//     y        [T, N]               see Output in packed_product.cuh
//
// A thread takes four columns of one row.
//
// The caller guarantees: gridDim.x * blockDim.x >= N / 4, gridDim.y = T; N a multiple of 32.
#include "packed_product.cuh"

extern "C" __global__ void __launch_bounds__(256)
    add_sections(const float* partial, const float* bias, void* y, long long y_stride, int epilogue, int columns,
                 int n_sections) {
    using namespace exl2;
    const int column = (blockIdx.x * blockDim.x + threadIdx.x) * 4, row = blockIdx.y;
    if (column >= columns) return;
    const long long section_stride = static_cast<long long>(gridDim.y) * columns;
    const float* from = partial + static_cast<long long>(row) * columns + column;
    float4 total = *reinterpret_cast<const float4*>(from);
    for (int section = 1; section < n_sections; ++section) {
        from += section_stride;
        total = add_4(total, *reinterpret_cast<const float4*>(from));
    }
    Output{y, bias, y_stride, epilogue}.write_4(row, column, total);
}
