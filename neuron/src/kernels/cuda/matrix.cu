// Matrices of weights in every format: products with few rows of numbers, rows by index, and whole matrices as bf16.
//
// A format says how a lane takes a unit of a row (16 to 32 numbers, mostly 16 bytes) into registers and how numbers come
// out of it; gemv, embed and widen are written once, over formats.
//
// A unit's numbers are in GROUPS groups of equal size. quad() gives four of them in a form that costs little, c, and
// affine() what is to be done with all of a group: number = scale * (c - ORIGIN) + shift. A product with one row of x
// does that to the group's sum, not to each number. place() says which unit a column belongs to and which of the unit's
// quads it is in, column() is the way back. DEPTH units of a row are loaded at a time. Of a
// CROWDED one only one block fits on a processor at M = 8.
#include "common.cuh"

// ALIGNED: every row begins on a boundary of 16 bytes.
template <bool ALIGNED>
struct Matrix {
  const unsigned char* at;
  int rows, width;
};

struct Affine {
  float scale, shift;
};

struct Place {
  int unit, quad;
};

__device__ __forceinline__ uint4 load_16(const void* at) { return __ldg(reinterpret_cast<const uint4*>(at)); }
__device__ __forceinline__ unsigned short load_2(const void* at) {
  return __ldg(reinterpret_cast<const unsigned short*>(at));
}
// On a boundary of 2 bytes.
__device__ __forceinline__ unsigned load_4_by_2(const unsigned char* at) {
  return load_2(at) | (unsigned)load_2(at + 2) << 16;
}

