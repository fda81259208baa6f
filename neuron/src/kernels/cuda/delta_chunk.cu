// The gated delta rule for many rows: 64 of them, a chunk, at a time by matrix products (Yang et al., "Gated Delta
// Networks", 2024). Key and value dim are 128. With G the sum of g within the chunk and D[i, j] = e^(G_i - G_j), i >= j:
//   A = strictly lower (diag(beta) K K^T o D);  U = (I + A)^-1 (beta o V);  W = (I + A)^-1 (beta o e^G o K)
//   P = lower (Q K^T o D)                                            `delta_chunk_prepare_128`, all chunks at once
//   V' = U - W S;  O = (e^G o Q) S + P V';  S <- e^G_C S + (e^(G_C - G) o K)^T V'
//                                                                    `delta_chunk_scan_128`, one chunk after another
// Every factor of a product is two bf16, high + low, of which all but low * low is summed in f32: with one bf16 the
// state would be off by some 5e-3. What the scan reads lies in scratch memory as mma_m16n8k16 takes it, 16 bytes a lane.
// Rows that the last chunk lacks are rows of zeros, which change nothing.
#include "common.cuh"

constexpr int CHUNK = 64, DIM = 128;

// === scratch: of a chunk of a head, in units of 16 bytes

constexpr int TILE = 32;                                         // a tile of 16 x 16 factors, a unit a lane
constexpr int PLANE = CHUNK / 16 * (DIM / 16) * TILE;            // of W, Q and K: all tiles
constexpr int SQUARE = CHUNK / 16 * (CHUNK / 16) * TILE;         // of P
constexpr int W_AT = 0, Q_AT = 2 * PLANE, K_AT = 4 * PLANE;      // high plane, low plane
constexpr int P_AT = 6 * PLANE;
constexpr int U_AT = P_AT + 2 * SQUARE;                          // tiles of 16 x 8 sums in f32
constexpr int DECAY_AT = U_AT + CHUNK / 16 * (DIM / 8) * TILE;   // e^G_C
constexpr int RECORD = DECAY_AT + 16;                            // 147712 bytes

// Records of a segment begin here: chunks of those before it are never more than that, and a table is spared.
__device__ __forceinline__ long long first_record(const int* starts, int segment) {
  return (starts[segment] - starts[0]) / CHUNK + segment;
}

// A word of two factors, and one of what they lack.
struct Split {
  unsigned high, low;
};
__device__ __forceinline__ Split split(float first, float second) {
  const unsigned high = pack_bf16(first, second);
  return {high, pack_bf16(first - widen_bf16_low(high), second - widen_bf16_high(high))};
}
__device__ __forceinline__ float first_of(unsigned high, unsigned low) { return widen_bf16_low(high) + widen_bf16_low(low); }
__device__ __forceinline__ float second_of(unsigned high, unsigned low) {
  return widen_bf16_high(high) + widen_bf16_high(low);
}

// d += a * b of split factors.
__device__ __forceinline__ void multiply(float d[4], const unsigned a_high[4], const unsigned a_low[4],
                                         const unsigned b_high[2], const unsigned b_low[2]) {
  mma_m16n8k16(d, a_high, b_high);
  mma_m16n8k16(d, a_low, b_high);
  mma_m16n8k16(d, a_high, b_low);
}

__device__ __forceinline__ void store_tile(uint4* plane, int low_plane, int tile, const Split words[4]) {
  const int at = tile * TILE + threadIdx.x % 32;
  plane[at] = make_uint4(words[0].high, words[1].high, words[2].high, words[3].high);
  plane[low_plane + at] = make_uint4(words[0].low, words[1].low, words[2].low, words[3].low);
}

// === prepare

constexpr int ROW = DIM + 8;        // of a plane in shared memory: rows of 16 bytes beside each other meet no bank twice
constexpr int X_ROW = 2 * DIM + 8;  // of the solution
constexpr int A_ROW = CHUNK + 4;
constexpr int PLANES_BYTES = 4 * CHUNK * ROW * 2; // K high, K low, Q high, Q low; the solution lies there later
constexpr int PREPARE_SHARED = PLANES_BYTES + CHUNK * A_ROW * 4 + 3 * CHUNK * 4;
static_assert(CHUNK * X_ROW * 4 <= PLANES_BYTES && PREPARE_SHARED == 87808, "what launches this is told so");

