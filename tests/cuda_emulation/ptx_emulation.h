// What the PTX instructions of `ptx.cuh` do, lane by lane, with the fragment layouts of the hardware.
//
// Layouts as in the PTX documentation, "Matrix fragments for mma" (g = lane / 4, t = lane % 4; a register holds two
// 16-bit numbers, the lower first):
//
//     mma.m16n8k8    A a0: row g, columns 2t, 2t+1            a1: row g + 8
//                    B b0: rows 2t, 2t+1 of column g
//     mma.m16n8k16   A a0: row g, columns 2t, 2t+1            a1: row g + 8
//                      a2: row g, columns 2t + 8, 2t + 9      a3: row g + 8
//                    B b0: rows 2t, 2t+1 of column g          b1: rows 2t + 8, 2t + 9
//     both           C c0, c1: row g, columns 2t, 2t+1        c2, c3: row g + 8
//     mma.m16n8k32 (int8; four numbers a register)
//                    A a0: row g, columns 4t..4t+3            a1: row g + 8
//                      a2: row g, columns 4t + 16..           a3: row g + 8
//                    B b0: rows 4t..4t+3 of column g          b1: rows 4t + 16..
//
//     ldmatrix.xN    matrix i is eight rows of 16 bytes, at the addresses of lanes 8i to 8i + 7
//                    register i: row lane / 4, numbers 2t and 2t + 1     (trans: rows 2t and 2t + 1, number lane / 4)
//
// EXL2_FAULT_MMA exchanges a1 and a2, EXL2_FAULT_LDMATRIX transposes: the suite must notice either.
#pragma once

namespace emu {

inline float half_bits_to_float(unsigned bits) {
    return __half2float(__half(__half_raw{static_cast<unsigned short>(bits)}));
}
inline float bfloat16_bits_to_float(unsigned bits) { return exl2_emu_bits<float>(bits << 16); }

struct MmaInput {
    float c[4];
    unsigned a[4], b[2];
};

template <int K, float (*kWiden)(unsigned)>
void mma_f32(const Lanes& lanes, long long) {
    static_assert(K == 8 || K == 16);
    float a[16][K], b[K][8];
    for (int lane = 0; lane < kWarpSize; ++lane) {
        const MmaInput& in = lanes.in<MmaInput>(lane);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < K / 4; ++i) {
#ifdef EXL2_FAULT_MMA
            const unsigned word = in.a[K == 16 ? (i == 1 ? 2 : i == 2 ? 1 : i) : 1 - i];
#else
            const unsigned word = in.a[i];
#endif
            const int row = g + 8 * (i % 2), column = 2 * t + 8 * (i / 2);
            a[row][column] = kWiden(word & 0xFFFFu);
            a[row][column + 1] = kWiden(word >> 16);
        }
        for (int i = 0; i < K / 8; ++i) {
            b[2 * t + 8 * i][g] = kWiden(in.b[i] & 0xFFFFu);
            b[2 * t + 8 * i + 1][g] = kWiden(in.b[i] >> 16);
        }
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
        const MmaInput& in = lanes.in<MmaInput>(lane);
        float* out = &lanes.out<float>(lane);
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            float sum = in.c[i];
            for (int k = 0; k < K; ++k) sum += a[row][k] * b[k][column];
            out[i] = sum;
        }
    }
}

struct MmaIntegerInput {
    int c[4];
    unsigned a[4], b[2];
};

inline void mma_s8(const Lanes& lanes, long long) {
    int a[16][32], b[32][8];
    for (int lane = 0; lane < kWarpSize; ++lane) {
        const MmaIntegerInput& in = lanes.in<MmaIntegerInput>(lane);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) {
            for (int j = 0; j < 4; ++j) {
                a[g + 8 * (i % 2)][4 * t + 16 * (i / 2) + j] = static_cast<signed char>(in.a[i] >> (8 * j));
            }
        }
        for (int i = 0; i < 2; ++i) {
            for (int j = 0; j < 4; ++j) b[4 * t + 16 * i + j][g] = static_cast<signed char>(in.b[i] >> (8 * j));
        }
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
        const MmaIntegerInput& in = lanes.in<MmaIntegerInput>(lane);
        int* out = &lanes.out<int>(lane);
        for (int i = 0; i < 4; ++i) {
            int sum = in.c[i];
            for (int k = 0; k < 32; ++k) sum += a[lane / 4 + 8 * (i / 2)][k] * b[k][2 * (lane % 4) + i % 2];
            out[i] = sum;
        }
    }
}