__device__ __forceinline__ unsigned word_of(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

__device__ __forceinline__ unsigned pick_bytes(unsigned low, unsigned high, unsigned selector) {
#ifdef __CUDACC__
  return __byte_perm(low, high, selector);
#else
  const unsigned long long both = low | (unsigned long long)high << 32;
  unsigned picked = 0;
  for (int i = 0; i < 4; ++i) picked |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return picked;
#endif
}

// Conversions of whole numbers to floats are slow (16 a clock), picking bytes is not: a byte with its top bit set, put
// below the exponent of 1, is 1 + (its lower seven bits) / 128.
constexpr float STEP = 1.0f / 128.0f;
__device__ __forceinline__ float4 from_one(unsigned word) {
  return make_float4(__uint_as_float(pick_bytes(word, 0x3f000000u, 0x7044u)),
                     __uint_as_float(pick_bytes(word, 0x3f000000u, 0x7144u)),
                     __uint_as_float(pick_bytes(word, 0x3f000000u, 0x7244u)),
                     __uint_as_float(pick_bytes(word, 0x3f000000u, 0x7344u)));
}

// Four signed bytes, exactly: 2^23 + (byte + 128), less that.
__device__ __forceinline__ float4 from_signed(unsigned word) {
  constexpr unsigned ONE_APART = 0x4b000000u; // 2^23, from where floats are one apart
  constexpr float ZERO = 8388736.0f;          // 2^23 + 128
  const unsigned biased = word ^ 0x80808080u;
  return make_float4(__uint_as_float(pick_bytes(biased, ONE_APART, 0x7440u)) - ZERO,
                     __uint_as_float(pick_bytes(biased, ONE_APART, 0x7441u)) - ZERO,
                     __uint_as_float(pick_bytes(biased, ONE_APART, 0x7442u)) - ZERO,
                     __uint_as_float(pick_bytes(biased, ONE_APART, 0x7443u)) - ZERO);
}

// === formats

// Numbers of BYTES bytes that need no scale; sixteen bytes a unit.
template <int BYTES>
struct Plain {
  static constexpr int UNIT = 16 / BYTES, GROUPS = 1;
  static constexpr float ORIGIN = 0.0f;
  static constexpr bool SCALED = false, SHIFTED = false, CROWDED = false;

  static constexpr int DEPTH = 4;
  static constexpr int NUMBER = BYTES; // rows may begin anywhere between two numbers
  static __device__ __forceinline__ Place place(int quad) { return {quad / (UNIT / 4), quad % (UNIT / 4)}; }
  static __device__ __forceinline__ int column(int unit, int quad) { return unit * UNIT + quad * 4; }
  template <bool ALIGNED>
  static __device__ __forceinline__ uint4 bits(const Matrix<ALIGNED>& w, int row, int unit) {
    const unsigned char* at = w.at + ((long long)row * w.width + unit * UNIT) * BYTES;
    if (ALIGNED) return load_16(at);
    // one number after another; those beyond the row are zeros
    unsigned long long halves[2] = {0, 0};
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll 1
      for (int i = 0; i < UNIT / 2; ++i) {
        const int in_unit = half * UNIT / 2 + i;
        if (unit * UNIT + in_unit >= w.width) break;
        const unsigned char* number = at + in_unit * BYTES;
        const unsigned bits = BYTES == 4   ? __ldg(reinterpret_cast<const unsigned*>(number))
                              : BYTES == 2 ? load_2(number)
                                           : __ldg(number);
        halves[half] |= (unsigned long long)bits << 8 * BYTES * i;
      }
    return make_uint4((unsigned)halves[0], (unsigned)(halves[0] >> 32), (unsigned)halves[1],
                      (unsigned)(halves[1] >> 32));
  }
};

struct F32 : Plain<4> {
  struct Unit {
    uint4 bits;
  };
  template <bool ALIGNED>
  static __device__ __forceinline__ Unit load(const Matrix<ALIGNED>& w, int row, int unit) {
    return {bits(w, row, unit)};
  }
  static __device__ __forceinline__ float4 quad(const Unit& unit, int) {
    return make_float4(__uint_as_float(unit.bits.x), __uint_as_float(unit.bits.y), __uint_as_float(unit.bits.z),
                       __uint_as_float(unit.bits.w));
  }
  static __device__ __forceinline__ Affine affine(const Unit&, int) { return {1.0f, 0.0f}; }
};

struct Bf16 : Plain<2> {
  struct Unit {
    uint4 bits;
  };
  template <bool ALIGNED>
  static __device__ __forceinline__ Unit load(const Matrix<ALIGNED>& w, int row, int unit) {
    return {bits(w, row, unit)};
  }
  static __device__ __forceinline__ float4 quad(const Unit& unit, int i) {
    const unsigned a = word_of(unit.bits, 2 * i), b = word_of(unit.bits, 2 * i + 1);
    return make_float4(widen_bf16_low(a), widen_bf16_high(a), widen_bf16_low(b), widen_bf16_high(b));
  }
  static __device__ __forceinline__ Affine affine(const Unit&, int) { return {1.0f, 0.0f}; }
};

struct F16 : Plain<2> {
  struct Unit {
    uint4 bits;
  };
  template <bool ALIGNED>
  static __device__ __forceinline__ Unit load(const Matrix<ALIGNED>& w, int row, int unit) {
    return {bits(w, row, unit)};
  }
  static __device__ __forceinline__ float4 quad(const Unit& unit, int i) {
    const unsigned a = word_of(unit.bits, 2 * i), b = word_of(unit.bits, 2 * i + 1);
    return make_float4(widen_f16((unsigned short)a), widen_f16((unsigned short)(a >> 16)),
                       widen_f16((unsigned short)b), widen_f16((unsigned short)(b >> 16)));
  }
  static __device__ __forceinline__ Affine affine(const Unit&, int) { return {1.0f, 0.0f}; }
};

// All values, then all scales in f16, one for 32 values of a row.
struct Q8_0 : Plain<1> {
  static constexpr int NUMBER = 0; // a row is whole blocks of 32
  static constexpr bool SCALED = true;
  struct Unit {
    uint4 bits;
    unsigned short scale;
  };
  template <bool ALIGNED>
  static __device__ __forceinline__ Unit load(const Matrix<ALIGNED>& w, int row, int unit) {
    const long long first = (long long)row * w.width + unit * UNIT;
    return {load_16(w.at + first), load_2(w.at + (long long)w.rows * w.width + first / 32 * 2)};
  }
  static __device__ __forceinline__ float4 quad(const Unit& unit, int i) { return from_signed(word_of(unit.bits, i)); }
  static __device__ __forceinline__ Affine affine(const Unit& unit, int) { return {widen_f16(unit.scale), 0.0f}; }
};

// All values (4 bits of exponent, 3 of fraction), then a scale in f32 for each square of 128 x 128 of them; rows * width
// is a multiple of 4.
struct Fp8 : Plain<1> {
  static constexpr int DEPTH = 2;
  static constexpr bool SCALED = true;
  struct Unit {
    uint4 bits;
    float scale;
  };
  template <bool ALIGNED>
  static __device__ __forceinline__ Unit load(const Matrix<ALIGNED>& w, int row, int unit) {
    const float* scales = reinterpret_cast<const float*>(w.at + (long long)w.rows * w.width);
    const int across = (w.width + 127) / 128;
    return {bits(w, row, unit), __ldg(scales + (long long)(row / 128) * across + unit * UNIT / 128)};
  }
  // Sign, exponent and fraction at their places in an f16, which then is the number / 256, exactly.
  static __device__ __forceinline__ float4 quad(const Unit& unit, int i) {
    const unsigned word = word_of(unit.bits, i);
    const unsigned first = pick_bytes(word, 0, 0x1404u), second = pick_bytes(word, 0, 0x3424u);
    const unsigned a = (first & 0x80008000u) | (first >> 1 & 0x3f803f80u);
    const unsigned b = (second & 0x80008000u) | (second >> 1 & 0x3f803f80u);
    return make_float4(widen_f16((unsigned short)a), widen_f16((unsigned short)(a >> 16)),
                       widen_f16((unsigned short)b), widen_f16((unsigned short)(b >> 16)));
  }
  static __device__ __forceinline__ Affine affine(const Unit& unit, int) { return {unit.scale * 256.0f, 0.0f}; }
};

// Blocks of 256 numbers as in GGUF files: scale and offset (f16), eight scales and offsets of 6 bits in 12 bytes, with
// FIVE a fifth bit of every number in 32 bytes, and in 128 bytes the lower four bits, 32 bytes for two parts of 32. A
// unit is 16 bytes of these: half of either part.
template <bool FIVE>
struct Affine256 {
  static constexpr int UNIT = 32, GROUPS = 2, BYTES = FIVE ? 176 : 144;
  static constexpr float ORIGIN = 1.0f;
  static constexpr bool SCALED = true, SHIFTED = true, CROWDED = FIVE;
  struct Unit {
    uint4 header, low, high;
    int pair;
  };
  static constexpr int DEPTH = 2, NUMBER = 0;
  static __device__ __forceinline__ Place place(int quad) {
    const int pair = quad / 16, part = quad / 8 % 2, half = quad / 4 % 2;
    return {pair * 2 + half, part * 4 + quad % 4};
  }
  static __device__ __forceinline__ int column(int unit, int quad) {
    return unit / 2 * 64 + quad / 4 * 32 + unit % 2 * 16 + quad % 4 * 4;
  }
  template <bool ALIGNED>
  static __device__ __forceinline__ Unit load(const Matrix<ALIGNED>& w, int row, int unit) {
    const unsigned char* block = w.at + ((long long)row * (w.width / 256) + unit / 8) * BYTES;
    const int pair = unit / 2 % 4, half = unit % 2;
    Unit taken;
    taken.header = load_16(block);
    taken.low = load_16(block + (FIVE ? 48 : 16) + pair * 32 + half * 16);
    if (FIVE) taken.high = load_16(block + 16 + half * 16);
    taken.pair = pair;
    return taken;
  }
  static __device__ __forceinline__ float4 quad(const Unit& unit, int i) {
    unsigned word = word_of(unit.low, i % 4) >> i / 4 * 4 & 0x0f0f0f0fu;
    if (FIVE) word |= word_of(unit.high, i % 4) >> (2 * unit.pair + i / 4) << 4 & 0x10101010u;
    return from_one(word | 0x80808080u);
  }
  static __device__ __forceinline__ Affine affine(const Unit& unit, int group) {
    // the lower four parts have all of their bits in one byte; the others the lower four bits in the third word, the
    // upper two above those of the part four before
    const int part = 2 * unit.pair + group, at = part % 4 * 8;
    const unsigned scales = unit.header.y >> at, offsets = unit.header.z >> at, rest = unit.header.w >> at;
    const bool lower = part < 4;
    const unsigned scale = lower ? scales & 63 : (rest & 15) | (scales >> 2 & 48);
    const unsigned offset = lower ? offsets & 63 : (rest >> 4 & 15) | (offsets >> 2 & 48);
    const float step = widen_f16((unsigned short)unit.header.x);
    const float shift = widen_f16((unsigned short)(unit.header.x >> 16));
    return {step * (float)scale * (1.0f / STEP), -(shift * (float)offset)};
  }
};

// Blocks of 210 bytes for 256 numbers as in GGUF files, on boundaries of 2 bytes: the lower four bits, the upper two,
// 16 signed scales, a scale in f16. A unit is four neighbours of each of the four quarters of half a block.
struct Q6K {
  static constexpr int UNIT = 16, GROUPS = 4, BYTES = 210;
  static constexpr float ORIGIN = 1.0f + 32.0f * STEP;
  static constexpr bool SCALED = true, SHIFTED = false, CROWDED = false;
  struct Unit {
    unsigned low[2], high;
    signed char parts[4];
    unsigned short scale;
  };
  static constexpr int DEPTH = 2, NUMBER = 0;
  static __device__ __forceinline__ Place place(int quad) { return {quad / 32 * 8 + quad % 8, quad / 8 % 4}; }
  static __device__ __forceinline__ int column(int unit, int quad) { return unit / 8 * 128 + quad * 32 + unit % 8 * 4; }
  template <bool ALIGNED>
  static __device__ __forceinline__ Unit load(const Matrix<ALIGNED>& w, int row, int unit) {
    const unsigned char* block = w.at + ((long long)row * (w.width / 256) + unit / 16) * BYTES;
    const int half = unit / 8 % 2, first = unit % 8 * 4;
    Unit taken;
    taken.low[0] = load_4_by_2(block + half * 64 + first);
    taken.low[1] = load_4_by_2(block + half * 64 + 32 + first);
    taken.high = load_4_by_2(block + 128 + half * 32 + first);
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter)
      taken.parts[quarter] = (signed char)__ldg(block + 192 + half * 8 + quarter * 2 + first / 16);
    taken.scale = load_2(block + 208);
    return taken;
  }
  static __device__ __forceinline__ float4 quad(const Unit& unit, int i) {
    const unsigned low = unit.low[i % 2] >> i / 2 * 4 & 0x0f0f0f0fu;
    const unsigned high = (i < 2 ? unit.high << (4 - 2 * i) : unit.high >> (2 * i - 4)) & 0x30303030u;
    return from_one(low | high | 0x80808080u);
  }
  static __device__ __forceinline__ Affine affine(const Unit& unit, int group) {
    return {widen_f16(unit.scale) * (float)unit.parts[group] * (1.0f / STEP), 0.0f};
  }
};

