// The plain C++ twin of kernels/primitives.cuh: runs one block after the other on the CPU, each CUDA thread a fiber that
// gives way only at barriers and warp operations, in an order drawn anew for every turn, so that a missing barrier
// shows. Reads and writes of shared memory outside of it, and deadlocks, stop the program.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>  // neither <functional> nor <random>, which take a third of a kernel's compilation
#include <vector>

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { u32 x, y; };
struct Index { int x, y, z; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::max;
using std::min;

#define DEVICE inline
#define SHARED_MEMORY(name) float4* name = (float4*)emulator::shared.data()
#define KERNEL(threads, blocks) extern "C" void
#define PARAMETERS(type) const type

namespace emulator {
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  int waiting = 0;  // 0: can run, 1: at the block's barrier, 2: in a warp operation, 3: done, 4: at barrier ``id``
  int id;
  u32 slot = 0;
  float values[64];
};
inline std::vector<float4> shared;
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline bool hasty;
inline int current, come[16];  // threads that have come to each barrier
inline void (*body)();
struct Random {  // splitmix64
  typedef uint64_t result_type;
  uint64_t state;
  static constexpr uint64_t min() { return 0; }
  static constexpr uint64_t max() { return UINT64_MAX; }
  uint64_t operator()() {
    uint64_t x = state += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
  }
};

inline void give_way(int reason) {
  Fiber& me = fibers[current];
  me.waiting = reason;
  swapcontext(&me.context, &scheduler);
}
inline void enter() {
  body();
  give_way(3);
}
inline void run_block(int threads, Random& random) {
  fibers.resize(threads);
  for (int& count : come) count = 0;
  for (int i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    f.stack.resize(1 << 17);
    f.waiting = 0;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) order[i] = i;
  for (;;) {
    std::shuffle(order.begin(), order.end(), random);
    bool ran = false;
    for (int i : order)
      if (fibers[i].waiting == 0) {
        current = i;
        ran = true;
        swapcontext(&scheduler, &fibers[i].context);
      }
    int at_barrier = 0, done = 0;
    for (Fiber& f : fibers) at_barrier += f.waiting == 1, done += f.waiting == 3;
    if (done == threads) return;
    if (at_barrier == threads) {
      for (Fiber& f : fibers) f.waiting = 0;
      continue;
    }
    bool released = false;
    for (int w = 0; w < threads; w += 32) {
      int together = 0;
      for (int i = w; i < w + 32; ++i) together += fibers[i].waiting == 2;
      if (together == 32) {
        released = true;
        for (int i = w; i < w + 32; ++i) fibers[i].waiting = 0;
      }
    }
    if (!ran && !released) {
      fprintf(stderr, "deadlock: %d of %d threads at the barrier, %d done\n", at_barrier, threads, done);
      exit(1);
    }
  }
}
// Every lane's ``values`` as they were when all lanes of the warp had come here.
inline void meet() { give_way(2); }
inline Fiber& lane(int i) { return fibers[current / 32 * 32 + i]; }
}  // namespace emulator

struct ThreadIndex {
  struct X { operator int() const { return emulator::current; } } x;
};
inline ThreadIndex threadIdx;
inline Index blockIdx, gridDim;
inline void __syncthreads() { emulator::give_way(1); }
inline void arrive(int id, int threads) {
  if (++emulator::come[id] < threads) return;
  emulator::come[id] = 0;
  for (emulator::Fiber& f : emulator::fibers)
    if (f.waiting == 4 && f.id == id) f.waiting = 0;
}
inline void meet(int id, int threads) {
  emulator::Fiber& me = emulator::fibers[emulator::current];
  me.id = id, me.waiting = 4;
  arrive(id, threads);
  emulator::give_way(me.waiting);  // 4, or 0: all have come
}

DEVICE float flush(float x) { return fabsf(x) < 1.17549435e-38f ? 0.0f : x; }
DEVICE float exp2_fast(float x) { return flush(exp2f(flush(x))); }
DEVICE float reciprocal(float x) { return flush(1.0f / flush(x)); }

