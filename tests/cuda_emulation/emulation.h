// CUDA C++ for g++: included before a `.cu` file, so that its kernels run on the CPU as written.
//
// Types and the conversions of float16 and bfloat16 are those of CUDA's own headers, in their host form. What those
// headers give to device code only is here: built-in variables, barriers, warp operations, atomics, fast mathematics.
// Inline PTX is not: it lives in `ptx.cuh`, whose twins are in `ptx_emulation.h`.
//
// The build (backend.py) defines EXL2_EMULATION and EXL2_ARCH. A kernel `name` becomes a function `name__emulate`.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>

#include "fibers.h"

// ---- keywords -------------------------------------------------------------------------------------------------------

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __launch_bounds__
#undef __grid_constant__
#ifdef EXL2_LIST_KERNELS
#define __global__ exl2_kernel_mark
#else
#define __global__
#endif
#define __device__
#define __host__
#define __shared__ static
#define __constant__ static
#define __launch_bounds__(...)
#define __grid_constant__
#undef __noinline__
#define __noinline__ __attribute__((noinline))
#undef __forceinline__
#define __forceinline__ inline __attribute__((always_inline))

#define threadIdx (emu::block.current->index)
#define blockIdx (emu::block.block_index)
#define blockDim (emu::block.block_dim)
#define gridDim (emu::block.grid_dim)
#define warpSize 32

// ---- barriers and fences --------------------------------------------------------------------------------------------

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    emu::sync_block(0, 0, false, file, line);
}
inline int __syncthreads_count(int vote, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return emu::sync_block(0, 0, vote != 0, file, line);
}
inline int __syncthreads_or(int vote, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return emu::sync_block(0, 0, vote != 0, file, line) > 0;
}
inline int __syncthreads_and(int vote, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return emu::sync_block(0, 0, vote == 0, file, line) == 0;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) {}

// ---- warp operations ------------------------------------------------------------------------------------------------

namespace emu {

inline void nothing(const Lanes&, long long) {}

template <class T>
void shuffle_index(const Lanes& lanes, long long width) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
        if (!lanes.has(lane)) continue;
        const auto& [value, source] = lanes.in<std::pair<T, int>>(lane);
        const int w = static_cast<int>(width), from = (lane & ~(w - 1)) | (source & (w - 1));
        if (!lanes.has(from)) fail("lane %d shuffles from lane %d, which is not in the mask 0x%08x", lane, from, lanes.mask);
        lanes.out<T>(lane) = lanes.in<std::pair<T, int>>(from).first;
    }
}
template <class T>
void shuffle_xor(const Lanes& lanes, long long width) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
        if (!lanes.has(lane)) continue;
        const auto& [value, bits] = lanes.in<std::pair<T, int>>(lane);
        const int w = static_cast<int>(width), from = lane ^ bits;
        const bool inside = from < (lane & ~(w - 1)) + w;
        if (inside && !lanes.has(from)) fail("lane %d shuffles from lane %d, which is not in the mask 0x%08x", lane, from, lanes.mask);
        lanes.out<T>(lane) = inside ? lanes.in<std::pair<T, int>>(from).first : value;
    }
}
template <class T>
void shuffle_by(const Lanes& lanes, long long width) {  // up with a negative, down with a positive distance
    for (int lane = 0; lane < kWarpSize; ++lane) {
        if (!lanes.has(lane)) continue;
        const auto& [value, distance] = lanes.in<std::pair<T, int>>(lane);
        const int w = static_cast<int>(width), base = lane & ~(w - 1), from = lane + distance;
        const bool inside = from >= base && from < base + w;
        if (inside && !lanes.has(from)) fail("lane %d shuffles from lane %d, which is not in the mask 0x%08x", lane, from, lanes.mask);
        lanes.out<T>(lane) = inside ? lanes.in<std::pair<T, int>>(from).first : value;
    }
}
inline void ballot(const Lanes& lanes, long long) {
    unsigned votes = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) votes |= lanes.has(lane) && lanes.in<int>(lane) ? 1u << lane : 0u;
    for (int lane = 0; lane < kWarpSize; ++lane) {
        if (lanes.has(lane)) lanes.out<unsigned>(lane) = votes;
    }
}
template <class T>
void match_any(const Lanes& lanes, long long) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
        if (!lanes.has(lane)) continue;
        unsigned equal = 0;
        for (int other = 0; other < kWarpSize; ++other) {
            equal |= lanes.has(other) && lanes.in<T>(other) == lanes.in<T>(lane) ? 1u << other : 0u;
        }
        lanes.out<unsigned>(lane) = equal;
    }
}
// kind: 0 add, 1 min, 2 max, 3 and, 4 or, 5 xor
template <class T>
void reduce(const Lanes& lanes, long long kind) {
    T total{};
    bool first = true;
    for (int lane = 0; lane < kWarpSize; ++lane) {
        if (!lanes.has(lane)) continue;
        const T value = lanes.in<T>(lane);
        if (first) total = value;
        else if (kind == 0) total = static_cast<T>(total + value);
        else if (kind == 1) total = value < total ? value : total;
        else if (kind == 2) total = value > total ? value : total;
        else if (kind == 3) total &= value;
        else if (kind == 4) total |= value;
        else total ^= value;
        first = false;
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
        if (lanes.has(lane)) lanes.out<T>(lane) = total;
    }
}
template <class T>
T shuffle(void (*operation)(const Lanes&, long long), unsigned mask, T value, int parameter, int width, const char* file,
          int line) {
    const std::pair<T, int> input(value, parameter);
    T output;
    warp_collective(mask, operation, width, &input, &output, file, line);
    return output;
}

}  // namespace emu