typedef Affine256<false> Q4K;
typedef Affine256<true> Q5K;

// NUMBER is 0 where the format itself sees to the boundaries of its loads.
template <class F>
__device__ __forceinline__ bool aligned(const void* at, int width) {
  return F::NUMBER == 0 || (reinterpret_cast<unsigned long long>(at) | (unsigned long long)width * F::NUMBER) % 16 == 0;
}

// A quad's numbers themselves. c - ORIGIN is exact, so they are what any reader of the format makes of it, but for the
// rounding of the last step.
template <class F>
__device__ __forceinline__ float4 numbers(const typename F::Unit& unit, int quad, Affine affine) {
  float4 c = F::quad(unit, quad);
  if (F::ORIGIN != 0.0f) c = make_float4(c.x - F::ORIGIN, c.y - F::ORIGIN, c.z - F::ORIGIN, c.w - F::ORIGIN);
  if (F::SHIFTED)
    c = make_float4(fmaf(affine.scale, c.x, affine.shift), fmaf(affine.scale, c.y, affine.shift),
                    fmaf(affine.scale, c.z, affine.shift), fmaf(affine.scale, c.w, affine.shift));
  else if (F::SCALED)
    c = make_float4(affine.scale * c.x, affine.scale * c.y, affine.scale * c.z, affine.scale * c.w);
  return c;
}

