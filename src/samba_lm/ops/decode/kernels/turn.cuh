// What SelfExtend makes of a step's projection: queries and keys rotated by their positions, for what is near, and by
// grouped ones, for what is far; keys and values go into both caches. The angles are made while the projection runs.
//
// Macros: HALF of a head.

constexpr int THREADS = 256;
constexpr int PAIRS = HALF / 2;  // of neighbouring numbers, of half a head

struct Turn {
  const u16 *q, *k, *v;                   // [rows, H, 2 HALF], [rows, G, 2 HALF], as projected
  const i64* position;
  const double* frequency;                // [HALF]
  u16 *near_q, *far_q;                    // [rows, H, 2 HALF]
  u16 *near_k, *near_v, *far_k, *far_v;   // rings [rows, slots, G, 2 HALF]
  i64 heads, groups, near_slots, far_slots;
  i64 group, shift;                       // grouped: position / group, and ``shift`` more for queries
};

// Two neighbours of the first half of a head and the two of the second that belong to them.
DEVICE void turn(u16* to, const u16* from, const float2* angles) {
  const float2 a = unpack_bf16(*(const u32*)from), b = unpack_bf16(*(const u32*)(from + HALF));
  const float2 one = angles[0], two = angles[1];  // cosine and sine
  *(u32*)to = pack_bf16(make_float2(fmaf(a.x, one.x, -(b.x * one.y)), fmaf(a.y, two.x, -(b.y * two.y))));
  *(u32*)(to + HALF) = pack_bf16(make_float2(fmaf(a.x, one.y, b.x * one.x), fmaf(a.y, two.y, b.y * two.x)));
}

// Grid: (rows, blocks that share a row).
KERNEL(THREADS, 2) decode_turn(PARAMETERS(Turn) p) {
  SHARED_MEMORY(memory);
  float2* angles = (float2*)memory;  // [HALF] for the near, for far queries, for far keys
  const int thread = threadIdx.x, m = blockIdx.x;
  const int heads = (int)p.heads, groups = (int)p.groups;
  let_next_begin();
  const i64 position = p.position[m];
  for (int i = thread; i < 3 * HALF; i += THREADS) {
    const int kind = i / HALF;
    const i64 where = kind == 0 ? position : position / p.group + (kind == 1 ? p.shift : 0);
    const double angle = (double)where * p.frequency[i % HALF];
    angles[i] = make_float2((float)cos(angle), (float)sin(angle));
  }
  wait_for_grids();
  __syncthreads();
  const i64 near_slot = m * p.near_slots + position % p.near_slots, far_slot = m * p.far_slots + position % p.far_slots;
  for (int i = blockIdx.y * THREADS + thread; i < (heads + 2 * groups) * PAIRS; i += gridDim.y * THREADS) {
    const int head = i / PAIRS, j = i % PAIRS * 2;
    if (head < heads) {
      const i64 at = ((i64)m * heads + head) * 2 * HALF + j;
      turn(p.near_q + at, p.q + at, angles + j);
      turn(p.far_q + at, p.q + at, angles + HALF + j);
      continue;
    }
    const int g = (head - heads) % groups;
    const i64 from = ((i64)m * groups + g) * 2 * HALF + j;
    const i64 near_to = (near_slot * groups + g) * 2 * HALF + j, far_to = (far_slot * groups + g) * 2 * HALF + j;
    if (head < heads + groups) {
      turn(p.near_k + near_to, p.k + from, angles + j);
      turn(p.far_k + far_to, p.k + from, angles + 2 * HALF + j);
      continue;
    }
    const u32 first = *(const u32*)(p.v + from), second = *(const u32*)(p.v + from + HALF);
    *(u32*)(p.near_v + near_to) = first, *(u32*)(p.near_v + near_to + HALF) = second;
    *(u32*)(p.far_v + far_to) = first, *(u32*)(p.far_v + far_to + HALF) = second;
  }
}
