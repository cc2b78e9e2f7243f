// Vectors of the machine at hand, and the little arithmetic the ops share.
//
// Written with the vector extensions of GCC and Clang; only what those lack is per machine, each with a portable twin.
// Every file that includes this is compiled once per level (see library_build.py), so all names have internal linkage.
//
// Results must not depend on how a loop was cut up: contraction is off (-ffp-contract=off), and where a fused
// multiply-add is wanted it is asked for by name. Sums over a contiguous row always run in 16 lanes, whatever the
// machine's vectors hold, and those are added as a fixed tree.
#pragma once

#include <stdint.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// For parts of inner loops whose sums must stay in registers.
#define EXL2_ALWAYS_INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecInt __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecUint __attribute__((vector_size(kLanes * 4)));
typedef int16_t VecShort __attribute__((vector_size(kLanes * 4)));
typedef Vec VecUnaligned __attribute__((aligned(4), may_alias));
typedef VecUint VecUintUnaligned __attribute__((aligned(4), may_alias));

inline Vec load(const float* from) { return *reinterpret_cast<const VecUnaligned*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<VecUnaligned*>(to) = value; }
inline VecUint load_words(const uint32_t* from) { return *reinterpret_cast<const VecUintUnaligned*>(from); }
inline void store_words(uint32_t* to, VecUint value) { *reinterpret_cast<VecUintUnaligned*>(to) = value; }
inline Vec splat(float value) { return value - Vec{}; }
inline VecInt splat_int(int32_t value) { return value - VecInt{}; }
inline Vec as_float(VecInt bits) { return reinterpret_cast<Vec>(bits); }
inline VecInt as_int(Vec value) { return reinterpret_cast<VecInt>(value); }
inline Vec select(VecInt condition, Vec yes, Vec no) { return condition ? yes : no; }

// 0, 1, 2, ...
inline VecInt lane_numbers() {
    VecInt result;
    for (int i = 0; i < kLanes; ++i) result[i] = i;
    return result;
}

// a * b + c, with one rounding where the machine has that.
inline Vec mul_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

// Round to the nearest float16, ties to even. The value must be an integer times a float16, and must round to less than
// 65536.
//
// Adding 1.5 * 2^(e+13), e the exponent of the value, leaves exactly the 11 bits of a float16 mantissa; taking it off
// again is exact. Subnormals need no care: the value is a multiple of 2^-24, and below 2^-14 those have 10 bits anyway.
inline Vec round_to_half(Vec value) {
    const VecInt exponent = as_int(value) & 0x7f800000;
    const Vec magic = as_float(exponent + ((13 << 23) | 0x400000));
    return (value + magic) - magic;
}

// One number, any value: overflow gives infinity.
inline uint16_t half_from_float(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 65536 or more
    if (magnitude < 0x38800000u) {
        // Subnormal or zero: adding 0.5 leaves the multiple of 2^-24 in the low bits.
        float small;
        __builtin_memcpy(&small, &magnitude, 4);
        small += 0.5f;
        uint32_t rounded;
        __builtin_memcpy(&rounded, &small, 4);
        return static_cast<uint16_t>(sign | (rounded - 0x3f000000u));
    }
    const uint32_t odd = (magnitude >> 13) & 1u;
    return static_cast<uint16_t>(sign | ((magnitude - (112u << 23) + 0xfffu + odd) >> 13));
}

inline float float_from_half(uint16_t half) {
    uint32_t bits = static_cast<uint32_t>(half & 0x7fffu) << 13;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    value *= 0x1p112f;
    __builtin_memcpy(&bits, &value, 4);
    if ((half & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;
    bits |= static_cast<uint32_t>(half & 0x8000u) << 16;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

inline uint16_t bfloat_from_float(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float float_from_bfloat(uint16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    __builtin_memcpy(&result, &bits, 4);
    return result;
}

// kLanes numbers from any of the element types that weights and pages have.
struct Half { uint16_t bits; };
struct Bfloat { uint16_t bits; };

inline Vec load_as_float(const float* from) { return load(from); }

inline Vec load_as_float(const Half* from) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__aarch64__)
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&from->bits)));
#else
    VecInt bits;
    for (int i = 0; i < kLanes; ++i) bits[i] = from[i].bits;
    VecInt magnitude = as_int(as_float((bits & 0x7fff) << 13) * 0x1p112f);
    magnitude |= ((bits & 0x7c00) == 0x7c00) & 0x7f800000;
    return as_float(magnitude | ((bits & 0x8000) << 16));
#endif
}

inline Vec load_as_float(const Bfloat* from) {
    VecInt bits;
    for (int i = 0; i < kLanes; ++i) bits[i] = from[i].bits;
    return as_float(bits << 16);
}

inline float to_float(float value) { return value; }
inline float to_float(Half value) { return float_from_half(value.bits); }
inline float to_float(Bfloat value) { return float_from_bfloat(value.bits); }

inline void from_float(float value, float* to) { *to = value; }
inline void from_float(float value, Half* to) { to->bits = half_from_float(value); }
inline void from_float(float value, Bfloat* to) { to->bits = bfloat_from_float(value); }

