// The C interface of the library, and the choice of the level of the machine at hand.
//
// Level "baseline" runs anywhere; "avx2" (with FMA and F16C) and "avx512" (F, BW, DQ, VL) where the processor has them.
#include <string.h>

#include "../exl2_layout.h"
#include "ops.h"

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

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// The level of this name, or the best if null; nullptr: unknown, or the processor lacks it.
const Level* find_level(const char* name) {
#if defined(EXL2_X86_LEVELS)
    if (has_avx512() && (name == nullptr || strcmp(name, kAvx512.name) == 0)) return &kAvx512;
    if (has_avx2() && (name == nullptr || strcmp(name, kAvx2.name) == 0)) return &kAvx2;
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