// === y (M, n) = x (M, k) times w (n, k) transposed

constexpr int GEMV_THREADS = 256, GEMV_WARPS = GEMV_THREADS / 32;

// A stretch of x, all M rows of it, lies in shared memory, a quad's numbers as a float4 at [quad of its unit][unit]:
// lanes that take units side by side then read side by side. The stretch is as long as 32 KiB allow.
//
// Block 256. Any grid is right: warps go on to further rows while there are some, and where the grid has more warps
// than there are pairs of rows, up to 8 warps of a block share a pair, each taking part of the width. Best should be
// max(ceil(n / 16), min(ceil(n / 2), 3 * processors)); where x is one stretch, 3 * processors do for any larger n, and a
// block then reads x but once.
template <class F, int M>
struct Stretch {
  // rows of w that a warp multiplies side by side, so that what it reads of x serves all of them
  static constexpr int ROWS = 2;
  static constexpr int LENGTH = 8192 / M, UNITS = LENGTH / F::UNIT, QUADS = F::UNIT / 4;
  static constexpr int PLANE = UNITS + (QUADS == 1 ? 0 : 8 / QUADS); // a unit's quads begin at different banks
  float4 x[M * QUADS * PLANE];
  float joined[GEMV_WARPS][ROWS * M]; // sums of warps that share a pair
};

