// What the scan kernels need of the GPU that plain C++ does not have. No CUDA header is included, so that NVRTC needs
// nothing but this text; a twin of this file in plain C++ lets the tests run the kernels on a CPU.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

#define DEVICE __device__ __forceinline__
#define SHARED_MEMORY(name) extern __shared__ float4 name[]
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define PARAMETERS(type) const __grid_constant__ type

// 2^x, relative error 2^-22; inputs and results below 2^-126 count as 0.
DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1/x, relative error 2^-23.
DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float2 unpack_bf16(u32 x) { return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)); }

DEVICE u32 pack_bf16(float2 v) {
  u32 x;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(v.y), "f"(v.x));
  return x;
}

DEVICE float2 unpack_f16(u32 x) {
  float2 v;
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(v.x), "=f"(v.y) : "r"(x));
  return v;
}

DEVICE u32 pack_f16(float2 v) {
  u32 x;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(v.y), "f"(v.x));
  return x;
}

DEVICE u32 ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// Barrier ``id``, 1 to 15: for ``threads`` in all, of which some only say that they have come and the others wait for all.
DEVICE void arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void meet(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// Copies 4 or 8 bytes from global to shared memory without waiting, or zeros if not ``there``: then ``from`` is not read.
// Copies belong to the group that commit_copies closes; wait_copies<n> waits for all of this thread's but the last n.
template <class X>
DEVICE void copy_async(X* to, const X* from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from),
               "n"(sizeof(X)), "r"(there ? (u32)sizeof(X) : 0u)
               : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

template <class X>
DEVICE X read_only(const X* x) {
  return __ldg(x);
}

// Where it stands: the compiler moves other loads towards their use, and with them their latency.
DEVICE u8 read_now(const u8* x) {
  u32 v;
  asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(v) : "l"(x));
  return (u8)v;
}
DEVICE float read_now(const float* x) {
  float v;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(x));
  return v;
}

// x as far as the tensor cores see it: 10 bits of mantissa.
DEVICE float high_part(float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); }

// The sums over lanes that the backward needs, on the tensor cores, which see 10 bits of a mantissa: the data are the
// first operand, so that lane l has v0, v2 in columns l % 4, 4 + l % 4 of row l / 4 and v1, v3 there in row 8 + l / 4.
// The second operand adds up columns 0-3 into one column of the total and 4-7 into another: the one of which ``low``,
// ``high`` is 1 in the lanes l whose l / 4 is the column's number. Lane l has of the total columns 2 (l % 4) and the next
// of row l / 4 in [0] and [1], and those of row 8 + l / 4 in [2] and [3].
DEVICE void sum_fours(float (&total)[4], float low, float high, float v0, float v1, float v2, float v3) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(total[0]), "+f"(total[1]), "+f"(total[2]), "+f"(total[3])
      : "r"(__float_as_uint(v0)), "r"(__float_as_uint(v1)), "r"(__float_as_uint(v2)), "r"(__float_as_uint(v3)),
        "r"(__float_as_uint(low)), "r"(__float_as_uint(high)));
}