// Row r of lanes 0..15 and columns 0..7, of lanes 16..31 columns 8..15: the tile of 16 x 16 whose corner is given, as
// load_matrices takes it for a left factor.
__device__ __forceinline__ const unsigned short* tile_row(const unsigned short* plane, int row, int column) {
  const int lane = threadIdx.x % 32;
  return plane + (row + lane % 16) * ROW + column + lane / 16 * 8;
}

// Grid (chunks of the longest segment, value_heads, segments), 128 threads, 87808 bytes of shared memory. `scratch` has
// value_heads * (rows / 64 + segments) records of 147712 bytes, rows being starts[segments] - starts[0].
extern "C" __global__ void __launch_bounds__(128)
    delta_chunk_prepare_128(const float* __restrict__ qkv, const float* __restrict__ b, const float* __restrict__ a,
                            const float* __restrict__ rate, const float* __restrict__ dt_bias, const int* starts,
                            uint4* __restrict__ scratch, int channels, int key_heads, int value_heads) {
  DYNAMIC_SHARED(unsigned char, shared);
  unsigned short* planes = reinterpret_cast<unsigned short*>(shared);
  const unsigned short *k_high = planes, *k_low = k_high + CHUNK * ROW;
  const unsigned short *q_high = k_low + CHUNK * ROW, *q_low = q_high + CHUNK * ROW;
  float* x = reinterpret_cast<float*>(shared);                      // (CHUNK, X_ROW): U | W
  float* lower = reinterpret_cast<float*>(shared + PLANES_BYTES);   // A transposed: (column, row)
  float* sums = lower + CHUNK * A_ROW;                              // G
  float* betas = sums + CHUNK;
  float* grown = betas + CHUNK;                                     // e^G

  const int segment = blockIdx.z, head = blockIdx.y;
  const int rows = min(CHUNK, starts[segment + 1] - starts[segment] - (int)blockIdx.x * CHUNK);
  if (rows <= 0) return;
  const long long start = starts[segment] + (long long)blockIdx.x * CHUNK;
  uint4* record = scratch + ((first_record(starts, segment) + blockIdx.x) * value_heads + head) * RECORD;
  const int key_head = head / (value_heads / key_heads);
  const float* queries = qkv + start * channels + key_head * DIM;
  const float* keys = queries + key_heads * DIM;
  const float* values = qkv + start * channels + 2 * key_heads * DIM + head * DIM;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

  if (warp == 0) {
    // lane l has rows 2l and 2l + 1
    float decay[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = 2 * lane + i;
      decay[i] = 0.0f;
      float beta = 0.0f;
      if (row < rows) {
        const long long at = (start + row) * value_heads + head;
        const float open = a[at] + dt_bias[head];
        decay[i] = -rate[head] * (open > 20.0f ? open : log1pf(expf(open)));
        beta = sigmoid(b[at]);
      }
      betas[row] = beta;
    }
    float sum = decay[0] + decay[1];
#pragma unroll
    for (int away = 1; away < 32; away *= 2) {
      const float before = __shfl_up_sync(ALL_LANES, sum, away);
      if (lane >= away) sum += before;
    }
    sums[2 * lane] = sum - decay[1];
    sums[2 * lane + 1] = sum;
    grown[2 * lane] = expf(sum - decay[1]);
    grown[2 * lane + 1] = expf(sum);
  }
  for (int at = threadIdx.x; at < CHUNK * DIM / 4; at += 128) {
    const int row = at / (DIM / 4), column = at % (DIM / 4) * 4;
    float4 k = make_float4(0.0f, 0.0f, 0.0f, 0.0f), q = k;
    if (row < rows) {
      k = *reinterpret_cast<const float4*>(keys + (long long)row * channels + column);
      q = *reinterpret_cast<const float4*>(queries + (long long)row * channels + column);
    }
    unsigned short* to = planes + row * ROW + column;
    const Split k0 = split(k.x, k.y), k1 = split(k.z, k.w), q0 = split(q.x, q.y), q1 = split(q.z, q.w);
    *reinterpret_cast<uint2*>(to) = make_uint2(k0.high, k1.high);
    *reinterpret_cast<uint2*>(to + CHUNK * ROW) = make_uint2(k0.low, k1.low);
    *reinterpret_cast<uint2*>(to + 2 * CHUNK * ROW) = make_uint2(q0.high, q1.high);
    *reinterpret_cast<uint2*>(to + 3 * CHUNK * ROW) = make_uint2(q0.low, q1.low);
  }
  __syncthreads();

  // the warp's 16 rows of K K^T and Q K^T, columns up to the diagonal; what Q K^T is read for is e^G o Q besides
  const int own = warp * 16;
  const float grown_rows[2] = {grown[own + g], grown[own + g + 8]};
  float kk[8][4], qk[8][4];
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) kk[j][i] = qk[j][i] = 0.0f;
#pragma unroll 1
  for (int tile = 0; tile < DIM / 16; ++tile) {
    unsigned kh[4], kl[4], qh[4], ql[4];
    load_matrices(kh, tile_row(k_high, own, tile * 16));
    load_matrices(kl, tile_row(k_low, own, tile * 16));
    load_matrices(qh, tile_row(q_high, own, tile * 16));
    load_matrices(ql, tile_row(q_low, own, tile * 16));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j > warp) break;
      // rows of K are columns of K^T: matrices (row 0, column 0), (0, 8), (8, 0), (8, 8) of the tile
      const int place = (j * 16 + lane / 16 * 8 + lane % 8) * ROW + tile * 16 + lane / 8 % 2 * 8;
      unsigned bh[4], bl[4];
      load_matrices(bh, k_high + place);
      load_matrices(bl, k_low + place);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        multiply(kk[2 * j + half], kh, kl, bh + 2 * half, bl + 2 * half);
        multiply(qk[2 * j + half], qh, ql, bh + 2 * half, bl + 2 * half);
      }
    }
    Split words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float factor = grown_rows[i % 2];
      words[i] = split(first_of(qh[i], ql[i]) * factor, second_of(qh[i], ql[i]) * factor);
    }
    store_tile(record + Q_AT, PLANE, warp * (DIM / 16) + tile, words);
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (j / 2 > warp) break;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = own + g + i / 2 * 8, column = j * 8 + 2 * t + i % 2;
      const float decay = row >= column ? expf(sums[row] - sums[column]) : 0.0f; // nothing positive
      if (row > column) lower[column * A_ROW + row] = betas[row] * kk[j][i] * decay;
      qk[j][i] *= decay;
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j > warp) break;
    // sums of two tiles side by side are a tile of factors
    const Split words[4] = {split(qk[2 * j][0], qk[2 * j][1]), split(qk[2 * j][2], qk[2 * j][3]),
                            split(qk[2 * j + 1][0], qk[2 * j + 1][1]), split(qk[2 * j + 1][2], qk[2 * j + 1][3])};
    store_tile(record + P_AT, SQUARE, warp * (CHUNK / 16) + j, words);
  }
  // (e^(G_C - G) o K)^T: tiles of 16 keys x 16 rows, each warp 16 rows
  const float last = sums[CHUNK - 1];
