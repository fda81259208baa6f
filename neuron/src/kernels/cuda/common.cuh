// What every kernel here may use, on the device and in the emulator (emulator.h), which runs the same source on a CPU.
//
// A kernel:
//
//   #include "common.cuh"
//   extern "C" __global__ void double_all(float* x, long long count) { ... }
//   KERNEL(double_all)
//
// KERNEL is nothing to nvcc; the emulator finds the kernel by it. Only pointers, int, unsigned, long long and float are
// parameters. Dynamic shared memory is `DYNAMIC_SHARED(float, scratch);` in the kernel. Shuffles are of whole warps
// (mask ALL_LANES), and every thread of a block must come to every barrier: a thread that has returned counts as missing.
// Inline PTX belongs into this file, with its emulation beside it.
#pragma once

#define ALL_LANES 0xffffffffu

#ifdef __CUDACC__
#define KERNEL(name)
#define DYNAMIC_SHARED(type, name)                                    \
  extern __shared__ __align__(16) unsigned char dynamic_shared[];    \
  type* name = reinterpret_cast<type*>(dynamic_shared)
#else
#include "emulator.h"
#endif

// === numbers of 16 bits, kept as unsigned short

// Exact.
__device__ __forceinline__ float widen_bf16(unsigned short x) { return __uint_as_float((unsigned)x << 16); }

// The two numbers of a word: the first is in its low half.
__device__ __forceinline__ float widen_bf16_low(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float widen_bf16_high(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }

// To the nearest, of two to the even one.
__device__ __forceinline__ unsigned short round_bf16(float x) {
  unsigned bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff; // not a number
  return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Two numbers rounded into a word, the first in its low half.
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
#ifdef __CUDACC__
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return round_bf16(low) | (unsigned)round_bf16(high) << 16;
#endif
}

// Exact.
__device__ __forceinline__ float widen_f16(unsigned short x) {
#ifdef __CUDACC__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x));
  return wide;
#else
  return emulator::widen_f16(x);
#endif
}

// To the nearest, of two to the even one.
__device__ __forceinline__ unsigned short round_f16(float x) {
#ifdef __CUDACC__
  unsigned short narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow) : "f"(x));
  return narrow;
#else
  return emulator::round_f16(x);
#endif
}

// === sums over threads

// Every lane gets the sum of all.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int away = 16; away > 0; away /= 2) x += __shfl_xor_sync(ALL_LANES, x, away);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int away = 16; away > 0; away /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, away));
  return x;
}

// Every thread gets the sum over the block, whose threads are whole warps. `scratch` is 32 floats of shared memory;
// between two uses of the same ones there must be a barrier (or another sum over other ones).
__device__ __forceinline__ float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  if (blockDim.x == 32) return x;
  const unsigned lane = threadIdx.x % 32;
  if (lane == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  return warp_sum(lane < blockDim.x / 32 ? scratch[lane] : 0.0f);
}

// === functions

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

// === tensor cores

// d (16, 8) += a (16, 16) · b (16, 8): factors bf16, sums f32. With g = lane / 4 and t = lane % 4, a lane holds, the
// number of the lower column (a) or row (b) in the low half of a word:
//   a[0] = (g, 2t..2t+1), a[1] = (g + 8, 2t..), a[2] = (g, 2t + 8..), a[3] = (g + 8, 2t + 8..)   row, columns
//   b[0] = (2t..2t+1, g), b[1] = (2t + 8.., g)                                                 rows, column
//   d[0] = (g, 2t), d[1] = (g, 2t + 1), d[2] = (g + 8, 2t), d[3] = (g + 8, 2t + 1)
// All lanes of a warp come to it together.
__device__ __forceinline__ void mma_m16n8k16(float d[4], const unsigned a[4], const unsigned b[2]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulator::mma_m16n8k16(d, a, b);
#endif
}

// Four matrices of 8 x 8 numbers of 16 bits from shared memory: lane 8i + r says where the 16 bytes of row r of matrix
// i lie. words[i] of a lane is then (row g, columns 2t..2t+1) of matrix i; with `transposed` (rows 2t..2t+1, column g).
__device__ __forceinline__ void load_matrices(unsigned words[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"((unsigned)__cvta_generic_to_shared(row))
               : "memory");
#else
  emulator::load_matrices(words, row, false);
#endif
}
__device__ __forceinline__ void load_matrices_transposed(unsigned words[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"((unsigned)__cvta_generic_to_shared(row))
               : "memory");
#else
  emulator::load_matrices(words, row, true);
#endif
}

// === copies that go on beside the work

// 16 bytes to shared memory, both on a boundary of 16; zeros where not `valid` (nothing is read then).
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid = true) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((unsigned)__cvta_generic_to_shared(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
#else
  emulator::copy_async_16(shared, valid ? global : nullptr);
#endif
}

// Ends a group of this thread's copies.
__device__ __forceinline__ void copy_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::copy_async_commit();
#endif
}

// Waits until at most the last GROUPS groups of this thread are under way. What other threads copied is there only after
// a barrier that follows.
template <int GROUPS>
__device__ __forceinline__ void copy_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
#else
  emulator::copy_async_wait(GROUPS);
#endif
}