template <int N, bool kTransposed>
void load_matrices(const Lanes& lanes, long long) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
        unsigned* out = &lanes.out<unsigned>(lane);
        for (int i = 0; i < N; ++i) {
            const auto number = [&](int row, int column) -> unsigned {
                const char* at = static_cast<const char*>(lanes.in<const void*>(8 * i + row));
                if (reinterpret_cast<std::uintptr_t>(at) % 16 != 0) fail("ldmatrix: a row is not 16-byte aligned");
                unsigned short value;
                std::memcpy(&value, at + 2 * column, sizeof value);
                return value;
            };
            const int g = lane / 4, t = lane % 4;
#ifdef EXL2_FAULT_LDMATRIX
            constexpr bool transposed = !kTransposed;
#else
            constexpr bool transposed = kTransposed;
#endif
            out[i] = transposed ? number(2 * t, g) | number(2 * t + 1, g) << 16
                                : number(g, 2 * t) | number(g, 2 * t + 1) << 16;
        }
    }
}

}  // namespace emu

namespace exl2 {

#define EXL2_EMU_MMA(name, K, widen)                                                                       \
    inline void name##_impl(float (&c)[4], const unsigned* a, const unsigned* b, const char* file, int line) { \
        emu::MmaInput input{};                                                                             \
        for (int i = 0; i < 4; ++i) input.c[i] = c[i];                                                     \
        for (int i = 0; i < K / 4; ++i) input.a[i] = a[i];                                                 \
        for (int i = 0; i < K / 8; ++i) input.b[i] = b[i];                                                 \
        emu::warp_collective(0xFFFFFFFFu, emu::mma_f32<K, emu::widen>, 0, &input, c, file, line);          \
    }
EXL2_EMU_MMA(mma_m16n8k8_f16_f32, 8, half_bits_to_float)
EXL2_EMU_MMA(mma_m16n8k16_f16_f32, 16, half_bits_to_float)
EXL2_EMU_MMA(mma_m16n8k16_bf16_f32, 16, bfloat16_bits_to_float)
#undef EXL2_EMU_MMA