#pragma unroll 1
  for (int tile = 0; tile < DIM / 16; ++tile) {
    // matrices (key 0, row 0), (8, 0), (0, 8), (8, 8) of the tile lie transposed
    const int place = (own + lane / 16 * 8 + lane % 8) * ROW + tile * 16 + lane / 8 % 2 * 8;
    unsigned high[4], low[4];
    load_matrices_transposed(high, k_high + place);
    load_matrices_transposed(low, k_low + place);
    Split words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* sum = sums + own + 2 * t + i / 2 * 8;
      words[i] = split(first_of(high[i], low[i]) * expf(last - sum[0]), second_of(high[i], low[i]) * expf(last - sum[1]));
    }
    store_tile(record + K_AT, PLANE, tile * (CHUNK / 16) + warp, words);
  }
  if (threadIdx.x == 0) *reinterpret_cast<float*>(record + DECAY_AT) = expf(last);
  __syncthreads(); // the planes are done with, A is whole

  // (I + A) X = [beta o V | beta o e^G o K] from above: a thread has a column of each, 16 rows at a time in registers
  const int column = threadIdx.x;
#pragma unroll 1
  for (int block = 0; block < CHUNK; block += 16) {
    float u[16], w[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int row = block + i;
      u[i] = w[i] = 0.0f;
      if (row < rows) {
        u[i] = betas[row] * values[(long long)row * channels + column];
        w[i] = betas[row] * grown[row] * keys[(long long)row * channels + column];
      }
    }
    for (int m = 0; m < block; ++m) {
      const float u_m = x[m * X_ROW + column], w_m = x[m * X_ROW + DIM + column];
      const float4* factors = reinterpret_cast<const float4*>(lower + m * A_ROW + block);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 four = factors[i];
        u[4 * i] -= four.x * u_m, w[4 * i] -= four.x * w_m;
        u[4 * i + 1] -= four.y * u_m, w[4 * i + 1] -= four.y * w_m;
        u[4 * i + 2] -= four.z * u_m, w[4 * i + 2] -= four.z * w_m;
        u[4 * i + 3] -= four.w * u_m, w[4 * i + 3] -= four.w * w_m;
      }
    }
