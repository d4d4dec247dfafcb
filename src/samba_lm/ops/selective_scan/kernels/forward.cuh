// Selective scan, forward: y and the final state, and for the backward the state before every EVERY tokens.
// Macros besides those of common.cuh: RESETS 1: there are resets; SAVE 1: there are checkpoints to write; STAGE: tokens
// that an owner of states loads at once.
//
// Helpers and owners wait only for each other, and each may be done with a tile while the other is not.

struct Forward {
  const Io *u, *delta, *B, *C, *z;
  const float *A, *D, *bias, *state;  // D, bias: may be null; state: null for zeros
  const u8* resets;                   // [B, L]
  const i64* lengths;                 // [B] or null
  Io* y;                              // [B, L, E]
  float *final_state, *checkpoints;   // [B, E, N]; [B, ceil(L / EVERY), N, E]
  i64 L, E;
  i64 u_batch, u_row, delta_batch, delta_row, B_batch, B_row, C_batch, C_row, z_batch, z_row;  // strides, in elements
};

struct ForwardTile {
  float2 step[T * CH];       // (step / ln 2, step * u)
  float bc[T * BC_ROW];      // fp32 B and C
  float part[T * G * CH];    // each group's share of y before skip and gate
};

constexpr int PREPARED = 1, WALKED = 3;  // barriers of even tiles; the next are those of odd ones
constexpr int EVERY = 16;                // tokens from one checkpoint to the next
static_assert(T % EVERY == 0 && EVERY % STAGE == 0, "checkpoints lie between stages");

// What STAGE tokens do to a thread's states. The compiler moves no load over a store to shared memory that may be to the
// same place, and few warps do not hide what a load, special functions and products take one after the other: so a
// stage is loaded before the one before it is computed and stored.
struct Stage {
  float2 step[STAGE];
  float b[STAGE][S], c[STAGE][S];
};

DEVICE void load_stage(Stage& to, const float2* step, const float* bc, int first) {
#pragma unroll
  for (int t = 0; t < STAGE; ++t) {
    to.step[t] = step[(first + t) * CH];
    load_bc(bc + (first + t) * BC_ROW, to.b[t], to.c[t]);
  }
}

// A thread's states over one stage. DROPS: some token of the tile drops them; bit 0 of ``resets``: this stage's first.
template <bool DROPS>
DEVICE void walk_stage(float (&h)[S], const Stage& now, const float (&A)[S], float* part, u32 resets) {
  float y[STAGE];
#pragma unroll
  for (int t = 0; t < STAGE; ++t)
#pragma unroll
    for (int i = 0; i < S; ++i) {
      if (DROPS && (resets >> t & 1)) h[i] = 0.0f;
      h[i] = fmaf(exp2_fast(now.step[t].x * A[i]), h[i], now.step[t].y * now.b[t][i]);
      y[t] = i == 0 ? now.c[t][i] * h[i] : fmaf(now.c[t][i], h[i], y[t]);
    }
#pragma unroll
  for (int t = 0; t < STAGE; ++t) part[t * G * CH] = y[t];
}

// A thread's states over one tile. ``save(first)`` comes before every EVERY tokens.
template <bool DROPS, class Save>
DEVICE void walk(float (&h)[S], const float (&A)[S], const float2* step, const float* bc, float* part, u32 resets, Save save) {
  Stage ahead;
  load_stage(ahead, step, bc, 0);
#pragma unroll
  for (int first = 0; first < T; first += STAGE) {
    if (first % EVERY == 0) save(first);
    const Stage now = ahead;
    if (first + STAGE < T) load_stage(ahead, step, bc, first + STAGE);
    walk_stage<DROPS>(h, now, A, part + first * G * CH, resets >> first);
  }
}

