// Attention of one query a row over caches of keys and values. A cache is a ring, position p in slot p modulo its slots;
// full attention's is never full. A unit of work is a run of a row's slots for TOGETHER key heads and all query heads that
// share them: the warps of a block take turns at its slots, 16 at a time, and add up what they found in shared memory. A
// row of several runs is put together by the block that is the last to finish one.
//
// How long a run is follows from the number of slots that the row sees, and parts are added in order: a row's bits depend
// on neither the other rows nor the caches' size. What a cache holds but for its newest slot was there before this step,
// and a block's first slots are on their way before the kernels before this one have ended.
//
// Macros: SOURCES caches that one softmax spans, WIDTH of a head (64 or 128), GROUPS key heads, SHARE query heads for each
// (at most 16), TOGETHER, RUN slots at least of a run, MOST runs of a cache, DEPTH stages of 16 slots that a warp fetches
// ahead.

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int STRANDS = WARPS / TOGETHER;    // warps that share a key head
constexpr int CHUNKS = GROUPS / TOGETHER;
constexpr int SLOTS = 16;                    // of a stage
constexpr int TURN = STRANDS * SLOTS;        // slots from a warp's stage to its next
constexpr int LINES = WIDTH / 8;             // of a key
constexpr int STRIDE = GROUPS * WIDTH;       // numbers from a slot to the next
constexpr int STAGE = 2 * SLOTS * LINES;     // lines of keys, then of values
constexpr bool TWO = SHARE > 8;              // eights of heads
// Of registers a thread takes 96 where that is enough, as if there were more of them: other kernels then have room.
constexpr int BOUND = WIDTH == 64 && !TWO ? 320 : THREADS;
constexpr int BLOCKS = WIDTH == 64 ? 2 : 1;  // that share a multiprocessor
constexpr float HIDDEN = -1e30f;
constexpr int FOURS = WIDTH / 4;             // of a head
constexpr int PITCH = WIDTH + 4;             // of a head's sums in shared memory
constexpr int HEADS = TOGETHER * SHARE;      // query heads of a unit
constexpr int ALL_HEADS = GROUPS * SHARE;
constexpr int AT_ONCE = 8;                   // parts that are fetched together

struct Source {
  const u16 *q, *keys, *values;  // [rows, H, WIDTH], [rows, slots, G, WIDTH]
  i64 slots, lag;                // the query sees keys of its own position less ``lag``, and before
};
struct Attend {
  Source sources[SOURCES];
  const i64* position;
  float *parts, *tops;  // [rows, H, room, WIDTH]; the largest score and the sum of weights [rows, H, room, 2]
  int* counters;        // [rows, G / TOGETHER], zero before and after
  u16* y;               // an operand of H WIDTH columns
  i64 rows, room;
  double scale;         // times log2(e); positive: the largest score stays the largest
};
struct Unit {
  int row, chunk, source, part, parts;  // chunk: which TOGETHER key heads; part: of all the row's ``parts``
  int start, count;                     // slots
  i64 position;
};

// Where line ``piece`` of a row lies: spread over the banks for reading four lines of two rows, or one line of eight.
DEVICE int key_line(int row, int piece) { return row * LINES + (piece ^ (row & 1) * 4); }
DEVICE int value_line(int row, int piece) { return SLOTS * LINES + row * LINES + (piece ^ (row & 7)); }

DEVICE int seen_of(const Source& s, i64 position) { return (int)max(min(position + 1 - s.lag, s.slots), (i64)0); }
// How often RUN is doubled.
DEVICE int doublings(int seen) {
  int times = 0;
  while (((i64)RUN * MOST << times) < seen) ++times;
  return times;
}
DEVICE int runs_of(int seen) {
  return seen == 0 ? 1 : (seen - 1 >> doublings(seen)) / RUN + 1;  // a row that sees nothing still has its turn
}
DEVICE int units_of(const Attend& p, i64 position) {
  int runs = 0;
#pragma unroll
  for (int s = 0; s < SOURCES; ++s) runs += runs_of(seen_of(p.sources[s], position));
  return runs * CHUNKS;
}

