// Small steps between the products.
#include "common.cuh"

// y = silu(gate) * up. Any grid and block.
extern "C" __global__ void swiglu(const float* __restrict__ gate, const float* __restrict__ up, float* __restrict__ y,
                                  long long count) {
  const long long step = (long long)gridDim.x * blockDim.x;
  for (long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x; at < count; at += step)
    y[at] = silu(gate[at]) * up[at];
}
KERNEL(swiglu)

// Row r of y is row index[r] of x. A block a row of y.
extern "C" __global__ void gather_rows(const float* __restrict__ x, const int* __restrict__ index,
                                       float* __restrict__ y, int width) {
  x += (long long)index[blockIdx.x] * width;
  y += (long long)blockIdx.x * width;
  for (int at = threadIdx.x; at < width; at += blockDim.x) y[at] = x[at];
}
KERNEL(gather_rows)

// Each row of both is a row of x and then that of y. A block a row.
extern "C" __global__ void side_by_side(const float* __restrict__ x, const float* __restrict__ y,
                                        float* __restrict__ both, int x_width, int y_width) {
  x += (long long)blockIdx.x * x_width;
  y += (long long)blockIdx.x * y_width;
  both += (long long)blockIdx.x * (x_width + y_width);
  for (int at = threadIdx.x; at < x_width; at += blockDim.x) both[at] = x[at];
  for (int at = threadIdx.x; at < y_width; at += blockDim.x) both[x_width + at] = y[at];
}
KERNEL(side_by_side)

// Row index[r] of sum += weights[r] * row r of x; no index comes twice. A block a row of x.
extern "C" __global__ void scatter_add(float* __restrict__ sum, const float* __restrict__ x,
                                       const int* __restrict__ index, const float* __restrict__ weights, int width) {
  sum += (long long)index[blockIdx.x] * width;
  x += (long long)blockIdx.x * width;
  const float weight = weights[blockIdx.x];
  for (int at = threadIdx.x; at < width; at += blockDim.x) sum[at] += weight * x[at];
}
KERNEL(scatter_add)

// Each row of x, in place, times the sigmoid of its gate. A block a row.
extern "C" __global__ void scale_by_sigmoid(float* __restrict__ x, const float* __restrict__ gates, int width) {
  x += (long long)blockIdx.x * width;
  const float factor = sigmoid(gates[blockIdx.x]);
  for (int at = threadIdx.x; at < width; at += blockDim.x) x[at] *= factor;
}
KERNEL(scale_by_sigmoid)

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

// Where the largest of the first `width` numbers of each row is, and what it is; rows are `stride` apart. A block a row,
// best of 1024 threads, whole warps.
extern "C" __global__ void __launch_bounds__(1024) argmax(const float* __restrict__ logits, int stride, int width, unsigned* __restrict__ ids,
                                  float* __restrict__ best) {
  __shared__ float values[32];
  __shared__ unsigned places[32];
  constexpr unsigned NOWHERE = 0xffffffffu;
  const float lowest = __uint_as_float(0xff800000u);
  const float* row = logits + (long long)blockIdx.x * stride;
  Best found = {lowest, NOWHERE};
  int done = 0;
  if (width % 4 == 0 && reinterpret_cast<unsigned long long>(row) % 16 == 0) {
    // four loads of 16 bytes under way a thread
    const float4* wide = reinterpret_cast<const float4*>(row);
    for (int at = threadIdx.x; at < width / 4; at += 4 * blockDim.x) {
      float4 four[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int place = at + i * blockDim.x;
        four[i] = place < width / 4 ? wide[place] : make_float4(lowest, lowest, lowest, lowest);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const unsigned place = 4 * (at + i * blockDim.x);
        found.meet(four[i].x, place);
        found.meet(four[i].y, place + 1);
        found.meet(four[i].z, place + 2);
        found.meet(four[i].w, place + 3);
      }
    }
    done = width;
  }
  for (int at = done + threadIdx.x; at < width; at += blockDim.x) found.meet(row[at], at);
  found.over_warp();
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (lane == 0) {
    values[warp] = found.value;
    places[warp] = found.id;
  }
  __syncthreads();
  if (warp > 0) return;
  found = lane < blockDim.x / 32 ? Best{values[lane], places[lane]} : Best{lowest, NOWHERE};
  found.over_warp();
  if (lane == 0) {
    ids[blockIdx.x] = found.id < (unsigned)width ? found.id : 0;
    best[blockIdx.x] = found.value;
  }
}
KERNEL(argmax)
