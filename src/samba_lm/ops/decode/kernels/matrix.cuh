// What the decoding kernels need of the GPU besides primitives.cuh: 16 bytes at once, the tensor cores, and kernels that
// begin before the one before them has ended. A twin of this file in plain C++ lets the tests run them on a CPU.

struct alignas(16) Line { u32 x, y, z, w; };  // 8 numbers of 16 bits

// As copy_async, 16 bytes, past the first-level cache; what is near in memory is fetched into the second-level cache.
DEVICE void copy_line(Line* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(to)),
               "l"(from), "r"(there ? 16u : 0u)
               : "memory");
}
// The same, of what nothing reads again in this step: it leaves the second-level cache before what kernels pass on.
DEVICE void copy_line_once(Line* to, const void* from, bool there) {
  asm volatile("{.reg .b64 first; mov.b64 first, 0x12f0000000000000;"  // evict first, as createpolicy encodes it
               "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, first;}" ::"r"(
                   (u32)__cvta_generic_to_shared(to)),
               "l"(from), "r"(there ? 16u : 0u)
               : "memory");
}
DEVICE float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
DEVICE void sync_warp() { __syncwarp(); }

// All that the kernels before this one wrote can be read from here on. Before it only what was there when the step began.
DEVICE void wait_for_grids() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// The kernel after this one may begin as soon as every block has come here or has ended.
DEVICE void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// total += A B for 16-bit floats (bf16): A is 16 x 16, B 16 x 8. Of lane l with row g = l / 4 and pair t = l % 4: a0, a2
// hold columns 2 t, 2 t + 1 and those + 8 of row g of A, a1, a3 of row g + 8; b0, b1 those rows of B's column g; the total
// is rows g ([0], [1]) and g + 8 ([2], [3]) in columns 2 t, 2 t + 1.
DEVICE void multiply(float (&total)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(total[0]), "+f"(total[1]), "+f"(total[2]), "+f"(total[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Four 8 x 8 matrices of 16-bit numbers, transposed: lanes 8 i .. 8 i + 7 name the rows of matrix i; lane l gets rows
// 2 (l % 4) and the next of column l / 4 of each.
DEVICE void load_transposed(u32 (&to)[4], const Line* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"((u32)__cvta_generic_to_shared(row))
               : "memory");
}
// Eight whole numbers of a byte each, -128 to 127, in bf16. 128 + the lower seven bits less 128 + the eighth: a pair is
// five instructions, none of them rounds.
DEVICE Line whole_bf16(uint2 v) {
  auto pair = [](u32 spread) {
    u32 y;
    asm("sub.rn.bf16x2 %0, %1, %2;"
        : "=r"(y)
        : "r"((spread & 0x007f007fu) | 0x43004300u), "r"((spread & 0x00800080u) | 0x43004300u));
    return y;
  };
  return Line{pair(__byte_perm(v.x, 0, 0x4140)), pair(__byte_perm(v.x, 0, 0x4342)),
              pair(__byte_perm(v.y, 0, 0x4140)), pair(__byte_perm(v.y, 0, 0x4342))};
}
// The lower (or upper) halves of eight bytes, 0 to 15, less 8.
DEVICE Line whole_bf16_of_4(uint2 v, int upper) {
  auto pair = [](u32 spread) {
    u32 y;
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(y) : "r"((spread & 0x000f000fu) | 0x43004300u), "r"(0x43084308u));
    return y;
  };
  const u32 a = v.x >> 4 * upper, b = v.y >> 4 * upper;
  return Line{pair(__byte_perm(a, 0, 0x4140)), pair(__byte_perm(a, 0, 0x4342)),
              pair(__byte_perm(b, 0, 0x4140)), pair(__byte_perm(b, 0, 0x4342))};
}
DEVICE float reciprocal_root(float x) { return rsqrtf(x); }
