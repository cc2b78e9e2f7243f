// What many kernels need: conversion of activations to and from float32, four numbers at a time, and sums in a fixed order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx.cuh"

namespace exl2 {

constexpr int kWarpThreads = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// Four consecutive numbers, aligned to the four of them.
__device__ __forceinline__ void load_4(const float* at, float (&x)[4]) {
    const float4 four = *reinterpret_cast<const float4*>(at);
    x[0] = four.x;
    x[1] = four.y;
    x[2] = four.z;
    x[3] = four.w;
}
template <class T>  // 16-bit types
__device__ __forceinline__ void load_4(const T* at, float (&x)[4]) {
    static_assert(sizeof(T) == 2, "float16 or bfloat16");
    union {
        uint2 words;
        unsigned short bits[4];
    } four;
    four.words = *reinterpret_cast<const uint2*>(at);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = to_float(*reinterpret_cast<const T*>(&four.bits[i]));
}
__device__ __forceinline__ void store_4(float* at, const float (&x)[4]) {
    *reinterpret_cast<float4*>(at) = make_float4(x[0], x[1], x[2], x[3]);
}
template <class T>  // 16-bit types
__device__ __forceinline__ void store_4(T* at, const float (&x)[4]) {
    static_assert(sizeof(T) == 2, "float16 or bfloat16");
    union {
        uint2 words;
        unsigned short bits[4];
    } four;
#pragma unroll
    for (int i = 0; i < 4; ++i) *reinterpret_cast<T*>(&four.bits[i]) = from_float<T>(x[i]);
    *reinterpret_cast<uint2*>(at) = four.words;
}

// The sum over the lanes of a warp, in every lane; the order of additions is that of the lane numbers' bits.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
        x += __shfl_xor_sync(kAllLanes, x, distance);
    }
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
        x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
    }
    return x;
}

// The sum over a block of whole warps, in every thread. `scratch`: 32 floats of shared memory, free for other use after
// the next barrier.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
    x = warp_sum(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    return warp_sum(lane < static_cast<int>(blockDim.x) / kWarpThreads ? scratch[lane] : 0.0f);
}

}  // namespace exl2
