// Which token comes next: the rule of kernels/choose.rs, number for number. What could be rounded in another way elsewhere is
// therefore written in operations that are never fused.
#include "common.cuh"

typedef unsigned long long u64;

// One change of a logit before a token is chosen: l = l > 0 ? l / divide : l * divide, then l + add.
struct Edit {
  unsigned row, id;
  float divide, add;
};

// How a row's token is chosen.
struct Pick {
  u64 random;
  u64 top_p;   // share of the weight of what top_k left, in 2^-64; 0: all
  float scale; // 1 / temperature; 0: the likeliest
  float limit; // the furthest that is kept, in units of distance
  unsigned top_k; // 0: all
  int mask;    // which of the masks; -1: none
};

// A thread an edit. Rows that are past the end fill up the table.
extern "C" __global__ void edit_logits(float* __restrict__ logits, int stride, const Edit* __restrict__ edits, int count,
                                       int rows, int width) {
  const int at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= count) return;
  const Edit edit = edits[at];
  if (edit.row >= (unsigned)rows || edit.id >= (unsigned)width) return;
  float* logit = logits + (long long)edit.row * stride + edit.id;
  const float x = *logit;
  *logit = __fadd_rn(x > 0.0f ? __fdiv_rn(x, edit.divide) : __fmul_rn(x, edit.divide), edit.add);
}
KERNEL(edit_logits)

// The better of two candidates: the larger, of equals the first. What is not a number is never better.
struct Best {
  float value;
  unsigned id;
  __device__ __forceinline__ void meet(float other, unsigned at) {
    if (other > value || (other == value && at < id)) {
      value = other;
      id = at;
    }
  }
  __device__ __forceinline__ void over_warp() {
#pragma unroll
    for (int away = 16; away > 0; away /= 2) {
      const float other = __shfl_xor_sync(ALL_LANES, value, away);
      const unsigned at = __shfl_xor_sync(ALL_LANES, id, away);
      meet(other, at);
    }
  }
};

// e^x for x from -inf to 0, as `kernels::exp` has it.
__device__ __forceinline__ float exp_as_host(float x) {
  constexpr float SHIFT = 12582912.0f; // 1.5 * 2^23
  x = fmaxf(x, -87.33f);
  const float shifted = __fadd_rn(__fmul_rn(x, 1.44269504088896340736f), SHIFT);
  const float n = __fsub_rn(shifted, SHIFT);
  const float r = __fsub_rn(__fsub_rn(x, __fmul_rn(n, 0.6933594f)), __fmul_rn(n, -2.1219444e-4f));
  float y = 1.9875691e-4f;
  y = __fadd_rn(__fmul_rn(y, r), 1.3981999e-3f);
  y = __fadd_rn(__fmul_rn(y, r), 8.333452e-3f);
  y = __fadd_rn(__fmul_rn(y, r), 4.16658e-2f);
  y = __fadd_rn(__fmul_rn(y, r), 1.6666665e-1f);
  y = __fadd_rn(__fmul_rn(y, r), 0.5f);
  y = __fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(y, r), r), r), 1.0f);
  return __fmul_rn(y, __uint_as_float((__float_as_uint(shifted) << 23) + 0x3f800000u));
}

// A row of logits, seen from its peak.
struct Row {
  const float* logits;
  const unsigned* mask; // null: all are allowed
  int width;
  float peak, scale;

  __device__ __forceinline__ float logit(int at) const {
    if (mask && !(mask[at / 32] >> (at % 32) & 1u)) return __uint_as_float(0xff800000u);
    return logits[at];
  }
  __device__ __forceinline__ float distance(int at) const { return __fmul_rn(__fsub_rn(peak, logit(at)), scale); }
};

// What is compared of a distance: whole units of 2^-26.
__device__ __forceinline__ float key_of(float distance) { return truncf(__fmul_rn(distance, 67108864.0f)); }
// Whole units of 2^-40, so that sums do not depend on their order.
__device__ __forceinline__ u64 weight_of(float distance) {
  return __float2ull_rz(__fmul_rn(exp_as_host(-distance), 1099511627776.0f));
}

constexpr int THREADS = 1024, BINS = 2048;

struct Shared {
  u64 bins[BINS];
  u64 warps[32];
  u64 left;
  int place;
  float value;
  unsigned id;
};

__device__ __forceinline__ u64 warp_scan(u64 x) {
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (int away = 1; away < 32; away *= 2) {
    const u64 other = __shfl_up_sync(ALL_LANES, x, away);
    if (lane >= away) x += other;
  }
  return x;
}

// Where the running sum of the first 2 * THREADS bins first is above `point`: `shared.place`, or -1, and in `shared.left` how far
// past what is before it the point is. With `share` the point is first made of it and of the total: see Pick.top_p.
__device__ void find(Shared& shared, u64 point, u64 share) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u64 first = shared.bins[2 * threadIdx.x], second = shared.bins[2 * threadIdx.x + 1];
  u64 sum = warp_scan(first + second);
  if (lane == 31) shared.warps[warp] = sum;
  if (threadIdx.x == 0) shared.place = -1;
  __syncthreads();
  if (warp == 0) shared.warps[lane] = warp_scan(shared.warps[lane]);
  __syncthreads();
  if (warp > 0) sum += shared.warps[warp - 1];
  if (share) {
    const u64 wanted = __umul64hi(shared.warps[31], share);
    point = wanted > 0 ? wanted - 1 : 0;
  }
  const u64 middle = sum - second, before = middle - first;
  if (before <= point && point < middle) {
    shared.place = 2 * threadIdx.x;
    shared.left = point - before;
  }
  if (middle <= point && point < sum) {
    shared.place = 2 * threadIdx.x + 1;
    shared.left = point - middle;
  }
  __syncthreads();
}