// The units in order: those of a row stand together, and key heads come first, so that neighbouring blocks read neighbouring
// memory. Lane m knows those of row m.
struct Units {
  float own, before;  // of this lane's row, of the rows before it
  int all;
};
DEVICE Units count_units(const Attend& p, int lane) {
  Units units;
  units.own = lane < (int)p.rows ? (float)units_of(p, p.position[lane]) : 0.0f;
  float sum = units.own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const float left = shuffle(sum, max(lane - step, 0));
    if (lane >= step) sum += left;
  }
  units.before = sum - units.own, units.all = (int)shuffle(sum, 31);
  return units;
}
// Unit number ``index``; its row is ``rows`` if there are no more.
DEVICE Unit find(const Attend& p, const Units& units, int index, int lane) {
  Unit unit = {(int)p.rows, 0, 0, 0, 1, 0, 0, 0};
  if (index >= units.all) return unit;
  unit.row = count_bits(ballot(lane < (int)p.rows && (int)units.before <= index)) - 1;
  unit.parts = (int)shuffle(units.own, unit.row) / CHUNKS;
  const int left = index - (int)shuffle(units.before, unit.row);
  unit.chunk = left % CHUNKS, unit.part = left / CHUNKS;
  unit.position = p.position[unit.row];
  int run = unit.part;
#pragma unroll
  for (int s = 0; s < SOURCES; ++s) {
    const int seen = seen_of(p.sources[s], unit.position), runs = runs_of(seen), length = RUN << doublings(seen);
    if (run >= 0 && run < runs) unit.source = s, unit.start = run * length, unit.count = min(length, seen - unit.start);
    run -= runs;
  }
  return unit;
}

// What a softmax has gathered, of four dims of a head: unnormalised sums, and how they compare.
struct Gathered {
  float4 sums;
  float top, total;
};
DEVICE Gathered nothing() { return {make_float4(0.0f, 0.0f, 0.0f, 0.0f), HIDDEN, 0.0f}; }
template <int COUNT>
DEVICE void gather(Gathered& all, const Gathered (&more)[COUNT]) {
  float top = all.top;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) top = fmaxf(top, more[i].top);
  const float fade = exp2_fast(all.top - top);
  all.sums.x *= fade, all.sums.y *= fade, all.sums.z *= fade, all.sums.w *= fade;
  all.total *= fade, all.top = top;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const float weight = exp2_fast(more[i].top - top);  // 0 of what saw nothing
    all.sums.x = fmaf(weight, more[i].sums.x, all.sums.x), all.sums.y = fmaf(weight, more[i].sums.y, all.sums.y);
    all.sums.z = fmaf(weight, more[i].sums.z, all.sums.z), all.sums.w = fmaf(weight, more[i].sums.w, all.sums.w);
    all.total = fmaf(weight, more[i].total, all.total);
  }
}
DEVICE void store(const Attend& p, int row, int head, int four, const Gathered& all) {
  const float share = reciprocal(all.total);
  uint2 y;
  y.x = pack_bf16(make_float2(all.sums.x * share, all.sums.y * share));
  y.y = pack_bf16(make_float2(all.sums.z * share, all.sums.w * share));
  *(uint2*)(p.y + operand(row, head * WIDTH + four * 4, (int)(p.rows + 7) / 8)) = y;
}