// The same from the last stage of the tile before, which is in ``ahead``, to this tile's last but one; its last stays in
// ``ahead``, so that no barrier comes between a load and its use. ``walked()`` comes when the tile before is done.
template <bool DROPS, class Save, class Walked>
DEVICE void walk_on(float (&h)[S], Stage& ahead, const float (&A)[S], const float2* step, const float* bc, float* part,
                    float* part_before, u32 resets, u32 resets_before, Save save, Walked walked) {
#pragma unroll
  for (int first = 0; first < T; first += STAGE) {
    const Stage now = ahead;
    load_stage(ahead, step, bc, first);
    if (first == 0) {
      walk_stage<DROPS>(h, now, A, part_before + (T - STAGE) * G * CH, resets_before >> (T - STAGE));
      walked();
    } else {
      walk_stage<DROPS>(h, now, A, part + (first - STAGE) * G * CH, resets >> (first - STAGE));
    }
    if (first % EVERY == 0) save(first);
  }
}

// Both, in each thread. Every other four warps (one of each scheduler) take the states before phases A and C, so that those
// wait while these compute, even if the block is alone on its multiprocessor.
constexpr bool TURNS = THREADS >= 256;

template <class Elements, class States>
DEVICE void run_both(Elements elements, States states) {
  if constexpr (TURNS) {
    const int when = threadIdx.x / 128 % 2 == 0;
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn)
      if (turn == when)
        states();
      else
        elements();
  } else {
    elements();
    states();
  }
}

// What a thread fetched of a tile, for itself alone.
struct ForwardInputs {
  Pair u[ROUNDS][WORKERS], delta[ROUNDS][WORKERS], z[GATED ? ROUNDS : 1][WORKERS], B[BC_ROUNDS][WORKERS], C[BC_ROUNDS][WORKERS];
};

struct ForwardShared {
  ForwardTile tile[2];  // used in turn
  ForwardInputs inputs[AHEAD];
};

