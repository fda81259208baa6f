// The gated delta rule as a scan over the rows of each segment (Yang et al., "Gated Delta Networks", 2024):
//   S <- e^g S;  delta = beta (v - S^T k);  S <- S + k delta^T;  o = S^T q
//
// The columns of a state know nothing of each other. A warp has 8 of them, each lane 4 columns of a sixteenth of the
// keys, in registers over all rows: the state is read once and written once, 16 bytes at a time, and what a row needs
// of other lanes comes by shuffles, with no barrier.
#include "common.cuh"

constexpr int SLICES = 16; // of the keys, one after another

struct Shape {
  int channels, key_heads, value_heads, value_dim, tail;
};

// Up to 4 numbers of a row; beyond `left` there are zeros.
__device__ __forceinline__ void load_columns(float to[4], const float* from, int left, bool whole) {
  if (whole) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c) to[c] = c < left ? from[c] : 0.0f;
  }
}
__device__ __forceinline__ void store_columns(float* to, const float from[4], int left, bool whole) {
  if (whole) {
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (c < left) to[c] = from[c];
  }
}
__device__ __forceinline__ bool on_boundary(const float* at) {
  return reinterpret_cast<unsigned long long>(at) % 16 == 0;
}

// What a lane needs of a row.
template <int KEYS>
struct Row {
  float key[KEYS], query[KEYS], value[4], a, b;

  // `whole`: channels are such that 16 bytes can be read at once
  __device__ __forceinline__ void load(const float* query_at, const float* key_at, const float* value_at,
                                       const float* a_at, const float* b_at, int left, bool whole) {
    if (KEYS % 4 == 0 && whole) {
#pragma unroll
      for (int i = 0; i < KEYS; i += 4) {
        load_columns(key + i, key_at + i, 4, true);
        load_columns(query + i, query_at + i, 4, true);
      }
    } else {
#pragma unroll
      for (int i = 0; i < KEYS; ++i) {
        key[i] = key_at[i];
        query[i] = query_at[i];
      }
    }
    load_columns(value, value_at, left, whole && left >= 4);
    a = *a_at;
    b = *b_at;
  }
};

// Sums over the lanes that have the same columns.
__device__ __forceinline__ void over_slices(float sums[4]) {
#pragma unroll
  for (int away = 16; away > 1; away /= 2) {
#pragma unroll
    for (int c = 0; c < 4; ++c) sums[c] += __shfl_xor_sync(ALL_LANES, sums[c], away);
  }
}

template <int KEY_DIM>
__device__ __forceinline__ void scan(const float* __restrict__ qkv, const float* __restrict__ b,
                                     const float* __restrict__ a, const float* __restrict__ rate,
                                     const float* __restrict__ dt_bias, float* __restrict__ out,
                                     const unsigned long long* slots, long long offset, const int* starts,
                                     const unsigned long long* trails, long long trail_offset, Shape shape) {
  constexpr int KEYS = KEY_DIM / SLICES;
  const int segment = blockIdx.z, head = blockIdx.y;
  const int start = starts[segment], rows = starts[segment + 1] - start;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int of_warp = blockIdx.x * 32 + warp * 8;
  if (rows == 0 || of_warp >= shape.value_dim) return; // the whole warp
  const int column = of_warp + lane % 2 * 4, slice = lane / 2;
  const int left = shape.value_dim - column; // columns that are there; at most 4 are this lane's
  const int key_head = head / (shape.value_heads / shape.key_heads);

  const long long size = (long long)KEY_DIM * shape.value_dim;
  const long long place = (long long)slice * KEYS * shape.value_dim + column; // of the lane's first number in a state
  float* state = reinterpret_cast<float*>(slots[segment]) + offset + shape.tail + head * size + place;
  float* trail = nullptr;
  if (trails[segment])
    trail = reinterpret_cast<float*>(trails[segment]) + trail_offset + shape.tail + (long long)rows * shape.channels +
            head * size + place;
  const bool whole = left >= 4 && shape.value_dim % 4 == 0 && on_boundary(state) && (!trail || on_boundary(trail));

  float s[KEYS][4];
#pragma unroll
  for (int i = 0; i < KEYS; ++i) load_columns(s[i], state + (long long)i * shape.value_dim, left, whole);

  qkv += (long long)start * shape.channels;
  const float* query_at = qkv + key_head * KEY_DIM + slice * KEYS;
  const float* key_at = query_at + shape.key_heads * KEY_DIM;
  const float* value_at = qkv + 2 * shape.key_heads * KEY_DIM + head * shape.value_dim + column;
  a += (long long)start * shape.value_heads + head;
  b += (long long)start * shape.value_heads + head;
  out += ((long long)start * shape.value_heads + head) * shape.value_dim + column;
  const bool whole_rows = shape.channels % 4 == 0 && shape.value_dim % 4 == 0 && on_boundary(qkv);
  const float decay = -rate[head], bias = dt_bias[head];

  Row<KEYS> next;
  next.load(query_at, key_at, value_at, a, b, left, whole_rows);
  for (int t = 0; t < rows; ++t) {
    const Row<KEYS> row = next;
    if (t + 1 < rows) {
      query_at += shape.channels;
      key_at += shape.channels;
      value_at += shape.channels;
      a += shape.value_heads;
      b += shape.value_heads;
      next.load(query_at, key_at, value_at, a, b, left, whole_rows);
    }
    const float beta = sigmoid(row.b);
    const float x = row.a + bias;
    const float kept = expf(decay * (x > 20.0f ? x : log1pf(expf(x))));

    float held[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < KEYS; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) held[c] += row.key[i] * s[i][c];
    }
    over_slices(held);
    float delta[4], read[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      delta[c] = beta * (row.value[c] - kept * held[c]);
      read[c] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < KEYS; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        s[i][c] = kept * s[i][c] + row.key[i] * delta[c];
        read[c] += row.query[i] * s[i][c];
      }
    }
    over_slices(read);
    if (slice == 0) store_columns(out, read, left, left >= 4 && shape.value_dim % 4 == 0 && on_boundary(out));
    out += (long long)shape.value_heads * shape.value_dim;
    if (trail && t + 1 < rows) {
#pragma unroll
      for (int i = 0; i < KEYS; ++i) store_columns(trail + (long long)i * shape.value_dim, s[i], left, whole);
      trail += shape.value_heads * size;
    }
  }
#pragma unroll
  for (int i = 0; i < KEYS; ++i) store_columns(state + (long long)i * shape.value_dim, s[i], left, whole);
}

// Grid (ceil(value_dim / 32), value_heads, segments), 128 threads. `qkv` is (T, channels) after the convolution and the
// norms of queries and keys; `tail` is how many floats of the convolution lie before the state in a slot.
#define DELTA_RULE(name, key_dim)                                                                                      \
  extern "C" __global__ void __launch_bounds__(128)                                                                    \
      name(const float* qkv, const float* b, const float* a, const float* rate, const float* dt_bias, float* out,      \
           const unsigned long long* slots, long long offset, const int* starts, const unsigned long long* trails,     \
           long long trail_offset, int channels, int key_heads, int value_heads, int value_dim, int tail) {            \
    scan<key_dim>(qkv, b, a, rate, dt_bias, out, slots, offset, starts, trails, trail_offset,                          \
                  Shape{channels, key_heads, value_heads, value_dim, tail});                                           \
  }                                                                                                                    \
  KERNEL(name)

DELTA_RULE(delta_rule_16, 16)
DELTA_RULE(delta_rule_32, 32)
DELTA_RULE(delta_rule_64, 64)
DELTA_RULE(delta_rule_128, 128)
