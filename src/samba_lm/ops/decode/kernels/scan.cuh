// A step of the selective scan for every row, a block for CHANNELS channels: the step's projection of ``low`` (on the
// tensor cores), softplus, state, output and gate. The states, which no kernel of this step has touched, are on their way
// before the kernels before this one have ended.
//
// Macros: N states, R of the step's rank (a multiple of 32, the columns of dt_proj filled up with zeros), SLICES of
// x_proj's sums, ROWS8 eights of rows.

constexpr int CHANNELS = 32;
constexpr int THREADS = 256 * ROWS8;
constexpr int QUADS = N / 4;                    // of a channel's states
constexpr int ROWS = 8 * ROWS8;
constexpr int STEPS_LINES = R / 8 + 1;          // of a row of weights or of low, odd for the banks

struct Scan {
  const float* partials;  // [SLICES, rows, rank + 2 N]: low, B, C
  const u16 *weight, *u, *z;  // weight [E, rank]; u and z: operands of E columns
  const float *A, *D, *bias;  // [E, N], [E], [E]
  float* state;           // [rows, E, N]
  u16* y;                 // an operand of E columns
  i64 rows, E, rank;
};
struct ScanShared {
  float state[ROWS][CHANNELS * N];
  Line weight[CHANNELS][STEPS_LINES];
  Line low[ROWS][STEPS_LINES];
  float BC[ROWS][2 * N];
  float delta[ROWS][CHANNELS];
  Line u[ROWS][CHANNELS / 8], z[ROWS][CHANNELS / 8];
};

