// The plain C++ twin of decode/kernels/matrix.cuh.
struct alignas(16) Line { u32 x, y, z, w; };

DEVICE void copy_line(Line* to, const void* from, bool there) { copy_async(to, (const Line*)from, there); }
DEVICE void copy_line_once(Line* to, const void* from, bool there) { copy_line(to, from, there); }
DEVICE float shuffle(float x, int lane) {
  emulator::lane(threadIdx.x % 32).values[0] = x;
  emulator::meet();
  float y = emulator::lane(lane).values[0];
  emulator::meet();
  return y;
}
DEVICE void sync_warp() { emulator::meet(); }
DEVICE void wait_for_grids() {}
DEVICE void let_next_begin() {}

DEVICE void multiply(float (&total)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const int l = threadIdx.x % 32;
  const u32 operands[] = {a0, a1, a2, a3, b0, b1};
  for (int i = 0; i < 6; ++i) {
    const float2 v = unpack_bf16(operands[i]);
    emulator::lane(l).values[2 * i] = v.x, emulator::lane(l).values[2 * i + 1] = v.y;
  }
  emulator::meet();
  auto a = [](int m, int k) { return emulator::lane(m % 8 * 4 + k % 8 / 2).values[(k / 8 * 2 + m / 8) * 2 + k % 2]; };
  auto b = [](int k, int n) { return emulator::lane(n * 4 + k % 8 / 2).values[8 + k / 8 * 2 + k % 2]; };
  for (int i = 0; i < 4; ++i) {
    const int m = l / 4 + i / 2 * 8, n = l % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) total[i] += a(m, k) * b(k, n);
  }
  emulator::meet();
}
DEVICE void load_transposed(u32 (&to)[4], const Line* row) {
  const int l = threadIdx.x % 32;
  memcpy(emulator::lane(l).values, row, 16);
  emulator::meet();
  for (int i = 0; i < 4; ++i) {
    u16 pair[2];
    for (int j = 0; j < 2; ++j)
      memcpy(&pair[j], (const u16*)emulator::lane(8 * i + l % 4 * 2 + j).values + l / 4, 2);
    to[i] = (u32)pair[0] | (u32)pair[1] << 16;
  }
  emulator::meet();
}
DEVICE Line whole_bf16(uint2 v) {
  auto pair = [](u32 two) { return pack_bf16({(float)(signed char)two, (float)(signed char)(two >> 8)}); };
  return {pair(v.x), pair(v.x >> 16), pair(v.y), pair(v.y >> 16)};
}
DEVICE Line whole_bf16_of_4(uint2 v, int upper) {
  auto pair = [=](u32 two) {
    return pack_bf16({(float)(two >> 4 * upper & 15) - 8, (float)(two >> (8 + 4 * upper) & 15) - 8});
  };
  return {pair(v.x), pair(v.x >> 16), pair(v.y), pair(v.y >> 16)};
}
DEVICE float reciprocal_root(float x) { return 1.0f / sqrtf(x); }
