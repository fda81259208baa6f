// Runs kernels on a CPU, for tests: g++ compiles a .cu to a shared library, which gives `emulator_launch`:
//
//   g++ -std=c++20 -O2 -w -shared -fPIC -x c++ kernel.cu -o kernel.so
//
// The threads of a block are fibers of one thread of the system, which change only at barriers and where a warp works
// together (shuffles, matrix products); the blocks come one after another. Every second block runs its threads
// backwards, so that a barrier that is missing shows. Dynamic shared memory holds NaNs at first. A thread that does not
// come to a barrier, or a warp whose threads come to different ones, ends the process with a message.
//
// Not covered: races that need the order of a GPU's memory, partial masks, blocks and threads of more than one dimension.
// The caller sees to it that one launch runs at a time.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static // one block at a time: it is the block's own
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

#define KERNEL(name) static const emulator::Registered registered_##name{#name, name};
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emulator::dynamic_shared)

struct uint3 {
  unsigned x, y, z;
};
typedef uint3 dim3;
// The vectors of CUDA, with their alignment.
#define EMULATOR_VECTORS(of, name)                                                              \
  struct __align__(2 * sizeof(of)) name##2 { of x, y; };                                        \
  struct __align__(sizeof(of) > 4 ? 16 : 4 * sizeof(of)) name##4 { of x, y, z, w; };            \
  inline name##2 make_##name##2(of x, of y) { return {x, y}; }                                  \
  inline name##4 make_##name##4(of x, of y, of z, of w) { return {x, y, z, w}; }
EMULATOR_VECTORS(float, float)
EMULATOR_VECTORS(int, int)
EMULATOR_VECTORS(unsigned, uint)
EMULATOR_VECTORS(signed char, char)
EMULATOR_VECTORS(unsigned char, uchar)
EMULATOR_VECTORS(short, short)
EMULATOR_VECTORS(unsigned short, ushort)
EMULATOR_VECTORS(long long, longlong)
EMULATOR_VECTORS(unsigned long long, ulonglong)
EMULATOR_VECTORS(double, double)
#undef EMULATOR_VECTORS

namespace emulator {
inline uint3 thread_index, block_index, block_size, grid_size;
inline unsigned char* dynamic_shared;
} // namespace emulator
#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size

// === fibers

#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
// Saves what a callee must keep, leaves the stack in *from and goes on where `to` was left.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
.size emulator_switch, .-emulator_switch
)");

