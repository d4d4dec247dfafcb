// Attention of one query a row over caches of keys and values. A cache is a ring, position p in slot p modulo its slots;
// full attention's is never full. A unit of work is a run of a row's slots for TOGETHER key heads and all query heads that
// share them: the warps of a block take turns at its slots, 16 at a time, and add up what they found in shared memory. A
// row of several runs is put together by the block that is the last to finish one.
//
// How long a run is follows from the number of slots that the row sees, and parts are added in order: a row's bits depend
// on neither the other rows nor the caches' size. What a cache holds but for its newest slot was there before this step,
// and a block's first slots are on their way before the kernels before this one have ended.
//
// Macros: SOURCES caches that one softmax spans, WIDTH of a head (64 or 128), SHARE query heads for each key head (at most
// 16), TOGETHER, RUN slots at least of a run, MOST runs of a cache, DEPTH stages of 16 slots that a warp fetches ahead.

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int STRANDS = WARPS / TOGETHER;    // warps that share a key head
constexpr int SLOTS = 16;                    // of a stage
constexpr int TURN = STRANDS * SLOTS;        // slots from a warp's stage to its next
constexpr int LINES = WIDTH / 8;             // of a key
constexpr int STAGE = 2 * SLOTS * LINES;     // lines of keys, then of values
constexpr bool TWO = SHARE > 8;              // eights of heads
// Of registers a thread takes 96 where that is enough, as if there were more of them: other kernels then have room.
constexpr int BOUND = WIDTH == 64 && !TWO ? 320 : THREADS;
constexpr int BLOCKS = WIDTH == 64 ? 2 : 1;  // that share a multiprocessor
constexpr float HIDDEN = -1e30f;
constexpr int FOURS = WIDTH / 4;             // of a head
constexpr int PITCH = WIDTH + 4;             // of a head's sums in shared memory
constexpr int HEADS = TOGETHER * SHARE;      // query heads of a unit
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
  i64 rows, groups, room;
  double scale;         // times log2(e); positive: the largest score stays the largest
};
struct Unit {
  int row, chunk, source, part, parts;  // chunk: which TOGETHER key heads; part: of all the row's ``parts``
  int start, count, newest;             // slots
};

// Where line ``piece`` of a row lies: spread over the banks for reading four lines of two rows, or one line of eight.
DEVICE int key_line(int row, int piece) { return row * LINES + (piece ^ (row & 1) * 4); }
DEVICE int value_line(int row, int piece) { return SLOTS * LINES + row * LINES + (piece ^ (row & 7)); }

DEVICE int seen_of(const Source& s, i64 position) { return (int)max(min(position + 1 - s.lag, s.slots), (i64)0); }
DEVICE int run_of(int seen) {
  int run = RUN;
  while ((i64)run * MOST < seen) run *= 2;
  return run;
}
DEVICE int runs_of(int seen) {
  const int run = run_of(seen);
  return max((seen + run - 1) / run, 1);  // a row that sees nothing still has its turn
}
DEVICE int parts_of(const Attend& p, i64 position) {
  int parts = 0;
#pragma unroll
  for (int s = 0; s < SOURCES; ++s) parts += runs_of(seen_of(p.sources[s], position));
  return parts;
}

// Unit number ``index``; its row is ``rows`` if there are no more. Lane m knows the number of row m's parts. Key heads come
// first, so that neighbouring blocks read neighbouring memory.
DEVICE Unit find(const Attend& p, int index, float parts_of_lane) {
  const int chunks = (int)p.groups / TOGETHER;
  Unit unit = {(int)p.rows, 0, 0, 0, 1, 0, 0, 0};
  int left = index;
  for (int m = 0; m < (int)p.rows; ++m) {
    const int parts = (int)shuffle(parts_of_lane, m);
    if (left < parts * chunks) {
      unit.row = m, unit.parts = parts;
      break;
    }
    left -= parts * chunks;
  }
  if (unit.row == (int)p.rows) return unit;
  unit.chunk = left % chunks, unit.part = left / chunks;
  const i64 position = p.position[unit.row];
  int run = unit.part;
#pragma unroll
  for (int s = 0; s < SOURCES; ++s) {
    const int seen = seen_of(p.sources[s], position), runs = runs_of(seen), length = run_of(seen);
    if (run >= 0 && run < runs) {
      unit.source = s, unit.start = run * length, unit.count = max(min(length, seen - unit.start), 0);
      unit.newest = seen ? (int)((position - p.sources[s].lag) % p.sources[s].slots) : 0;
    }
    run -= runs;
  }
  return unit;
}

// Numbers that a softmax gathered, of four dims of a head: unnormalised sums, and how they compare.
struct Gathered {
  float4 sums;
  float top, total;
};
DEVICE void gather(Gathered& all, float4 sums, float top, float total) {
  const float higher = fmaxf(all.top, top);
  const float fade = exp2_fast(all.top - higher), weight = exp2_fast(top - higher);  // 0 of what saw nothing
  all.sums.x = fmaf(weight, sums.x, all.sums.x * fade), all.sums.y = fmaf(weight, sums.y, all.sums.y * fade);
  all.sums.z = fmaf(weight, sums.z, all.sums.z * fade), all.sums.w = fmaf(weight, sums.w, all.sums.w * fade);
  all.total = fmaf(weight, total, all.total * fade), all.top = higher;
}
DEVICE Gathered nothing() { return {make_float4(0.0f, 0.0f, 0.0f, 0.0f), HIDDEN, 0.0f}; }