KERNEL(THREADS, 4 / ROWS8) decode_scan(PARAMETERS(Scan) p) {
  SHARED_MEMORY(memory);
  ScanShared& shared = *(ScanShared*)memory;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int M = (int)p.rows, E = (int)p.E, rank = (int)p.rank, first = blockIdx.x * CHANNELS;
  const int count = min(CHANNELS, E - first), wide = rank + 2 * N;
  let_next_begin();
  for (int i = thread; i < M * CHANNELS * QUADS; i += THREADS) {
    const int m = i / (CHANNELS * QUADS), quad = i % (CHANNELS * QUADS);
    const bool there = quad / QUADS < count;
    copy_line((Line*)&shared.state[m][quad * 4], p.state + ((i64)m * E + first) * N + (there ? quad * 4 : 0), there);
  }
  for (int i = thread; i < CHANNELS * (R / 8); i += THREADS) {
    const int channel = i / (R / 8), piece = i % (R / 8);
    const bool there = channel < count && piece * 8 < rank;
    copy_line(&shared.weight[channel][piece], p.weight + (there ? (i64)(first + channel) * rank + piece * 8 : 0), there);
  }
  commit_copies();
  // As owner of four states of a channel, of every row and of some of the rows.
  const int quad = thread % QUADS, channel = thread / QUADS % CHANNELS, at = first + channel;
  const bool inside = channel < count;
  float4 A = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float skip = 0.0f, bias = 0.0f;
  if (inside) A = *(const float4*)(p.A + (i64)at * N + quad * 4), skip = p.D[at], bias = p.bias[at];

  wait_for_grids();
  for (int i = thread; i < M * (CHANNELS / 8); i += THREADS) {
    const int m = i / (CHANNELS / 8), piece = i % (CHANNELS / 8);
    const bool there = piece * 8 < count;
    const i64 from = operand(m, first + (there ? piece * 8 : 0), ROWS8);
    copy_line(&shared.u[m][piece], p.u + from, there);
    copy_line(&shared.z[m][piece], p.z + from, there);
  }
  commit_copies();
  // Four columns of low, B and C of a row at once; all of a thread's on their way together.
  constexpr int FOURS = (R + 2 * N) / 4, SUMS = (ROWS * FOURS + THREADS - 1) / THREADS;
  float4 part[SUMS][SLICES];
#pragma unroll
  for (int i = 0; i < SUMS; ++i) {
    const int item = thread + i * THREADS, m = item / FOURS, column = item % FOURS * 4;
    const int from = column < R ? column : rank + column - R;
#pragma unroll
    for (int s = 0; s < SLICES; ++s) {
      part[i][s] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (m < M && (column >= R || column < rank))
        part[i][s] = *(const float4*)(p.partials + ((i64)s * M + m) * wide + from);
    }
  }
#pragma unroll
  for (int i = 0; i < SUMS; ++i) {
    const int item = thread + i * THREADS, m = item / FOURS, column = item % FOURS * 4;
    if (m >= ROWS) continue;
    float4 total = part[i][0];
#pragma unroll
    for (int s = 1; s < SLICES; ++s)
      total.x += part[i][s].x, total.y += part[i][s].y, total.z += part[i][s].z, total.w += part[i][s].w;
    const uint2 packed = {pack_bf16(make_float2(total.x, total.y)), pack_bf16(make_float2(total.z, total.w))};
    if (column < R) {
      *(uint2*)((u16*)shared.low[m] + column) = packed;
    } else {
      const float2 v0 = unpack_bf16(packed.x), v1 = unpack_bf16(packed.y);
      *(float4*)&shared.BC[m][column - R] = make_float4(v0.x, v0.y, v1.x, v1.y);
    }
  }
  wait_copies<0>();
  __syncthreads();
  if (warp < CHANNELS / 16 * ROWS8) {
    const int tile = warp / ROWS8 * 16, n = warp % ROWS8 * 8, g = lane / 4, t = lane % 4;
    float total[4] = {};
#pragma unroll
    for (int k = 0; k < R / 8; k += 4) {
      const Line a = shared.weight[tile + g][k + t], b = shared.weight[tile + g + 8][k + t], x = shared.low[n + g][k + t];
      multiply(total, a.x, b.x, a.y, b.y, x.x, x.y);
      multiply(total, a.z, b.z, a.w, b.w, x.z, x.w);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) shared.delta[n + t * 2 + i % 2][tile + g + i / 2 * 8] = rounded(total[i]);
  }
  __syncthreads();
  constexpr int TOGETHER = THREADS / (CHANNELS * QUADS) ? THREADS / (CHANNELS * QUADS) : 1;  // rows at once
  constexpr int ROUNDS = CHANNELS * QUADS > THREADS ? CHANNELS * QUADS / THREADS : 1;  // of the channels of a row
  for (int m = thread / (CHANNELS * QUADS); m < M; m += TOGETHER) {
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
      const int c = channel + round * (THREADS / QUADS), here = first + c;
      const bool there = c < count;
      if (ROUNDS > 1 && there) {
        A = *(const float4*)(p.A + (i64)here * N + quad * 4), skip = p.D[here], bias = p.bias[here];
      }
      const float x = bf16(((const u16*)shared.u[m])[c]);
      const float gate = bf16(((const u16*)shared.z[m])[c]);
      const float step = softplus2(shared.delta[m][c] + bias), enters = step * (x * LN_2);
      const float4 B = *(const float4*)&shared.BC[m][quad * 4], C = *(const float4*)&shared.BC[m][N + quad * 4];
      float4 h = *(const float4*)&shared.state[m][c * N + quad * 4];
      h.x = fmaf(h.x, exp2_fast(step * A.x), enters * B.x);
      h.y = fmaf(h.y, exp2_fast(step * A.y), enters * B.y);
      h.z = fmaf(h.z, exp2_fast(step * A.z), enters * B.z);
      h.w = fmaf(h.w, exp2_fast(step * A.w), enters * B.w);
      if (there) *(float4*)(p.state + ((i64)m * E + here) * N + quad * 4) = h;
      float out = fmaf(h.x, C.x, fmaf(h.y, C.y, fmaf(h.z, C.z, h.w * C.w)));
#pragma unroll
      for (int mask = 1; mask < QUADS; mask *= 2) out += shuffle_xor(out, mask);
      if (there && quad == 0) p.y[operand(m, here, ROWS8)] = low(fmaf(x, skip, out) * silu(gate));
    }
  }
}
