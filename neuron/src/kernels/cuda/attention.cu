// Full attention: queries and keys made ready, few rows over long memories (decode, in splits that are combined), many
// rows of a segment (prefill).
//
// Keys and values lie in blocks of 16 tokens. With KV in f32 everything is done in f32; with KV in bf16 queries and
// weights are rounded to bf16 and multiplied on tensor cores, sums are f32.
#include "common.cuh"

constexpr int BLOCK_TOKENS = 16;

struct Blocks {
  const unsigned long long* of_segment; // addresses
  long long keys, values;               // where a block's keys and values of the head begin, in elements
};

__device__ __forceinline__ Blocks blocks_of(const unsigned long long* blocks, int table_width, int segment, int layer,
                                            int kv_heads, int head, int dim) {
  const long long keys = 2ll * (layer * kv_heads + head) * BLOCK_TOKENS * dim;
  return {blocks + (long long)segment * table_width, keys, keys + BLOCK_TOKENS * dim};
}

template <class KV>
__device__ __forceinline__ const KV* block_at(const Blocks& blocks, int block) {
  return reinterpret_cast<const KV*>(__ldg(blocks.of_segment + block));
}

__device__ __forceinline__ void keep(float x, float* at) { *at = x; }
__device__ __forceinline__ void keep(float x, unsigned short* at) { *at = round_bf16(x); }

// === queries and keys made ready

// Grid (T, heads + kv_heads). Block: whole warps; 128 does for every dim.
template <class KV>
__device__ __forceinline__ void prepare(const float* q_gate, const float* k, const float* v, const float* q_scale,
                                        const float* k_scale, const float* frequencies, float* queries,
                                        const unsigned long long* blocks, int table_width, const int* row_segment,
                                        const int* positions, int heads, int kv_heads, int dim, int half, int layer,
                                        float eps) {
  __shared__ float scratch[32];
  const long long row = blockIdx.x;
  const int head = blockIdx.y, position = positions[row];
  const bool query = head < heads;
  const int kv_head = head - heads;
  const float* in = query ? q_gate + (row * heads + head) * 2 * dim : k + (row * kv_heads + kv_head) * dim;
  const float* scale = query ? q_scale : k_scale;

  float squares = 0.0f;
  for (int i = threadIdx.x; i < dim; i += blockDim.x) squares = fmaf(in[i], in[i], squares);
  const float inverse = 1.0f / sqrtf(block_sum(squares, scratch) / (float)dim + eps);

  float* out = queries + (row * heads + head) * dim;
  KV* key = nullptr;
  if (!query) {
    const Blocks own = blocks_of(blocks, table_width, row_segment[row], layer, kv_heads, kv_head, dim);
    KV* block = const_cast<KV*>(block_at<KV>(own, position / BLOCK_TOKENS));
    const int at = position % BLOCK_TOKENS * dim;
    key = block + own.keys + at;
    const float* value = v + (row * kv_heads + kv_head) * dim;
    for (int i = threadIdx.x; i < dim; i += blockDim.x) keep(value[i], block + own.values + at + i);
  }
  for (int i = threadIdx.x; i < dim; i += blockDim.x) {
    float x = in[i] * inverse * scale[i];
    if (i < 2 * half) {
      const int pair = i < half ? i : i - half, other = i < half ? i + half : i - half;
      float sine, cosine;
      sincosf((float)position * frequencies[pair], &sine, &cosine);
      const float y = in[other] * inverse * scale[other];
      x = i < half ? x * cosine - y * sine : x * cosine + y * sine;
    }
    if (query)
      out[i] = x;
    else
      keep(x, key + i);
  }
}

