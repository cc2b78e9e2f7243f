// The PTX instructions that kernels use, as small functions. The only place with inline assembly.
//
//     mma_m16n8k16_f16_f32   c[16 x 8] += a[16 x 16] * b[16 x 8]; on sm_75, which has half of it, two instructions
//     ldmatrix_x*            eight-by-eight matrices of 16-bit numbers from shared memory to fragments
//     cp_async_*             global to shared memory without registers; on sm_75 a plain load and store
//     ld_global_nc*          loads of what is read once: read-only path, not kept in L1
//
// Fragment layouts are drawn in the PTX documentation ("Matrix fragments for mma.m16n8k16"). With EXL2_EMULATION the
// functions come from `ptx_emulation.h` of the tests instead, which does the same in plain C++.
//
// EXL2_ARCH is the compute capability as two or three digits (75, 80, 86, 89, 90, 120); kernels test it, never
// __CUDA_ARCH__, which CUDA's headers would take for device code when the emulation sets it.
#pragma once

#ifdef EXL2_EMULATION

#include "ptx_emulation.h"

#define EXL2_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(emu::block.shared)
#define EXL2_SHARED(type, name, count)                              \
    static const emu::SharedArray name##_room(sizeof(type) * (count)); \
    type(&name)[count] = *reinterpret_cast<type(*)[count]>(name##_room.data())

#else

#define EXL2_ARCH (__CUDA_ARCH__ / 10)

// Dynamic shared memory of the block, 128-byte aligned: one use a kernel.
#define EXL2_DYNAMIC_SHARED(type, name)                             \
    extern __shared__ __align__(128) unsigned char exl2_dynamic_shared[]; \
    type* const name = reinterpret_cast<type*>(exl2_dynamic_shared)
// A static array in shared memory, 16-byte aligned. Preferred to a bare __shared__: the emulation poisons it.
#define EXL2_SHARED(type, name, count) __shared__ __align__(16) type name[count]

namespace exl2 {

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// ---- tensor cores ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ void mma_m16n8k8_f16_f32(float (&c)[4], const unsigned (&a)[2], const unsigned (&b)[1]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

__device__ __forceinline__ void mma_m16n8k16_f16_f32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if EXL2_ARCH >= 80
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    const unsigned first[2] = {a[0], a[1]}, second[2] = {a[2], a[3]}, b0[1] = {b[0]}, b1[1] = {b[1]};
    mma_m16n8k8_f16_f32(c, first, b0);
    mma_m16n8k8_f16_f32(c, second, b1);
#endif
}

#if EXL2_ARCH >= 80
__device__ __forceinline__ void mma_m16n8k16_bf16_f32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k32_s8_s32(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// ---- shared memory to fragments: `row` is the address of one row of 16 bytes, lane 8i + j naming row j of matrix i ------

__device__ __forceinline__ void ldmatrix_x1(unsigned (&r)[1], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(unsigned (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x1_trans(unsigned (&r)[1], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(unsigned (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// ---- global to shared memory, in the background -----------------------------------------------------------------------
// Both addresses aligned to the size. cp_async_wait<N> waits until at most N committed groups are still under way, for
// the calling thread's copies alone: a barrier must follow before others read them.

__device__ __forceinline__ void cp_async_16(void* target, const void* source) {
#if EXL2_ARCH >= 80
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(target)), "l"(source) : "memory");
#else
    *static_cast<uint4*>(target) = *static_cast<const uint4*>(source);
#endif
}
// As above, or 16 zero bytes if not valid; `source` must be an address in any case, but is not read then.
__device__ __forceinline__ void cp_async_16_zfill(void* target, const void* source, bool valid) {
#if EXL2_ARCH >= 80
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source),
                 "r"(valid ? 16 : 0)
                 : "memory");
#else
    *static_cast<uint4*>(target) = valid ? *static_cast<const uint4*>(source) : make_uint4(0, 0, 0, 0);
#endif
}
__device__ __forceinline__ void cp_async_8(void* target, const void* source) {
#if EXL2_ARCH >= 80
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(target)), "l"(source) : "memory");
#else
    *static_cast<uint2*>(target) = *static_cast<const uint2*>(source);
#endif
}
__device__ __forceinline__ void cp_async_4(void* target, const void* source) {
#if EXL2_ARCH >= 80
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(target)), "l"(source) : "memory");
#else
    *static_cast<unsigned*>(target) = *static_cast<const unsigned*>(source);
#endif
}
__device__ __forceinline__ void cp_async_commit() {
#if EXL2_ARCH >= 80
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N>
__device__ __forceinline__ void cp_async_wait() {
#if EXL2_ARCH >= 80
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}
__device__ __forceinline__ void cp_async_wait_all() {
#if EXL2_ARCH >= 80
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// ---- shared memory by 32-bit addresses --------------------------------------------------------------------------------
// For loops that are short of registers and instructions: a pointer to shared memory takes two registers, and the compiler
// likes to work it out anew each time.

using SharedAddress = unsigned;

template <class Word>
__device__ __forceinline__ Word ld_shared(SharedAddress at);
template <>
__device__ __forceinline__ uint4 ld_shared<uint4>(SharedAddress at) {
    uint4 value;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(at)
                 : "memory");
    return value;
}
template <>
__device__ __forceinline__ uint2 ld_shared<uint2>(SharedAddress at) {
    uint2 value;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(at) : "memory");
    return value;
}
template <>
__device__ __forceinline__ unsigned ld_shared<unsigned>(SharedAddress at) {
    unsigned value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(at) : "memory");
    return value;
}
template <>
__device__ __forceinline__ unsigned short ld_shared<unsigned short>(SharedAddress at) {
    unsigned short value;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(at) : "memory");
    return value;
}
// cp_async_16 where `wanted`, nothing elsewhere; without a branch.
__device__ __forceinline__ void cp_async_16_if(SharedAddress target, const void* source, bool wanted) {
#if EXL2_ARCH >= 80
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1], 16; }" ::"r"(target),
                 "l"(source), "r"(static_cast<int>(wanted))
                 : "memory");
