// What a segment of time does to a state, so that the segments of a long row can run at once: its result from zero and
// the sum of its steps, state_out = local + 2^(steps A) state_in. Macros besides those of common.cuh (HELP 0):
// RESETS 1: there are resets;
//   REVERSE  0: the state, from u and B. 1: its gradient, from the last token to the first, from dy, z and C.
// Segments are rows of the batch; all have a multiple of T tokens.

struct Segments {
  const Io *x, *delta, *w, *z;  // u, delta and B; or dy, delta, C and z
  const float *A, *bias;        // bias: may be null
  const u8* resets;             // [B, L]
  const i64* lengths;           // [B] or null
  float *local, *steps;         // [B, E, N]; [B, E], in units of ln 2, NEVER where a document starts
  i64 L, E;
  i64 x_batch, x_row, delta_batch, delta_row, w_batch, w_row, z_batch, z_row;  // strides, in elements
};

constexpr float NEVER = 1e30f;  // nothing of the state before is left

struct SegmentsTile {
  float2 step[T * CH];  // (step / ln 2, what enters)
  float w[T * N];
};

struct SegmentsInputs {
  Pair x[ROUNDS][WORKERS], delta[ROUNDS][WORKERS], z[GATED ? ROUNDS : 1][WORKERS], w[BC_ROUNDS][WORKERS];
};

struct SegmentsShared {
  SegmentsTile tile[2];  // used in turn
  SegmentsInputs inputs[AHEAD];
};

// One thread's states over one tile. DROPS: some token of the tile drops them.
template <bool DROPS>
DEVICE void walk(float (&h)[S], float& total, const float (&A)[S], const float2* step, const float* w, u32 resets) {
#pragma unroll
  for (int k = 0; k < T; ++k) {
    const int t = REVERSE ? T - 1 - k : k;
    const bool drops = DROPS && (resets >> t & 1);
    float2 s = step[t * CH];
    float enters[S];
#pragma unroll
    for (int i = 0; i < S; i += 4) {
      float4 v = *(const float4*)(w + t * N + i);
      enters[i] = v.x, enters[i + 1] = v.y, enters[i + 2] = v.z, enters[i + 3] = v.w;
    }
    total = drops ? NEVER : fminf(total + s.x, NEVER);
#pragma unroll
    for (int i = 0; i < S; ++i) {
      float decay = exp2_fast(s.x * A[i]);
      if (DROPS) decay = drops ? 0.0f : decay;
      h[i] = REVERSE ? decay * fmaf(s.y, enters[i], h[i]) : fmaf(decay, h[i], s.y * enters[i]);
    }
  }
}