#pragma unroll
    for (int m = 0; m < 16; ++m) {
      x[(block + m) * X_ROW + column] = u[m];
      x[(block + m) * X_ROW + DIM + column] = w[m];
#pragma unroll
      for (int i = m + 1; i < 16; ++i) {
        const float factor = lower[(block + m) * A_ROW + block + i];
        u[i] -= factor * u[m], w[i] -= factor * w[m];
      }
    }
  }
  __syncthreads();

  // W with its sign turned, so that the scan only adds
#pragma unroll 1
  for (int tile = 0; tile < DIM / 16; ++tile) {
    Split words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = *reinterpret_cast<const float2*>(x + (own + g + i % 2 * 8) * X_ROW + DIM + tile * 16 + 2 * t +
                                                           i / 2 * 8);
      words[i] = split(-pair.x, -pair.y);
    }
    store_tile(record + W_AT, PLANE, warp * (DIM / 16) + tile, words);
  }
  float4* u_tiles = reinterpret_cast<float4*>(record + U_AT) + warp * (DIM / 8) * TILE + lane;
#pragma unroll 4
  for (int tile = 0; tile < DIM / 8; ++tile) {
    const float2 upper = *reinterpret_cast<const float2*>(x + (own + g) * X_ROW + tile * 8 + 2 * t);
    const float2 under = *reinterpret_cast<const float2*>(x + (own + g + 8) * X_ROW + tile * 8 + 2 * t);
    u_tiles[tile * TILE] = make_float4(upper.x, upper.y, under.x, under.y);
  }
}
KERNEL(delta_chunk_prepare_128)

// === scan

// Right factors in shared memory: rows of 32 columns, two planes. The four pieces of 8 columns of a row are swapped so
// that eight rows beside each other meet no bank twice.
constexpr int WIDTH = 32;
constexpr int S_PLANE = DIM * WIDTH, V_PLANE = CHUNK * WIDTH;
constexpr int GROUP_SHARED = (2 * S_PLANE + 2 * V_PLANE) * 2;
static_assert(GROUP_SHARED == 24576, "what launches this is told so");

__device__ __forceinline__ int swapped(int row, int piece) { return row * WIDTH + (piece ^ row / 2 % 4) * 8; }

// The lane's four sums of a tile of 16 x 8 at (row, 8 * piece), split, to both planes.
__device__ __forceinline__ void put_sums(unsigned short* high, unsigned short* low, int row, int piece, const float d[4]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Split words = split(d[2 * half], d[2 * half + 1]);
    const int at = swapped(row + g + half * 8, piece) + 2 * t;
    *reinterpret_cast<unsigned*>(high + at) = words.high;
    *reinterpret_cast<unsigned*>(low + at) = words.low;
  }
}

// Right factors of 16 rows from `row` on, all 32 columns: words 2j, 2j + 1 are those of piece j.
__device__ __forceinline__ void get_factors(unsigned words[8], const unsigned short* plane, int row) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int pair = 0; pair < 2; ++pair)
    load_matrices_transposed(words + 4 * pair, plane + swapped(row + lane % 16, 2 * pair + lane / 16));
}

// A tile of left factors.
struct Tile {
  unsigned high[4], low[4];
  __device__ __forceinline__ void load(const uint4* plane, int low_plane, int tile) {
    const uint4 *at = plane + tile * TILE + threadIdx.x % 32, h = at[0], l = at[low_plane];
    high[0] = h.x, high[1] = h.y, high[2] = h.z, high[3] = h.w;
    low[0] = l.x, low[1] = l.y, low[2] = l.z, low[3] = l.w;
  }
};