// Each number rounded to float16 and back; overflow gives infinity.
inline Vec through_half(Vec value) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__aarch64__)
    return vcvt_f32_f16(vcvt_f16_f32(value));
#else
    Vec result;
    for (int i = 0; i < kLanes; ++i) result[i] = float_from_half(half_from_float(value[i]));
    return result;
#endif
}

// Sixteen partial sums, however many vectors that takes.
constexpr int kWideLanes = 16;
constexpr int kWideParts = kWideLanes / kLanes;

struct Wide {
    Vec part[kWideParts];
};

inline Wide wide_zero() {
    Wide result;
    for (int i = 0; i < kWideParts; ++i) result.part[i] = Vec{};
    return result;
}

template <typename Element>
inline Wide wide_load(const Element* from) {
    Wide result;
    for (int i = 0; i < kWideParts; ++i) result.part[i] = load_as_float(from + i * kLanes);
    return result;
}

// The first `count` of 16 numbers, zeros after them.
template <typename Element>
inline Wide wide_load_some(const Element* from, int count) {
    float buffer[kWideLanes] = {};
    for (int i = 0; i < count; ++i) buffer[i] = to_float(from[i]);
    return wide_load(buffer);
}

inline void wide_mul_add(Wide a, Wide b, Wide& sum) {
    for (int i = 0; i < kWideParts; ++i) sum.part[i] = mul_add(a.part[i], b.part[i], sum.part[i]);
}

// The sum of the 16 lanes as the tree (i, i+8), (i, i+4), (i, i+2), (i, i+1).
inline float wide_sum(Wide value) {
    float lane[kWideLanes];
    for (int i = 0; i < kWideParts; ++i) store(lane + i * kLanes, value.part[i]);
    typedef float Four __attribute__((vector_size(16)));
    typedef Four FourUnaligned __attribute__((aligned(4), may_alias));
    const FourUnaligned* four = reinterpret_cast<const FourUnaligned*>(lane);
    const Four sum = (four[0] + four[2]) + (four[1] + four[3]);
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// Numbers 0 to 255, one a lane.
inline VecInt load_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
    return reinterpret_cast<VecInt>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
    return reinterpret_cast<VecInt>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    VecInt result;
    for (int i = 0; i < kLanes; ++i) result[i] = from[i];
    return result;
#endif
}

// The low byte of each lane.
inline void store_bytes(int8_t* to, VecInt value) {
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(value)));
#else
    for (int i = 0; i < kLanes; ++i) to[i] = static_cast<int8_t>(value[i]);
#endif
}

// The low half of each lane.
inline void store_shorts(int16_t* to, VecInt value) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(value)));
#else
    for (int i = 0; i < kLanes; ++i) to[i] = static_cast<int16_t>(value[i]);
#endif
}

// (a & mask) | b, where b has no bits of the mask.
inline VecUint and_or(VecUint a, uint32_t mask, VecUint b) {
#if defined(__AVX512F__)
    return reinterpret_cast<VecUint>(_mm512_ternarylogic_epi32(reinterpret_cast<__m512i>(a), _mm512_set1_epi32(static_cast<int>(mask)),
                                                               reinterpret_cast<__m512i>(b), 0xEA));
#else
    return (a & mask) | b;
#endif
}

// sum + the dot product of four unsigned bytes of `codes` and four signed bytes of `digits`, lane by lane, exactly.
// kWide: codes may exceed 127, which the 16-bit sums of plain AVX2 and AVX-512 would not hold.
template <bool kWide>
inline VecInt dot4(VecInt sum, VecUint codes, VecInt digits) {
#if defined(__AVX512VNNI__)
    return reinterpret_cast<VecInt>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(codes),
                                                        reinterpret_cast<__m512i>(digits)));
#elif defined(__AVX512BW__)
    const __m512i ones = _mm512_set1_epi16(1), right = reinterpret_cast<__m512i>(digits);
    if constexpr (kWide) {
        const __m512i low = _mm512_maddubs_epi16(reinterpret_cast<__m512i>(codes & 0x0f0f0f0fu), right);
        const __m512i high = _mm512_maddubs_epi16(reinterpret_cast<__m512i>((codes >> 4) & 0x0f0f0f0fu), right);
        return sum + reinterpret_cast<VecInt>(_mm512_madd_epi16(low, ones)) +
               reinterpret_cast<VecInt>(_mm512_madd_epi16(high, _mm512_set1_epi16(16)));
    }
    return sum + reinterpret_cast<VecInt>(
                     _mm512_madd_epi16(_mm512_maddubs_epi16(reinterpret_cast<__m512i>(codes), right), ones));