DEVICE void store(const Attend& p, int row, int head, int four, const Gathered& all) {
  uint2 y;
  y.x = pack_bf16(make_float2(all.sums.x / all.total, all.sums.y / all.total));
  y.y = pack_bf16(make_float2(all.sums.z / all.total, all.sums.w / all.total));
  *(uint2*)(p.y + operand(row, head * WIDTH + four * 4, (int)(p.rows + 7) / 8)) = y;
}

KERNEL(BOUND, BLOCKS) decode_attend(PARAMETERS(Attend) p) {
  SHARED_MEMORY(memory);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int groups = (int)p.groups, stride = groups * WIDTH;
  const int own = warp % TOGETHER, strand = warp / TOGETHER;
  Line* ring = (Line*)memory + warp * DEPTH * STAGE;
  float* sums = (float*)ring;  // once the slots are seen: [SHARE, PITCH], then tops and totals
  int* before = (int*)((Line*)memory + WARPS * DEPTH * STAGE);  // blocks that finished a part of the row before this one
  let_next_begin();
  const float parts_of_lane = lane < (int)p.rows ? (float)parts_of(p, p.position[lane]) : 0.0f;
  int index = blockIdx.x;
  Unit unit = find(p, index, parts_of_lane);

  constexpr int ROWS = 32 / LINES, ROUNDS = SLOTS / ROWS;  // rows that a warp copies at once
  const int row = lane / LINES, piece = lane % LINES;
  const u16 *keys = nullptr, *values = nullptr;  // what this lane copies of the warp's first stage
  auto fetch = [&](int stage, int slot) {
    const int first = stage * TURN + strand * SLOTS + row;
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
      const int r = row + i * ROWS;
      const i64 from = (i64)(stage * TURN + i * ROWS) * stride;
      const bool there = first + i * ROWS < unit.count;
      copy_line(ring + slot * STAGE + key_line(r, piece), keys + from, there);
      copy_line(ring + slot * STAGE + value_line(r, piece), values + from, there);
    }
  };
  auto begin = [&] {
    if (unit.row == (int)p.rows) return;
    const Source& source = p.sources[unit.source];
    const i64 slot = (i64)unit.row * source.slots + unit.start + strand * SLOTS + row;
    const i64 from = slot * stride + (unit.chunk * TOGETHER + own) * WIDTH + piece * 8;
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
    const u16* queries = p.sources[unit.source].q + ((i64)unit.row * groups * SHARE + head) * WIDTH;
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
    int slot = 0;
    for (int stage = 0; stage * TURN + strand * SLOTS < unit.count; ++stage) {
      wait_copies<DEPTH - 1>();
      sync_warp();
      Line* at = ring + slot * STAGE;
      const int first = stage * TURN + strand * SLOTS;
      const int fresh = unit.newest - unit.start - first;  // what was fetched of it may be old: read it again
      if (fresh >= 0 && fresh < SLOTS) {
        if (row == fresh % ROWS) {
          const i64 from = (i64)(stage * TURN + fresh - row) * stride;
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
    const i64 first_head = (i64)unit.row * groups * SHARE + unit.chunk * HEADS;
    for (int i = thread; i < HEADS * FOURS; i += THREADS) {
      const int of = i / FOURS, four = i % FOURS;
      Gathered all = nothing();
#pragma unroll
      for (int s = 0; s < STRANDS; ++s) {
        const float* found = (float*)((Line*)memory + (s * TOGETHER + of / SHARE) * DEPTH * STAGE);
        const float* numbers = found + SHARE * PITCH + of % SHARE;
        gather(all, *(const float4*)(found + of % SHARE * PITCH + four * 4), numbers[0], numbers[SHARE]);
      }
      if (unit.parts == 1) {
        store(p, unit.row, unit.chunk * HEADS + of, four, all);
        continue;
      }
      const i64 at = (first_head + of) * p.room + unit.part;
      *(float4*)(p.parts + at * WIDTH + four * 4) = all.sums;
      if (four == 0) *(float2*)(p.tops + at * 2) = make_float2(all.top, all.total);
    }
    __syncthreads();
    // The next unit's slots are on their way while this one's row may be put together.
    const Unit done = unit;
    index += gridDim.x;
    unit = find(p, index, parts_of_lane);
    begin();
    if (done.parts == 1) continue;
    int* counter = p.counters + done.row * (groups / TOGETHER) + done.chunk;
    if (thread == 0) *before = count_block(counter);
    __syncthreads();
    if (*before < done.parts - 1) continue;
    if (thread == 0) *counter = 0;
    for (int i = thread; i < HEADS * FOURS; i += THREADS) {
      const int four = i % FOURS;
      const i64 of = first_head + i / FOURS, at = of * p.room;
      Gathered all = nothing();
      for (int from = 0; from < done.parts; from += AT_ONCE) {
        float4 found[AT_ONCE];
        float2 numbers[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
          found[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f), numbers[j] = make_float2(HIDDEN, 0.0f);
          if (from + j >= done.parts) continue;
          found[j] = read_fresh((const float4*)(p.parts + (at + from + j) * WIDTH + four * 4));
          numbers[j] = read_fresh((const float2*)(p.tops + (at + from + j) * 2));
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) gather(all, found[j], numbers[j].x, numbers[j].y);
      }
      store(p, done.row, done.chunk * HEADS + i / FOURS, four, all);
    }
  }
}