inline void mma_m16n8k8_f16_f32(float (&c)[4], const unsigned (&a)[2], const unsigned (&b)[1], EXL2_EMU_SITE) {
    mma_m16n8k8_f16_f32_impl(c, a, b, file, line);
}
inline void mma_m16n8k16_f16_f32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], EXL2_EMU_SITE) {
    mma_m16n8k16_f16_f32_impl(c, a, b, file, line);
}
#if EXL2_ARCH >= 80
inline void mma_m16n8k16_bf16_f32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], EXL2_EMU_SITE) {
    mma_m16n8k16_bf16_f32_impl(c, a, b, file, line);
}
inline void mma_m16n8k32_s8_s32(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], EXL2_EMU_SITE) {
    emu::MmaIntegerInput input{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    emu::warp_collective(0xFFFFFFFFu, emu::mma_s8, 0, &input, c, file, line);
}
#endif

#define EXL2_EMU_LDMATRIX(name, N, transposed)                                                               \
    inline void name(unsigned (&r)[N], const void* row, EXL2_EMU_SITE) {                                     \
        emu::warp_collective(0xFFFFFFFFu, emu::load_matrices<N, transposed>, 0, &row, r, file, line);        \
    }
EXL2_EMU_LDMATRIX(ldmatrix_x1, 1, false)
EXL2_EMU_LDMATRIX(ldmatrix_x2, 2, false)
EXL2_EMU_LDMATRIX(ldmatrix_x4, 4, false)
EXL2_EMU_LDMATRIX(ldmatrix_x1_trans, 1, true)
EXL2_EMU_LDMATRIX(ldmatrix_x2_trans, 2, true)
EXL2_EMU_LDMATRIX(ldmatrix_x4_trans, 4, true)
#undef EXL2_EMU_LDMATRIX

// A copy is done at the latest moment the program allows, so that a missing wait shows; with EXL2_EMU_EARLY_COPIES at once,
// so that a target still being read shows. On sm_75 it is always done at once.
inline void exl2_emu_copy(const emu::AsyncCopy& copy) {
    std::memcpy(copy.target, copy.source, copy.from_source);
    std::memset(static_cast<char*>(copy.target) + copy.from_source, 0, copy.bytes - copy.from_source);
}
template <int kBytes>
void exl2_emu_cp_async(void* target, const void* source, int from_source) {
    if (reinterpret_cast<std::uintptr_t>(target) % kBytes || reinterpret_cast<std::uintptr_t>(source) % kBytes) {
        emu::fail("cp_async_%d: target or source is not aligned to %d bytes", kBytes, kBytes);
    }
    const emu::AsyncCopy copy{target, source, kBytes, from_source};
#if EXL2_ARCH >= 80 && !defined(EXL2_EMU_EARLY_COPIES)
    emu::block.current->copies.push_back(copy);
#else
    exl2_emu_copy(copy);
#endif
}
inline void cp_async_16(void* target, const void* source) { exl2_emu_cp_async<16>(target, source, 16); }
inline void cp_async_16_zfill(void* target, const void* source, bool valid) {
    exl2_emu_cp_async<16>(target, source, valid ? 16 : 0);
}
inline void cp_async_8(void* target, const void* source) { exl2_emu_cp_async<8>(target, source, 8); }
inline void cp_async_4(void* target, const void* source) { exl2_emu_cp_async<4>(target, source, 4); }
inline void cp_async_commit() { emu::block.current->group_ends.push_back(emu::block.current->copies.size()); }
template <int N>
void cp_async_wait() {
    emu::Thread& self = *emu::block.current;
    if (self.group_ends.size() <= N) return;
    const std::size_t n_groups = self.group_ends.size() - N, n_copies = self.group_ends[n_groups - 1];
    for (std::size_t i = 0; i < n_copies; ++i) exl2_emu_copy(self.copies[i]);
    self.copies.erase(self.copies.begin(), self.copies.begin() + n_copies);
    self.group_ends.erase(self.group_ends.begin(), self.group_ends.begin() + n_groups);
    for (std::size_t& end : self.group_ends) end -= n_copies;
}
inline void cp_async_wait_all() {
    cp_async_commit();
    cp_async_wait<0>();
}

using SharedAddress = unsigned char*;
inline SharedAddress shared_address(const void* pointer) {
    return static_cast<unsigned char*>(const_cast<void*>(pointer));
}
template <class Word>
Word ld_shared(SharedAddress at) {
    return *reinterpret_cast<const Word*>(at);
}
inline void cp_async_16_if(SharedAddress target, const void* source, bool wanted) {
    if (wanted) cp_async_16(target, source);
}

inline uint4 ld_global_nc_v4(const void* at) { return *static_cast<const uint4*>(at); }
inline uint2 ld_global_nc_v2(const void* at) { return *static_cast<const uint2*>(at); }
inline unsigned ld_global_nc(const void* at) { return *static_cast<const unsigned*>(at); }
inline void prefetch_l2(const void*) {}

template <unsigned kTable>
unsigned lop3(unsigned a, unsigned b, unsigned c) {
    unsigned result = 0;
    for (int i = 0; i < 8; ++i) {
        if ((kTable >> i) & 1u) result |= ((i & 4) ? a : ~a) & ((i & 2) ? b : ~b) & ((i & 1) ? c : ~c);
    }
    return result;
}

inline float exp2_approx(float x) { return ::exp2f(x); }
inline float rcp_approx(float x) { return 1.0f / x; }
inline float tanh_approx(float x) { return ::tanhf(x); }

template <int kId>
void bar_sync(int n_threads, EXL2_EMU_SITE) {
    static_assert(kId > 0 && kId < emu::kBarriers, "barrier 0 is __syncthreads");
    emu::sync_block(kId, n_threads, false, file, line);
}

}  // namespace exl2
