// The ops that are compiled once per level of the machine, and their arguments.
//
// All pointers are to contiguous memory. Ops return a Status; on anything but kOk the output is undefined.
#pragma once

#include <stdint.h>

#include "thread_pool.h"

namespace exl2 {

enum Status : int {
    kOk = 0,
    kNoMemory = 1,
    kOutOfRange = 2,  // a position, slot, page or length points outside its tensor
};

// Of weights, tables and pages; the last three, of pages alone, are codes of as many bits (pages.h).
enum Dtype : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2, kQ8 = 3, kQ6 = 4, kQ4 = 5 };

struct Exl2Matmul {
    const float* x;                 // [rows, in]
    int64_t rows, in, out;
    const uint32_t* codes;          // see exl2_layout.h
    int64_t packed_rows;
    const uint32_t* scales;
    const uint16_t* group_scales;
    const int32_t* groups;
    int64_t n_groups;
    const int32_t* perm;            // [in], or null: stored order is input order
    float* y;                       // [rows, out]
};

struct GptqMatmul {
    const float* x;                 // [rows, in]
    int64_t rows, in, out;
    const uint32_t* codes;
    const uint16_t* scales;
    const uint8_t* zeros;
    const int32_t* row_groups;      // [in]
    int64_t n_groups;
    float* y;                       // [rows, out]
};

// From the file's form of a matrix to planes (exl2_layout.h).
struct Exl2Planes {
    const uint32_t* words;          // [packed_rows, out]
    int64_t packed_rows, out;
    const int32_t* groups;
    int64_t n_groups;
    const uint32_t* scale_words;    // [n_groups, out / 8]
    uint8_t* planes;                // [out / 32, packed_rows, 128]
    uint8_t* scales;                // [out / 32, n_groups, 16]
};

struct GptqPlanes {
    const uint32_t* words;          // [in / 8, out]
    int64_t in, out;
    const int32_t* perm;            // [in], the row of `words` that each stored row is; or null
    uint8_t* planes;                // [out / 32, in / 8, 128]
};

// Activations as whole numbers; see digits.cpp.
struct Digits {
    const float* x;                 // [rows, in], in a multiple of 32
    int64_t rows, in;
    const int32_t* perm;            // [in], the column of x that each stored row takes; or null
    int whole;                      // 1: whole numbers; 0: two digits of each
    void* numbers;                  // whole: int16 [in / 32, rows, 32]; else int8 [rows, in / 32, 64]
    float* scales;                  // whole: [in / 32, rows]; else [rows, in / 32]
    int32_t* sums;                  // likewise
};

struct PlaneMatmul {
    int whole;                      // of Digits
    const void* numbers;
    const float* x_scales;
    const int32_t* sums;
    int64_t rows, in, out;          // out: columns of y; the matrix has them rounded up to whole tiles
    const uint8_t* planes;
    int64_t packed_rows;
    const uint8_t* scales;          // EXL2: nibbles; GPTQ, where `zeros` is given: float16 [tiles, n_groups, 32]
    const uint16_t* group_scales;   // EXL2: [n_groups]
    const uint8_t* zeros;           // GPTQ: [tiles, n_groups, 32]; or null
    const int32_t* groups;
    int64_t n_groups;
    const float* bias;              // [out], or null
    int accumulate;                 // 1: y += the product; 0: y = the product
    float* y;                       // [rows, out]
};

struct DenseMatmul {
    const float* x;                 // [rows, in]
    int64_t rows, in, out;
    const void* weight;             // [out, in] of `dtype`
    int dtype;
    const float* bias;              // [out], or null
    int accumulate;                 // as in PlaneMatmul
    float* y;                       // [rows, out]
};

struct Embedding {
    const void* table;              // [n_ids, columns] of `dtype`
    int dtype;
    int64_t n_ids, columns;
    const int64_t* ids;             // [rows]
    int64_t rows;
    float* y;                       // [rows, columns]
};

struct AddInto {
    const float* x;
    int64_t count;
    float* y;                       // y += x
};

struct RmsNorm {
    const float* x;                 // [rows, columns]
    const float* weight;            // [columns]
    int64_t rows, columns;
    float eps;
    float* y;                       // [rows, columns]
};

struct SiluMul {
    const float* gate;
    const float* up;
    int64_t count;
    float* y;
};