// Which rows of x are multiplied, and where their products go: one after another, or those of a list, where the product
// of visit v goes to row v and `share` visits in a row have one row of x.
struct Side {
  const float* x;
  float* y;
  const int* visits; // null: in order
  int count, share;
  __device__ __forceinline__ const float* from(int m, int k) const {
    return x + (long long)(visits ? __ldg(visits + m) / share : m) * k;
  }
  __device__ __forceinline__ float* to(int m, int n) const {
    return y + (long long)(visits ? __ldg(visits + m) : m) * n;
  }
};

template <class F, int M, bool ALIGNED>
__device__ __forceinline__ void gemv(Stretch<F, M>& stretch, const void* weights, const Side& side, int n, int k) {
  constexpr int UNITS = Stretch<F, M>::UNITS, QUADS = Stretch<F, M>::QUADS, PLANE = Stretch<F, M>::PLANE;
  constexpr int ROWS = Stretch<F, M>::ROWS, GROUP_QUADS = QUADS / F::GROUPS;
  // units of each row that a lane has under way
  constexpr int DEPTH = !ALIGNED ? 1 : M == 1 ? F::DEPTH : F::GROUPS > 1 ? 1 : 2;
  const Matrix<ALIGNED> w = {static_cast<const unsigned char*>(weights), n, k};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int pairs = (n + ROWS - 1) / ROWS, all_units = (k + F::UNIT - 1) / F::UNIT;
  // warps that share a pair: while a warp's share is at least one unit a lane
  int split = 1;
  while (split < GEMV_WARPS && (long long)pairs * split * 2 <= (long long)gridDim.x * GEMV_WARPS &&
         split * 64 <= UNITS)
    split *= 2;
  const int side_by_side = GEMV_WARPS / split, share = warp % split;

  bool staged = false; // all of x, which is no longer than the stretch
  for (int base = blockIdx.x * side_by_side; base < pairs; base += gridDim.x * side_by_side) {
    int rows[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) rows[r] = min((base + warp / split) * ROWS + r, n - 1);
    float sums[ROWS][M];
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int m = 0; m < M; ++m) sums[r][m] = 0.0f;

    for (int begin = 0; begin < all_units; begin += UNITS) {
      const int end = min(begin + UNITS, all_units);
      int first = begin + share * 32 + lane;
      typename F::Unit units[DEPTH][ROWS];
      // the first loads are under way while x is fetched
#pragma unroll
      for (int d = 0; d < DEPTH; ++d)
        if (first + d * split * 32 < end)
#pragma unroll
          for (int r = 0; r < ROWS; ++r) units[d][r] = F::load(w, rows[r], first + d * split * 32);

      if (!staged) {
        __syncthreads(); // nobody reads the last stretch any more
        // rows beyond the count stay as they are: nobody looks at their sums
        for (int m = 0; m < side.count; ++m)
          for (int quad = threadIdx.x; quad < UNITS * QUADS; quad += GEMV_THREADS) {
            const int column = begin * F::UNIT + quad * 4;
            if (column >= k && column >= end * F::UNIT) break;
            const float* from = side.from(m, k) + column;
            float4 four;
            if (k % 4 == 0 && column < k && reinterpret_cast<unsigned long long>(side.x) % 16 == 0)
              four = __ldg(reinterpret_cast<const float4*>(from));
            else
              four = make_float4(column < k ? from[0] : 0.0f, column + 1 < k ? from[1] : 0.0f,
                                 column + 2 < k ? from[2] : 0.0f, column + 3 < k ? from[3] : 0.0f);
            const Place place = F::place(quad);
            stretch.x[(m * QUADS + place.quad) * PLANE + place.unit] = four;
          }
        __syncthreads();
        staged = all_units <= UNITS;
      }

      while (first < end) {
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
          const int unit = first + d * split * 32;
          if (unit >= end) break;
          const float4* own = stretch.x + (unit - begin);
#pragma unroll
          for (int group = 0; group < F::GROUPS; ++group) {
            Affine affine[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) affine[r] = F::affine(units[d][r], group);
            float partial[ROWS] = {}, plain = 0.0f;
#pragma unroll
            for (int q = group * GROUP_QUADS; q < (group + 1) * GROUP_QUADS; ++q) {
              if (M == 1) {
                const float4 v = own[q * PLANE];
                if (F::ORIGIN != 0.0f) plain += (v.x + v.y) + (v.z + v.w);
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                  const float4 c = F::quad(units[d][r], q);
                  partial[r] = fmaf(c.x, v.x, fmaf(c.y, v.y, fmaf(c.z, v.z, fmaf(c.w, v.w, partial[r]))));
                }
              } else {
                float4 c[ROWS];
#pragma unroll
                for (int r = 0; r < ROWS; ++r) c[r] = numbers<F>(units[d][r], q, affine[r]);
#pragma unroll
                for (int m = 0; m < M; ++m) {
                  const float4 v = own[(m * QUADS + q) * PLANE];
#pragma unroll
                  for (int r = 0; r < ROWS; ++r)
                    sums[r][m] =
                        fmaf(c[r].x, v.x, fmaf(c[r].y, v.y, fmaf(c[r].z, v.z, fmaf(c[r].w, v.w, sums[r][m]))));
                }
              }
            }
            if (M == 1) {
#pragma unroll
              for (int r = 0; r < ROWS; ++r) {
                if (F::ORIGIN != 0.0f) partial[r] = fmaf(-F::ORIGIN, plain, partial[r]);
                sums[r][0] = F::SCALED ? fmaf(affine[r].scale, partial[r], sums[r][0]) : sums[r][0] + partial[r];
                if (F::SHIFTED) sums[r][0] = fmaf(affine[r].shift, plain, sums[r][0]);
              }
            }
          }
        }
        first += DEPTH * split * 32;
#pragma unroll
        for (int d = 0; d < DEPTH; ++d)
          if (first + d * split * 32 < end)
#pragma unroll
            for (int r = 0; r < ROWS; ++r) units[d][r] = F::load(w, rows[r], first + d * split * 32);
      }
    }

