// y = x W^T for a few rows x, bound by reading W once. A tile is 16 rows of W, the first operand of the tensor cores: 8
// pairs, of a first row and the one HALF after it (the gate and what it opens, the two numbers that a rotation mixes, or
// simply neighbours). A block owns some pairs and a slice of the columns; its warps share the slice's columns, in turns of
// 128 bytes, so that a warp keeps its part of x in registers and a block reads long pieces of rows at a time. A warp
// fetches W for itself, DEPTH chunks of 16 rows x 128 bytes ahead, the first of them before the kernels before this one
// have ended. The warps' sums are added up in shared memory, in order: what a row of x gives depends neither on the other
// rows nor on how many there are, nor on the number of blocks.
//
// Numbers of 8 or 4 bits are whole ones: they are multiplied as bf16, which holds them, and the sums scaled in fp32; in 4
// bits those of every 64 columns. Columns then come in 128s, of which byte j of 64 holds the columns j (lower half) and
// j + 64.
//
// Macros: BITS of a number of W, 16 (bf16), 8 or 4, KC chunks of a warp, ROWS8 eights of rows of x, DEPTH, HALF, EPILOGUE,
// BLOCKS that fit a multiprocessor.

constexpr int WARPS = 8;
constexpr int LINES = 8;                        // of 16 bytes, in a row of a chunk
constexpr int ROW = 16 * LINES;                 // bytes
constexpr int COLUMNS = ROW * 8 / BITS;         // of a chunk
constexpr int SEGMENTS = COLUMNS / 32;          // of 32 columns, in a row of a chunk; a lane takes eight of each
constexpr int READS = BITS == 16 ? 2 : 4;       // by which four lanes read a row of a chunk
constexpr int TURN = WARPS * COLUMNS;           // columns from a warp's chunk to its next
constexpr int GROUP = 64;                       // columns that share a scale, of 4 bits
constexpr int CHUNK = 16 * (LINES + (BITS == 4));  // lines; at its end four scales of each row
constexpr int PAIRS = 8;                        // of a tile
constexpr int WIDTH = 8 * ROWS8 + 1;            // of a row of sums, odd for the banks
constexpr int SUMS = 16 * WIDTH;                // of a warp
constexpr int ITEMS = PAIRS * 8 * ROWS8;        // results of a tile

#define PARTIAL 0  // fp32 sums of each slice, [slice, row, N]
#define PLAIN 1    // bf16 [row, N]
#define SWIGLU 2   // SiLU(first) second, an operand of N / 2 columns
#define QKV 3      // rotated queries [row, H HALF 2]; keys and values into their rings
#define CONV 4     // first half of N: a step of a convolution of 4 taps; second half: y2 as it is; both operands

#if BITS == 16
typedef Line Packed;  // what a lane reads of a row of W at once
DEVICE Line as_bf16(Packed v) { return v; }
#else
typedef uint2 Packed;
DEVICE Line as_bf16(Packed v) { return whole_bf16(v); }
#endif

// Where in its row of a chunk a line lies, so that the lanes of several rows, who read at once, meet no bank twice.
DEVICE int swizzled(int row, int line) { return line ^ row % READS * (LINES / READS); }

struct Linear {
  const u8* w;
  const u16* x;  // an operand, see numbers.cuh
  void* y;
  i64 rows, N, K, share;  // share: pairs of a block
  // QKV: angles fp32 [rows, HALF] or null, rings [rows, slots, groups, 2 HALF]
  const float *cos, *sin;
  u16 *keys, *values;
  const i64* position;
  i64 heads, groups, slots;
  // CONV: weights [N / 2, 4], bias [N / 2], the last three inputs [rows, 3, N / 2]
  const u16 *taps, *bias;
  u16 *inputs, *y2;
  const float* scale;  // of whole numbers: [N], of 4 bits [N, groups]
};

