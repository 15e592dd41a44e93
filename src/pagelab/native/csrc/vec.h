// Vectors of the instruction set that this unit is compiled for, by the compiler's own vector
// types: 16 floats with AVX-512, 8 with AVX2, 4 with NEON or SSE.
//
// Everything here is static: units for different instruction sets must not share code, or the
// linker would keep one of them for all. For the same reason nothing of the standard library
// but C functions is used.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "model.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

namespace pagelab {
namespace {

#if defined(__AVX512F__)
constexpr int VF = 16;
#elif defined(__AVX2__)
constexpr int VF = 8;
#else
constexpr int VF = 4;
#endif
constexpr int NV = kPanel / VF;  // vectors across a panel

typedef float vf __attribute__((vector_size(VF * 4)));
typedef int32_t vi __attribute__((vector_size(VF * 4)));
typedef uint32_t vu __attribute__((vector_size(VF * 4)));
typedef uint16_t vh __attribute__((vector_size(VF * 2)));  // halves or bfloat16
typedef vf vf_any __attribute__((aligned(1), may_alias));
typedef vi vi_any __attribute__((aligned(1), may_alias));
typedef vh vh_any __attribute__((aligned(1), may_alias));
typedef int32_t i32_any __attribute__((aligned(1), may_alias));

INLINE vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
INLINE void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }
INLINE vi load_i(const void* p) { return *reinterpret_cast<const vi_any*>(p); }
INLINE vf splat(float x) { return x - vf{}; }
INLINE vi splat_i(int32_t x) { return x - vi{}; }
INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
INLINE vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}
INLINE vi max_i(vi a, vi b) { return a > b ? a : b; }
INLINE int least(int a, int b) { return a < b ? a : b; }
INLINE int most(int a, int b) { return a > b ? a : b; }

INLINE float sum(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#elif defined(__aarch64__)
  return vaddvq_f32((float32x4_t)x);
#endif
  float total = 0;
  UNROLL for (int i = 0; i < VF; ++i) total += x[i];
  return total;
}
INLINE float largest(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#elif defined(__aarch64__)
  return vmaxvq_f32((float32x4_t)x);
#endif
  float best = x[0];
  UNROLL for (int i = 1; i < VF; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// Magnitudes by their bits, whose order is that of the numbers; an infinity or a NaN is greater
// than all of them, so that it is never lost.
INLINE vi magnitude(vf x) { return (vi)x & 0x7fffffff; }
INLINE float largest_magnitude(vi x) {
#if defined(__AVX512F__)
  const int32_t best = _mm512_reduce_max_epi32((__m512i)x);
#else
  int32_t best = x[0];
  UNROLL for (int i = 1; i < VF; ++i) best = x[i] > best ? x[i] : best;
#endif
  float value;
  memcpy(&value, &best, 4);
  return value;
}

// The nearest whole number, of magnitudes below 2^22; to even. Of a NaN: any number.
INLINE vi nearest(vf x) {
  return (vi)(x + 12582912.0f) - 0x4b400000;  // 1.5 * 2^23: adding it rounds
}
// The lower bytes of the lanes.
INLINE void store_bytes(void* p, vi x) {
  typedef int8_t bytes __attribute__((vector_size(VF), aligned(1), may_alias));
  *static_cast<bytes*>(p) = __builtin_convertvector(x, bytes);
}
// Lane by lane the products of the lower and of the upper 16 bits (signed), added up.
INLINE vi add_pairs(vi a, vi b) {
#if defined(__AVX512BW__)
  return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

// bfloat16: the upper half of a float, rounded to nearest even.
INLINE uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
INLINE float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
INLINE vf load_bf16(const uint16_t* p) {
  const vh raw = *reinterpret_cast<const vh_any*>(p);
  return (vf)(__builtin_convertvector(raw, vu) << 16);
}
INLINE void store_bf16(uint16_t* p, vf x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)x));
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  vst1_bf16(reinterpret_cast<__bf16*>(p), vcvt_bf16_f32((float32x4_t)x));
#else
  const vu bits = (vu)x, rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  const vu quiet = (bits >> 16) | 0x40;  // of what is no number
  *reinterpret_cast<vh_any*>(p) = __builtin_convertvector(x == x ? rounded : quiet, vh);
#endif
}

INLINE float from_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 31, fraction = h & 1023u;
  if (exponent == 0) {  // zero or subnormal
    const float value = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t upper = exponent == 31 ? 0x7f800000u : (exponent + 112) << 23;
  const uint32_t bits = sign | upper | fraction << 13;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
INLINE vf load_half(const uint16_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
  vf x;
  UNROLL for (int i = 0; i < VF; ++i) x[i] = from_half(p[i]);
  return x;
#endif
}

// e^x within two units in the last place: x = n ln 2 + r, a polynomial in r, times 2^n.
INLINE vf vexp(vf x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
#if defined(__AVX512F__)
  // of two operands the second is taken where one is no number, so that it stays what it is
  const vf bounded = (vf)_mm512_min_ps(
      _mm512_set1_ps(200.0f), _mm512_max_ps(_mm512_set1_ps(-200.0f), (__m512)x));
#else
  const vf low = splat(-87.0f), high = splat(88.0f);
  const vf bounded = x < low ? low : (x > high ? high : x);
#endif
  const vf shifted = bounded * 1.44269504f + shift;
  const vf n = shifted - shift;
  const vf r = (bounded - n * 0.693145752f) - n * 1.42860677e-6f;
  vf p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const vf value = (vf)((vi)p + (((vi)shifted - 0x4b400000) << 23));
  return x < low ? vf{} : (x != x ? x : value);
#endif
}

}  // namespace
}  // namespace pagelab