#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int m = 0; m < M; ++m) sums[r][m] = warp_sum(sums[r][m]);
    if (split > 1) {
      if (lane == 0)
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
          for (int m = 0; m < M; ++m) stretch.joined[warp][r * M + m] = sums[r][m];
      __syncthreads();
    }
    if (share == 0 && lane == 0) {
      const int row = (base + warp / split) * ROWS;
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int m = 0; m < M; ++m) {
          float sum = sums[r][m];
          for (int other = 1; other < split; ++other) sum += stretch.joined[warp + other][r * M + m];
          if (row + r < n && m < side.count) side.to(m, n)[row + r] = sum;
        }
    }
    if (split > 1) __syncthreads(); // `joined` is free again
  }
}

// === rows by index, and whole matrices as bf16

// Up to four numbers of a row, at `column`, of which `width` says how many there are. `whole`: rows are a multiple of 4.
__device__ __forceinline__ void store(float* row, int column, int width, bool whole, float4 four) {
  if (whole) {
    if (column < width) *reinterpret_cast<float4*>(row + column) = four;
    return;
  }
  if (column < width) row[column] = four.x;
  if (column + 1 < width) row[column + 1] = four.y;
  if (column + 2 < width) row[column + 2] = four.z;
  if (column + 3 < width) row[column + 3] = four.w;
}
__device__ __forceinline__ void store(unsigned short* row, int column, int width, bool whole, float4 four) {
  if (whole) {
    if (column < width)
      *reinterpret_cast<uint2*>(row + column) = make_uint2(pack_bf16(four.x, four.y), pack_bf16(four.z, four.w));
    return;
  }
  if (column < width) row[column] = round_bf16(four.x);
  if (column + 1 < width) row[column + 1] = round_bf16(four.y);
  if (column + 2 < width) row[column + 2] = round_bf16(four.z);
  if (column + 3 < width) row[column + 3] = round_bf16(four.w);
}