struct RopeCacheWrite {
    const float *q, *k, *v;         // [rows, heads, dim], [rows, kv_heads, dim] twice
    const float *cos, *sin;         // [n_positions, half]
    const int64_t *positions, *slots;
    int64_t rows, heads, kv_heads, dim, n_positions, half, n_slots;
    void *k_pages, *v_pages;        // [n_slots, kv_heads, dim] of `dtype`
    int dtype;
    float* q_rotated;               // [rows, heads, dim]
};

// RopeCacheWrite for quantised pages: all three vectors go into the basis of the pages.
struct QuantiseKvWrite {
    const float *q, *k, *v;         // [rows, heads, dim], [rows, kv_heads, dim] twice; dim a multiple of 32
    const float *cos, *sin;         // [n_positions, half]
    const int64_t *positions, *slots;
    int64_t rows, heads, kv_heads, dim, n_positions, half, n_slots;
    uint8_t* k_codes;               // [n_slots, kv_heads, dim * bits / 8]
    uint16_t* k_scales;             // [n_slots, kv_heads, dim / 32]
    uint8_t* v_codes;
    uint16_t* v_scales;
    int bits;                       // 8, 6 or 4
    float rotation_factor;          // hadamard.h
    float* q_rotated;               // [rows, heads, dim]
};

struct PagedAttention {
    const float* q;                 // [rows, heads, dim]; of quantised pages in their basis
    const void *k_pages, *v_pages;  // [n_pages, page_size, kv_heads, dim] of `dtype`
    const uint16_t *k_scales, *v_scales;  // of quantised pages [n_pages, page_size, kv_heads, dim / 32]; or null
    int dtype;
    const int32_t* page_table;      // [batch, table_width]
    const int32_t* query_starts;    // [batch + 1]
    const int32_t* context_lens;    // [batch]
    const int32_t* group_starts;    // [n_groups + 1]; null without groups
    const int32_t* group_prefix_pages;  // [n_groups], pages that all sequences of a group share
    int64_t rows, heads, kv_heads, dim, n_pages, page_size, batch, table_width, n_groups;
    float softmax_scale;
    int64_t window;                 // 0: off
    float softcap;                  // 0: off
    const float* sinks;             // [heads], or null
    float rotation_factor;          // of quantised pages
    float* y;                       // [rows, heads, dim]
};

// For making EXL2 matrices; see quantise.cpp.
struct RoundingCosts {
    const float* x;                 // [rows, columns]
    int64_t rows, columns;
    const float* row_weights;       // [rows]
    const float* steps;             // [n_steps, columns]
    int64_t n_steps;
    int bits, peaks;
    float* costs;                   // [n_steps, columns]
};

struct GptqRows {
    const float* x;                 // [rows, columns]
    int64_t rows, columns;
    const float* upper;             // [rows, rows], rows upper_stride apart
    int64_t upper_stride;
    const float* steps;             // [columns]
    int bits, feedback;
    uint8_t* codes;                 // [rows, columns]
    float* values;                  // [rows, columns]
    float* errors;                  // [rows, columns]
};

#define EXL2_FOR_EACH_OP(apply)                                                                                   \
    apply(exl2_matmul, Exl2Matmul) apply(gptq_matmul, GptqMatmul) apply(dense_matmul, DenseMatmul)                \
    apply(exl2_planes, Exl2Planes) apply(gptq_planes, GptqPlanes) apply(digits, Digits)                           \
    apply(plane_matmul, PlaneMatmul) apply(rms_norm, RmsNorm) apply(silu_mul, SiluMul) apply(embedding, Embedding)    \
    apply(add_into, AddInto) apply(rope_cache_write, RopeCacheWrite) apply(paged_attention, PagedAttention) \
    apply(quantise_kv_write, QuantiseKvWrite) apply(rounding_costs, RoundingCosts) apply(gptq_rows, GptqRows)

#define EXL2_DECLARE_OP(name, Args) int name(const Args& args);
#define EXL2_DECLARE_LEVEL(level) \
    namespace level {             \
    EXL2_FOR_EACH_OP(EXL2_DECLARE_OP) \
    }

EXL2_DECLARE_LEVEL(baseline)
EXL2_DECLARE_LEVEL(avx2)
EXL2_DECLARE_LEVEL(avx512)
EXL2_DECLARE_LEVEL(avx512vnni)
EXL2_DECLARE_LEVEL(dotprod)

namespace avx512vnni {
int plane_matmul_by_sums(const PlaneMatmul& args);  // the same numbers; see spread_codes.h
}

}  // namespace exl2