#define EXL2_EMU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, EXL2_EMU_SITE) {
    emu::warp_collective(mask, emu::nothing, 0, nullptr, nullptr, file, line);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EXL2_EMU_SITE) {
    return emu::shuffle<T>(emu::shuffle_index<T>, mask, value, source, width, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EXL2_EMU_SITE) {
    return emu::shuffle<T>(emu::shuffle_xor<T>, mask, value, bits, width, file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, EXL2_EMU_SITE) {
    return emu::shuffle<T>(emu::shuffle_by<T>, mask, value, -static_cast<int>(distance), width, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, EXL2_EMU_SITE) {
    return emu::shuffle<T>(emu::shuffle_by<T>, mask, value, static_cast<int>(distance), width, file, line);
}
inline unsigned __ballot_sync(unsigned mask, int vote, EXL2_EMU_SITE) {
    unsigned votes;
    emu::warp_collective(mask, emu::ballot, 0, &vote, &votes, file, line);
    return votes;
}
inline int __any_sync(unsigned mask, int vote, EXL2_EMU_SITE) { return __ballot_sync(mask, vote, file, line) != 0; }
inline int __all_sync(unsigned mask, int vote, EXL2_EMU_SITE) { return __ballot_sync(mask, vote, file, line) == mask; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value, EXL2_EMU_SITE) {
    unsigned equal;
    emu::warp_collective(mask, emu::match_any<T>, 0, &value, &equal, file, line);
    return equal;
}
#define EXL2_EMU_REDUCE(name, kind)                                                          \
    template <class T>                                                                       \
    T __reduce_##name##_sync(unsigned mask, T value, EXL2_EMU_SITE) {                        \
        static_assert(std::is_integral_v<T>, "__reduce_*_sync takes integers; sm_80 and up"); \
        T total;                                                                             \
        emu::warp_collective(mask, emu::reduce<T>, kind, &value, &total, file, line);        \
        return total;                                                                        \
    }
EXL2_EMU_REDUCE(add, 0)
EXL2_EMU_REDUCE(min, 1)
EXL2_EMU_REDUCE(max, 2)
EXL2_EMU_REDUCE(and, 3)
EXL2_EMU_REDUCE(or, 4)
EXL2_EMU_REDUCE(xor, 5)
#undef EXL2_EMU_REDUCE
inline unsigned __activemask() { return 0xFFFFFFFFu; }

// ---- atomics: nothing else runs meanwhile ---------------------------------------------------------------------------

template <class T>
T atomicAdd(T* at, std::common_type_t<T> value) { const T old = *at; *at = old + value; return old; }
template <class T>
T atomicSub(T* at, std::common_type_t<T> value) { const T old = *at; *at = old - value; return old; }
template <class T>
T atomicMin(T* at, std::common_type_t<T> value) { const T old = *at; if (value < old) *at = value; return old; }
template <class T>
T atomicMax(T* at, std::common_type_t<T> value) { const T old = *at; if (value > old) *at = value; return old; }
template <class T>
T atomicExch(T* at, std::common_type_t<T> value) { const T old = *at; *at = value; return old; }
template <class T>
T atomicCAS(T* at, std::common_type_t<T> compare, std::common_type_t<T> value) {
    const T old = *at;
    if (old == compare) *at = value;
    return old;
}
template <class T>
T atomicAnd(T* at, std::common_type_t<T> value) { const T old = *at; *at = old & value; return old; }
template <class T>
T atomicOr(T* at, std::common_type_t<T> value) { const T old = *at; *at = old | value; return old; }
template <class T>
T atomicXor(T* at, std::common_type_t<T> value) { const T old = *at; *at = old ^ value; return old; }
inline unsigned atomicInc(unsigned* at, unsigned limit) { const unsigned old = *at; *at = old >= limit ? 0 : old + 1; return old; }

// ---- integers and bits ----------------------------------------------------------------------------------------------

template <class To, class From>
To exl2_emu_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline unsigned __float_as_uint(float x) { return exl2_emu_bits<unsigned>(x); }
inline int __float_as_int(float x) { return exl2_emu_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return exl2_emu_bits<float>(x); }
inline float __int_as_float(int x) { return exl2_emu_bits<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; ++i) reversed |= ((x >> i) & 1u) << (31 - i);
    return reversed;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const unsigned long long both = (static_cast<unsigned long long>(y) << 32) | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned nibble = (selector >> (4 * i)) & 0xFu;
        unsigned byte = static_cast<unsigned>(both >> (8 * (nibble & 7u))) & 0xFFu;
        if (nibble & 8u) byte = byte & 0x80u ? 0xFFu : 0u;
        result |= byte << (8 * i);
    }
    return result;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>(((static_cast<unsigned long long>(high) << 32) | low) >> (shift & 31u));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((((static_cast<unsigned long long>(high) << 32) | low) << (shift & 31u)) >> 32);
}
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>((static_cast<unsigned long long>(x) * y) >> 32); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    return static_cast<unsigned long long>((static_cast<unsigned __int128>(x) * y) >> 64);
}
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i) c += static_cast<signed char>(a >> (8 * i)) * static_cast<signed char>(b >> (8 * i));
    return c;
}
#define EXL2_EMU_MIN_MAX(T)                              \
    inline T min(T x, T y) { return y < x ? y : x; }     \
    inline T max(T x, T y) { return x < y ? y : x; }
