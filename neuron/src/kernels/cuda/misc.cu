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