#elif defined(__AVX2__)
    const __m256i ones = _mm256_set1_epi16(1), right = reinterpret_cast<__m256i>(digits);
    if constexpr (kWide) {
        const __m256i low = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(codes & 0x0f0f0f0fu), right);
        const __m256i high = _mm256_maddubs_epi16(reinterpret_cast<__m256i>((codes >> 4) & 0x0f0f0f0fu), right);
        return sum + reinterpret_cast<VecInt>(_mm256_madd_epi16(low, ones)) +
               reinterpret_cast<VecInt>(_mm256_madd_epi16(high, _mm256_set1_epi16(16)));
    }
    return sum + reinterpret_cast<VecInt>(
                     _mm256_madd_epi16(_mm256_maddubs_epi16(reinterpret_cast<__m256i>(codes), right), ones));
#elif defined(__ARM_FEATURE_DOTPROD)
    // The instruction takes signed bytes on both sides; codes above 127 go in two halves.
    const int8x16_t right = reinterpret_cast<int8x16_t>(digits);
    if constexpr (kWide) {
        const int8x16_t low = reinterpret_cast<int8x16_t>(codes & 0x0f0f0f0fu);
        const int8x16_t high = reinterpret_cast<int8x16_t>((codes >> 4) & 0x0f0f0f0fu);
        return vdotq_s32(sum, low, right) + (vdotq_s32(VecInt{}, high, right) << 4);
    }
    return vdotq_s32(sum, reinterpret_cast<int8x16_t>(codes), right);
#else
    const VecInt bytes = reinterpret_cast<VecInt>(codes);
    sum += (bytes & 255) * (digits << 24 >> 24);
    sum += (bytes >> 8 & 255) * (digits << 16 >> 24);
    sum += (bytes >> 16 & 255) * (digits << 8 >> 24);
    return sum + (bytes >> 24 & 255) * (digits >> 24);
#endif
}

// sum + the dot product of two signed 16-bit numbers of `a` and of `b`, lane by lane, exactly.
inline VecInt dot2(VecInt sum, VecInt a, VecInt b) {
#if defined(__AVX512VNNI__)
    return reinterpret_cast<VecInt>(
        _mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX512BW__)
    return sum + reinterpret_cast<VecInt>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
    return sum + reinterpret_cast<VecInt>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__aarch64__)
    const int16x8_t left = reinterpret_cast<int16x8_t>(a), right = reinterpret_cast<int16x8_t>(b);
    return sum + vpaddq_s32(vmull_s16(vget_low_s16(left), vget_low_s16(right)), vmull_high_s16(left, right));
#else
    return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// The largest lane; NaN is never larger.
inline float lane_maximum(Vec value) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(value);
#else
    float largest = value[0];
    for (int i = 1; i < kLanes; ++i) largest = value[i] > largest ? value[i] : largest;
    return largest;
#endif
}

inline int32_t lane_maximum(VecInt value) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32(reinterpret_cast<__m512i>(value));
#elif defined(__aarch64__)
    return vmaxvq_s32(value);
#else
    int32_t largest = value[0];
    for (int i = 1; i < kLanes; ++i) largest = value[i] > largest ? value[i] : largest;
    return largest;
#endif
}

inline int32_t lane_sum(VecInt value) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32(reinterpret_cast<__m512i>(value));
#elif defined(__aarch64__)
    return vaddvq_s32(value);
#else
    int32_t sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += value[i];
    return sum;
#endif
}

// The same, and sum + a * b, modulo 2^32.
inline int32_t wrapping_lane_sum(VecInt value) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32(reinterpret_cast<__m512i>(value));
#else
    uint32_t sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += static_cast<uint32_t>(value[i]);
    return static_cast<int32_t>(sum);
#endif
}

inline VecInt wrapping_mul_add(VecInt a, VecInt b, VecInt sum) {
    return reinterpret_cast<VecInt>(reinterpret_cast<VecUint>(a) * reinterpret_cast<VecUint>(b) + reinterpret_cast<VecUint>(sum));
}

// e^x to about 1.5 units in the last place; 0 below -87.3, e^88.3 above 88.3, NaN for NaN.
//   n = round(x / ln 2), r = x - n ln 2 in two steps, e^r by a polynomial (Cephes' coefficients), times 2^n.
inline Vec exp_vec(Vec x) {
    const VecInt underflow = x < -87.3f;
    x = select(x > 88.3f, splat(88.3f), x);
    x = select(underflow, splat(-87.3f), x);
    const Vec magic = splat(12582912.0f);
    const Vec shifted = mul_add(x, splat(1.44269504f), magic);
    const Vec n = shifted - magic;
    Vec r = mul_add(n, splat(-0.693359375f), x);
    r = mul_add(n, splat(2.12194440e-4f), r);
    Vec p = splat(1.9875691500e-4f);
    p = mul_add(p, r, splat(1.3981999507e-3f));
    p = mul_add(p, r, splat(8.3334519073e-3f));
    p = mul_add(p, r, splat(4.1665795894e-2f));
    p = mul_add(p, r, splat(1.6666665459e-1f));
    p = mul_add(p, r, splat(5.0000001201e-1f));
    p = mul_add(p, r * r, r + 1.0f);
    const VecInt exponent = as_int(shifted) - as_int(magic) + 127;
    return select(underflow, Vec{}, p * as_float(exponent << 23));
}

}  // namespace
