// The short causal convolution in front of the delta rule.
#include "common.cuh"

// Taps that there can be; those that are missing are taken as zeros before the others.
constexpr int TAPS = 8;
// Rows whose inputs are asked for together.
constexpr int AHEAD = 4;

// y[t, c] = silu(sum over j of weight[j, c] * u[t - taps + 1 + j, c]) with the tail of the segment's slot as the inputs
// before its first row; the slot is left with the tail of what came.
// Grid (ceil(channels / threads), chunks, segments), a thread a channel; `chunk`, at least taps - 1, is the rows of a
// block, and chunks * chunk at least the rows of the longest segment. Only the first chunk touches the tail.
extern "C" __global__ void causal_conv(const float* __restrict__ inputs, const float* __restrict__ weight,
                                       float* __restrict__ outputs, const unsigned long long* slots, long long offset,
                                       const int* starts, const unsigned long long* trails, long long trail_offset,
                                       int channels, int taps, int chunk) {
  const int segment = blockIdx.z;
  const int start = starts[segment], rows = starts[segment + 1] - start;
  const int first = blockIdx.y * chunk, end = min(rows, first + chunk);
  const int channel = blockIdx.x * blockDim.x + threadIdx.x;
  if (first >= rows || channel >= channels) return;
  inputs += (long long)start * channels + channel;
  outputs += (long long)start * channels + channel;
  float* tail = reinterpret_cast<float*>(slots[segment]) + offset + channel;
  float* trail = trails[segment] ? reinterpret_cast<float*>(trails[segment]) + trail_offset + channel : nullptr;
  const int past = taps - 1;

  float factors[TAPS];
  float window[TAPS]; // the last is the row's own input
#pragma unroll
  for (int j = 0; j < TAPS; ++j) {
    const int tap = j - (TAPS - taps);
    factors[j] = tap >= 0 ? weight[(long long)tap * channels + channel] : 0.0f;
    window[j] = 0.0f;
    // before the loop moves the window on: the inputs before the first row lie one place further
    const int back = j - (TAPS - taps) - 1;
    if (back >= 0)
      window[j] = first == 0 ? tail[(long long)back * channels] : inputs[(long long)(first - past + back) * channels];
  }
  if (first == 0) {
    if (trail) {
#pragma unroll
      for (int j = 1; j < TAPS; ++j)
        if (j > TAPS - taps) trail[(long long)(j - 1 - (TAPS - taps)) * channels] = window[j];
    }
    // what is kept is the last `past` of the tail, which is in the window, and the inputs
#pragma unroll
    for (int j = 1; j < TAPS; ++j) {
      const int place = j - 1 - (TAPS - taps); // of the tail
      const int from = place + rows - past;    // the row, or before the first
      if (place >= 0 && from >= 0) tail[(long long)place * channels] = inputs[(long long)from * channels];
      const int to = place - rows; // where an old one goes
      if (to >= 0) tail[(long long)to * channels] = window[j];
    }
  }
  for (int row = first; row < end; row += AHEAD) {
    float ahead[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) ahead[i] = row + i < end ? inputs[(long long)(row + i) * channels] : 0.0f;
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      if (row + i >= end) break;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < TAPS - 1; ++j) window[j] = window[j + 1];
      window[TAPS - 1] = ahead[i];
#pragma unroll
      for (int j = 0; j < TAPS; ++j) sum += factors[j] * window[j];
      outputs[(long long)(row + i) * channels] = silu(sum);
      if (trail) trail[(long long)(past + row + i) * channels] = ahead[i];
    }
  }
}
KERNEL(causal_conv)