template <class F, bool ALIGNED, class Out>
__device__ __forceinline__ void decode_row(const Matrix<ALIGNED>& w, int row, Out* out) {
  constexpr int QUADS = F::UNIT / 4;
  for (int at = threadIdx.x; at < (w.width + F::UNIT - 1) / F::UNIT; at += blockDim.x) {
    const typename F::Unit unit = F::load(w, row, at);
#pragma unroll
    for (int q = 0; q < QUADS; ++q)
      store(out, F::column(at, q), w.width, w.width % 4 == 0,
            numbers<F>(unit, q, F::affine(unit, q / (QUADS / F::GROUPS))));
  }
}

template <class F, class Out>
__device__ __forceinline__ void decode_row(const void* matrix, int rows, int width, int row, Out* out) {
  const unsigned char* at = static_cast<const unsigned char*>(matrix);
  if (aligned<F>(matrix, width))
    decode_row<F>(Matrix<true>{at, rows, width}, row, out);
  else
    decode_row<F>(Matrix<false>{at, rows, width}, row, out);
}

// Grid: the rows of y. Block: any.
template <class F>
__device__ __forceinline__ void embed(const unsigned int* ids, const void* table, float* y, int width, int first,
                                      int rows) {
  const long long row = (long long)ids[blockIdx.x] - first;
  float* out = y + (long long)blockIdx.x * width;
  if (row >= 0 && row < rows)
    decode_row<F>(table, rows, width, (int)row, out);
  else
    for (int column = threadIdx.x; column < width; column += blockDim.x) out[column] = 0.0f;
}

// Grid: n. Block: any; 128 is enough from k = 1024 on.
template <class F>
__device__ __forceinline__ void widen(const void* w, unsigned short* out, int n, int k) {
  decode_row<F>(w, n, k, blockIdx.x, out + (long long)blockIdx.x * k);
}

// Any grid and block; 4 numbers a thread and round.
extern "C" __global__ void to_bf16(const float* x, unsigned short* y, long long count) {
  const long long threads = (long long)gridDim.x * blockDim.x;
  const long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  for (long long at = thread; at < count / 4; at += threads) {
    const float4 four = reinterpret_cast<const float4*>(x)[at];
    reinterpret_cast<uint2*>(y)[at] = make_uint2(pack_bf16(four.x, four.y), pack_bf16(four.z, four.w));
  }
  if (thread < count % 4) y[count - 1 - thread] = round_bf16(x[count - 1 - thread]);
}
KERNEL(to_bf16)