KERNEL(THREADS, BLOCKS) scan_forward(PARAMETERS(Forward) p) {
  SHARED_MEMORY(memory);
  ForwardShared& shared = *(ForwardShared*)memory;
  const int thread = threadIdx.x, lane = thread % 32;
  const bool works = HELP == 0 || thread >= OWNERS;
  const int worker = HELP == 0 ? thread : max(thread - OWNERS, 0);
  const int L = (int)p.L, E = (int)p.E;
  const i64 batch = blockIdx.y;
  const int tiles = (L + T - 1) / T;

  // As owner of states.
  const int group = thread / CH, channel = blockIdx.x * CH + lane;
  const bool inside = channel < E && thread < OWNERS;
  const i64 at = (batch * E + channel) * N + group * S;
  float A[S], h[S];
#pragma unroll
  for (int i = 0; i < S; ++i) {
    A[i] = inside ? p.A[(i64)channel * N + group * S + i] : 0.0f;
    h[i] = inside && p.state ? p.state[at + i] : 0.0f;
  }

  // As worker on a pair of channels, in row ``row`` of each tile and every ROUND rows on.
  const int column = worker % COLUMNS * 2, row = worker / COLUMNS, pair = blockIdx.x * CH + column;
  const int count = min(E - pair, 2);
  const float2 bias = pair_or_zero(p.bias, pair, count), skip = pair_or_zero(p.D, pair, count);
  const Io* u = p.u + batch * p.u_batch + row * p.u_row + pair;
  const Io* delta = p.delta + batch * p.delta_batch + row * p.delta_row + pair;
  const Io* z = GATED ? p.z + batch * p.z_batch + row * p.z_row + pair : nullptr;
  Io* y = p.y + (batch * L + row) * E + pair;
  const i64 u_round = p.u_row * ROUND, delta_round = p.delta_row * ROUND, z_round = p.z_row * ROUND, y_round = (i64)E * ROUND;
  const int padding = p.lengths ? L - (int)min(max(p.lengths[batch], (i64)0), p.L) : 0;
  int rows = count > 0 ? L - row : 0;  // from this thread's first row of the loop's tile on; none outside of E

  // As reader of B and C.
  const int bc_row = worker / (N / 2), bc_state = worker % (N / 2) * 2;
  const Io* B = p.B + batch * p.B_batch + bc_row * p.B_row + bc_state;
  const Io* C = p.C + batch * p.C_batch + bc_row * p.C_row + bc_state;
  const i64 B_round = p.B_row * BC_ROUND, C_round = p.C_row * BC_ROUND;
  const int bc_to = bc_row * BC_ROW + bc_column(bc_state);

  const u8* resets = RESETS ? p.resets + batch * L : nullptr;

  // Tile by tile; ``left``: rows of it and later that exist, from this thread's first on.
  auto fetch = [&](int tile, int left) {
    ForwardInputs& to = shared.inputs[tile & (AHEAD - 1)];
#pragma unroll
    for (int k = 0; k < ROUNDS; ++k) {
      const int n = row_of_tile(row, k) && left > k * ROUND ? count : 0;
      fetch_pair(&to.u[k][worker], u + k * u_round, n);
      fetch_pair(&to.delta[k][worker], delta + k * delta_round, n);
      if constexpr (GATED) fetch_pair(&to.z[k][worker], z + k * z_round, n);
    }
    const int left_bc = L - tile * T - bc_row;
#pragma unroll
    for (int k = 0; k < BC_ROUNDS; ++k) {
      const int n = bc_row_of_tile(bc_row, k) && left_bc > k * BC_ROUND ? 2 : 0;
      fetch_pair(&to.B[k][worker], B + k * B_round, n);
      fetch_pair(&to.C[k][worker], C + k * C_round, n);
    }
    commit_copies();
    u += p.u_row * T, delta += p.delta_row * T, B += p.B_row * T, C += p.C_row * T;
    if constexpr (GATED) z += p.z_row * T;
  };
  auto prepare = [&](int index, int left) {  // phase A; ``left`` counts rows with a step
    ForwardTile& tile = shared.tile[index & 1];
    const ForwardInputs& from = shared.inputs[index & (AHEAD - 1)];
    float2* step = &tile.step[row * CH + column];
#pragma unroll
    for (int k = 0; k < ROUNDS; ++k) {
      if (!row_of_tile(row, k)) continue;
      float2 uu = unpack(from.u[k][worker]), x = unpack(from.delta[k][worker]);
      x.x += bias.x, x.y += bias.y;
      float2 d = make_float2(softplus2(x.x, exp_minus_abs(x.x)), softplus2(x.y, exp_minus_abs(x.y)));
      if (left <= k * ROUND) d = make_float2(0.0f, 0.0f);
      *(float4*)&step[k * ROUND * CH] = make_float4(d.x, d.x * LN_2 * uu.x, d.y, d.y * LN_2 * uu.y);
    }
    float* bc = &tile.bc[bc_to];
#pragma unroll
    for (int k = 0; k < BC_ROUNDS; ++k) {
      if (!bc_row_of_tile(bc_row, k)) continue;
      const float2 b = unpack(from.B[k][worker]), c = unpack(from.C[k][worker]);
      *(float2*)&bc[k * BC_ROUND * BC_ROW] = b;
      *(float2*)&bc[k * BC_ROUND * BC_ROW + S] = c;
    }
  };
  auto finish = [&](int index, int left) {  // phase C
    const ForwardInputs& from = shared.inputs[index & (AHEAD - 1)];
    const float* part = &shared.tile[index & 1].part[row * G * CH + column];
#pragma unroll
    for (int k = 0; k < ROUNDS; ++k) {
      if (!row_of_tile(row, k)) continue;
      float2 total = sum_groups(&part[k * ROUND * G * CH]), uu = unpack(from.u[k][worker]);
      total.x = fmaf(skip.x, uu.x, total.x), total.y = fmaf(skip.y, uu.y, total.y);
      if constexpr (GATED) {
        float2 gate = unpack(from.z[k][worker]);
        total.x *= gate.x * sigmoid(gate.x), total.y *= gate.y * sigmoid(gate.y);
      }
      store_pair(y + k * y_round, total, left > k * ROUND ? count : 0);
    }
    y += (i64)E * T;
  };

  u8 reset_raw = RESETS ? load_reset(resets, 0, L - padding, lane) : (u8)0;
  if (works) {
    fetch(0, rows), fetch(1, rows - T), fetch(2, rows - 2 * T);
    wait_copies<2>();
    prepare(0, rows - padding);
  }

  auto save = [&](int tile, int first) {
    const int number = tile * (T / EVERY) + first / EVERY, all = (L + EVERY - 1) / EVERY;
    if (SAVE && inside && (T == EVERY || number < all)) {
#pragma unroll
      for (int i = 0; i < S; ++i) p.checkpoints[((batch * all + number) * N + group * S + i) * E + channel] = h[i];
    }
  };
  auto step_of = [&](int tile) { return &shared.tile[tile & 1].step[lane]; };
  auto bc_of = [&](int tile) { return &shared.tile[tile & 1].bc[group * 2 * S]; };
  auto part_of = [&](int tile) { return &shared.tile[tile & 1].part[thread]; };

  if constexpr (HELP != 0) {
    if (works) {
      arrive(PREPARED, THREADS);
      for (int tile = 0; tile < tiles; ++tile, rows -= T) {
        wait_copies<1>();  // for the next tile
        meet(WALKED + (tile + 1 & 1), THREADS);
        if (tile > 0) finish(tile - 1, T);
        prepare(tile + 1, rows - padding - T);  // after the last tile: zeros that nobody reads
        if (tile + 1 < tiles) arrive(PREPARED + (tile + 1 & 1), THREADS);
        fetch(tile + 3, rows - 3 * T);  // where the tile before was
      }
      meet(WALKED + (tiles + 1 & 1), THREADS);
      finish(tiles - 1, rows + T);
    } else {
      Stage ahead = {};  // before the first tile: a stage that changes nothing
      u32 before = 0;
      for (int tile = 0; tile < tiles; ++tile) {
        const u32 dropped = RESETS ? ballot(reset_raw != 0) : 0u;
        if (RESETS) reset_raw = load_reset(resets, (tile + 1) * T, L - padding, lane);
        meet(PREPARED + (tile & 1), THREADS);
        auto walked = [&] { arrive(WALKED + (tile + 1 & 1), THREADS); };
        auto keep = [&](int first) { save(tile, first); };
        if (RESETS && (dropped | before))
          walk_on<true>(h, ahead, A, step_of(tile), bc_of(tile), part_of(tile), part_of(tile + 1), dropped, before, keep, walked);
        else
          walk_on<false>(h, ahead, A, step_of(tile), bc_of(tile), part_of(tile), part_of(tile + 1), 0u, 0u, keep, walked);
        before = dropped;
      }
      walk_stage<RESETS != 0>(h, ahead, A, part_of(tiles - 1) + (T - STAGE) * G * CH, before >> (T - STAGE));
      arrive(WALKED + (tiles + 1 & 1), THREADS);
    }
  } else {
    for (int tile = 0; tile < tiles; ++tile, rows -= T) {
      const u32 dropped = RESETS ? ballot(reset_raw != 0) : 0u;
      if (RESETS) reset_raw = load_reset(resets, (tile + 1) * T, L - padding, lane);
      __syncthreads();
      auto elements = [&] {
        wait_copies<1>();  // for the next tile
        if (tile > 0) finish(tile - 1, T);
        prepare(tile + 1, rows - padding - T);  // after the last tile: zeros that nobody reads
        fetch(tile + 3, rows - 3 * T);          // where the tile before was
      };
      auto states = [&] {
        auto keep = [&](int first) { save(tile, first); };
        if (RESETS && dropped)
          walk<true>(h, A, step_of(tile), bc_of(tile), part_of(tile), dropped, keep);
        else
          walk<false>(h, A, step_of(tile), bc_of(tile), part_of(tile), 0u, keep);
      };
      run_both(elements, states);
    }
    __syncthreads();
    if (works) finish(tiles - 1, rows + T);
  }
  if (inside) {
#pragma unroll
    for (int i = 0; i < S; ++i) p.final_state[at + i] = h[i];
  }
}