#else
    if (wanted) {
        const uint4 value = *static_cast<const uint4*>(source);
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(target), "r"(value.x), "r"(value.y), "r"(value.z),
                     "r"(value.w)
                     : "memory");
    }
#endif
}

// ---- loads of what is read once ---------------------------------------------------------------------------------------

__device__ __forceinline__ uint4 ld_global_nc_v4(const void* at) {
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(at));
    return value;
}
__device__ __forceinline__ uint2 ld_global_nc_v2(const void* at) {
    uint2 value;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(at));
    return value;
}
__device__ __forceinline__ unsigned ld_global_nc(const void* at) {
    unsigned value;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(value) : "l"(at));
    return value;
}
__device__ __forceinline__ void prefetch_l2(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// ---- arithmetic -------------------------------------------------------------------------------------------------------

// Any function of three bits, bitwise. kTable: evaluate it on a = 0xF0, b = 0xCC, c = 0xAA, e.g. (0xF0 & 0xCC) | 0xAA.
template <unsigned kTable>
__device__ __forceinline__ unsigned lop3(unsigned a, unsigned b, unsigned c) {
    unsigned result;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(result) : "r"(a), "r"(b), "r"(c), "n"(kTable));
    return result;
}

__device__ __forceinline__ float exp2_approx(float x) {  // 2 ulp; 0 below -126
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float rcp_approx(float x) {  // 1 ulp
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float tanh_approx(float x) {  // 2^-11 relative
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// A barrier of n_threads (whole warps) of the block; 1 <= kId <= 15.
template <int kId>
__device__ __forceinline__ void bar_sync(int n_threads) {
    asm volatile("bar.sync %0, %1;" ::"n"(kId), "r"(n_threads) : "memory");
}

}  // namespace exl2

#endif  // EXL2_EMULATION
