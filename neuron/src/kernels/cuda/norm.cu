// Norms of rows. A row is read once: its numbers stay in registers until the sum of their squares is known, up to HELD
// of them a thread; only of wider rows is the rest read again.
#include "common.cuh"

// Numbers of a row that a thread keeps: with 1024 threads rows of 16384.
constexpr int HELD = 16;

// y = row / sqrt(mean(row^2) + eps) * scale, where x (and, with `hidden`, hidden + x, which is left there) is the row.
template <bool ADD>
__device__ __forceinline__ void norm_row(float* __restrict__ hidden, const float* __restrict__ x,
                                         const float* __restrict__ scale, float* __restrict__ y, int width, float eps,
                                         float* scratch) {
  const long long row = (long long)blockIdx.x * width;
  x += row;
  y += row;
  if (ADD) hidden += row;
  float held[HELD];
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    const int at = threadIdx.x + i * blockDim.x;
    held[i] = 0.0f;
    if (at < width) {
      held[i] = x[at];
      if (ADD) hidden[at] = held[i] += hidden[at];
    }
    sum += held[i] * held[i];
  }
  for (int at = threadIdx.x + HELD * blockDim.x; at < width; at += blockDim.x) {
    float wide = x[at];
    if (ADD) hidden[at] = wide += hidden[at];
    sum += wide * wide;
  }
  const float factor = 1.0f / sqrtf(block_sum(sum, scratch) / width + eps);
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    const int at = threadIdx.x + i * blockDim.x;
    if (at < width) y[at] = held[i] * factor * scale[at];
  }
  for (int at = threadIdx.x + HELD * blockDim.x; at < width; at += blockDim.x)
    y[at] = (ADD ? hidden[at] : x[at]) * factor * scale[at];
}

// A block a row, any multiple of 32 threads.
extern "C" __global__ void rms_norm(const float* x, const float* scale, float* y, int width, float eps) {
  __shared__ float scratch[32];
  norm_row<false>(nullptr, x, scale, y, width, eps, scratch);
}
KERNEL(rms_norm)

// hidden += x; y = its norm. A block a row, any multiple of 32 threads.
extern "C" __global__ void add_rms_norm(float* hidden, const float* x, const float* scale, float* y, int width, float eps) {
  __shared__ float scratch[32];
  norm_row<true>(hidden, x, scale, y, width, eps, scratch);
}
KERNEL(add_rms_norm)

// hidden += x. A thread a number.
extern "C" __global__ void add(float* __restrict__ hidden, const float* __restrict__ x, long long count) {
  const long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (at < count) hidden[at] += x[at];
}
KERNEL(add)

// In place: x / sqrt(mean(x^2) + eps) * weight * silu(gate). A block a head of a token, any multiple of 32 threads.
extern "C" __global__ void gated_rms_norm(float* __restrict__ x, const float* __restrict__ gate,
                                          const float* __restrict__ weight, int width, float eps) {
  __shared__ float scratch[32];
  const long long row = (long long)blockIdx.x * width;
  x += row;
  gate += row;
  float sum = 0.0f;
  for (int at = threadIdx.x; at < width; at += blockDim.x) sum += x[at] * x[at];
  const float factor = 1.0f / sqrtf(block_sum(sum, scratch) / width + eps);
  for (int at = threadIdx.x; at < width; at += blockDim.x) x[at] = x[at] * factor * weight[at] * silu(gate[at]);
}
KERNEL(gated_rms_norm)

// Queries and keys of (rows, channels), which lie first in a row, in place: x / sqrt(sum(x^2) + 1e-6), the queries times
// key_dim^-0.5 besides. Grid (rows, 2 * key_heads); any multiple of 32 threads, best 32 (a head is small).
extern "C" __global__ void l2_norm_heads(float* __restrict__ qkv, int channels, int key_heads, int key_dim) {
  __shared__ float scratch[32];
  const int head = blockIdx.y;
  float* x = qkv + (long long)blockIdx.x * channels + (long long)head * key_dim;
  float sum = 0.0f;
  for (int at = threadIdx.x; at < key_dim; at += blockDim.x) sum += x[at] * x[at];
  float factor = 1.0f / sqrtf(block_sum(sum, scratch) + 1e-6f);
  if (head < key_heads) factor /= sqrtf((float)key_dim);
  for (int at = threadIdx.x; at < key_dim; at += blockDim.x) x[at] *= factor;
}
KERNEL(l2_norm_heads)
