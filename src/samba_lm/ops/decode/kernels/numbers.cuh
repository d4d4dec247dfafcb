// bf16 as the decoding kernels read and write it, and the functions that they share. Where a product is added to
// something the kernels say whether it is rounded before: variants for few and for many rows give the same bits.

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

DEVICE float bf16(u32 bits) { return unpack_bf16(bits).x; }
DEVICE u16 low(float x) { return (u16)pack_bf16(make_float2(x, 0.0f)); }
DEVICE float rounded(float x) { return bf16(low(x)); }
DEVICE float silu(float x) { return x * reciprocal(1.0f + exp2_fast(x * -LOG2_E)); }

// log2(1 + e^x), relative error 2^-22 everywhere: w = e^-|x| times a polynomial of w, as in triton_math.py.
DEVICE float softplus2(float x) {
  const float w = exp2_fast(fabsf(x) * -LOG2_E);
  float q = fmaf(w, 0.007549080532044172f, -0.042566657066345215f);
  q = fmaf(w, q, 0.11285553127527237f);
  q = fmaf(w, q, -0.19711840152740479f);
  q = fmaf(w, q, 0.27564114332199097f);
  q = fmaf(w, q, -0.3584083914756775f);
  q = fmaf(w, q, 0.48069295287132263f);
  q = fmaf(w, q, -0.7213401794433594f);
  q = fmaf(w, q, 1.4426950216293335f);
  return fmaf(fmaxf(x, 0.0f), LOG2_E, w * q);
}

// Where column k of row m lies in what a product reads: eight rows of 32 columns together, as a warp takes them.
DEVICE i64 operand(int m, int k, int eights) { return ((i64)(k / 32 * eights + m / 8) * 8 + m % 8) * 32 + k % 32; }