DEVICE float as_float(u32 x) { float y; memcpy(&y, &x, 4); return y; }
DEVICE u32 as_bits(float x) { u32 y; memcpy(&y, &x, 4); return y; }
DEVICE float2 unpack_bf16(u32 x) { return {as_float(x << 16), as_float(x & 0xffff0000u)}; }
DEVICE u32 round_bf16(float x) { u32 b = as_bits(x); return (b + 0x7fffu + (b >> 16 & 1)) >> 16; }
DEVICE u32 pack_bf16(float2 v) { return round_bf16(v.x) | round_bf16(v.y) << 16; }
DEVICE float half_to_float(u16 x) { _Float16 h; memcpy(&h, &x, 2); return (float)h; }
DEVICE u32 float_to_half(float x) { _Float16 h = (_Float16)x; u16 b; memcpy(&b, &h, 2); return b; }
DEVICE float2 unpack_f16(u32 x) { return {half_to_float((u16)x), half_to_float((u16)(x >> 16))}; }
DEVICE u32 pack_f16(float2 v) { return float_to_half(v.x) | float_to_half(v.y) << 16; }

DEVICE u32 ballot(bool x) {
  emulator::lane(threadIdx.x % 32).values[0] = x;
  emulator::meet();
  u32 all = 0;
  for (int i = 0; i < 32; ++i) all |= (u32)(emulator::lane(i).values[0] != 0.0f) << i;
  emulator::meet();
  return all;
}
DEVICE float shuffle_xor(float x, int mask) {
  emulator::lane(threadIdx.x % 32).values[0] = x;
  emulator::meet();
  float y = emulator::lane(threadIdx.x % 32 ^ mask).values[0];
  emulator::meet();
  return y;
}
// Takes place as late as it may, when it is waited for, or with an odd seed as soon as it may, too.
struct Copy { void* to; const void* from; int bytes; bool there; };
inline std::vector<std::vector<std::vector<Copy>>> copies;  // of each thread: its groups
template <class X>
DEVICE void copy_async(X* to, const X* from, bool there) {
  copies[threadIdx.x].back().push_back({to, from, (int)sizeof(X), there});
  if (emulator::hasty && there) memcpy(to, from, sizeof(X));
}
DEVICE void commit_copies() { copies[threadIdx.x].push_back({}); }
template <int PENDING>
DEVICE void wait_copies() {
  auto& groups = copies[threadIdx.x];
  while ((int)groups.size() - 1 > PENDING) {
    for (const Copy& c : groups.front())
      if (c.there)
        memcpy(c.to, c.from, c.bytes);
      else
        memset(c.to, 0, c.bytes);
    groups.erase(groups.begin());
  }
}

template <class X>
DEVICE X read_only(const X* x) { return *x; }

template <class X>
DEVICE X read_now(const X* x) { return *x; }

DEVICE float tf32(float x) { return as_float(as_bits(x) & 0xffffe000u); }
DEVICE float high_part(float x) { return tf32(x); }
// Multiplies the fragments out as the instruction's definition has them.
DEVICE void sum_fours(float (&total)[4], float low, float high, float v0, float v1, float v2, float v3) {
  const int l = threadIdx.x % 32;
  const float operands[] = {v0, v1, v2, v3, low, high};
  for (int i = 0; i < 6; ++i) emulator::lane(l).values[i] = tf32(operands[i]);
  emulator::meet();
  auto a = [](int m, int k) { return emulator::lane(m % 8 * 4 + k % 4).values[k / 4 * 2 + m / 8]; };
  auto b = [](int k, int n) { return emulator::lane(n * 4 + k % 4).values[4 + k / 4]; };
  for (int i = 0; i < 4; ++i) {
    const int m = l / 4 + i / 2 * 8, n = l % 4 * 2 + i % 2;
    for (int k = 0; k < 8; ++k) total[i] += a(m, k) * b(k, n);
  }
  emulator::meet();
}