namespace emulator {
struct Context {
  void* stack = nullptr;
  void start(unsigned char* top, void (*entry)()) {
    void** at = reinterpret_cast<void**>(top);
    *--at = nullptr; // where entry would return to; it never does
    *--at = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--at = nullptr;
    stack = at;
  }
  void go(Context& to) { emulator_switch(&stack, to.stack); }
};
} // namespace emulator
#else
#include <ucontext.h>
namespace emulator {
struct Context {
  ucontext_t context;
  void start(unsigned char* top, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = top - (48 << 10);
    context.uc_stack.ss_size = 48 << 10;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void go(Context& to) { swapcontext(&context, &to.context); }
};
} // namespace emulator
#endif

namespace emulator {

// Where a thread waits. The line tells one barrier from another.
enum class At { running, block, warp, end };

struct Copy {
  void* to;
  const void* from; // null: zeros
};

struct Thread {
  Context context;
  At at;
  int line;
  unsigned parity; // which of the warp's slots its next exchange uses
  std::vector<std::vector<Copy>> copies; // groups, the open one last
};

// What a thread lends to the others of its warp: enough for the operands of a matrix product.
struct Slot {
  unsigned char bytes[48];
};

struct Warp {
  Slot slots[2][32];
  void (*finish)(Warp&, unsigned parity); // done once when all have come
};

constexpr size_t STACK = 64 << 10, PAGE = 4096;

inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline Context scheduler;
inline unsigned current; // the thread that runs
inline std::function<void()> body;
inline const char* kernel_name;
inline unsigned char* stacks;

[[noreturn]] inline void fail(const char* what, unsigned first, unsigned count) {
  fprintf(stderr, "emulator: kernel %s, block (%u, %u, %u): %s\n", kernel_name, block_index.x, block_index.y,
          block_index.z, what);
  for (unsigned t = first; t < first + count; ++t) {
    const Thread& thread = threads[t];
    if (t > first && t + 1 < first + count && thread.at == threads[t - 1].at && thread.line == threads[t - 1].line)
      continue;
    fprintf(stderr, "  thread %u: %s", t,
            thread.at == At::block  ? "at __syncthreads"
            : thread.at == At::warp ? "waits for its warp"
            : thread.at == At::end  ? "has returned"
                                    : "runs");
    if (thread.at != At::end) fprintf(stderr, ", line %d", thread.line);
    fprintf(stderr, "\n");
  }
  abort();
}

inline void entry() {
  body();
  threads[current].at = At::end;
  threads[current].context.go(scheduler);
  abort(); // a thread that has ended is not gone on with
}

// Lets others run until the scheduler comes back to this thread.
inline void wait(At at, int line) {
  Thread& thread = threads[current];
  thread.at = at;
  thread.line = line;
  thread.context.go(scheduler);
}

inline void barrier(int line = __builtin_LINE()) { wait(At::block, line); }

// The warp's threads each lend `mine`; gives the slots of all, which stand until the thread's next exchange but one.
inline const Slot* exchange(const void* mine, size_t bytes, int line, void (*finish)(Warp&, unsigned) = nullptr) {
  Thread& thread = threads[current];
  Warp& warp = warps[current / 32];
  const unsigned parity = thread.parity;
  thread.parity ^= 1;
  memcpy(warp.slots[parity][current % 32].bytes, mine, bytes);
  warp.finish = finish;
  wait(At::warp, line);
  return warp.slots[parity];
}

// Runs the warp's threads until each has come to a barrier of the block or to its end.
inline void run_warp(unsigned w, bool backwards) {
  const unsigned first = w * 32, count = std::min(32u, block_size.x - first);
  for (;;) {
    for (unsigned i = 0; i < count; ++i) {
      const unsigned t = first + (backwards ? count - 1 - i : i);
      if (threads[t].at != At::running) continue;
      current = t;
      thread_index.x = t;
      scheduler.go(threads[t].context);
    }
    unsigned waiting = 0;
    for (unsigned t = first; t < first + count; ++t) waiting += threads[t].at == At::warp;
    if (waiting == 0) return;
    for (unsigned t = first; t < first + count; ++t)
      if (threads[t].at != At::warp || threads[t].line != threads[first].line)
        fail("a warp's threads wait for each other at different places", first, count);
    if (warps[w].finish) warps[w].finish(warps[w], threads[first].parity ^ 1);
    for (unsigned t = first; t < first + count; ++t) threads[t].at = At::running;
  }
}

inline void run_block(bool backwards) {
  const unsigned count = block_size.x, warp_count = (count + 31) / 32;
  for (unsigned t = 0; t < count; ++t) {
    Thread& thread = threads[t];
    // stacks that began at the same place of their pages would fight for the same lines of the cache
    thread.context.start(stacks + (t + 1) * STACK - (t % 32) * 192, entry);
    thread.at = At::running;
    thread.parity = 0;
    thread.copies.resize(1);
    thread.copies[0].clear();
  }
  for (;;) {
    for (unsigned i = 0; i < warp_count; ++i) run_warp(backwards ? warp_count - 1 - i : i, backwards);
    unsigned waiting = 0;
    for (unsigned t = 0; t < count; ++t) waiting += threads[t].at == At::block;
    if (waiting == 0) return;
    for (unsigned t = 0; t < count; ++t)
      if (threads[t].at != At::block || threads[t].line != threads[0].line)
        fail("not all threads come to the same __syncthreads", 0, count);
    for (unsigned t = 0; t < count; ++t) threads[t].at = At::running;
  }
}

inline void run_grid(const char* kernel, const unsigned grid[3], unsigned block, unsigned shared,
                     std::function<void()> kernel_body) {
  constexpr unsigned MOST = 1024;
  if (block == 0 || block > MOST) {
    fprintf(stderr, "emulator: kernel %s: a block of %u threads\n", kernel, block);
    abort();
  }
  if (!stacks) {
    void* all = mmap(nullptr, MOST * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) abort();
    stacks = static_cast<unsigned char*>(all);
    // a stack that is too small is to end the process, not to write into the next one
    for (unsigned t = 0; t < MOST; ++t) mprotect(stacks + t * STACK, PAGE, PROT_NONE);
  }
  threads.resize(std::max<size_t>(threads.size(), block));
  warps.resize(std::max<size_t>(warps.size(), (block + 31) / 32));
  std::vector<float4> memory(shared / 16 + 1);
  dynamic_shared = reinterpret_cast<unsigned char*>(memory.data());
  kernel_name = kernel;
  body = std::move(kernel_body);
  grid_size = {grid[0], grid[1], grid[2]};
  block_size = {block, 1, 1};
  thread_index = {0, 0, 0};
  for (unsigned z = 0; z < grid[2]; ++z)
    for (unsigned y = 0; y < grid[1]; ++y)
      for (unsigned x = 0; x < grid[0]; ++x) {
        block_index = {x, y, z};
        memset(dynamic_shared, 0xff, memory.size() * 16);
        run_block((x + y + z) % 2 == 1);
      }
}

// === kernels by name

struct Kernel {
  // A letter for each parameter: p a pointer, i int or unsigned, l long long, f float.
  std::string parameters;
  std::function<void(void**)> call;
};

inline std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}

template <class T>
constexpr char letter() {
  if constexpr (std::is_pointer_v<T>) return 'p';
  else if constexpr (std::is_same_v<T, float>) return 'f';
  else if constexpr (std::is_integral_v<T> && sizeof(T) == 4) return 'i';
  else {
    static_assert(std::is_integral_v<T> && sizeof(T) == 8, "a parameter of a kernel is a pointer, int, long long or float");
    return 'l';
  }
}

struct Registered {
  template <class... P>
  Registered(const char* name, void (*kernel)(P...)) {
    Kernel entry{{letter<P>()...}, [kernel](void** args) { call(kernel, args, std::index_sequence_for<P...>()); }};
    if (!kernels().emplace(name, std::move(entry)).second) {
      fprintf(stderr, "emulator: two kernels are called %s\n", name);
      abort();
    }
  }
  template <class... P, size_t... I>
  static void call(void (*kernel)(P...), void** args, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_cv_t<P>*>(args[I])...);
  }
};

