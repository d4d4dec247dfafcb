// Selective scan, backward: the tiles of [first, end) in reverse, all else as in the forward. Macros besides those of
// common.cuh: RESETS as in the forward; KEEP 1: a tile's decays stay in registers, 0: they are computed twice. HELP is
// never 0 here.
//
// Of a tile, a group runs its states forward from the checkpoint, keeping them in registers, then walks back with the
// gradient of the state as the only carry. The sums over states go through shared memory as in the forward; those over
// channels (for B and C) are lanes' sums, on the tensor cores.
//
// Owners do only this; helpers prepare tiles (phase A) and finish what was walked (phase C). They wait only for each
// other, at named barriers. A tile has two halves of tokens: while one is walked back, the sums of the other are
// finished, so one buffer serves both. Of three tiles in shared memory helpers finish one and prepare another while
// the third is walked, so that owners find a tile ready.

struct Backward {
  const Io *dy, *u, *delta, *B, *C, *z;
  const float *A, *D, *bias;          // D, bias: may be null
  const u8* resets;                   // [B, L]
  const i64* lengths;                 // [B] or null
  const float *checkpoints, *dfinal;  // [B, tiles, N, E]; [B, E, N] or null
  Io *du, *ddelta, *dz;               // [B, L, E]
  float* dstate;                      // [B, E, N]: the carry from span to span, and at last the result
  float *dA, *dD, *dbias;             // [B, E, N], [B, E], [B, E]: added to after the first span
  float* partial;                     // [blocks, B, (end - first) * T, 2 N]: dB and dC of this span, summed over CH channels
  i64 L, E, first, end;               // tiles; the spans are run last to first
  i64 dy_batch, dy_row, u_batch, u_row, delta_batch, delta_row, B_batch, B_row, C_batch, C_row, z_batch, z_row;
};

constexpr int HALF = T / 2;
constexpr int TILES = 3;  // in shared memory
// Barriers: an even tile is prepared (the next: an odd one); there is room for the sums of a half; they are there.
enum { PREPARED = 1, FREE_LATE = 3, FREE_EARLY, WALKED_LATE, WALKED_EARLY };
constexpr bool PRECISE = IO != 1;  // sums on the tensor cores of more than 10 bits of mantissa
static_assert(HELP != 0, "helpers do phases A and C");

struct BackwardTile {
  float2 step[T * CH];    // (step / ln 2, step * u)
  float dy[T * CH];       // gradient of y before the gate
  float bc[T * BC_ROW];
  float4 factors[T * COLUMNS];  // for the thread that wrote it: dstep/ddelta of two channels, dz/y of two
};

// What a thread fetched of a tile, for itself alone.
struct BackwardInputs {
  Pair dy[ROUNDS][WORKERS], u[ROUNDS][WORKERS], delta[ROUNDS][WORKERS], z[GATED ? ROUNDS : 1][WORKERS];
  Pair B[BC_ROUNDS][WORKERS], C[BC_ROUNDS][WORKERS];
};

struct BackwardShared {
  BackwardTile tile[TILES];
  float2 part[T * G * CH];  // each group's share of the gradients of step * u and of step
  float part_y[T * G * CH];
  float sums[T * 2 * N];    // dB, dC
  BackwardInputs inputs[AHEAD];
};

// h[t + 1], the states after each token, from h[0].
template <bool DROPS>
DEVICE void run_forward(float (&h)[T + 1][S], float (&decay)[T][S], const float (&A)[S], const float2* step, const float* bc, u32 resets) {
#pragma unroll
  for (int t = 0; t < T; ++t) {
    float2 s = step[t * CH];
    float b[S], c[S];
    load_bc(bc + t * BC_ROW, b, c);
#pragma unroll
    for (int i = 0; i < S; ++i) {
      float a = exp2_fast(s.x * A[i]);
      if (DROPS && (resets >> t & 1)) a = 0.0f;
      h[t + 1][i] = fmaf(a, h[t][i], s.y * b[i]);
      if (KEEP) decay[t][i] = a;
    }
  }
}

constexpr int BATCH = 8 / S;  // tokens whose sums over lanes are made at once: 8 states

struct Walker {
  float A[S], carry[S], dA[S];
  float select[8];  // what sum_fours adds up by: 1 in the lanes of column r
  bool upper, right, writes;
};