EXL2_EMU_MIN_MAX(int)
EXL2_EMU_MIN_MAX(unsigned)
EXL2_EMU_MIN_MAX(long)
EXL2_EMU_MIN_MAX(unsigned long)
EXL2_EMU_MIN_MAX(long long)
EXL2_EMU_MIN_MAX(unsigned long long)
#undef EXL2_EMU_MIN_MAX
inline float min(float x, float y) { return std::fmin(x, y); }
inline float max(float x, float y) { return std::fmax(x, y); }

// ---- memory ---------------------------------------------------------------------------------------------------------

template <class T>
T __ldg(const T* at) { return *at; }
template <class T>
T __ldcs(const T* at) { return *at; }
template <class T>
T __ldcg(const T* at) { return *at; }
template <class T>
void __stcs(T* at, T value) { *at = value; }
template <class T>
void __stcg(T* at, T value) { *at = value; }

// ---- mathematics: the fast forms are as exact as the plain ones here ------------------------------------------------

inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __expf(float x) { return ::expf(x); }
inline float __logf(float x) { return ::logf(x); }
inline float __log2f(float x) { return ::log2f(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return ::fmaf(x, y, z); }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }

// One rounding: the product is exact in double, and so is, but for its last bits, the sum.
inline __half __hfma(__half a, __half b, __half c) {
    return __double2half(static_cast<double>(__half2float(a)) * __half2float(b) + __half2float(c));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
    return __halves2half2(__hfma(__low2half(a), __low2half(b), __low2half(c)),
                          __hfma(__high2half(a), __high2half(b), __high2half(c)));
}