// === what kernels call

inline void whole_warp(unsigned mask) {
  if (mask != 0xffffffffu || block_size.x % 32) fail("only whole warps work together", current, 1);
}

template <class T>
T shuffle(unsigned mask, T mine, int from, int line) {
  whole_warp(mask);
  static_assert(sizeof(T) <= 16);
  const Slot* slots = exchange(&mine, sizeof mine, line);
  T other;
  memcpy(&other, slots[from & 31].bytes, sizeof other);
  return other;
}

// The lane `by` away, where it is in the same part of `width` lanes; else the lane itself.
inline int lane_within(int by, int width) {
  const int lane = thread_index.x % 32;
  return lane / width == (lane + by + 32) / width - 32 / width ? lane + by : lane;
}

struct Operands {
  unsigned a[4], b[2];
};

// The lanes' operands become, in the same slots, their four numbers of a · b.
inline void multiply(Warp& warp, unsigned parity) {
  float a[16][16], b[16][8], product[16][8] = {};
  const auto low = [](unsigned pair) { pair <<= 16; float x; memcpy(&x, &pair, 4); return x; };
  const auto high = [](unsigned pair) { pair &= 0xffff0000u; float x; memcpy(&x, &pair, 4); return x; };
  Slot* slots = warp.slots[parity];
  for (int lane = 0; lane < 32; ++lane) {
    Operands mine;
    memcpy(&mine, slots[lane].bytes, sizeof mine);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + i % 2 * 8, column = 2 * t + i / 2 * 8;
      a[row][column] = low(mine.a[i]);
      a[row][column + 1] = high(mine.a[i]);
    }
    for (int i = 0; i < 2; ++i) {
      b[2 * t + 8 * i][g] = low(mine.b[i]);
      b[2 * t + 8 * i + 1][g] = high(mine.b[i]);
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) product[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const float mine[4] = {product[g][2 * t], product[g][2 * t + 1], product[g + 8][2 * t], product[g + 8][2 * t + 1]};
    memcpy(slots[lane].bytes, mine, sizeof mine);
  }
}

inline void mma_m16n8k16(float d[4], const unsigned a[4], const unsigned b[2], int line = __builtin_LINE()) {
  whole_warp(0xffffffffu);
  const Operands mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const Slot* slots = exchange(&mine, sizeof mine, line, multiply);
  float product[4];
  memcpy(product, slots[thread_index.x % 32].bytes, sizeof product);
  for (int i = 0; i < 4; ++i) d[i] += product[i];
}

inline void load_matrices(unsigned words[4], const void* row, bool transposed, int line = __builtin_LINE()) {
  whole_warp(0xffffffffu);
  if (reinterpret_cast<size_t>(row) % 16) fail("a row of load_matrices is not on a boundary of 16 bytes", current, 1);
  unsigned char bytes[16];
  memcpy(bytes, row, 16);
  const Slot* slots = exchange(bytes, 16, line);
  const int g = thread_index.x % 32 / 4, t = thread_index.x % 4;
  for (int i = 0; i < 4; ++i) {
    unsigned short pair[2];
    for (int j = 0; j < 2; ++j) {
      const int from = transposed ? 2 * t + j : g, column = transposed ? g : 2 * t + j;
      memcpy(&pair[j], slots[8 * i + from].bytes + 2 * column, 2);
    }
    words[i] = pair[0] | (unsigned)pair[1] << 16;
  }
}