// What an owner loads of BATCH tokens: while those after them are computed, as in the forward, because the compiler
// moves no load over a store to shared memory that may be to the same place.
struct Stage {
  float2 step[BATCH];
  float dy[BATCH], b[BATCH][S], c[BATCH][S];
};

DEVICE void load_stage(Stage& to, const BackwardTile& tile, const float* bc, int lane, int first) {
#pragma unroll
  for (int k = 0; k < BATCH; ++k) {
    to.step[k] = tile.step[(first + k) * CH + lane], to.dy[k] = tile.dy[(first + k) * CH + lane];
    load_bc(bc + (first + k) * BC_ROW, to.b[k], to.c[k]);
  }
}

// A batch's sums over lanes, from those that sum_fours made: a lane's are dB of two states and dC of the same, of every
// eighth of the lanes. They go where ``sums`` has the batch's first token.
DEVICE void store_sums(const Walker& w, const float (&total)[4], float* sums) {
  float left = w.upper ? total[2] : total[0], right = w.upper ? total[3] : total[1];
  left += shuffle_xor(w.upper ? total[0] : total[2], 16), right += shuffle_xor(w.upper ? total[1] : total[3], 16);
  float v = w.right ? right : left;
  v += shuffle_xor(w.right ? left : right, 8);
  v += shuffle_xor(v, 4);
  if (w.writes) *sums = v;
}