// ---- entry points ---------------------------------------------------------------------------------------------------

namespace emu {

template <class T>
constexpr char kind_of() {
    using Plain = std::remove_cv_t<std::remove_reference_t<T>>;
    if constexpr (std::is_pointer_v<Plain>) return 'p';
    else if constexpr (std::is_same_v<Plain, float>) return 'f';
    else if constexpr (std::is_integral_v<Plain> && sizeof(Plain) == 4) return 'i';
    else if constexpr (std::is_integral_v<Plain> && sizeof(Plain) == 8) return 'l';
    else return '?';
}

template <class... P>
struct Call {
    void (*kernel)(P...);
    void** arguments;

    template <std::size_t... I>
    void run(std::index_sequence<I...>) const {
        kernel(*static_cast<std::remove_cv_t<std::remove_reference_t<P>>*>(arguments[I])...);
    }
};

template <class... P>
const char* launch_kernel(void (*kernel)(P...), const unsigned grid[3], const unsigned dims[3], std::size_t shared_bytes,
                          int order, const char* kinds, void** arguments) {
    static const char wanted[] = {kind_of<P>()..., 0};
    std::lock_guard<std::mutex> lock(launch_mutex);
    if (std::strcmp(kinds, wanted) != 0) {
        std::snprintf(block.message, sizeof block.message,
                      "the kernel's parameters are '%s', the arguments are '%s' (p pointer, i 32-bit, l 64-bit, f float)",
                      wanted, kinds);
        return block.message;
    }
    Call<P...> call{kernel, arguments};
    const auto body = [](void* data) { static_cast<Call<P...>*>(data)->run(std::index_sequence_for<P...>{}); };
    return launch(grid, dims, shared_bytes, order, body, &call);
}

}  // namespace emu

#define EXL2_EMULATE(kernel)                                                                               \
    extern "C" __attribute__((visibility("default"))) const char* kernel##__emulate(                       \
        const unsigned* grid, const unsigned* dims, std::size_t shared_bytes, int order, const char* kinds, \
        void** arguments) {                                                                                \
        return emu::launch_kernel(kernel, grid, dims, shared_bytes, order, kinds, arguments);              \
    }

// ---- undefined behaviour: -fsanitize=alignment,bounds,null calls these ---------------------------------------------------

namespace emu {
struct SourceLocation {
    const char* file;
    std::uint32_t line, column;
};
struct AlignmentData {
    SourceLocation at;
    const void* type;
    unsigned char log_alignment, kind;
};
}  // namespace emu

extern "C" __attribute__((used)) void __ubsan_handle_type_mismatch_v1(emu::AlignmentData* data, std::uintptr_t pointer) {
    emu::fail("%s:%u: address %#zx is null or not a multiple of %d", emu::base_name(data->at.file), data->at.line,
              static_cast<std::size_t>(pointer), 1 << data->log_alignment);
}
extern "C" __attribute__((used)) void __ubsan_handle_out_of_bounds(emu::SourceLocation* at, std::uintptr_t index) {
    emu::fail("%s:%u: index %lld is out of bounds", emu::base_name(at->file), at->line, static_cast<long long>(index));
}