// The smallest key up to which there are `count` tokens, or (where that is 0) the share `share` of the weight of all up to `limit`;
// `limit` where there are not so many. Digit by digit of the key, which has 31 bits: each time what shares the digits before
// is counted by the next one.
__device__ float border(Shared& shared, const Row& row, unsigned count, u64 share, float limit) {
  u64 point = count - 1;
  unsigned known = 0; // digits, as far as they are found
#pragma unroll 1
  for (int level = 0; level < 3; ++level) {
    const int bits = level == 0 ? 11 : 10, shift = level == 0 ? 20 : level == 1 ? 10 : 0;
    for (int at = threadIdx.x; at < BINS; at += THREADS) shared.bins[at] = 0;
    __syncthreads();
    for (int at = threadIdx.x; at < row.width; at += THREADS) {
      const float distance = row.distance(at), key = key_of(distance);
      if (!(key <= limit && key < 2147483648.0f)) continue;
      const unsigned digits = (unsigned)key >> shift;
      if (level > 0 && digits >> bits != known) continue;
      const u64 adds = count ? 1 : weight_of(distance);
      if (adds) atomicAdd(&shared.bins[digits & ((1u << bits) - 1)], adds);
    }
    __syncthreads();
    find(shared, point, level == 0 && !count ? share : 0);
    if (shared.place < 0) return limit;
    known = known << bits | shared.place;
    point = shared.left;
    __syncthreads();
  }
  return (float)known; // the key of a token, which a float holds
}

// The token of each row, among the first `width` logits: none (all bits set) where one is not a number or none is finite. Rows are
// `stride` apart. A block of 1024 threads a row.
extern "C" __global__ void __launch_bounds__(1024) choose(const float* __restrict__ logits, int stride, int width,
                                                          const Pick* __restrict__ picks,
                                                          const unsigned* __restrict__ masks, int mask_words,
                                                          unsigned* __restrict__ ids) {
  __shared__ Shared shared;
  constexpr unsigned NONE = 0xffffffffu;
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Pick pick = picks[blockIdx.x];
  Row row;
  row.logits = logits + (long long)blockIdx.x * stride;
  row.mask = pick.mask < 0 ? nullptr : masks + (long long)pick.mask * mask_words;
  row.width = width;
  row.scale = pick.scale;

  // the peak
  Best best = {__uint_as_float(0xff800000u), NONE};
  bool broken = false;
#pragma unroll 4
  for (int at = threadIdx.x; at < width; at += THREADS) {
    broken |= !(row.logits[at] < __uint_as_float(0x7f800000u));
    best.meet(row.logit(at), at);
  }
  best.over_warp();
  broken = __any_sync(ALL_LANES, broken);
  if (lane == 0) {
    // the first bins serve as a place for the candidates of warps
    shared.bins[warp] = (u64)best.id << 32 | __float_as_uint(best.value);
    shared.warps[warp] = broken;
  }
  __syncthreads();
  if (warp == 0) {
    const u64 of_warp = shared.bins[lane];
    best = {__uint_as_float((unsigned)of_warp), (unsigned)(of_warp >> 32)};
    best.over_warp();
    broken = __any_sync(ALL_LANES, shared.warps[lane] != 0);
    if (lane == 0) {
      // all of a row may be as low as where the search began
      shared.id = broken || !(best.value > __uint_as_float(0xff800000u)) ? NONE : best.id;
      shared.value = best.value;
    }
  }
  __syncthreads();
  row.peak = shared.value;
  if (shared.id == NONE || pick.scale == 0.0f) {
    if (threadIdx.x == 0) ids[blockIdx.x] = shared.id;
    return;
  }

  // what is kept
  float limit = __uint_as_float(0x7f800000u);
  if (pick.top_k) limit = border(shared, row, pick.top_k, 0, limit);
  if (pick.top_p) limit = border(shared, row, 0, pick.top_p, limit);
  limit = fminf(limit, pick.limit);

  // the weights of pieces of the row, in order, and the piece in which the running sum passes the point that was drawn
  const int piece = (width + 32 * BINS - 1) / (32 * BINS) * 32;
  for (int at = warp; at < BINS; at += THREADS / 32) {
    u64 sum = 0;
    const int end = min(width, (at + 1) * piece);
    for (int i = at * piece + lane; i < end; i += 32) {
      const float distance = row.distance(i);
      if (key_of(distance) <= limit) sum += weight_of(distance);
    }
    sum = __shfl_sync(ALL_LANES, warp_scan(sum), 31);
    if (lane == 0) shared.bins[at] = sum;
  }
  __syncthreads();
  find(shared, 0, 0); // for the total
  const u64 point = __umul64hi(pick.random, shared.warps[31]);
  __syncthreads();
  find(shared, point, 0);
  if (warp > 0) return;
  u64 left = shared.left;
  const int first = shared.place * piece;
  for (int start = first; start < first + piece; start += 32) {
    const int at = start + lane;
    u64 weight = 0;
    if (at < width) {
      const float distance = row.distance(at);
      if (key_of(distance) <= limit) weight = weight_of(distance);
    }
    const u64 sum = warp_scan(weight);
    const unsigned passed = __ballot_sync(ALL_LANES, sum > left);
    if (passed) {
      if (lane == 0) ids[blockIdx.x] = start + __ffs(passed) - 1;
      return;
    }
    left -= __shfl_sync(ALL_LANES, sum, 31);
  }
}
KERNEL(choose)
