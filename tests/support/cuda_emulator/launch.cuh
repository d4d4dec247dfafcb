// Appended to a kernel: runs its whole grid; ``parameters`` is the kernel's struct.
#ifndef SHARED_BYTES
#error "the launcher says how much shared memory there is"
#endif
static const void* given;
extern "C" void launch(const void* parameters, int grid_x, int grid_y, int threads, int seed) {
  emulator::Random random{(uint64_t)seed};
  given = parameters;
  emulator::hasty = seed % 2;
  gridDim = {grid_x, grid_y, 1};
  emulator::shared.resize(SHARED_BYTES / 16);
  for (int y = 0; y < grid_y; ++y)
    for (int x = 0; x < grid_x; ++x) {
      blockIdx = {x, y, 0};
      memset(emulator::shared.data(), 0xff, SHARED_BYTES);  // NaN: what is read must have been written
      copies.assign(threads, {{}});
      emulator::body = [] { ENTRY(*(const PARAMETER_TYPE*)given); };
      emulator::run_block(threads, random);
    }
}
