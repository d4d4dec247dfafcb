// The parts that decode_attend leaves, put together: bf16 [rows, H, WIDTH]. A thread for each number, THREADS / WIDTH heads
// a block.
//
// Macros: WIDTH, SPLITS.

constexpr int THREADS = 256;
constexpr float HIDDEN = -1e30f;

struct Join {
  const float *parts, *tops, *totals;  // [heads of all rows, SPLITS, WIDTH], [heads, SPLITS]
  u16* y;
  i64 heads;
};

KERNEL(THREADS, 8) decode_join(PARAMETERS(Join) p) {
  const i64 head = (i64)blockIdx.x * (THREADS / WIDTH) + threadIdx.x / WIDTH;
  const int dim = threadIdx.x % WIDTH;
  let_next_begin();
  wait_for_grids();
  if (head >= p.heads) return;
  float top = HIDDEN, total = 0.0f, sum = 0.0f, tops[SPLITS], parts[SPLITS];
#pragma unroll
  for (int s = 0; s < SPLITS; ++s) {
    tops[s] = p.tops[head * SPLITS + s];
    parts[s] = p.parts[(head * SPLITS + s) * WIDTH + dim];
    top = fmaxf(top, tops[s]);
  }
#pragma unroll
  for (int s = 0; s < SPLITS; ++s) {
    const float weight = exp2_fast(tops[s] - top);  // 0 of a part that saw nothing
    total = fmaf(weight, p.totals[head * SPLITS + s], total);
    sum = fmaf(weight, parts[s], sum);
  }
  p.y[head * WIDTH + dim] = low(sum / total);
}
