// The plain C++ twin of decode/kernels/blocks.cuh: blocks run one after the other.
DEVICE int count_block(int* counter) { return (*counter)++; }
template <class X>
DEVICE X read_fresh(const X* x) { return *x; }
DEVICE int count_bits(u32 x) { return __builtin_popcount(x); }