KERNEL(32 * WARPS, BLOCKS) decode_linear(PARAMETERS(Linear) p) {
  SHARED_MEMORY(memory);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  Line* ring = (Line*)memory + warp * DEPTH * CHUNK;
  float* sums = (float*)(memory + WARPS * DEPTH * CHUNK);
  const int M = (int)p.rows, N = (int)p.N, K = (int)p.K;
  const int begin = (int)blockIdx.x * (int)p.share, end = min(begin + (int)p.share, N / 2);
  const int tiles = (end - begin + PAIRS - 1) / PAIRS;
  const int chunk0 = (int)blockIdx.y * KC * WARPS + warp, k0 = chunk0 * COLUMNS;
  const int row_bytes = BITS == 4 ? (K + 127) / 128 * 64 : K * (BITS / 8);

  // As copier: row ``row`` of four and every fourth on, line ``piece`` of it.
  const int row = lane / LINES, piece = lane % LINES;
  const u8 *first_a = nullptr, *first_b = nullptr;
  bool has_a = false, has_b = false;
  const i64 to_second = (i64)HALF * row_bytes;
  auto row_of = [&](int pair) { return (i64)(pair / HALF * 2 * HALF + pair % HALF); };
#if BITS == 4
  const float* scale = nullptr;  // two of row lane / 2
  bool has_scale = false;
  const int groups = row_bytes / (GROUP / 2);
#endif
  auto place = [&](int tile) {
    const int a = begin + tile * PAIRS + row, b = a + 4;
    has_a = a < end, has_b = b < end;
    first_a = p.w + row_of(has_a ? a : begin) * row_bytes + chunk0 * ROW + piece * 16;
    first_b = p.w + row_of(has_b ? b : begin) * row_bytes + chunk0 * ROW + piece * 16;
#if BITS == 4
    const int pair = begin + tile * PAIRS + lane / 2 % PAIRS;
    has_scale = pair < end;
    scale = p.scale + (row_of(has_scale ? pair : begin) + lane / 16 * HALF) * groups + chunk0 * 4 + lane % 2 * 2;
#endif
  };
  auto fetch = [&](int kc, int slot) {
    const bool inside = (chunk0 + kc * WARPS) * ROW + piece * 16 < row_bytes;
    const int later = kc * WARPS * ROW;
    Line* to = ring + slot * CHUNK + row * LINES + swizzled(row, piece);
    copy_line_once(to, first_a + later, inside && has_a);
    copy_line_once(to + 4 * LINES, first_b + later, inside && has_b);
    copy_line_once(to + 8 * LINES, first_a + to_second + later, inside && has_a);
    copy_line_once(to + 12 * LINES, first_b + to_second + later, inside && has_b);
#if BITS == 4
    const bool scaled = (chunk0 + kc * WARPS) * 4 + lane % 2 * 2 < groups;
    copy_async((uint2*)(ring + slot * CHUNK + 16 * LINES) + lane, (const uint2*)(scale + kc * WARPS * 4), scaled && has_scale);
#endif
  };

#pragma unroll
  for (int c = 0; c < DEPTH; ++c) {
    if (c % KC == 0) place(c / KC);
    if (c / KC < tiles) fetch(c % KC, c);
    commit_copies();
  }
  if (tiles * KC <= DEPTH) let_next_begin();
  wait_for_grids();
  const int g = lane / 4, t = lane % 4;
  Line x[KC][SEGMENTS][ROWS8];
#pragma unroll
  for (int kc = 0; kc < KC; ++kc)
#pragma unroll
    for (int j = 0; j < SEGMENTS; ++j)
#pragma unroll
      for (int n = 0; n < ROWS8; ++n) {
        const int m = n * 8 + g, k = k0 + kc * TURN + j * 32 + t * 8;
        x[kc][j][n] = Line{0, 0, 0, 0};
        if (m < M && k < K) x[kc][j][n] = *(const Line*)(p.x + operand(m, k, ROWS8));
      }

  // As maker of a result: a pair of each tile, and a row of x.
  const int own = thread % PAIRS, m = thread / PAIRS;
  const bool maker = thread < ITEMS && m < M;
#if EPILOGUE == QKV
  const i64 newest_slot = maker ? m * p.slots + p.position[m] % p.slots : 0;
#endif

  int slot = 0;
  auto refill = [&](int tile, int kc) {
    sync_warp();
    const int later = tile + (kc + DEPTH) / KC;
    if ((kc + DEPTH) % KC == 0) place(later);
    if (later < tiles) fetch((kc + DEPTH) % KC, slot);
    commit_copies();
    if ((kc + DEPTH) % KC == KC - 1 && later == tiles - 1) let_next_begin();
    slot = slot + 1 == DEPTH ? 0 : slot + 1;
  };
  for (int tile = 0; tile < tiles; ++tile) {
    float total[ROWS8][4] = {};
#pragma unroll
    for (int kc = 0; kc < KC; ++kc) {
      wait_copies<DEPTH - 1>();
      sync_warp();
      const Line* from = ring + slot * CHUNK + g * LINES;
      Packed w[READS][2];
#pragma unroll
      for (int j = 0; j < READS; ++j) {
        const int at = swizzled(g, j * (LINES / READS));
        w[j][0] = ((const Packed*)(from + at))[t];
        w[j][1] = ((const Packed*)(from + 8 * LINES + at))[t];
      }
#if BITS == 4
      const float4* scales = (const float4*)(ring + slot * CHUNK + 16 * LINES);
      const float4 of_first = scales[g], of_second = scales[g + 8];
#endif
      if (BITS > 4) refill(tile, kc);
      // Eight neighbours of a row are two pairs of columns of each of two products: a sum does not mind the order.
#if BITS == 4
      const float first_scales[4] = {of_first.x, of_first.y, of_first.z, of_first.w};
      const float second_scales[4] = {of_second.x, of_second.y, of_second.z, of_second.w};
#pragma unroll
      for (int i = 0; i < COLUMNS / GROUP; ++i) {
        float sum[ROWS8][4] = {};
#pragma unroll
        for (int j = 2 * i; j < 2 * i + 2; ++j) {
          const int of = i / 2 * 2 + j % 2;
          const Line a = whole_bf16_of_4(w[of][0], i % 2), b = whole_bf16_of_4(w[of][1], i % 2);
#pragma unroll
          for (int n = 0; n < ROWS8; ++n) {
            multiply(sum[n], a.x, b.x, a.y, b.y, x[kc][j][n].x, x[kc][j][n].y);
            multiply(sum[n], a.z, b.z, a.w, b.w, x[kc][j][n].z, x[kc][j][n].w);
          }
        }
#pragma unroll
        for (int n = 0; n < ROWS8; ++n)
#pragma unroll
          for (int k = 0; k < 4; ++k)
            total[n][k] = fmaf(k < 2 ? first_scales[i] : second_scales[i], sum[n][k], total[n][k]);
      }
#else
#pragma unroll
      for (int j = 0; j < SEGMENTS; ++j) {
        const Line a = as_bf16(w[j][0]), b = as_bf16(w[j][1]);
#pragma unroll
        for (int n = 0; n < ROWS8; ++n) {
          multiply(total[n], a.x, b.x, a.y, b.y, x[kc][j][n].x, x[kc][j][n].y);
          multiply(total[n], a.z, b.z, a.w, b.w, x[kc][j][n].z, x[kc][j][n].w);
        }
      }
#endif
      if (BITS == 4) refill(tile, kc);  // not before: there are too few registers for all that lies in the chunk
    }
    const int pair = begin + tile * PAIRS + own;
    const bool makes = maker && pair < end;
#if BITS == 8
    float first_scale = 0.0f, second_scale = 0.0f;  // while the sums of the warps come together
    if (makes) first_scale = p.scale[row_of(pair)], second_scale = p.scale[row_of(pair) + HALF];
#endif
#if EPILOGUE == CONV
    const int inner = N / 2, channel = 2 * pair;
    u32* before = (u32*)(p.inputs + (i64)m * 3 * inner + channel);
    u32 old[3] = {}, bias = 0;
    Line weight = {0, 0, 0, 0};
    if (makes && channel < inner) {  // while the sums of the warps come together
#pragma unroll
      for (int i = 0; i < 3; ++i) old[i] = before[i * (inner / 2)];
      weight = *(const Line*)(p.taps + channel * 4), bias = *(const u32*)(p.bias + channel);
    }
#elif EPILOGUE == QKV
    const int head = pair / HALF, j = pair % HALF;
    const bool turned = p.cos && head < (int)(p.heads + p.groups);
    float cosine = 1.0f, sine = 0.0f;
    if (makes && turned) cosine = p.cos[m * HALF + j], sine = p.sin[m * HALF + j];
#endif
    float* place_of = sums + ((tile & 1) * WARPS + warp) * SUMS;
#pragma unroll
    for (int n = 0; n < ROWS8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) place_of[(g + i / 2 * 8) * WIDTH + n * 8 + t * 2 + i % 2] = total[n][i];
    __syncthreads();
    if (!makes) continue;
    const float* of_pair = sums + (tile & 1) * WARPS * SUMS + own * WIDTH + m;
    float a = 0.0f, b = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) a += of_pair[w * SUMS], b += of_pair[w * SUMS + 8 * WIDTH];
#if BITS == 8
    a *= first_scale, b *= second_scale;
#endif
#if EPILOGUE == PARTIAL
    *(float2*)((float*)p.y + ((i64)blockIdx.y * M + m) * N + 2 * pair) = make_float2(a, b);
#elif EPILOGUE == PLAIN
    *(u32*)((u16*)p.y + (i64)m * N + 2 * pair) = pack_bf16(make_float2(a, b));
#elif EPILOGUE == SWIGLU
    ((u16*)p.y)[operand(m, pair, ROWS8)] = low(silu(rounded(a)) * rounded(b));
#elif EPILOGUE == QKV
    a = rounded(a), b = rounded(b);
    if (turned) {
      const float before = a;
      a = fmaf(before, cosine, -(b * sine)), b = fmaf(before, sine, b * cosine);
    }
    u16* to = (u16*)p.y + ((i64)m * p.heads + head) * 2 * HALF;
    if (head >= (int)p.heads) {
      const int group = head - (int)p.heads;
      u16* rings = group < (int)p.groups ? p.keys : p.values;
      to = rings + (newest_slot * p.groups + group % (int)p.groups) * 2 * HALF;
    }
    to[j] = low(a), to[j + HALF] = low(b);
#else
    const u32 newest = pack_bf16(make_float2(a, b));
    if (channel >= inner) {
      *(u32*)(p.y2 + operand(m, channel - inner, ROWS8)) = newest;
    } else {
      const u32 of_first[2] = {weight.x, weight.y}, of_second[2] = {weight.z, weight.w};
      float2 y = unpack_bf16(bias);
      const u32 in[4] = {old[0], old[1], old[2], newest};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 v = unpack_bf16(in[i]), u = unpack_bf16(of_first[i / 2]), s = unpack_bf16(of_second[i / 2]);
        y.x = fmaf(v.x, i % 2 ? u.y : u.x, y.x), y.y = fmaf(v.y, i % 2 ? s.y : s.x, y.y);
      }
      before[0] = old[1], before[inner / 2] = old[2], before[2 * (inner / 2)] = newest;
      *(u32*)((u16*)p.y + operand(m, channel, ROWS8)) = pack_bf16(make_float2(silu(y.x), silu(y.y)));
    }
#endif
  }
}
