// The C interface of the library, and the choice of the level of the machine at hand.
//
// Level "baseline" runs anywhere; "avx2" (with FMA and F16C), "avx512" (F, BW, DQ, VL) and "avx512vnni" where the processor
// has them. "avx512amd" is the last with products by sums (spread_codes.h), which pay where 512-bit multiplications take
// twice as long as additions: on AMD's processors.
#include <stdint.h>
#include <string.h>

#include <atomic>

#include "../exl2_layout.h"
#include "ops.h"

#if defined(EXL2_ARM_LEVELS) && defined(__linux__)
#include <sys/auxv.h>
#endif

#define EXL2_PUBLIC extern "C" __attribute__((visibility("default")))

namespace exl2 {
namespace {

struct Level {
    const char* name;
#define EXL2_OP_POINTER(name, Args) int (*name)(const Args&);
    EXL2_FOR_EACH_OP(EXL2_OP_POINTER)
};

#define EXL2_OP_IN_TABLE(name, Args) EXL2_TABLE_LEVEL::name,
#define EXL2_TABLE_LEVEL baseline
const Level kBaseline = {"baseline", EXL2_FOR_EACH_OP(EXL2_OP_IN_TABLE)};
#undef EXL2_TABLE_LEVEL

#if defined(EXL2_X86_LEVELS)
#define EXL2_TABLE_LEVEL avx2
const Level kAvx2 = {"avx2", EXL2_FOR_EACH_OP(EXL2_OP_IN_TABLE)};
#undef EXL2_TABLE_LEVEL
#define EXL2_TABLE_LEVEL avx512
const Level kAvx512 = {"avx512", EXL2_FOR_EACH_OP(EXL2_OP_IN_TABLE)};
#undef EXL2_TABLE_LEVEL
#define EXL2_TABLE_LEVEL avx512vnni
const Level kAvx512Vnni = {"avx512vnni", EXL2_FOR_EACH_OP(EXL2_OP_IN_TABLE)};
#undef EXL2_TABLE_LEVEL

const Level kAvx512Amd = [] {
    Level level = kAvx512Vnni;
    level.name = "avx512amd";
    level.plane_matmul = avx512vnni::plane_matmul_by_sums;
    return level;
}();

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#endif

#if defined(EXL2_ARM_LEVELS)
#define EXL2_TABLE_LEVEL dotprod
const Level kDotprod = {"dotprod", EXL2_FOR_EACH_OP(EXL2_OP_IN_TABLE)};
#undef EXL2_TABLE_LEVEL

bool has_dotprod() {
#if defined(__linux__)
    constexpr unsigned long kAsimdDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
    return (getauxval(AT_HWCAP) & kAsimdDotProduct) != 0;
#elif defined(__APPLE__)
    return true;  // every one of these has them
#else
    return false;
#endif
}
#endif

// The level of this name, or the best if null; nullptr: unknown, or the processor lacks it.
const Level* find_level(const char* name) {
#if defined(EXL2_X86_LEVELS)
    const bool best_is_amd = name == nullptr && __builtin_cpu_is("amd");
    if (has_avx512vnni() && (best_is_amd || (name != nullptr && strcmp(name, kAvx512Amd.name) == 0))) return &kAvx512Amd;
    if (has_avx512vnni() && (name == nullptr || strcmp(name, kAvx512Vnni.name) == 0)) return &kAvx512Vnni;
    if (has_avx512() && (name == nullptr || strcmp(name, kAvx512.name) == 0)) return &kAvx512;
    if (has_avx2() && (name == nullptr || strcmp(name, kAvx2.name) == 0)) return &kAvx2;
#endif
#if defined(EXL2_ARM_LEVELS)
    if (has_dotprod() && (name == nullptr || strcmp(name, kDotprod.name) == 0)) return &kDotprod;
#endif
    return name == nullptr || strcmp(name, kBaseline.name) == 0 ? &kBaseline : nullptr;
}

const Level*& current() {
    static const Level* level = find_level(nullptr);
    return level;
}

}  // namespace
}  // namespace exl2

EXL2_PUBLIC int exl2_abi_version() { return exl2::kAbiVersion; }