KERNEL(THREADS, BLOCKS) scan_segments(PARAMETERS(Segments) p) {
  SHARED_MEMORY(memory);
  SegmentsShared& shared = *(SegmentsShared*)memory;
  const int thread = threadIdx.x, lane = thread % 32;
  const int L = (int)p.L, E = (int)p.E, tiles = L / T;
  const i64 batch = blockIdx.y;

  // As owner of states.
  const int group = thread / CH, channel = blockIdx.x * CH + lane;
  const bool inside = channel < E;
  float A[S], h[S], total = 0.0f;
#pragma unroll
  for (int i = 0; i < S; ++i) {
    A[i] = inside ? p.A[(i64)channel * N + group * S + i] : 0.0f;
    h[i] = 0.0f;
  }

  // As worker on a pair of channels, in row ``row`` of each tile and every ROUND rows on.
  const int column = thread % COLUMNS * 2, row = thread / COLUMNS, pair = blockIdx.x * CH + column;
  const int count = max(min(E - pair, 2), 0);
  const float2 bias = pair_or_zero(p.bias, pair, count);
  const Io* x = p.x + batch * p.x_batch + row * p.x_row + pair;
  const Io* delta = p.delta + batch * p.delta_batch + row * p.delta_row + pair;
  const Io* z = GATED ? p.z + batch * p.z_batch + row * p.z_row + pair : nullptr;
  const int valid = p.lengths ? (int)min(max(p.lengths[batch], (i64)0), p.L) : L;  // tokens that have a step
  const u8* resets = RESETS ? p.resets + batch * L : nullptr;

  // As reader of B or C.
  const int w_row = thread / (N / 2), w_state = thread % (N / 2) * 2;
  const Io* w = p.w + batch * p.w_batch + w_row * p.w_row + w_state;

  auto start_of = [&](int index) { return (REVERSE ? tiles - 1 - index : index) * T; };  // of the tile taken ``index``-th

  auto fetch = [&](int index) {
    SegmentsInputs& to = shared.inputs[index & (AHEAD - 1)];
    const i64 first = start_of(index);
    const bool exists = index < tiles;
#pragma unroll
    for (int k = 0; k < ROUNDS; ++k) {
      const int n = row_of_tile(row, k) && exists ? count : 0;
      const i64 at = first + k * ROUND;
      fetch_pair(&to.x[k][thread], x + at * p.x_row, n);
      fetch_pair(&to.delta[k][thread], delta + at * p.delta_row, n);
      if constexpr (GATED) fetch_pair(&to.z[k][thread], z + at * p.z_row, n);
    }
#pragma unroll
    for (int k = 0; k < BC_ROUNDS; ++k)
      fetch_pair(&to.w[k][thread], w + (first + k * BC_ROUND) * p.w_row, bc_row_of_tile(w_row, k) && exists ? 2 : 0);
    commit_copies();
  };
  auto prepare = [&](int index) {
    SegmentsTile& tile = shared.tile[index & 1];
    const SegmentsInputs& from = shared.inputs[index & (AHEAD - 1)];
    const int left = valid - start_of(index) - row;
#pragma unroll
    for (int k = 0; k < ROUNDS; ++k) {
      if (!row_of_tile(row, k)) continue;
      float2 enters = unpack(from.x[k][thread]), raw = unpack(from.delta[k][thread]);
      raw.x += bias.x, raw.y += bias.y;
      float2 d = make_float2(softplus2(raw.x, exp_minus_abs(raw.x)), softplus2(raw.y, exp_minus_abs(raw.y)));
      if (left <= k * ROUND) d = make_float2(0.0f, 0.0f);
      if constexpr (REVERSE == 0) {
        enters.x *= d.x * LN_2, enters.y *= d.y * LN_2;
      } else if constexpr (GATED) {
        float2 gate = unpack(from.z[k][thread]);
        enters.x *= gate.x * sigmoid(gate.x), enters.y *= gate.y * sigmoid(gate.y);
      }
      *(float4*)&tile.step[(row + k * ROUND) * CH + column] = make_float4(d.x, enters.x, d.y, enters.y);
    }
#pragma unroll
    for (int k = 0; k < BC_ROUNDS; ++k) {
      if (!bc_row_of_tile(w_row, k)) continue;
      *(float2*)&tile.w[(w_row + k * BC_ROUND) * N + w_state] = unpack(from.w[k][thread]);
    }
  };

  u8 reset_raw = RESETS ? load_reset(resets, start_of(0), valid, lane) : (u8)0;
  fetch(0), fetch(1), fetch(2);
  wait_copies<2>();
  prepare(0);
  for (int index = 0; index < tiles; ++index) {
    const u32 dropped = RESETS ? ballot(reset_raw != 0) : 0u;
    if (RESETS && index + 1 < tiles) reset_raw = load_reset(resets, start_of(index + 1), valid, lane);
    __syncthreads();
    wait_copies<1>();  // for the next tile
    if (index + 1 < tiles) prepare(index + 1);
    fetch(index + 3);
    const SegmentsTile& now = shared.tile[index & 1];
    const float2* step = &now.step[lane];
    if (RESETS && dropped)
      walk<true>(h, total, A, step, now.w + group * S, dropped);
    else
      walk<false>(h, total, A, step, now.w + group * S, 0u);
  }
  if (inside) {
#pragma unroll
    for (int i = 0; i < S; ++i) p.local[(batch * E + channel) * N + group * S + i] = h[i];
    if (group == 0) p.steps[batch * E + channel] = total;
  }
}
