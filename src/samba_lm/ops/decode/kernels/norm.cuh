// The residual stream's next value and what the next layer reads of it, a block for each row: stream += branch, where the
// branch is the sum of a projection's slices, in order; normed = bf16(weight stream / rms). With no slices (SLICES 0) the
// stream begins: it is the token's embedding, and the rotations' angles of all layers are made.
//
// Macros: SLICES, PER fours of a row for each thread.

constexpr int THREADS = 256;

struct Norm {
  float* stream;          // [rows, D]
  const float* partials;  // [SLICES, rows, D]
  const u16* weight;      // [D]
  u16* normed;            // an operand of D columns
  i64 rows, D;
  double eps;
  i64* position;          // null, or positions to move on by one
  // SLICES 0
  const i64* tokens;
  const u16* embedding;   // [V, D]
  i64 V, half;
  const double* frequency;  // [half] or null
  float *cos, *sin;         // [rows, half]
};

KERNEL(THREADS, 1) decode_norm(PARAMETERS(Norm) p) {
  SHARED_MEMORY(memory);
  float* sums = (float*)memory;
  const int thread = threadIdx.x, m = blockIdx.x, D = (int)p.D;
  let_next_begin();
  uint2 weight[PER];
#pragma unroll
  for (int i = 0; i < PER; ++i)
    weight[i] = (thread + i * THREADS) * 4 < D ? *(const uint2*)(p.weight + (thread + i * THREADS) * 4) : uint2{0, 0};
  wait_for_grids();
  float* stream = p.stream + (i64)m * D;
  float square = 0.0f;
#if SLICES == 0
  const i64 token = min(max(p.tokens[m], (i64)0), p.V - 1);
  const i64 where = p.position[m];
  if (p.frequency)
    for (int j = thread; j < (int)p.half; j += THREADS) {
      const double angle = (double)where * p.frequency[j];
      p.cos[m * p.half + j] = (float)cos(angle);
      p.sin[m * p.half + j] = (float)sin(angle);
    }
#endif
  float4 now[PER];
#if SLICES > 0
  float4 part[PER][SLICES];
#endif
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const int d = (thread + i * THREADS) * 4;
    now[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (d >= D) continue;
#if SLICES == 0
    const uint2 e = *(const uint2*)(p.embedding + token * D + d);
    const float2 e0 = unpack_bf16(e.x), e1 = unpack_bf16(e.y);
    now[i] = make_float4(e0.x, e0.y, e1.x, e1.y);
#else
    now[i] = *(const float4*)(stream + d);
#pragma unroll
    for (int s = 0; s < SLICES; ++s) part[i][s] = *(const float4*)(p.partials + ((i64)s * p.rows + m) * D + d);
#endif
  }
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const int d = (thread + i * THREADS) * 4;
    if (d >= D) continue;
#if SLICES > 0
    float4 branch = part[i][0];
#pragma unroll
    for (int s = 1; s < SLICES; ++s) {
      const float4 more = part[i][s];
      branch.x += more.x, branch.y += more.y, branch.z += more.z, branch.w += more.w;
    }
    now[i].x += rounded(branch.x), now[i].y += rounded(branch.y);
    now[i].z += rounded(branch.z), now[i].w += rounded(branch.w);
#endif
    *(float4*)(stream + d) = now[i];
    square = fmaf(now[i].x, now[i].x, fmaf(now[i].y, now[i].y, square));
    square = fmaf(now[i].z, now[i].z, fmaf(now[i].w, now[i].w, square));
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) square += shuffle_xor(square, mask);
  if (thread % 32 == 0) sums[thread / 32] = square;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < THREADS / 32; ++w) total += sums[w];
  const float scale = reciprocal_root(total / (float)D + (float)p.eps);
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const int d = (thread + i * THREADS) * 4;
    if (d >= D) continue;
    const float2 w0 = unpack_bf16(weight[i].x), w1 = unpack_bf16(weight[i].y);
    uint2 out;
    out.x = pack_bf16(make_float2(now[i].x * scale * w0.x, now[i].y * scale * w0.y));
    out.y = pack_bf16(make_float2(now[i].z * scale * w1.x, now[i].w * scale * w1.y));
    *(uint2*)(p.normed + operand(m, d, (int)(p.rows + 7) / 8)) = out;
  }
#if SLICES > 0
  if (p.position && thread == 0) p.position[m] += 1;
#endif
}