// Hash of the sources this was built from, as library_build.py computed it.
EXL2_PUBLIC const char* exl2_source_hash() { return EXL2_SOURCE_HASH; }

EXL2_PUBLIC const char* exl2_cpu_level() { return exl2::current()->name; }

// Use a lower level than the best, for tests. Not while ops run. Returns 1 if there is no such level here.
EXL2_PUBLIC int exl2_set_cpu_level(const char* name) {
    const exl2::Level* level = exl2::find_level(name);
    if (level == nullptr) return 1;
    exl2::current() = level;
    return 0;
}

EXL2_PUBLIC void exl2_set_num_threads(int count) { exl2::set_num_threads(count); }

// One function per op, taking the argument structure of ops.h.
#define EXL2_EXPORT_OP(name, Args) \
    EXL2_PUBLIC int exl2_op_##name(const exl2::Args* args) { return exl2::current()->name(*args); }
EXL2_FOR_EACH_OP(EXL2_EXPORT_OP)

namespace {

// Which op an entry of a tape is; the order is that of EXL2_FOR_EACH_OP, and exl2_op_index names it.
#define EXL2_OP_NUMBER(name, Args) kOp_##name,
enum OpNumber : int { EXL2_FOR_EACH_OP(EXL2_OP_NUMBER) kOpCount };

}  // namespace

// The number of an op in a tape, -1 if there is none of this name.
EXL2_PUBLIC int exl2_op_index(const char* name) {
#define EXL2_OP_INDEX(op, Args) \
    if (strcmp(name, #op) == 0) return kOp_##op;
    EXL2_FOR_EACH_OP(EXL2_OP_INDEX)
    return -1;
}

// Run a sequence of ops in one call: ops[i] is the number of the op, arguments[i] its structure. Stops at the first that
// fails, leaves its place in *stopped_at and returns its status.
EXL2_PUBLIC int exl2_run_tape(const int32_t* ops, const void* const* arguments, int64_t count, int64_t* stopped_at) {
    const exl2::Level& level = *exl2::current();
    const exl2::Region region;
    for (int64_t i = 0; i < count; ++i) {
        int status = exl2::kOutOfRange;
        switch (ops[i]) {
#define EXL2_RUN_OP(name, Args) \
    case kOp_##name: status = level.name(*static_cast<const exl2::Args*>(arguments[i])); break;
            EXL2_FOR_EACH_OP(EXL2_RUN_OP)
        }
        if (status != exl2::kOk) {
            *stopped_at = i;
            return status;
        }
    }
    return exl2::kOk;
}

// Read n_bytes once with all threads, in the stride of a matmul; returns a number that depends on all of them. For
// measuring what memory gives.
EXL2_PUBLIC uint64_t exl2_read_memory(const void* memory, int64_t n_bytes) {
    struct Job {
        const uint8_t* memory;
        int64_t n_bytes;
        std::atomic<uint64_t> sum;
    } job{static_cast<const uint8_t*>(memory), n_bytes, {0}};
    constexpr int64_t kPart = 1 << 16;
    const exl2::Task task = [](const void* context, int64_t index) {
        Job& job = *static_cast<Job*>(const_cast<void*>(context));
        typedef uint64_t Eight __attribute__((vector_size(64), aligned(1), may_alias));
        const int64_t last = (index + 1) * kPart < job.n_bytes ? (index + 1) * kPart : job.n_bytes;
        Eight sum[4] = {};
        int64_t i = index * kPart;
        for (; i + 256 <= last; i += 256)
            for (int k = 0; k < 4; ++k) sum[k] ^= *reinterpret_cast<const Eight*>(job.memory + i + 64 * k);
        uint64_t total = 0;
        for (int k = 0; k < 4; ++k)
            for (int lane = 0; lane < 8; ++lane) total += sum[k][lane];
        for (; i < last; ++i) total += job.memory[i];
        job.sum.fetch_add(total);
        return true;
    };
    const exl2::Region region;
    exl2::run_tasks((n_bytes + kPart - 1) / kPart, n_bytes, task, &job);
    return job.sum.load();
}