// One batch backwards. h and decay: those before the tile's first token, and of it.
template <bool DROPS>
DEVICE void walk_stage(Walker& w, float (&total)[4], const Stage& now, const float (&h)[T + 1][S], const float (&decay)[T][S],
                       int first, float2* part, float* part_y, u32 resets) {
  float y[BATCH], ddu[BATCH], dstep[BATCH];
  total[0] = total[1] = total[2] = total[3] = 0.0f;
#pragma unroll
  for (int k = BATCH - 1; k >= 0; --k) {
    const int t = first + k;
    float db[S], dc[S];
    const float2 s = now.step[k];
#pragma unroll
    for (int i = 0; i < S; ++i) {
      float a = KEEP ? decay[t][i] : exp2_fast(s.x * w.A[i]);
      if (!KEEP && DROPS && (resets >> t & 1)) a = 0.0f;
      const float c = now.c[k][i], b = now.b[k][i];
      if (GATED) y[k] = i == 0 ? c * h[t + 1][i] : fmaf(c, h[t + 1][i], y[k]);
      const float g = fmaf(c, now.dy[k], w.carry[i]);  // gradient of the state after this token
      db[i] = s.y * g, dc[i] = now.dy[k] * h[t + 1][i];
      ddu[k] = i == 0 ? g * b : fmaf(g, b, ddu[k]);
      w.carry[i] = a * g;
      const float e = w.carry[i] * h[t][i];  // gradient of the logarithm of the decay
      dstep[k] = i == 0 ? e * w.A[i] : fmaf(e, w.A[i], dstep[k]);
      w.dA[i] = fmaf(e, s.x, w.dA[i]);
    }
#pragma unroll
    for (int i = 0; i < S; i += 2) {
      const float low = w.select[k * S + i], high = w.select[k * S + i + 1];
      sum_fours(total, low, high, db[i], dc[i], db[i + 1], dc[i + 1]);
      if (PRECISE) {
        const float x = db[i + 1] - high_part(db[i + 1]), y = dc[i + 1] - high_part(dc[i + 1]);
        sum_fours(total, low, high, db[i] - high_part(db[i]), dc[i] - high_part(dc[i]), x, y);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < BATCH; ++k) {
    part[(first + k) * G * CH] = make_float2(ddu[k], dstep[k]);
    if (GATED) part_y[(first + k) * G * CH] = y[k];
  }
}

// Half a tile backwards. On entry its last tokens are in ``ahead`` and the sums of the batch after them in ``total``; on
// return those of the tokens before and of its first batch. ``stored()`` comes when the former sums are. Sums are stored
// a batch late because they are long in the making, and no load passes a store.
template <bool DROPS, int FROM, class Stored>
DEVICE void walk_half(Walker& w, float (&total)[4], Stage& ahead, const float (&h)[T + 1][S], const float (&decay)[T][S],
                      const BackwardTile& tile, const float* bc, int lane, float2* part, float* part_y, float* sums, u32 resets,
                      Stored stored) {
#pragma unroll
  for (int first = FROM + HALF - BATCH; first >= FROM; first -= BATCH) {
    const Stage now = ahead;
    const float before[4] = {total[0], total[1], total[2], total[3]};
    if (first > 0) load_stage(ahead, tile, bc, lane, first - BATCH);
    walk_stage<DROPS>(w, total, now, h, decay, first, part, part_y, resets);
    if (first + BATCH < T) store_sums(w, before, sums + (first + BATCH) * 2 * N);
    if (first == FROM + HALF - BATCH) stored();
  }
}

// total += x, with what rounding took away carried on in ``lost``: a row may have a million tokens.
DEVICE void add(float& total, float& lost, float x) {
  const float y = x - lost, sum = total + y;
  lost = (sum - total) - y;
  total = sum;
}

KERNEL(THREADS, BLOCKS) scan_backward(PARAMETERS(Backward) p) {
  SHARED_MEMORY(memory);
  BackwardShared& shared = *(BackwardShared*)memory;
  const int thread = threadIdx.x, lane = thread % 32;
  const bool works = thread >= OWNERS;
  const int worker = max(thread - OWNERS, 0);
  const int L = (int)p.L, E = (int)p.E, first = (int)p.first, end = (int)p.end;
  const i64 batch = blockIdx.y;
  const int limit = p.lengths ? (int)min(max(p.lengths[batch], (i64)0), p.L) : L;
  const int tiles = (L + T - 1) / T;
  const bool start_over = end == tiles;  // the first span to run

  // As owner of states.
  const int group = thread / CH, channel = blockIdx.x * CH + lane;
  const bool inside = channel < E && thread < OWNERS;
  const i64 at = (batch * E + channel) * N + group * S;
  Walker w;
#pragma unroll
  for (int i = 0; i < S; ++i) {
    w.A[i] = inside ? p.A[(i64)channel * N + group * S + i] : 0.0f;
    const float* carry = start_over ? p.dfinal : p.dstate;
    w.carry[i] = inside && carry ? carry[at + i] : 0.0f;
    w.dA[i] = 0.0f;
  }
#pragma unroll
  for (int r = 0; r < 8; ++r) w.select[r] = lane / 4 == r ? 1.0f : 0.0f;
  w.upper = lane & 16, w.right = lane & 8, w.writes = (lane & 4) == 0;
  const int slot = lane % 4 * 2 + (lane >> 3 & 1);  // of 8: tokens of S states
  float* const sums = &shared.sums[slot / S * 2 * N + (lane >> 4) * N + group * S + slot % S];
  const float* checkpoint = p.checkpoints + ((batch * tiles + end - 1) * N + group * S) * E + channel;

  // As worker on a pair of channels.
  const int column = worker % COLUMNS * 2, row = worker / COLUMNS, pair = blockIdx.x * CH + column;
  const int count = min(E - pair, 2);
  const float2 bias = pair_or_zero(p.bias, pair, count), skip = pair_or_zero(p.D, pair, count);
  float2 dskip = make_float2(0.0f, 0.0f), lost = make_float2(0.0f, 0.0f), dbias = make_float2(0.0f, 0.0f);
  const i64 last = (i64)(end - 1) * T;
  const Io* dy = p.dy + batch * p.dy_batch + (last + row) * p.dy_row + pair;
  const Io* u = p.u + batch * p.u_batch + (last + row) * p.u_row + pair;
  const Io* delta = p.delta + batch * p.delta_batch + (last + row) * p.delta_row + pair;
  const Io* z = GATED ? p.z + batch * p.z_batch + (last + row) * p.z_row + pair : nullptr;
  i64 own = (batch * L + last + row) * E + pair;

  // As reader of B and C.
  const int bc_row = worker / (N / 2), bc_state = worker % (N / 2) * 2;
  const Io* B = p.B + batch * p.B_batch + (last + bc_row) * p.B_row + bc_state;
  const Io* C = p.C + batch * p.C_batch + (last + bc_row) * p.C_row + bc_state;
  const int bc_to = bc_row * BC_ROW + bc_column(bc_state);
  float* partial = p.partial + ((i64)blockIdx.x * gridDim.y + batch) * ((end - first) * T) * (2 * N) + (end - 1 - first) * T * 2 * N + worker;

  const u8* resets = RESETS ? p.resets + batch * L : nullptr;

  float next_state[S];

  // Whether this thread's pair of round k is in that half of the tile; with few threads a matter of k alone.
  auto in_half = [&](int k, int half) {
    return ROUND <= HALF ? k * ROUND / HALF == half : row_of_tile(row, k) && (row + k * ROUND) / HALF == half;
  };
  // Tile by tile, last to first.
  auto fetch = [&](int tile) {
    BackwardInputs& to = shared.inputs[tile & (AHEAD - 1)];
    const int left = tile >= first && count > 0 ? L - tile * T - row : 0;
#pragma unroll
    for (int k = 0; k < ROUNDS; ++k) {
      const int n = row_of_tile(row, k) && left > k * ROUND ? count : 0;
      fetch_pair(&to.dy[k][worker], dy + k * ROUND * p.dy_row, n);
      fetch_pair(&to.u[k][worker], u + k * ROUND * p.u_row, n);
      fetch_pair(&to.delta[k][worker], delta + k * ROUND * p.delta_row, n);
      if constexpr (GATED) fetch_pair(&to.z[k][worker], z + k * ROUND * p.z_row, n);
    }
    const int left_bc = tile >= first ? L - tile * T - bc_row : 0;
#pragma unroll
    for (int k = 0; k < BC_ROUNDS; ++k) {
      const int n = bc_row_of_tile(bc_row, k) && left_bc > k * BC_ROUND ? 2 : 0;
      fetch_pair(&to.B[k][worker], B + k * BC_ROUND * p.B_row, n);
      fetch_pair(&to.C[k][worker], C + k * BC_ROUND * p.C_row, n);
    }
    commit_copies();
    dy -= T * p.dy_row, u -= T * p.u_row, delta -= T * p.delta_row, B -= T * p.B_row, C -= T * p.C_row;
    if constexpr (GATED) z -= T * p.z_row;
  };
  auto load_state = [&](int tile) {
#pragma unroll
    for (int i = 0; i < S; ++i) next_state[i] = inside && tile >= first ? read_now(checkpoint + (i64)i * E) : 0.0f;
    checkpoint -= (i64)N * E;
  };
  auto prepare = [&](BackwardTile& to, int tile, int half) {  // phase A
    const BackwardInputs& from = shared.inputs[tile & (AHEAD - 1)];
    const int steps = limit - tile * T - row;  // rows from this thread's first on that have a step
#pragma unroll
    for (int k = 0; k < ROUNDS; ++k) {
      if (!in_half(k, half)) continue;
      const int t = row + k * ROUND, index = t * COLUMNS + column / 2;
      float2 uu = unpack(from.u[k][worker]), x = unpack(from.delta[k][worker]), g = unpack(from.dy[k][worker]);
      float2 dz = make_float2(0.0f, 0.0f);
      x.x += bias.x, x.y += bias.y;
      const float2 v = make_float2(exp_minus_abs(x.x), exp_minus_abs(x.y));
      float2 d = make_float2(softplus2(x.x, v.x), softplus2(x.y, v.y));
      float2 slope = make_float2(reciprocal(1.0f + v.x), reciprocal(1.0f + v.y));  // of softplus: sigmoid
      slope.x *= x.x < 0.0f ? v.x : 1.0f, slope.y *= x.y < 0.0f ? v.y : 1.0f;
      if (steps <= k * ROUND) d = slope = make_float2(0.0f, 0.0f);
      if (GATED) {
        const float2 gate = unpack(from.z[k][worker]), on = make_float2(sigmoid(gate.x), sigmoid(gate.y));
        const float2 silu = make_float2(gate.x * on.x, gate.y * on.y);
        dz = make_float2(g.x * fmaf(silu.x, 1.0f - on.x, on.x), g.y * fmaf(silu.y, 1.0f - on.y, on.y));
        g.x *= silu.x, g.y *= silu.y;
      }
      *(float4*)&to.step[t * CH + column] = make_float4(d.x, d.x * LN_2 * uu.x, d.y, d.y * LN_2 * uu.y);
      *(float2*)&to.dy[t * CH + column] = g;
      to.factors[index] = make_float4(slope.x, slope.y, dz.x, dz.y);
    }
  };
  auto prepare_states = [&](BackwardTile& to, int tile) {
    const BackwardInputs& from = shared.inputs[tile & (AHEAD - 1)];
    float* bc = &to.bc[bc_to];
#pragma unroll
    for (int k = 0; k < BC_ROUNDS; ++k) {
      if (!bc_row_of_tile(bc_row, k)) continue;
      *(float2*)&bc[k * BC_ROUND * BC_ROW] = unpack(from.B[k][worker]);
      *(float2*)&bc[k * BC_ROUND * BC_ROW + S] = unpack(from.C[k][worker]);
    }
  };
  auto finish = [&](const BackwardTile& from, int tile, int half) {  // phase C
    const int left = L - tile * T - row;
#pragma unroll
    for (int k = 0; k < ROUNDS; ++k) {
      if (!in_half(k, half)) continue;
      const int t = row + k * ROUND, index = t * COLUMNS + column / 2;
      const float4 step = *(const float4*)&from.step[t * CH + column], factors = from.factors[index];
      const float2 g = *(const float2*)&from.dy[t * CH + column], uu = unpack(shared.inputs[tile & (AHEAD - 1)].u[k][worker]);
      float4 total = *(const float4*)&shared.part[t * G * CH + column];  // step * u, step; of two channels
#pragma unroll
      for (int other = 1; other < G; ++other) {
        const float4 v = *(const float4*)&shared.part[(t * G + other) * CH + column];
        total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
      }
      const float2 ddelta = make_float2(fmaf(total.x, uu.x, total.y) * factors.x, fmaf(total.z, uu.y, total.w) * factors.y);
      const float2 du = make_float2(fmaf(total.x, step.x * LN_2, g.x * skip.x), fmaf(total.z, step.z * LN_2, g.y * skip.y));
      dbias.x += ddelta.x, dbias.y += ddelta.y;
      add(dskip.x, lost.x, g.x * uu.x), add(dskip.y, lost.y, g.y * uu.y);
      const int n = left > k * ROUND ? count : 0;
      const i64 to = own + k * ROUND * (i64)E;
      store_pair(p.ddelta + to, ddelta, n);
      store_pair(p.du + to, du, n);
      if (GATED) {
        float2 y = sum_groups(&shared.part_y[t * G * CH + column]);
        y.x = fmaf(skip.x, uu.x, y.x) * factors.z, y.y = fmaf(skip.y, uu.y, y.y) * factors.w;
        store_pair(p.dz + to, y, n);
      }
    }
#pragma unroll
    for (int i = 0; i < HALF * 2 * N; i += WORKERS) partial[half * HALF * 2 * N + i] = shared.sums[half * HALF * 2 * N + worker + i];
    if (half == 0) own -= (i64)T * E, partial -= T * 2 * N;
  };

  u8 reset_raw = RESETS ? load_reset(resets, (end - 1) * T, limit, lane) : (u8)0;
  load_state(end - 1);
  if (works) {
    fetch(end - 1), fetch(end - 2), fetch(end - 3);
    wait_copies<2>();
    BackwardTile& start = shared.tile[(end - 1) % TILES];
    prepare(start, end - 1, 1), prepare(start, end - 1, 0), prepare_states(start, end - 1);
  }
  float h[T + 1][S], decay[T][S];
#pragma unroll
  for (int i = 0; i < S; ++i) h[0][i] = next_state[i];
  load_state(end - 2);

  float2* const part = &shared.part[thread];
  float* const part_y = &shared.part_y[thread];
  auto next = [&](int tile) {
#pragma unroll
    for (int i = 0; i < S; ++i) h[0][i] = next_state[i];
    load_state(tile - 2);
  };
  if (works) {
    auto prepare_all = [&](int tile) {
      BackwardTile& to = shared.tile[tile % TILES];
      wait_copies<1>();
      prepare(to, tile, 1), prepare(to, tile, 0), prepare_states(to, tile);
      arrive(PREPARED + (tile & 1), THREADS);
    };
    arrive(PREPARED + (end - 1 & 1), THREADS), arrive(FREE_LATE, THREADS);
    if (end - 2 >= first) prepare_all(end - 2);
    for (int tile = end - 1; tile >= first; --tile) {
      meet(WALKED_EARLY, THREADS);  // the tile after
      if (tile < end - 1) finish(shared.tile[(tile + 1) % TILES], tile + 1, 0);
      arrive(FREE_EARLY, THREADS);
      fetch(tile - 3);  // where the tile after was
      if (tile - 2 >= first) prepare_all(tile - 2);
      meet(WALKED_LATE, THREADS);
      finish(shared.tile[tile % TILES], tile, 1);
      if (tile > first) arrive(FREE_LATE, THREADS);
    }
    meet(WALKED_EARLY, THREADS);
    finish(shared.tile[first % TILES], first, 0);
  } else {
    Stage ahead;
    float total[4] = {};
    for (int tile = end - 1; tile >= first; --tile) {
      const BackwardTile& now = shared.tile[tile % TILES];
      const float* bc = &now.bc[group * 2 * S];
      const u32 dropped = RESETS ? ballot(reset_raw != 0) : 0u;
      if (RESETS) reset_raw = load_reset(resets, (tile - 1) * T, tile > first ? limit : 0, lane);
      meet(PREPARED + (tile & 1), THREADS);
      if (RESETS && dropped)
        run_forward<true>(h, decay, w.A, &now.step[lane], bc, dropped);
      else
        run_forward<false>(h, decay, w.A, &now.step[lane], bc, 0u);
      load_stage(ahead, now, bc, lane, T - BATCH);
      store_sums(w, total, sums);  // of the tile after
      arrive(WALKED_EARLY, THREADS);
      meet(FREE_LATE, THREADS);
      auto none = [] {};
      auto walked = [&] { arrive(WALKED_LATE, THREADS); };
      if (RESETS && !KEEP && dropped) {
        walk_half<true, HALF>(w, total, ahead, h, decay, now, bc, lane, part, part_y, sums, dropped, none);
        meet(FREE_EARLY, THREADS);
        walk_half<true, 0>(w, total, ahead, h, decay, now, bc, lane, part, part_y, sums, dropped, walked);
      } else {
        walk_half<false, HALF>(w, total, ahead, h, decay, now, bc, lane, part, part_y, sums, 0u, none);
        meet(FREE_EARLY, THREADS);
        walk_half<false, 0>(w, total, ahead, h, decay, now, bc, lane, part, part_y, sums, 0u, walked);
      }
      next(tile);
    }
    store_sums(w, total, sums);
    arrive(WALKED_EARLY, THREADS);
  }

  if (inside) {
#pragma unroll
    for (int i = 0; i < S; ++i) {
      p.dstate[at + i] = w.carry[i];
      p.dA[at + i] = w.dA[i] * LN_2 + (start_over ? 0.0f : p.dA[at + i]);
    }
  }
  __syncthreads();
  float4* const all = (float4*)shared.part;
  if (works) all[worker] = make_float4(dskip.x, dskip.y, dbias.x, dbias.y);
  __syncthreads();
  if (thread < CH && channel < E) {  // one channel each, the threads that worked on it in order
    float ds = 0.0f, db = 0.0f;
    for (int other = 0; other < ROUND; ++other) {
      const float4 v = all[other * COLUMNS + thread / 2];
      ds += thread % 2 ? v.y : v.x, db += thread % 2 ? v.w : v.z;
    }
    const i64 to = batch * E + channel;
    p.dD[to] = ds + (start_over ? 0.0f : p.dD[to]);
    p.dbias[to] = db + (start_over ? 0.0f : p.dbias[to]);
  }
}

// dB and dC of a span: the sums of the blocks' partial ones, four states a thread.
struct Sum {
  const float* partial;  // [blocks, B, rows, 2 N]
  Io *dB, *dC;           // [B, L, N]
  i64 blocks, B, rows, start, L;  // start: the span's first token
};

KERNEL(256, 1) sum_partials(PARAMETERS(Sum) p) {
  // Multiplication on the tensor cores cuts mantissas off after 10 bits: on average 2^-10 / 2 / ln 4 of each product.
  constexpr float UNBIAS = PRECISE ? 1.0f : 1.0f / (1.0f - 0.000352f);
  const i64 index = (i64)blockIdx.x * 256 + threadIdx.x, stride = p.B * p.rows * (2 * N / 4);
  const i64 row = index / (2 * N / 4), batch = blockIdx.y, t = p.start + row;
  const int n = (int)(index % (2 * N / 4)) * 4;
  if (row >= p.rows || t >= p.L) return;
  const float4* from = (const float4*)p.partial + batch * p.rows * (2 * N / 4) + index;
  float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
  for (int i = 0; i < (int)p.blocks; ++i) {
    const float4 v = from[i * stride];
    total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
  }
  Io* to = (n < N ? p.dB : p.dC) + (batch * p.L + t) * N + n % N;
  Pair* pairs = (Pair*)to;
  pairs[0] = pack(make_float2(total.x * UNBIAS, total.y * UNBIAS));
  pairs[1] = pack(make_float2(total.z * UNBIAS, total.w * UNBIAS));
}
