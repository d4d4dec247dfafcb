// What the blocks of one kernel tell one another. A twin of this file in plain C++ lets the tests run them on a CPU.

// How many blocks had been counted before: what they wrote before they were counted can be read from here on, with
// read_fresh. One thread counts its block, behind a barrier of the block.
DEVICE int count_block(int* counter) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}
// Past the first-level cache, which does not notice what other multiprocessors write.
DEVICE float4 read_fresh(const float4* x) { return __ldcg(x); }
DEVICE float2 read_fresh(const float2* x) { return __ldcg(x); }
DEVICE int count_bits(u32 x) { return __popc(x); }
