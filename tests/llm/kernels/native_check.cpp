// Runs ops of the CPU library on fixed inputs and prints what comes out, so that two machines can be compared.
//
//     native_check LEVEL
//
// A line each: a name, "exact" or "near", and numbers. What is whole numbers must be the same everywhere; floats may differ
// by their order of rounding.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <vector>

#include "ops.h"

extern "C" {
const char* exl2_cpu_level();
int exl2_set_cpu_level(const char* name);
void exl2_set_num_threads(int count);
#define DECLARE(name, Args) int exl2_op_##name(const exl2::Args* args);
EXL2_FOR_EACH_OP(DECLARE)
}

namespace {

uint32_t state = 1;

uint32_t draw() {
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

float draw_float() { return static_cast<float>(static_cast<int>(draw() & 0xffff) - 0x8000) / 16384.0f; }

std::vector<float> floats(size_t count) {
    std::vector<float> result(count);
    for (float& one : result) one = draw_float();
    return result;
}

// float16 numbers of about 1, any sign.
std::vector<uint16_t> halves(size_t count) {
    std::vector<uint16_t> result(count);
    for (uint16_t& one : result) one = static_cast<uint16_t>((draw() & 0x87ff) | 0x3800);
    return result;
}

template <typename Number>
void print_exact(const char* name, const std::vector<Number>& numbers) {
    uint64_t hash = 14695981039346656037ull;
    const unsigned char* bytes = reinterpret_cast<const unsigned char*>(numbers.data());
    for (size_t i = 0; i < numbers.size() * sizeof(Number); ++i) hash = (hash ^ bytes[i]) * 1099511628211ull;
    printf("%s exact %016llx\n", name, static_cast<unsigned long long>(hash));
}

void print_near(const char* name, const std::vector<float>& numbers) {
    printf("%s near", name);
    for (const float one : numbers) printf(" %.9g", static_cast<double>(one));
    printf("\n");
}

void check(int status, const char* name) {
    if (status != exl2::kOk) printf("%s failed with %d\n", name, status);
}

constexpr int kHeads = 4, kKvHeads = 2, kDim = 64, kPageSize = 16, kPages = 12, kSlots = kPages * kPageSize;

// Three sequences of 150, 145 and 160 tokens; the first two share eight pages.
void attend(const char* name, const void* k, const void* v, const uint16_t* k_scales, const uint16_t* v_scales, int dtype) {
    const std::vector<int32_t> table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 3, 5, 4, 8, 9, 1, 0, 2, 11, 10};
    const std::vector<int32_t> starts = {0, 1, 2, 7}, contexts = {150, 145, 160}, groups = {0, 2, 3}, prefix = {8, 0};
    const std::vector<float> q = floats(7 * kHeads * kDim), sinks = floats(kHeads);
    std::vector<float> y(q.size()), shared(q.size());
    exl2::PagedAttention args = {};
    args.q = q.data();
    args.k_pages = k;
    args.v_pages = v;
    args.k_scales = k_scales;
    args.v_scales = v_scales;
    args.dtype = dtype;
    args.page_table = table.data();
    args.query_starts = starts.data();
    args.context_lens = contexts.data();
    args.rows = 7;
    args.heads = kHeads;
    args.kv_heads = kKvHeads;
    args.dim = kDim;
    args.n_pages = kPages;
    args.page_size = kPageSize;
    args.batch = 3;
    args.table_width = 10;
    args.softmax_scale = 0.125f;
    args.window = 140;
    args.softcap = 3.0f;
    args.sinks = sinks.data();
    args.rotation_factor = 0.125f;
    args.y = y.data();
    check(exl2_op_paged_attention(&args), name);
    args.group_starts = groups.data();
    args.group_prefix_pages = prefix.data();
    args.n_groups = 2;
    args.y = shared.data();
    check(exl2_op_paged_attention(&args), name);
    if (memcmp(y.data(), shared.data(), y.size() * sizeof(float)) != 0) printf("%s differs where pages are shared\n", name);
    print_near(name, y);
}

void check_attention() {
    const std::vector<float> k = floats(size_t{kSlots} * kKvHeads * kDim), v = floats(k.size());
    attend("attention float32", k.data(), v.data(), nullptr, nullptr, exl2::kFloat32);
    const std::vector<uint16_t> k_half = halves(k.size()), v_half = halves(k.size());
    attend("attention float16", k_half.data(), v_half.data(), nullptr, nullptr, exl2::kFloat16);
    const std::vector<float> q = floats(size_t{kSlots} * kHeads * kDim), cos(kDim / 2, 1.0f), sin(kDim / 2, 0.0f);
    std::vector<int64_t> positions(kSlots, 0), slots(kSlots);
    for (int i = 0; i < kSlots; ++i) slots[static_cast<size_t>(i)] = i;
    const struct { int bits, dtype; } kinds[] = {{8, exl2::kQ8}, {6, exl2::kQ6}, {4, exl2::kQ4}};
    for (const auto kind : kinds) {
        std::vector<uint8_t> k_codes(k.size() * static_cast<size_t>(kind.bits) / 8), v_codes(k_codes.size());
        std::vector<uint16_t> k_scales(k.size() / 32), v_scales(k_scales.size());
        std::vector<float> rotated(q.size());
        exl2::QuantiseKvWrite args = {};
        args.q = q.data();
        args.k = k.data();
        args.v = v.data();
        args.cos = cos.data();
        args.sin = sin.data();
        args.positions = positions.data();
        args.slots = slots.data();
        args.rows = args.n_slots = kSlots;
        args.heads = kHeads;
        args.kv_heads = kKvHeads;
        args.dim = kDim;
        args.n_positions = 1;
        args.half = kDim / 2;
        args.k_codes = k_codes.data();
        args.k_scales = k_scales.data();
        args.v_codes = v_codes.data();
        args.v_scales = v_scales.data();
        args.bits = kind.bits;
        args.rotation_factor = 0.125f;
        args.q_rotated = rotated.data();
        check(exl2_op_quantise_kv_write(&args), "quantise_kv_write");
        print_exact("codes of keys", k_codes);
        print_exact("codes of values", v_codes);
        print_exact("scales of keys", k_scales);
        print_exact("rotated queries", rotated);
        attend("attention over codes", k_codes.data(), v_codes.data(), k_scales.data(), v_scales.data(), kind.dtype);
    }
}

// One group of 64 rows at each width, 64 columns.
void check_matmul() {
    constexpr int kRows = 3, kGroupRows = 64, kOut = 64;
    const int widths[] = {8, 6, 5, 4, 3, 2};
    std::vector<int32_t> groups;
    int64_t in = 0, packed_rows = 0;
    for (const int bits : widths) {
        groups.insert(groups.end(), {bits, kGroupRows});
        in += kGroupRows;
        packed_rows += kGroupRows * bits / 32;
    }
    const int64_t n_groups = static_cast<int64_t>(groups.size()) / 2;
    std::vector<uint32_t> words(static_cast<size_t>(packed_rows * kOut)), scale_words(static_cast<size_t>(n_groups * kOut / 8));
    for (uint32_t& one : words) one = draw() << 16 ^ draw();
    for (uint32_t& one : scale_words) one = draw() << 16 ^ draw();
    std::vector<uint8_t> planes(words.size() * 4), scales(static_cast<size_t>(n_groups * kOut / 2));
    exl2::Exl2Planes repack = {};
    repack.words = words.data();
    repack.packed_rows = packed_rows;
    repack.out = kOut;
    repack.groups = groups.data();
    repack.n_groups = n_groups;
    repack.scale_words = scale_words.data();
    repack.planes = planes.data();
    repack.scales = scales.data();
    check(exl2_op_exl2_planes(&repack), "exl2_planes");
    print_exact("planes", planes);

    const std::vector<float> x = floats(static_cast<size_t>(kRows * in));
    const std::vector<uint16_t> group_scales(static_cast<size_t>(n_groups), 0x1c00);  // 2^-8
    for (const int whole : {0, 1}) {
        std::vector<int8_t> numbers(x.size() * 2);
        std::vector<float> x_scales(x.size() / 32), y(kRows * kOut);
        std::vector<int32_t> sums(x_scales.size());
        exl2::Digits make = {};
        make.x = x.data();
        make.rows = kRows;
        make.in = in;
        make.whole = whole;
        make.numbers = numbers.data();
        make.scales = x_scales.data();
        make.sums = sums.data();
        check(exl2_op_digits(&make), "digits");
        print_exact("numbers", numbers);
        print_exact("sums", sums);

        exl2::PlaneMatmul multiply = {};
        multiply.whole = whole;
        multiply.numbers = numbers.data();
        multiply.x_scales = x_scales.data();
        multiply.sums = sums.data();
        multiply.rows = kRows;
        multiply.in = in;
        multiply.out = kOut;
        multiply.planes = planes.data();
        multiply.packed_rows = packed_rows;
        multiply.scales = scales.data();
        multiply.group_scales = group_scales.data();
        multiply.groups = groups.data();
        multiply.n_groups = n_groups;
        multiply.y = y.data();
        check(exl2_op_plane_matmul(&multiply), "plane_matmul");
        print_near("plane_matmul", y);
    }

    const std::vector<uint16_t> weight = halves(static_cast<size_t>(kOut * in));
    std::vector<float> y(kRows * kOut);
    exl2::DenseMatmul dense = {};
    dense.x = x.data();
    dense.rows = kRows;
    dense.in = in;
    dense.out = kOut;
    dense.weight = weight.data();
    dense.dtype = exl2::kFloat16;
    dense.y = y.data();
    check(exl2_op_dense_matmul(&dense), "dense_matmul");
    print_near("dense_matmul", y);
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 2 || exl2_set_cpu_level(arguments[1]) != 0) {
        printf("no such level\n");
        return 1;
    }
    exl2_set_num_threads(2);
    printf("level %s\n", exl2_cpu_level());
    check_attention();
    check_matmul();
    return 0;
}
