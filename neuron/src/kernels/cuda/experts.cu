// Experts: which rows go to which of them, and what becomes of what they say. Their matrices are multiplied by gemv
// (matrix.cu).
//
// A row goes to `chosen` experts; row r and its j-th choice are visit r * chosen + j. Products lie by visit.
#include "common.cuh"

constexpr int MOST_ROWS = 64, MOST_EXPERTS = 512, MOST_CHOSEN = 16;

// From (rows, experts) logits of a router: `weights` of visits, softmax over all experts and where `normed` divided by the
// sum of the row's; of equals the first is chosen. What goes to one expert stands together in `visits`, by row, and
// `groups` has parts of that, each of `most` visits at the most: the expert, the place of the first visit, and how many
// there are; groups beyond the last have none.
//
// One block of whole warps, at least a thread an expert.
extern "C" __global__ void __launch_bounds__(512)
    route(const float* __restrict__ logits, int rows, int experts, int chosen, int normed, int most,
          float* __restrict__ weights, int* __restrict__ visits, int4* __restrict__ groups, int group_count) {
  __shared__ int choices[MOST_ROWS * MOST_CHOSEN];
  __shared__ unsigned of_warp[MOST_EXPERTS / 32];
  constexpr int OWN = MOST_EXPERTS / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;

  for (int row = warp; row < rows; row += warps) {
    const float* own = logits + (long long)row * experts;
    float likely[OWN], top = __uint_as_float(0xff800000u);
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      likely[i] = i * 32 + lane < experts ? own[i * 32 + lane] : __uint_as_float(0xff800000u);
      top = fmaxf(top, likely[i]);
    }
    top = warp_max(top);
    float sum = 0.0f;
    unsigned left = 0; // which of its experts are not chosen yet
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      likely[i] = expf(likely[i] - top);
      if (i * 32 + lane < experts) {
        sum += likely[i];
        left |= 1u << i;
      }
    }
    sum = warp_sum(sum);

    float mine = 0.0f, of_chosen = 0.0f;
    int choice = 0;
    for (int j = 0; j < chosen; ++j) {
      // the bits of numbers that are not negative are in order as whole numbers; what is not a number comes first
      unsigned long long best = 0;
#pragma unroll
      for (int i = 0; i < OWN; ++i) {
        const unsigned long long key =
            (unsigned long long)__float_as_uint(likely[i]) << 32 | (0xffffffffu - (unsigned)(i * 32 + lane));
        if ((left >> i & 1) && key > best) best = key;
      }
#pragma unroll
      for (int away = 16; away > 0; away /= 2) {
        const unsigned long long other = __shfl_xor_sync(ALL_LANES, best, away);
        best = other > best ? other : best;
      }
      const int expert = (int)(0xffffffffu - (unsigned)best);
      const float weight = __uint_as_float((unsigned)(best >> 32));
      if (expert % 32 == lane) left &= ~(1u << expert / 32);
      of_chosen += weight;
      if (lane == j) {
        mine = weight;
        choice = expert;
      }
    }
    if (lane < chosen) {
      weights[row * chosen + lane] = mine / (normed ? of_chosen : sum);
      choices[row * chosen + lane] = choice;
    }
  }
  __syncthreads();

  const int all = rows * chosen, expert = threadIdx.x;
  int count = 0;
  for (int visit = 0; visit < all; ++visit) count += choices[visit] == expert;
  // visits and groups of the experts before, both in one number
  const unsigned both = (unsigned)count | (unsigned)((count + most - 1) / most) << 16;
  unsigned before = both;
#pragma unroll
  for (int away = 1; away < 32; away *= 2) {
    const unsigned other = __shfl_up_sync(ALL_LANES, before, away);
    if (lane >= away) before += other;
  }
  if (lane == 31) of_warp[warp] = before;
  __syncthreads();
  before -= both;
  unsigned total = 0;
  for (int other = 0; other < warps; ++other) {
    if (other < warp) before += of_warp[other];
    total += of_warp[other];
  }

  const int first = before & 0xffffu;
  int group = before >> 16;
  for (int done = 0; done < count; done += most) groups[group++] = make_int4(expert, first + done, min(most, count - done), 0);
  for (int i = (total >> 16) + threadIdx.x; i < group_count; i += blockDim.x) groups[i] = make_int4(0, 0, 0, 0);
  for (int visit = 0, at = first; at < first + count; ++visit)
    if (choices[visit] == expert) visits[at++] = visit;
}
KERNEL(route)

// Row by row, x = sigmoid(gate) * x + the sum of weight * y over the row's visits. Grid: rows, and blocks for a row.
extern "C" __global__ void combine(float* __restrict__ x, const float* __restrict__ gates, const float* __restrict__ y,
                                   const float* __restrict__ weights, int width, int chosen) {
  const int column = blockIdx.y * blockDim.x + threadIdx.x;
  if (column >= width) return;
  const long long row = blockIdx.x;
  float sum = sigmoid(gates[row]) * x[row * width + column];
  for (int j = 0; j < chosen; ++j) {
    const long long visit = row * chosen + j;
    sum = fmaf(weights[visit], y[visit * width + column], sum);
  }
  x[row * width + column] = sum;
}
KERNEL(combine)