KERNEL(BOUND, BLOCKS) decode_attend(PARAMETERS(Attend) p) {
  SHARED_MEMORY(memory);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int own = warp % TOGETHER, strand = warp / TOGETHER;
  Line* ring = (Line*)memory + warp * DEPTH * STAGE;
  float* sums = (float*)ring;  // once the slots are seen: [SHARE, PITCH], then tops and totals
  int* before = (int*)((Line*)memory + WARPS * DEPTH * STAGE);  // blocks that finished a part of the row before this one
  let_next_begin();
  const Units units = count_units(p, lane);
  int index = blockIdx.x;
  Unit unit = find(p, units, index, lane);

  constexpr int ROWS = 32 / LINES, ROUNDS = SLOTS / ROWS;  // rows that a warp copies at once
  const int row = lane / LINES, piece = lane % LINES;
  const u16 *keys = nullptr, *values = nullptr;  // what this lane copies of the warp's first stage
  auto fetch = [&](int stage, int slot) {
    const int first = stage * TURN + strand * SLOTS + row;
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
      const int r = row + i * ROWS;
      const i64 from = (i64)(stage * TURN + i * ROWS) * STRIDE;
      const bool there = first + i * ROWS < unit.count;
      copy_line(ring + slot * STAGE + key_line(r, piece), keys + from, there);
      copy_line(ring + slot * STAGE + value_line(r, piece), values + from, there);
    }
  };
  auto begin = [&] {
    if (unit.row == (int)p.rows) return;
    const Source& source = p.sources[unit.source];
    const i64 slot = (i64)unit.row * source.slots + unit.start + strand * SLOTS + row;
    const i64 from = slot * STRIDE + (unit.chunk * TOGETHER + own) * WIDTH + piece * 8;
    keys = source.keys + from, values = source.values + from;
#pragma unroll
    for (int s = 0; s < DEPTH; ++s) {
      if (s * TURN + strand * SLOTS < unit.count) fetch(s, s);
      commit_copies();
    }
  };
  begin();
  wait_for_grids();
  const int g = lane / 4, t = lane % 4;
  const float scale = (float)p.scale;

  while (unit.row < (int)p.rows) {
    const int head = (unit.chunk * TOGETHER + own) * SHARE;
    const u16* queries = p.sources[unit.source].q + ((i64)unit.row * ALL_HEADS + head) * WIDTH;
    Line q[LINES / 4][TWO + 1];
#pragma unroll
    for (int j = 0; j < LINES / 4; ++j)
#pragma unroll
      for (int i = 0; i <= TWO; ++i) {
        q[j][i] = Line{0, 0, 0, 0};
        if (g + 8 * i < SHARE) q[j][i] = *(const Line*)(queries + (g + 8 * i) * WIDTH + j * 32 + t * 8);
      }
    // Scores are heads x slots; what the values give is the other way round, so that eight heads fill the tensor cores.
    float out[TWO + 1][WIDTH / 16][4] = {}, top[2] = {HIDDEN, HIDDEN}, total[2] = {};
    const Source& source = p.sources[unit.source];
    const i64 last = unit.position - source.lag;
    const int newest = (int)(last < source.slots ? last : last % source.slots) - unit.start;  // slot from the run's first
    int slot = 0;
    for (int stage = 0; stage * TURN + strand * SLOTS < unit.count; ++stage) {
      wait_copies<DEPTH - 1>();
      sync_warp();
      Line* at = ring + slot * STAGE;
      const int first = stage * TURN + strand * SLOTS;
      const int fresh = newest - first;  // what was fetched of it may be old: read it again
      if (fresh >= 0 && fresh < SLOTS) {
        if (row == fresh % ROWS) {
          const i64 from = (i64)(stage * TURN + fresh - row) * STRIDE;
          at[key_line(fresh, piece)] = *(const Line*)(keys + from);
          at[value_line(fresh, piece)] = *(const Line*)(values + from);
        }
        sync_warp();
      }
      float scores[2][4] = {};
#pragma unroll
      for (int j = 0; j < LINES / 4; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Line k = at[key_line(8 * i + g, 4 * j + t)];
          multiply(scores[i], q[j][0].x, q[j][TWO].x * TWO, q[j][0].y, q[j][TWO].y * TWO, k.x, k.y);
          multiply(scores[i], q[j][0].z, q[j][TWO].z * TWO, q[j][0].w, q[j][TWO].w * TWO, k.z, k.w);
        }
      float weights[2][4] = {};
#pragma unroll
      for (int h = 0; h <= TWO; ++h) {
        float higher = top[h], sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& score = scores[i / 2][2 * h + i % 2];
          score = first + i / 2 * 8 + 2 * t + i % 2 < unit.count ? score : HIDDEN;
          higher = fmaxf(higher, score);
        }
        higher = fmaxf(higher, shuffle_xor(higher, 1));
        higher = fmaxf(higher, shuffle_xor(higher, 2));
        const float fade = exp2_fast((top[h] - higher) * scale), shift = higher * scale;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float weight = exp2_fast(fmaf(scores[i / 2][2 * h + i % 2], scale, -shift));
          weights[i / 2][2 * h + i % 2] = weight, sum += weight;
        }
        total[h] = fmaf(total[h], fade, sum);
        top[h] = higher;
        const float fades[2] = {shuffle(fade, 8 * t), shuffle(fade, 8 * t + 4)};  // of heads 2 t and 2 t + 1
#pragma unroll
        for (int d = 0; d < WIDTH / 16; ++d)
#pragma unroll
          for (int i = 0; i < 4; ++i) out[h][d][i] *= fades[i % 2];
      }
      u32 w[2][TWO + 1];
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int h = 0; h <= TWO; ++h) w[i][h] = pack_bf16(make_float2(weights[i][2 * h], weights[i][2 * h + 1]));
#pragma unroll
      for (int d = 0; d < WIDTH / 16; ++d) {
        u32 v[4];
        load_transposed(v, at + value_line(lane % 16, 2 * d + lane / 16));
#pragma unroll
        for (int h = 0; h <= TWO; ++h) multiply(out[h][d], v[0], v[2], v[1], v[3], w[0][h], w[1][h]);
      }
      sync_warp();
      if ((stage + DEPTH) * TURN + strand * SLOTS < unit.count) fetch(stage + DEPTH, slot);
      commit_copies();
      slot = slot + 1 == DEPTH ? 0 : slot + 1;
    }

    // The warps' numbers come together.
    wait_copies<0>();
    sync_warp();