#define PREPARE(name, KV)                                                                                        \
  extern "C" __global__ void attention_prepare_##name(                                                           \
      const float* q_gate, const float* k, const float* v, const float* q_scale, const float* k_scale,           \
      const float* frequencies, float* queries, const unsigned long long* blocks, int table_width,               \
      const int* row_segment, const int* positions, int heads, int kv_heads, int dim, int half, int layer,       \
      float eps) {                                                                                               \
    prepare<KV>(q_gate, k, v, q_scale, k_scale, frequencies, queries, blocks, table_width, row_segment,          \
                positions, heads, kv_heads, dim, half, layer, eps);                                              \
  }                                                                                                              \
  KERNEL(attention_prepare_##name)
PREPARE(f32, float)
PREPARE(bf16, unsigned short)

// === plain sums, for keys and values in f32

constexpr int PLAIN_THREADS = 128, MOST_HEADS = 16;

// The query heads of a kv head, for one row.
template <int D>
struct PlainState {
  static constexpr int OWN = D <= PLAIN_THREADS ? 1 : D / PLAIN_THREADS; // dimensions that a thread sums up
  float queries[MOST_HEADS][D];
  float scores[MOST_HEADS][BLOCK_TOKENS];
  float most[MOST_HEADS], sum[MOST_HEADS], rescale[MOST_HEADS];
};

// Tokens from `begin` (at the start of a block) up to before `end`, of which there is at least one.
template <int D>
__device__ __forceinline__ void plain_attend(PlainState<D>& state, float (&sums)[MOST_HEADS][PlainState<D>::OWN],
                                             const float* queries, const Blocks& blocks, int group, int begin,
                                             int end) {
  constexpr int OWN = PlainState<D>::OWN;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const float scale = 1.0f / sqrtf((float)D);
  for (int i = thread; i < group * D; i += PLAIN_THREADS) state.queries[i / D][i % D] = queries[i] * scale;
  if (thread < group) {
    state.most[thread] = -INFINITY;
    state.sum[thread] = 0.0f;
  }
#pragma unroll
  for (int h = 0; h < MOST_HEADS; ++h)
#pragma unroll
    for (int i = 0; i < OWN; ++i) sums[h][i] = 0.0f;
  __syncthreads();

  for (int first = begin; first < end; first += BLOCK_TOKENS) {
    const float* block = block_at<float>(blocks, first / BLOCK_TOKENS);
    const int tokens = min(end - first, BLOCK_TOKENS);
    for (int token = warp; token < tokens; token += PLAIN_THREADS / 32) {
      float key[D / 32];
#pragma unroll
      for (int i = 0; i < D / 32; ++i) key[i] = block[blocks.keys + token * D + i * 32 + lane];
      for (int h = 0; h < group; ++h) {
        float score = 0.0f;
#pragma unroll
        for (int i = 0; i < D / 32; ++i) score = fmaf(state.queries[h][i * 32 + lane], key[i], score);
        score = warp_sum(score);
        if (lane == 0) state.scores[h][token] = score;
      }
    }
    __syncthreads();
    if (thread < group) {
      float most = state.most[thread];
      for (int token = 0; token < tokens; ++token) most = fmaxf(most, state.scores[thread][token]);
      const float rescale = expf(state.most[thread] - most);
      float sum = state.sum[thread] * rescale;
      for (int token = 0; token < tokens; ++token) {
        const float weight = expf(state.scores[thread][token] - most);
        state.scores[thread][token] = weight;
        sum += weight;
      }
      state.most[thread] = most;
      state.sum[thread] = sum;
      state.rescale[thread] = rescale;
    }
    __syncthreads();
    if (thread < D) {
#pragma unroll
      for (int h = 0; h < MOST_HEADS; ++h) {
        if (h >= group) break;
#pragma unroll
        for (int i = 0; i < OWN; ++i) sums[h][i] *= state.rescale[h];
      }
      for (int token = 0; token < tokens; ++token) {
        float value[OWN];
#pragma unroll
        for (int i = 0; i < OWN; ++i) value[i] = block[blocks.values + token * D + i * PLAIN_THREADS + thread];
#pragma unroll
        for (int h = 0; h < MOST_HEADS; ++h) {
          if (h >= group) break;
#pragma unroll
          for (int i = 0; i < OWN; ++i) sums[h][i] = fmaf(state.scores[h][token], value[i], sums[h][i]);
        }
      }
    }
    __syncthreads();
  }
}

template <int D>
__device__ __forceinline__ void decode_f32(const float* queries, const unsigned long long* blocks, int table_width,
                                           const int* row_segment, const int* positions, float* partial, int heads,
                                           int kv_heads, int layer, int split_tokens) {
  __shared__ PlainState<D> state;
  const int split = blockIdx.x, splits = gridDim.x, kv_head = blockIdx.y, thread = threadIdx.x;
  const long long row = blockIdx.z;
  const int group = heads / kv_heads, begin = split * split_tokens;
  const int end = min(begin + split_tokens, positions[row] + 1);
  float* out = partial + ((row * heads + kv_head * group) * splits + split) * (D + 2);
  const long long apart = (long long)splits * (D + 2);
  if (begin >= end) {
    if (thread < group) {
      out[thread * apart] = -INFINITY;
      out[thread * apart + 1] = 0.0f;
    }
    for (int i = thread; i < group * D; i += PLAIN_THREADS) out[i / D * apart + 2 + i % D] = 0.0f;
    return;
  }
  float sums[MOST_HEADS][PlainState<D>::OWN];
  plain_attend<D>(state, sums, queries + (row * heads + kv_head * group) * D,
                  blocks_of(blocks, table_width, row_segment[row], layer, kv_heads, kv_head, D), group, begin, end);
  if (thread < group) {
    out[thread * apart] = state.most[thread];
    out[thread * apart + 1] = state.sum[thread];
  }
  if (thread < D)
#pragma unroll
    for (int h = 0; h < MOST_HEADS; ++h) {
      if (h >= group) break;
#pragma unroll
      for (int i = 0; i < PlainState<D>::OWN; ++i) out[h * apart + 2 + i * PLAIN_THREADS + thread] = sums[h][i];
    }
}

// === tensor cores, for keys and values in bf16

__device__ __forceinline__ uint4 load_16(const void* at) { return __ldg(reinterpret_cast<const uint4*>(at)); }

// Two words, each with a number of one token in its low half and of the next in its high half, from the tokens' words.
__device__ __forceinline__ unsigned lows(unsigned first, unsigned second) { return (first & 0xffffu) | second << 16; }
__device__ __forceinline__ unsigned highs(unsigned first, unsigned second) { return first >> 16 | (second & 0xffff0000u); }

// As many words of a row, zeros where it is not `there`.
__device__ __forceinline__ void load_words(unsigned (&words)[4], const unsigned short* at, bool there) {
  const uint4 all = there ? load_16(at) : make_uint4(0, 0, 0, 0);
  words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
}
__device__ __forceinline__ void load_words(unsigned (&words)[2], const unsigned short* at, bool there) {
  const uint2 all = there ? __ldg(reinterpret_cast<const uint2*>(at)) : make_uint2(0, 0);
  words[0] = all.x, words[1] = all.y;
}
__device__ __forceinline__ void load_words(unsigned (&words)[1], const unsigned short* at, bool there) {
  words[0] = there ? __ldg(reinterpret_cast<const unsigned*>(at)) : 0;
}

// Over which dimensions a product sums is the same in any order, so both factors of q·k are taken as they are read
// fastest: with t = lane % 4 a lane has 8 numbers of a row from 32 j + 8 t on, the operands of products 2 j (numbers 0..3)
// and 2 j + 1 (numbers 4..7).
//
// Four f32 of a row, as two words.
__device__ __forceinline__ void query_words(const float* row, int from, unsigned words[2]) {
  const float4 four = __ldg(reinterpret_cast<const float4*>(row + from));
  words[0] = pack_bf16(four.x, four.y);
  words[1] = pack_bf16(four.z, four.w);
}

constexpr int DECODE_WARPS = 4;

// The scores are taken the other way round, keys times queries: 16 tokens of a block by 8 heads, and so are the sums,
// dimensions by heads. Keys and values go straight from memory to where tensor cores take them, a block of tokens a warp.
template <int D>
__device__ __forceinline__ void decode_bf16(const float* queries, const unsigned long long* blocks, int table_width,
                                            const int* row_segment, const int* positions, float* partial, int heads,
                                            int kv_heads, int layer, int split_tokens) {
  constexpr int HEADS = 8;                // that one product takes
  constexpr int EACH = D >= 128 ? 8 : D / 16; // neighbouring numbers of a value that a lane reads
  constexpr int VALUE_READS = D / 8 / EACH;
  __shared__ float joined[HEADS][D];
  __shared__ float warp_most[DECODE_WARPS][HEADS], warp_weights[DECODE_WARPS][HEADS];

  const int split = blockIdx.x, splits = gridDim.x, kv_head = blockIdx.y;
  const long long row = blockIdx.z;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int group = heads / kv_heads, begin = split * split_tokens;
  const int end = min(begin + split_tokens, positions[row] + 1);
  const Blocks own = blocks_of(blocks, table_width, row_segment[row], layer, kv_heads, kv_head, D);
  const float scale = 1.0f / sqrtf((float)D);

  for (int head = 0; head < group; head += HEADS) {
    const int there = min(group - head, HEADS);
    const long long first_head = row * heads + kv_head * group + head;
    float* out = partial + (first_head * splits + split) * (D + 2);
    const long long apart = (long long)splits * (D + 2);
    if (begin >= end) {
      for (int i = threadIdx.x; i < there * (D + 2); i += blockDim.x)
        out[i / (D + 2) * apart + i % (D + 2)] = i % (D + 2) == 0 ? -INFINITY : 0.0f;
      continue;
    }

    unsigned query[D / 16][2]; // of head g; of the last one where there are fewer
#pragma unroll
    for (int i = 0; i < D / 16; ++i)
      query_words(queries + (first_head + min(g, there - 1)) * D, i / 2 * 32 + t * 8 + i % 2 * 4, query[i]);
    float sums[D / 16][4];
#pragma unroll
    for (int i = 0; i < D / 16; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][j] = 0.0f;
    float most[2] = {-INFINITY, -INFINITY}, weights[2] = {0.0f, 0.0f}; // of heads 2 t and 2 t + 1; weights of own tokens

    for (int first = begin + warp * BLOCK_TOKENS; first < end; first += DECODE_WARPS * BLOCK_TOKENS) {
      const unsigned short* block = block_at<unsigned short>(own, first / BLOCK_TOKENS);
      const unsigned short* keys = block + own.keys + t * 8;
      uint4 key[D / 32][2];
#pragma unroll
      for (int j = 0; j < D / 32; ++j) {
        key[j][0] = load_16(keys + g * D + j * 32);
        key[j][1] = load_16(keys + (g + 8) * D + j * 32);
      }
      float scores[4] = {0.0f, 0.0f, 0.0f, 0.0f}; // tokens g and g + 8, heads 2 t and 2 t + 1
#pragma unroll
      for (int j = 0; j < D / 32; ++j) {
        const unsigned a[4] = {key[j][0].x, key[j][1].x, key[j][0].y, key[j][1].y};
        mma_m16n8k16(scores, a, query[2 * j]);
        const unsigned b[4] = {key[j][0].z, key[j][1].z, key[j][0].w, key[j][1].w};
        mma_m16n8k16(scores, b, query[2 * j + 1]);
      }
      // tokens behind the row's own may be anything, their values too
      const bool valid[2] = {first + g < end, first + g + 8 < end};
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[i] = valid[i / 2] ? scores[i] * scale : -INFINITY;
      float rescale[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = fmaxf(scores[h], scores[h + 2]);
#pragma unroll
        for (int away = 4; away < 32; away *= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, away));
        top = fmaxf(top, most[h]);
        rescale[h] = expf(most[h] - top);
        most[h] = top;
        scores[h] = expf(scores[h] - top);
        scores[h + 2] = expf(scores[h + 2] - top);
        weights[h] = weights[h] * rescale[h] + (scores[h] + scores[h + 2]);
      }
      if (rescale[0] != 1.0f || rescale[1] != 1.0f)
#pragma unroll
        for (int i = 0; i < D / 16; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[i][j] *= rescale[j % 2];

      // weights as the second operand: tokens 2 t.. of head g, which lie with lanes of tokens 2 t.. and head pair g / 2
      const unsigned lower = pack_bf16(scores[0], scores[1]), upper = pack_bf16(scores[2], scores[3]);
      const int even = 2 * t * 4 + g / 2, odd = even + 4;
      const unsigned from[4] = {__shfl_sync(ALL_LANES, lower, even), __shfl_sync(ALL_LANES, lower, odd),
                                __shfl_sync(ALL_LANES, upper, even), __shfl_sync(ALL_LANES, upper, odd)};
      const unsigned weight[2] = {g % 2 ? highs(from[0], from[1]) : lows(from[0], from[1]),
                                  g % 2 ? highs(from[2], from[3]) : lows(from[2], from[3])};

      // values as the first operand, dimensions by tokens: of product e of a pair of reads, row g is number e of what
      // lanes g read first, row g + 8 number e of what they read second
      const unsigned short* values = block + own.values + g * EACH;
      const int tokens[4] = {2 * t, 2 * t + 1, 2 * t + 8, 2 * t + 9};
#pragma unroll
      for (int pair = 0; pair < VALUE_READS / 2; ++pair) {
        unsigned value[2][4][EACH / 2];
#pragma unroll
        for (int read = 0; read < 2; ++read)
#pragma unroll
          for (int token = 0; token < 4; ++token) {
            const unsigned short* at = values + tokens[token] * D + (2 * pair + read) * 8 * EACH;
            load_words(value[read][token], at, first + tokens[token] < end);
          }
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
          unsigned a[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const unsigned x = value[i % 2][i / 2 * 2][e / 2], y = value[i % 2][i / 2 * 2 + 1][e / 2];
            a[i] = e % 2 ? highs(x, y) : lows(x, y);
          }
          mma_m16n8k16(sums[pair * EACH + e], a, weight);
        }
      }
    }

    // the warps' parts are joined: the largest score first
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int away = 4; away < 32; away *= 2) weights[h] += __shfl_xor_sync(ALL_LANES, weights[h], away);
    if (g == 0)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        warp_most[warp][2 * t + h] = most[h];
        warp_weights[warp][2 * t + h] = weights[h];
      }
    __syncthreads();
    float factors[2], total_most[2], total_weights[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      total_most[h] = -INFINITY;
      for (int w = 0; w < DECODE_WARPS; ++w) total_most[h] = fmaxf(total_most[h], warp_most[w][2 * t + h]);
      factors[h] = expf(most[h] - total_most[h]);
      total_weights[h] = 0.0f;
      for (int w = 0; w < DECODE_WARPS; ++w)
        total_weights[h] += warp_weights[w][2 * t + h] * expf(warp_most[w][2 * t + h] - total_most[h]);
    }
    for (int w = 0; w < DECODE_WARPS; ++w) {
      if (warp == w)
#pragma unroll
        for (int i = 0; i < D / 16; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int dimension = (i / EACH * 2 + j / 2) * 8 * EACH + g * EACH + i % EACH;
            float& sum = joined[2 * t + j % 2][dimension];
            sum = (w == 0 ? 0.0f : sum) + sums[i][j] * factors[j % 2];
          }
      __syncthreads();
    }
    if (warp == 0 && g == 0)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (2 * t + h < there) {
          out[(2 * t + h) * apart] = total_most[h];
          out[(2 * t + h) * apart + 1] = total_weights[h];
        }
    for (int i = threadIdx.x; i < there * D; i += blockDim.x) out[i / D * apart + 2 + i % D] = joined[i / D][i % D];
    __syncthreads(); // before the next heads are joined
  }
}