// A copy is done when its thread waits for it, so that one that is not waited for shows.
inline void copy_async_16(void* to, const void* from) {
  if (reinterpret_cast<size_t>(to) % 16 || reinterpret_cast<size_t>(from) % 16)
    fail("a copy of 16 bytes is not on a boundary of 16 bytes", current, 1);
  memset(to, 0xff, 16);
  threads[current].copies.back().push_back({to, from});
}
inline void copy_async_commit() { threads[current].copies.emplace_back(); }
inline void copy_async_wait(int groups) {
  auto& copies = threads[current].copies;
  while (copies.size() > (size_t)groups + 1) {
    for (const Copy& copy : copies.front()) {
      if (copy.from) memcpy(copy.to, copy.from, 16);
      else memset(copy.to, 0, 16);
    }
    copies.erase(copies.begin());
  }
}

inline float widen_f16(unsigned short x) {
  const unsigned sign = (x & 0x8000u) << 16, exponent = x >> 10 & 31, fraction = x & 0x3ff;
  if (exponent == 0) {
    const float size = std::ldexp((float)fraction, -24);
    return sign ? -size : size;
  }
  const unsigned bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  float wide;
  memcpy(&wide, &bits, 4);
  return wide;
}

inline unsigned short round_f16(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  const unsigned sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return 0x7fff;
  if (size >= 0x477ff000u) return sign | 0x7c00; // beyond the largest
  if (size < 0x38800000u) return sign | (unsigned short)std::nearbyint(std::ldexp(std::fabs(x), 24));
  return sign | (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
}

} // namespace emulator

#define __syncthreads() emulator::barrier()
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  emulator::whole_warp(mask);
  emulator::exchange("", 1, line);
}
template <class T>
T __shfl_sync(unsigned mask, T x, int from, int width = 32, int line = __builtin_LINE()) {
  return emulator::shuffle(mask, x, (threadIdx.x % 32) / width * width + (from & (width - 1)), line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int with, int width = 32, int line = __builtin_LINE()) {
  return emulator::shuffle(mask, x, (threadIdx.x % 32) ^ with, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, int by, int width = 32, int line = __builtin_LINE()) {
  return emulator::shuffle(mask, x, emulator::lane_within(by, width), line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, int by, int width = 32, int line = __builtin_LINE()) {
  return emulator::shuffle(mask, x, emulator::lane_within(-by, width), line);
}
inline unsigned __ballot_sync(unsigned mask, int yes, int line = __builtin_LINE()) {
  emulator::whole_warp(mask);
  const unsigned char mine = yes != 0;
  const emulator::Slot* slots = emulator::exchange(&mine, 1, line);
  unsigned all = 0;
  for (int lane = 0; lane < 32; ++lane) all |= (unsigned)slots[lane].bytes[0] << lane;
  return all;
}
inline int __any_sync(unsigned mask, int yes, int line = __builtin_LINE()) { return __ballot_sync(mask, yes, line) != 0; }
inline int __all_sync(unsigned mask, int yes, int line = __builtin_LINE()) {
  return __ballot_sync(mask, yes, line) == 0xffffffffu;
}

template <class T>
T __ldg(const T* at) { return *at; }
template <class T>
T atomicAdd(T* at, std::type_identity_t<T> x) { T before = *at; *at += x; return before; }
template <class T>
T atomicMax(T* at, std::type_identity_t<T> x) { T before = *at; *at = std::max(before, x); return before; }
inline void __threadfence() {}

template <class To, class From>
inline To emulator_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float x) { return emulator_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulator_bits<float>(x); }
inline int __float_as_int(float x) { return emulator_bits<int>(x); }
inline float __int_as_float(int x) { return emulator_bits<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; ++i) sum += (int)(signed char)(a >> 8 * i) * (signed char)(b >> 8 * i);
  return sum;
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
// what this is compiled for fuses nothing
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline unsigned long long __float2ull_rz(float x) { return (unsigned long long)x; }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
  return (unsigned long long)((unsigned __int128)x * y >> 64);
}
template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
  const std::common_type_t<A, B> x = a, y = b;
  return y < x ? y : x;
}
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
  const std::common_type_t<A, B> x = a, y = b;
  return x < y ? y : x;
}

// Runs a kernel; `args` points to each argument. 1: no such kernel, 2: another number of parameters.
extern "C" __attribute__((used, visibility("default"))) inline int emulator_launch(
    const char* kernel, const unsigned grid[3], unsigned block, unsigned shared, void** args, int count) {
  const auto found = emulator::kernels().find(kernel);
  if (found == emulator::kernels().end()) return 1;
  const emulator::Kernel& entry = found->second;
  if ((int)entry.parameters.size() != count) return 2;
  emulator::run_grid(found->first.c_str(), grid, block, shared, [&] { entry.call(args); });
  return 0;
}

// The kinds of a kernel's parameters, a letter for each (see emulator::Kernel); null where there is no such kernel.
extern "C" __attribute__((used, visibility("default"))) inline const char* emulator_parameters(const char* kernel) {
  const auto found = emulator::kernels().find(kernel);
  return found == emulator::kernels().end() ? nullptr : found->second.parameters.c_str();
}