#pragma unroll
    for (int h = 0; h <= TWO; ++h) {
      total[h] += shuffle_xor(total[h], 1);
      total[h] += shuffle_xor(total[h], 2);
      if (t == 0 && g + 8 * h < SHARE) {
        sums[SHARE * PITCH + g + 8 * h] = top[h] * scale;
        sums[SHARE * PITCH + SHARE + g + 8 * h] = total[h];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int of = 8 * h + 2 * t + i % 2;
        if (of >= SHARE) continue;
#pragma unroll
        for (int d = 0; d < WIDTH / 16; ++d) sums[of * PITCH + d * 16 + g + i / 2 * 8] = out[h][d][i];
      }
    }
    __syncthreads();
    const i64 first_head = (i64)unit.row * ALL_HEADS + unit.chunk * HEADS;
    for (int i = thread; i < HEADS * FOURS; i += THREADS) {
      const int of = i / FOURS, four = i % FOURS;
      Gathered all = nothing(), found[STRANDS];
#pragma unroll
      for (int s = 0; s < STRANDS; ++s) {
        const float* from = (float*)((Line*)memory + (s * TOGETHER + of / SHARE) * DEPTH * STAGE);
        const float* numbers = from + SHARE * PITCH + of % SHARE;
        found[s] = {*(const float4*)(from + of % SHARE * PITCH + four * 4), numbers[0], numbers[SHARE]};
      }
      gather(all, found);
      if (unit.parts == 1) {
        store(p, unit.row, unit.chunk * HEADS + of, four, all);
        continue;
      }
      const i64 at = (first_head + of) * p.room + unit.part;
      *(float4*)(p.parts + at * WIDTH + four * 4) = all.sums;
      if (four == 0) *(float2*)(p.tops + at * 2) = make_float2(all.top, all.total);
    }
    __syncthreads();
    const Unit done = unit;
    int* counter = p.counters + done.row * CHUNKS + done.chunk;
    int earlier = 0;
    if (thread == 0 && done.parts > 1) earlier = count_block(counter);
    // The next unit's slots are on their way while this one's row may be put together.
    index += gridDim.x;
    unit = find(p, units, index, lane);
    begin();
    if (done.parts == 1) continue;
    if (thread == 0) *before = earlier;
    __syncthreads();
    if (*before < done.parts - 1) continue;
    if (thread == 0) *counter = 0;
    for (int i = thread; i < HEADS * FOURS; i += THREADS) {
      const int four = i % FOURS;
      const i64 of = first_head + i / FOURS;
      Gathered all = nothing();
      for (int part = 0; part < done.parts; part += AT_ONCE) {
        Gathered found[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
          found[j] = nothing();
          if (part + j >= done.parts) continue;
          const i64 at = of * p.room + part + j;
          const float2 numbers = read_fresh((const float2*)(p.tops + at * 2));
          found[j] = {read_fresh((const float4*)(p.parts + at * WIDTH + four * 4)), numbers.x, numbers.y};
        }
        gather(all, found);
      }
      store(p, done.row, done.chunk * HEADS + i / FOURS, four, all);
    }
  }
}
