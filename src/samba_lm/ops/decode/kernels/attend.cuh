// Attention of one query a row over a ring of keys and values: each warp takes SPLIT slots of a row and a key head, for
// all query heads that share it, and leaves an unnormalised part; decode_join puts the parts together. All of the ring but
// the newest slot was there before this step, and is on its way before the kernels before this one have ended.
//
// Macros: WIDTH of a head (64 or 128), SHARE query heads for each key head (at most 16), SPLIT, WARPS of a block, DEPTH
// stages of 16 slots.

constexpr int SLOTS = 16;                    // of a stage
constexpr int LINES = WIDTH / 8;             // of a key
constexpr int STAGE = 2 * SLOTS * LINES;     // lines of keys, then of values
constexpr int STAGES = SPLIT / SLOTS;
constexpr bool TWO = SHARE > 8;              // eights of heads
constexpr float HIDDEN = -1e30f;
constexpr int BOUND = 320;  // threads, of which there are fewer: 96 registers each, so that the next kernels have room

struct Attend {
  const u16 *q, *keys, *values;  // [rows, H, WIDTH], [rows, slots, G, WIDTH]
  const i64* position;
  float *parts, *tops, *totals;  // [rows, H, splits, WIDTH], [rows, H, splits]
  i64 rows, groups, slots, splits, ahead;  // ahead: fetch the rest into the second-level cache early
  double scale;                  // times log2(e)
};

// Where line ``piece`` of a row lies: spread over the banks for reading four lines of two rows, or one line of eight.
DEVICE int key_line(int row, int piece) { return row * LINES + (piece ^ (row & 1) * 4); }
DEVICE int value_line(int row, int piece) { return SLOTS * LINES + row * LINES + (piece ^ (row & 7)); }

KERNEL(BOUND, 2) decode_attend(PARAMETERS(Attend) p) {
  SHARED_MEMORY(memory);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int groups = (int)p.groups, slots = (int)p.slots, splits = (int)p.splits;
  Line* ring = (Line*)memory + warp * DEPTH * STAGE;
  // Key heads side by side, so that neighbouring warps read neighbouring memory.
  const int unit = blockIdx.x * WARPS + warp, group = unit % groups, split = unit / groups % splits;
  const int m = unit / (groups * splits);
  let_next_begin();
  const bool exists = m < (int)p.rows;
  const i64 position = exists ? p.position[m] : 0;
  const int newest = (int)(position % slots), start = split * SPLIT;
  const int filled = exists ? (int)min(position + 1, p.slots) : 0;
  const int count = max(min(filled - start, SPLIT), 0);  // of this warp
  const int stride = groups * WIDTH;
  const i64 base = ((i64)m * slots + start) * stride + group * WIDTH;
  constexpr int AT_ONCE = 32 / LINES, ROUNDS = SLOTS / AT_ONCE;  // rows
  const int row = lane / LINES, piece = lane % LINES;
  const u16 *keys = p.keys + base + row * stride + piece * 8, *values = p.values + base + row * stride + piece * 8;
  auto fetch = [&](int stage, int slot) {
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
      const int r = row + i * AT_ONCE, from = (stage * SLOTS + i * AT_ONCE) * stride;
      const bool there = stage * SLOTS + r < count;
      copy_line(ring + slot * STAGE + key_line(r, piece), keys + from, there);
      copy_line(ring + slot * STAGE + value_line(r, piece), values + from, there);
    }
  };
#pragma unroll
  for (int s = 0; s < DEPTH; ++s) {
    if (s * SLOTS < count) fetch(s, s);
    commit_copies();
  }
  // All key heads of a slot lie together: each of their warps fetches every so many of the pieces.
  constexpr int PIECE = 512;  // numbers
  const int rest = p.ahead ? (count - DEPTH * SLOTS) * stride : 0;
  for (int i = (lane * groups + group) * PIECE; i < rest; i += 32 * groups * PIECE) {
    const i64 from = ((i64)m * slots + start + DEPTH * SLOTS) * stride + i;
    prefetch(p.keys + from, 2 * min(PIECE, rest - i));
    prefetch(p.values + from, 2 * min(PIECE, rest - i));
  }
  wait_for_grids();
  if (!exists) return;
  const int g = lane / 4, t = lane % 4;
  const int head = group * SHARE;
  Line q[LINES / 4][TWO + 1];
#pragma unroll
  for (int j = 0; j < LINES / 4; ++j)
#pragma unroll
    for (int i = 0; i <= TWO; ++i) {
      q[j][i] = Line{0, 0, 0, 0};
      if (g + 8 * i < SHARE)
        q[j][i] = *(const Line*)(p.q + ((i64)m * groups * SHARE + head + g + 8 * i) * WIDTH + j * 32 + t * 8);
    }
  // Scores are heads x slots; what the values give is the other way round, so that eight heads fill the tensor cores.
  float out[TWO + 1][WIDTH / 16][4] = {}, top[2] = {HIDDEN, HIDDEN}, total[2] = {};
  const float scale = (float)p.scale;  // positive: the largest score stays the largest
  int slot = 0;
  for (int stage = 0; stage * SLOTS < count; ++stage) {
    wait_copies<DEPTH - 1>();
    sync_warp();
    Line* at = ring + slot * STAGE;
    const int fresh = newest - start - stage * SLOTS;  // what was fetched of it may be old: read it again
    if (fresh >= 0 && fresh < SLOTS) {
      if (row == fresh % AT_ONCE) {
        const int from = (newest - start - row) * stride;
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
        const bool there = stage * SLOTS + i / 2 * 8 + 2 * t + i % 2 < count;
        score = there ? score : HIDDEN;
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
    if ((stage + DEPTH) * SLOTS < count) fetch(stage + DEPTH, slot);
    commit_copies();
    slot = slot + 1 == DEPTH ? 0 : slot + 1;
  }
#pragma unroll
  for (int h = 0; h <= TWO; ++h) {
    total[h] += shuffle_xor(total[h], 1);
    total[h] += shuffle_xor(total[h], 2);
    if (t == 0 && g + 8 * h < SHARE) {
      const i64 to = ((i64)m * groups * SHARE + head + g + 8 * h) * splits + split;
      p.tops[to] = top[h] * scale, p.totals[to] = total[h];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int own = 8 * h + 2 * t + i % 2;
      if (own >= SHARE) continue;
      float* to = p.parts + (((i64)m * groups * SHARE + head + own) * splits + split) * WIDTH + g + i / 2 * 8;
#pragma unroll
      for (int d = 0; d < WIDTH / 16; ++d) to[d * 16] = out[h][d][i];
    }
  }
}