// Grid (splits, kv_heads, T), block 128.
#define DECODE(name, function, D)                                                                               \
  extern "C" __global__ void __launch_bounds__(128) attention_decode_##name##_##D(                              \
      const float* queries, const unsigned long long* blocks, int table_width, const int* row_segment,          \
      const int* positions, float* partial, int heads, int kv_heads, int layer, int split_tokens) {             \
    function<D>(queries, blocks, table_width, row_segment, positions, partial, heads, kv_heads, layer,          \
                split_tokens);                                                                                  \
  }                                                                                                             \
  KERNEL(attention_decode_##name##_##D)
DECODE(f32, decode_f32, 32)
DECODE(f32, decode_f32, 64)
DECODE(f32, decode_f32, 128)
DECODE(f32, decode_f32, 256)
DECODE(bf16, decode_bf16, 32)
DECODE(bf16, decode_bf16, 64)
DECODE(bf16, decode_bf16, 128)
DECODE(bf16, decode_bf16, 256)

// Grid (T, heads). Block: any; dim threads at best.
extern "C" __global__ void attention_combine(const float* partial, const float* q_gate, float* out, int heads, int dim,
                                             int splits) {
  const long long head = (long long)blockIdx.x * heads + blockIdx.y;
  const float* parts = partial + head * splits * (dim + 2);
  const float* gate = q_gate + head * 2 * dim + dim;
  float most = -INFINITY, sum = 0.0f;
  for (int split = 0; split < splits; ++split) most = fmaxf(most, parts[(long long)split * (dim + 2)]);
  for (int split = 0; split < splits; ++split) {
    const float* part = parts + (long long)split * (dim + 2);
    sum += part[1] * expf(part[0] - most);
  }
  for (int i = threadIdx.x; i < dim; i += blockDim.x) {
    float joined = 0.0f;
    for (int split = 0; split < splits; ++split) {
      const float* part = parts + (long long)split * (dim + 2);
      // a split without tokens says nothing but that it has none
      if (part[1] > 0.0f) joined = fmaf(part[2 + i], expf(part[0] - most), joined);
    }
    out[head * dim + i] = joined / sum * sigmoid(gate[i]);
  }
}
KERNEL(attention_combine)

// === many rows of a segment
//
// Grid (ceil(rows of the longest segment * group / 64), kv_heads, segments), block 128. A tile is 64 items; item i of a
// segment is query head i % group of row i / group, so that all heads of a kv head share what is read of it.

constexpr int PREFILL_ITEMS = 64, PREFILL_THREADS = 128;

// The later tiles have more tokens before them: they come first, so that the short ones fill the end.
__device__ __forceinline__ int first_item() { return (int)(gridDim.x - 1 - blockIdx.x) * PREFILL_ITEMS; }

// A row's heads one after another; the rows are those whose first item is in the tile.
template <int D>
__device__ __forceinline__ void prefill_f32(const float* queries, const float* q_gate, const unsigned long long* blocks,
                                            int table_width, const int* starts, const int* positions, float* out,
                                            int heads, int kv_heads, int layer) {
  __shared__ PlainState<D> state;
  const int kv_head = blockIdx.y, segment = blockIdx.z, group = heads / kv_heads, begin = first_item();
  const int last = min((begin + PREFILL_ITEMS + group - 1) / group, starts[segment + 1] - starts[segment]);
  const Blocks own = blocks_of(blocks, table_width, segment, layer, kv_heads, kv_head, D);
  for (int i = (begin + group - 1) / group; i < last; ++i) {
    const long long row = starts[segment] + i, first_head = row * heads + kv_head * group;
    float sums[MOST_HEADS][PlainState<D>::OWN];
    plain_attend<D>(state, sums, queries + first_head * D, own, group, 0, positions[row] + 1);
    if (threadIdx.x < D)
#pragma unroll
      for (int h = 0; h < MOST_HEADS; ++h) {
        if (h >= group) break;
#pragma unroll
        for (int j = 0; j < PlainState<D>::OWN; ++j) {
          const int dimension = j * PLAIN_THREADS + threadIdx.x;
          const float gate = q_gate[(first_head + h) * 2 * D + D + dimension];
          out[(first_head + h) * D + dimension] = sums[h][j] / state.sum[h] * sigmoid(gate);
        }
      }
    __syncthreads(); // `state` is read no more
  }
}

// 16 bytes of a token's key or value in shared memory: rows that are read together begin at different banks.
template <int D>
__device__ __forceinline__ int swizzled(int token, int chunk) {
  const int chunks = D / 8, turn = D >= 64 ? token % 8 : token / 2 % 4;
  return (token * chunks + (chunk ^ turn)) * 8;
}

// A warp has 16 items; their queries stay in registers, with the sums. The next block of tokens comes in while one is
// worked on.
template <int D>
__device__ __forceinline__ void prefill_bf16(const float* queries, const float* q_gate,
                                             const unsigned long long* blocks, int table_width, const int* starts,
                                             const int* positions, float* out, int heads, int kv_heads, int layer) {
  __shared__ __align__(128) unsigned short tokens[2][2][BLOCK_TOKENS * D]; // stage, keys and values
  const int kv_head = blockIdx.y, segment = blockIdx.z, group = heads / kv_heads;
  const int first_row = starts[segment], items = (starts[segment + 1] - first_row) * group, begin = first_item();
  if (begin >= items) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int before = positions[first_row], own_begin = begin + warp * 16;
  // an item's position is `before` and its row; a warp works while its last item sees tokens, and always on block 0
  const int last = before + (min(begin + PREFILL_ITEMS, items) - 1) / group;
  const int own_first = before + min(own_begin, items - 1) / group;
  const int own_last = own_begin < items ? before + min(own_begin + 15, items - 1) / group : -1;
  const Blocks own = blocks_of(blocks, table_width, segment, layer, kv_heads, kv_head, D);
  const float scale = 1.0f / sqrtf((float)D);

  long long head_at[2]; // (row, head) of items g and g + 8
  int position[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int item = min(own_begin + g + 8 * i, items - 1);
    head_at[i] = (long long)(first_row + item / group) * heads + kv_head * group + item % group;
    position[i] = before + item / group;
  }
  unsigned query[D / 16][4];
#pragma unroll
  for (int k = 0; k < D / 16; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 two =
          __ldg(reinterpret_cast<const float2*>(queries + head_at[i % 2] * D + k * 16 + i / 2 * 8 + 2 * t));
      query[k][i] = pack_bf16(two.x, two.y);
    }
  float sums[D / 8][4];
#pragma unroll
  for (int i = 0; i < D / 8; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[i][j] = 0.0f;
  float most[2] = {-INFINITY, -INFINITY}, weights[2] = {0.0f, 0.0f};

  const auto fetch = [&](int block) {
    const unsigned short* at = block_at<unsigned short>(own, block);
    for (int i = threadIdx.x; i < 2 * BLOCK_TOKENS * (D / 8); i += PREFILL_THREADS) {
      const int value = i / (BLOCK_TOKENS * (D / 8)), token = i / (D / 8) % BLOCK_TOKENS, chunk = i % (D / 8);
      copy_async_16(tokens[block % 2][value] + swizzled<D>(token, chunk),
                    at + (value ? own.values : own.keys) + token * D + chunk * 8,
                    block * BLOCK_TOKENS + token <= last); // later tokens may be anything
    }
    copy_async_commit();
  };

  const int count = last / BLOCK_TOKENS + 1;
  fetch(0);
  for (int block = 0; block < count; ++block) {
    if (block + 1 < count) {
      fetch(block + 1);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();
    if (block * BLOCK_TOKENS <= own_last) {
      const unsigned short* keys = tokens[block % 2][0];
      const unsigned short* values = tokens[block % 2][1];
      float scores[2][4] = {}; // tokens 0..7 and 8..15
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        unsigned words[4]; // both halves of the 16 dimensions for the first tokens, then for the others
        load_matrices(words, keys + swizzled<D>(lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
        mma_m16n8k16(scores[0], query[k], words);
        mma_m16n8k16(scores[1], query[k], words + 2);
      }
      const bool all = block * BLOCK_TOKENS + BLOCK_TOKENS - 1 <= own_first;
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = block * BLOCK_TOKENS + half * 8 + 2 * t + i % 2;
          scores[half][i] = all || token <= position[i / 2] ? scores[half][i] * scale : -INFINITY;
        }
      float rescale[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float top = fmaxf(fmaxf(scores[0][2 * i], scores[0][2 * i + 1]), fmaxf(scores[1][2 * i], scores[1][2 * i + 1]));
        top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
        top = fmaxf(fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2)), most[i]);
        rescale[i] = expf(most[i] - top);
        most[i] = top;
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float& score = scores[j / 2][2 * i + j % 2];
          score = expf(score - top);
          sum += score;
        }
        weights[i] = weights[i] * rescale[i] + sum;
      }
      // the largest score is soon found, and then nothing has to be rescaled
      if (rescale[0] != 1.0f || rescale[1] != 1.0f)
#pragma unroll
        for (int i = 0; i < D / 8; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[i][j] *= rescale[j / 2];
      const unsigned weight[4] = {pack_bf16(scores[0][0], scores[0][1]), pack_bf16(scores[0][2], scores[0][3]),
                                  pack_bf16(scores[1][0], scores[1][1]), pack_bf16(scores[1][2], scores[1][3])};
#pragma unroll
      for (int i = 0; i < D / 16; ++i) {
        unsigned words[4]; // both halves of the tokens for the first 8 dimensions, then for the others
        load_matrices_transposed(words, values + swizzled<D>(lane / 8 % 2 * 8 + lane % 8, 2 * i + lane / 16));
        mma_m16n8k16(sums[2 * i], weight, words);
        mma_m16n8k16(sums[2 * i + 1], weight, words + 2);
      }
    }
    __syncthreads(); // this stage may be fetched into
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    weights[i] += __shfl_xor_sync(ALL_LANES, weights[i], 1);
    weights[i] += __shfl_xor_sync(ALL_LANES, weights[i], 2);
    if (own_begin + g + 8 * i >= items) continue;
    const float inverse = 1.0f / weights[i];
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      const int dimension = 8 * j + 2 * t;
      const float2 gate = __ldg(reinterpret_cast<const float2*>(q_gate + head_at[i] * 2 * D + D + dimension));
      *reinterpret_cast<float2*>(out + head_at[i] * D + dimension) =
          make_float2(sums[j][2 * i] * inverse * sigmoid(gate.x), sums[j][2 * i + 1] * inverse * sigmoid(gate.y));
    }
  }
}

#define PREFILL(name, function, D)                                                                              \
  extern "C" __global__ void __launch_bounds__(PREFILL_THREADS) attention_prefill_##name##_##D(                 \
      const float* queries, const float* q_gate, const unsigned long long* blocks, int table_width,             \
      const int* starts, const int* positions, float* out, int heads, int kv_heads, int layer) {                \
    function<D>(queries, q_gate, blocks, table_width, starts, positions, out, heads, kv_heads, layer);          \
  }                                                                                                             \
  KERNEL(attention_prefill_##name##_##D)
PREFILL(f32, prefill_f32, 32)
PREFILL(f32, prefill_f32, 64)
PREFILL(f32, prefill_f32, 128)
PREFILL(f32, prefill_f32, 256)
PREFILL(bf16, prefill_bf16, 32)
PREFILL(bf16, prefill_bf16, 64)
PREFILL(bf16, prefill_bf16, 128)
PREFILL(bf16, prefill_bf16, 256)