template <class F, int M>
__device__ __forceinline__ void gemv(const void* w, const Side& side, int n, int k) {
  __shared__ Stretch<F, M> stretch;
  if (aligned<F>(w, k))
    gemv<F, M, true>(stretch, w, side, n, k);
  else
    gemv<F, M, false>(stretch, w, side, n, k);
}

// The same where the device may have chosen the matrices, which it has where there are `groups` (see experts.cu): each
// is a matrix of the table `w` and up to M visits to it. Grid: as ever, then groups, then parts; a part has a table of
// `experts` matrices and products of its own for `all` visits. A null in the table is a matrix of another format.
template <class F, int M>
__device__ __forceinline__ void gemv(const void* w, const float* x, float* y, int n, int k, const int4* groups,
                                     const int* visits, int all, int share, int experts) {
  Side side = {x, y, nullptr, M, 1};
  if (groups) {
    const int4 group = __ldg(groups + blockIdx.y); // matrix, first visit, visits
    if (group.z == 0) return;
    const unsigned long long* table = static_cast<const unsigned long long*>(w);
    w = reinterpret_cast<const void*>(__ldg(table + (long long)blockIdx.z * experts + group.x));
    if (!w) return;
    side = {x, y + (long long)blockIdx.z * all * n, visits + group.y, group.z, share};
  }
  gemv<F, M>(w, side, n, k);
}

// Blocks that a processor is to have room for.
#define GEMV_BLOCKS(F, M) (M == 1 ? 3 : M == 8 && F::CROWDED ? 1 : 2)
#define GEMV(name, F, M)                                                                               \
  extern "C" __global__ void __launch_bounds__(GEMV_THREADS, GEMV_BLOCKS(F, M))                        \
      gemv_##name##_##M(const void* w, const float* x, float* y, int n, int k) {                       \
    gemv<F, M>(w, Side{x, y, nullptr, M, 1}, n, k);                                                    \
  }                                                                                                    \
  KERNEL(gemv_##name##_##M)
#define GEMV_CHOSEN(name, F, M)                                                                        \
  extern "C" __global__ void __launch_bounds__(GEMV_THREADS, GEMV_BLOCKS(F, M))                        \
      gemv_##name##_##M(const void* w, const float* x, float* y, int n, int k, const int4* groups,     \
                        const int* visits, int all, int share, int experts) {                          \
    gemv<F, M>(w, x, y, n, k, groups, visits, all, share, experts);                                    \
  }                                                                                                    \
  KERNEL(gemv_##name##_##M)
#define FORMAT(name, F)                                                                                \
  GEMV_CHOSEN(name, F, 1)                                                                              \
  GEMV(name, F, 2)                                                                                     \
  GEMV_CHOSEN(name, F, 4)                                                                              \
  GEMV(name, F, 8)                                                                                     \
  extern "C" __global__ void embed_##name(const unsigned int* ids, const void* table, float* y,        \
                                          int width, int first, int rows) {                            \
    embed<F>(ids, table, y, width, first, rows);                                                       \
  }                                                                                                    \
  KERNEL(embed_##name)
#define WIDEN(name, F)                                                                                 \
  extern "C" __global__ void widen_##name(const void* w, unsigned short* out, int n, int k) {          \
    widen<F>(w, out, n, k);                                                                            \
  }                                                                                                    \
  KERNEL(widen_##name)

FORMAT(f32, F32)
FORMAT(bf16, Bf16)
FORMAT(f16, F16)
FORMAT(q8_0, Q8_0)
FORMAT(q4_k, Q4K)
FORMAT(q5_k, Q5K)
FORMAT(q6_k, Q6K)
FORMAT(fp8, Fp8)
WIDEN(f16, F16)
WIDEN(q8_0, Q8_0)
WIDEN(q4_k, Q4K)
WIDEN(q5_k, Q5K)
WIDEN(q6_k, Q6K)
WIDEN(fp8, Fp8)
