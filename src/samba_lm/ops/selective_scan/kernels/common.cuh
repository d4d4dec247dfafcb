// What the forward and the backward share. These macros come from the launcher:
//   IO    0: fp32, 1: bf16, 2: fp16 - of u, delta, z, B, C, y and their gradients; everything between is fp32
//   N     states of a channel
//   S     states that a thread owns, a multiple of 4
//   TOKENS of a tile, see below; 16, and in the forward also 32
//   WIDE  1: pairs of neighbouring channels are read and written at once, as alignment allows
//   GATED 1: there is a z
//   HELP  threads that own no states, see below; 0 or a multiple of 32
//   BLOCKS of a multiprocessor to make room for: bounds the registers of a thread
//
// A block walks CH channels, one for each lane of a warp, through a whole span of time, T tokens (a tile) after the other.
// Thread = channel c of CH, group g of G = N / S: it owns the states g * S ... of its channel. What depends on the channel
// but not on the state is computed once for each element, as pairs of channels, and passed through shared memory:
// softplus, products and gates before the states (phase A), the sums over the groups after them (phase C). Each phase
// works on buffers of its own, so that the special functions of one overlap the arithmetic of another: the states of a
// tile with phase A of the next and phase C of the one before. What a thread reads from global memory it fetches into
// shared memory two tiles ahead.
//
// Without helpers all threads do all phases, with one barrier a tile. HELP more threads do phases A and C, and the states'
// owners nothing else: always in the backward, and in the forward where a block is alone on its multiprocessor.

constexpr int CH = 32;
constexpr int T = TOKENS;
constexpr int G = N / S;
constexpr int OWNERS = CH * G;                     // threads that own states: the first ones
constexpr int THREADS = OWNERS + HELP;
constexpr int WORKERS = HELP ? HELP : OWNERS;      // threads that work on pairs of channels
constexpr int COLUMNS = CH / 2;                    // pairs of channels in a row
constexpr int ROUND = WORKERS / COLUMNS;           // rows that all workers cover at once
constexpr int ROUNDS = (T + ROUND - 1) / ROUND;    // a worker's pairs of a tile: rows apart by ROUND
constexpr int BC_ROUND = WORKERS / (N / 2);        // likewise for pairs of states of B and C
constexpr int BC_ROUNDS = (T + BC_ROUND - 1) / BC_ROUND;
constexpr int BC_ROW = 2 * N;                      // for each group S of B, then S of C
constexpr int AHEAD = 4;                           // tiles whose inputs are in shared memory: of phases A and C, and on their way
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

#if IO == 0
typedef float Io;
typedef float2 Pair;
DEVICE float2 unpack(Pair x) { return x; }
DEVICE Pair pack(float2 v) { return v; }
DEVICE Pair join(Io x, Io y) { return make_float2(x, y); }
DEVICE Io first(Pair x) { return x.x; }
DEVICE Io second(Pair x) { return x.y; }
#else
typedef u16 Io;
typedef u32 Pair;
#if IO == 1
DEVICE float2 unpack(Pair x) { return unpack_bf16(x); }
DEVICE Pair pack(float2 v) { return pack_bf16(v); }
#else
DEVICE float2 unpack(Pair x) { return unpack_f16(x); }
DEVICE Pair pack(float2 v) { return pack_f16(v); }
#endif
DEVICE Pair join(Io x, Io y) { return (u32)x | (u32)y << 16; }
DEVICE Io first(Pair x) { return (Io)(x & 0xffffu); }
DEVICE Io second(Pair x) { return (Io)(x >> 16); }
#endif

// Fetches two neighbours to where this thread will read them after wait_copies; zeros for those beyond ``count``.
DEVICE void fetch_pair(Pair* to, const Io* x, int count) {
#if WIDE
  copy_async(to, (const Pair*)x, count > 0);
#else
  *to = join(count > 0 ? read_only(x) : Io{}, count > 1 ? read_only(x + 1) : Io{});
#endif
}

DEVICE void store_pair(Io* x, float2 v, int count) {
  Pair both = pack(v);
#if WIDE
  if (count > 0) *(Pair*)x = both;
#else
  if (count > 0) x[0] = first(both);
  if (count > 1) x[1] = second(both);
#endif
}

// log2(1 + w) / w for w in [0, 1], relative error 2^-22.6: lg2.approx is only absolutely exact near 1.
DEVICE float log2_ratio(float w) {
  float q = 0.007549178f;
  q = fmaf(q, w, -0.042567044f);
  q = fmaf(q, w, 0.112856165f);
  q = fmaf(q, w, -0.19711895f);
  q = fmaf(q, w, 0.2756414f);
  q = fmaf(q, w, -0.35840848f);
  q = fmaf(q, w, 0.48069295f);
  q = fmaf(q, w, -0.7213402f);
  return fmaf(q, w, 1.442695f);
}

// log2(1 + e^x): softplus in units of ln 2, so that exp(softplus(x) * A) is 2^(this * A). Wants w = e^-|x|.
DEVICE float softplus2(float x, float w) { return fmaf(fmaxf(x, 0.0f), LOG2_E, w * log2_ratio(w)); }

DEVICE float exp_minus_abs(float x) { return exp2_fast(fabsf(x) * -LOG2_E); }

DEVICE float sigmoid(float x) { return reciprocal(1.0f + exp2_fast(x * -LOG2_E)); }

// Where in a row of B and C in shared memory the pair of states n, n + 1 of B lies; those of C are S further on.
DEVICE int bc_column(int n) { return n / S * (2 * S) + n % S; }

DEVICE void load_bc(const float* row, float (&b)[S], float (&c)[S]) {
#pragma unroll
  for (int i = 0; i < S; i += 4) {
    float4 x = *(const float4*)(row + i), y = *(const float4*)(row + S + i);
    b[i] = x.x, b[i + 1] = x.y, b[i + 2] = x.z, b[i + 3] = x.w;
    c[i] = y.x, c[i + 1] = y.y, c[i + 2] = y.z, c[i + 3] = y.w;
  }
}

// Whether this thread's pair of round ``k`` is one of the tile: there may be more threads than pairs.
DEVICE bool row_of_tile(int row, int k) { return T % ROUND == 0 || row + k * ROUND < T; }
DEVICE bool bc_row_of_tile(int row, int k) { return T % BC_ROUND == 0 || row + k * BC_ROUND < T; }

DEVICE float2 pair_or_zero(const float* x, int at, int count) {
  return make_float2(x && count > 0 ? x[at] : 0.0f, x && count > 1 ? x[at + 1] : 0.0f);
}

// The sum of G numbers that lie CH apart, for a pair of channels.
DEVICE float2 sum_groups(const float* x) {
  float2 total = *(const float2*)x;
#pragma unroll
  for (int g = 1; g < G; ++g) {
    float2 v = *(const float2*)(x + g * CH);
    total.x += v.x, total.y += v.y;
  }
  return total;
}

// Bit t: the state is dropped before token ``start + t``. Padding drops nothing. All lanes of a warp call this.
DEVICE u8 load_reset(const u8* resets, int start, int limit, int lane) {
  int t = start + lane;
  return lane < T && t >= 0 && t < limit ? read_now(resets + t) : (u8)0;
}