// Grid (512 / threads, value_heads, segments). Threads are 128 or 256: a group of 128 has 32 columns of the state, in
// registers, and 24576 bytes of shared memory. Two groups a block read the scratch half as often; one makes more blocks.
// The state lies `tail` floats behind `offset` in a slot; out is (T, value_heads, 128).
extern "C" __global__ void __launch_bounds__(256)
    delta_chunk_scan_128(const uint4* __restrict__ scratch, float* __restrict__ out, const unsigned long long* slots,
                         long long offset, const int* starts, int value_heads, int tail) {
  DYNAMIC_SHARED(unsigned char, shared);
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  unsigned short* s_high = reinterpret_cast<unsigned short*>(shared + group * GROUP_SHARED);
  unsigned short *s_low = s_high + S_PLANE, *v_high = s_low + S_PLANE, *v_low = v_high + V_PLANE;

  const int segment = blockIdx.z, head = blockIdx.y;
  const int start = starts[segment], rows = starts[segment + 1] - start;
  if (rows == 0) return;
  const int column = (blockIdx.x * (blockDim.x / 128) + group) * WIDTH;
  const uint4* record = scratch + (first_record(starts, segment) * value_heads + head) * RECORD;

  // the warp's 32 keys x 32 columns: tile (m, j) is keys 16m.. and columns 8j..
  float* state = reinterpret_cast<float*>(slots[segment]) + offset + tail + (long long)head * DIM * DIM +
                 (warp * 32 + g) * DIM + column + 2 * t;
  float s[2][4][4];
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][j][i] = state[(m * 16 + i / 2 * 8) * DIM + j * 8 + i % 2];

  for (int first = 0; first < rows; first += CHUNK, record += (long long)value_heads * RECORD) {
    Tile w, q;
    w.load(record + W_AT, PLANE, warp * (DIM / 16));
    q.load(record + Q_AT, PLANE, warp * (DIM / 16));
    // V' and O of the warp's 16 rows
    float v[4][4], o[4][4];
    const uint4* u = record + U_AT + (warp * (DIM / 8) + column / 8) * TILE + lane;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint4 four = u[j * TILE];
      v[j][0] = __uint_as_float(four.x), v[j][1] = __uint_as_float(four.y);
      v[j][2] = __uint_as_float(four.z), v[j][3] = __uint_as_float(four.w);
#pragma unroll
      for (int i = 0; i < 4; ++i) o[j][i] = 0.0f;
    }
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int j = 0; j < 4; ++j) put_sums(s_high, s_low, warp * 32 + m * 16, j, s[m][j]);
    __syncthreads();
#pragma unroll 2
    for (int tile = 0; tile < DIM / 16; ++tile) {
      const Tile w_now = w, q_now = q;
      if (tile + 1 < DIM / 16) {
        w.load(record + W_AT, PLANE, warp * (DIM / 16) + tile + 1);
        q.load(record + Q_AT, PLANE, warp * (DIM / 16) + tile + 1);
      }
      unsigned high[8], low[8];
      get_factors(high, s_high, tile * 16);
      get_factors(low, s_low, tile * 16);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        multiply(v[j], w_now.high, w_now.low, high + 2 * j, low + 2 * j);
        multiply(o[j], q_now.high, q_now.low, high + 2 * j, low + 2 * j);
      }
    }
    Tile p, k[2];
    p.load(record + P_AT, SQUARE, warp * (CHUNK / 16));
#pragma unroll
    for (int m = 0; m < 2; ++m) k[m].load(record + K_AT, PLANE, (warp * 2 + m) * (CHUNK / 16));
    const float decay = *reinterpret_cast<const float*>(record + DECAY_AT);
#pragma unroll
    for (int j = 0; j < 4; ++j) put_sums(v_high, v_low, warp * 16, j, v[j]);
    __syncthreads(); // V' is there, and nobody reads the planes of S any more
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][j][i] *= decay;
#pragma unroll 1
    for (int tile = 0; tile < CHUNK / 16; ++tile) {
      const Tile p_now = p, k_now[2] = {k[0], k[1]};
      if (tile + 1 < CHUNK / 16) {
        if (tile + 1 <= warp) p.load(record + P_AT, SQUARE, warp * (CHUNK / 16) + tile + 1);
#pragma unroll
        for (int m = 0; m < 2; ++m) k[m].load(record + K_AT, PLANE, (warp * 2 + m) * (CHUNK / 16) + tile + 1);
      }
      unsigned high[8], low[8];
      get_factors(high, v_high, tile * 16);
      get_factors(low, v_low, tile * 16);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (tile <= warp) multiply(o[j], p_now.high, p_now.low, high + 2 * j, low + 2 * j);
#pragma unroll
        for (int m = 0; m < 2; ++m) multiply(s[m][j], k_now[m].high, k_now[m].low, high + 2 * j, low + 2 * j);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + warp * 16 + g + half * 8;
      if (row >= rows) continue;
      float* to = out + ((long long)(start + row) * value_heads + head) * DIM + column + 2 * t;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        *reinterpret_cast<float2*>(to + j * 8) = make_float2(o[j][2 * half], o[j][2 * half + 1]);
    }
  }
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) state[(m * 16 + i / 2 * 8) * DIM + j * 8 + i % 2] = s[m][j][i];
}
KERNEL(delta_chunk_scan_128)
