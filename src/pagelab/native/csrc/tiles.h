// Tiles of a product: up to some rows times one panel of 32 columns, kept in registers.
//
// The inputs of a row are always added up one after the other (by groups in the quantized
// kinds), so that a result does not depend on how many rows share a tile.
#pragma once

#include "rows.h"

namespace pagelab {
namespace {

// Rows of a tile at most, by the registers there are: 14 x 2 of AVX-512's 32, 3 x 4 of AVX2's 16,
// 3 x 8 of NEON's 32 hold sums, and the others a panel's column and the rows' numbers.
constexpr int kFloatRows = VF == 16 ? 14 : 3;
constexpr int kByteRows = VF == 16 ? 6 : 2;

// Where a tile's results go: c[row * ldc + column], added to what is there if `add`.
struct Out {
  float* c;
  int64_t ldc;
  bool add;
};

template <int MR>
INLINE void finish(vf (&acc)[MR][NV], const Out& out, const float* bias) {
  UNROLL for (int r = 0; r < MR; ++r) {
    UNROLL for (int v = 0; v < NV; ++v) {
      float* const at = out.c + r * out.ldc + v * VF;
      vf value = acc[r][v];
      if (bias != nullptr) value += load(bias + v * VF);
      if (out.add) value += load(at);
      store(at, value);
    }
  }
}

template <int MR>
static void tile_f32(const uint8_t* rows, int64_t stride, const uint8_t* panel, int kp,
                     const float* bias, const Out& out) {
  vf acc[MR][NV] = {};
  const float* b = reinterpret_cast<const float*>(panel);
  for (int i = 0; i < kp; ++i, b += kPanel) {
    vf column[NV];
    UNROLL for (int v = 0; v < NV; ++v) column[v] = load(b + v * VF);
    UNROLL for (int r = 0; r < MR; ++r) {
      const vf x = splat(reinterpret_cast<const float*>(rows + r * stride)[i]);
      UNROLL for (int v = 0; v < NV; ++v) acc[r][v] += x * column[v];
    }
  }
  finish<MR>(acc, out, bias);
}

// acc + the products of two bfloat16 each of w and of the pair x.
INLINE vf dot_bf16(vf acc, vi w, int32_t x) {
#if defined(__AVX512BF16__)
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(x));
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return (vf)vbfdotq_f32((float32x4_t)acc, (bfloat16x8_t)w, (bfloat16x8_t)vdupq_n_s32(x));
#else
  const vf low = (vf)(w << 16), high = (vf)(w & splat_i(static_cast<int32_t>(0xffff0000u)));
  acc += low * splat(from_bf16(static_cast<uint16_t>(x)));
  return acc + high * splat(from_bf16(static_cast<uint16_t>(static_cast<uint32_t>(x) >> 16)));
#endif
}

template <int MR>
static void tile_bf16(const uint8_t* rows, int64_t stride, const uint8_t* panel, int kp,
                      const float* bias, const Out& out) {
  vf acc[MR][NV] = {};
  for (int i = 0; i < kp / 2; ++i, panel += kPanel * 4) {
    vi column[NV];
    UNROLL for (int v = 0; v < NV; ++v) column[v] = load_i(panel + v * VF * 4);
    UNROLL for (int r = 0; r < MR; ++r) {
      const int32_t x = reinterpret_cast<const i32_any*>(rows + r * stride)[i];
      UNROLL for (int v = 0; v < NV; ++v) acc[r][v] = dot_bf16(acc[r][v], column[v], x);
    }
  }
  finish<MR>(acc, out, bias);
}

// ARM multiplies signed bytes, x86 unsigned ones by signed ones. A weight is stored 128 too large:
// a signed byte with its upper bit turned, or an unsigned one whose sum is 128 times x's too large.
#if defined(__aarch64__)
constexpr int kTurn = static_cast<int>(0x80808080u), kExcess = 0;
#else
constexpr int kTurn = 0, kExcess = 128;
#endif

// acc + the products of four bytes each: w of the sign above, x signed.
INLINE vi dot_bytes(vi acc, vi w, int32_t x) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(__aarch64__)
  const int8x16_t ws = vreinterpretq_s8_s32((int32x4_t)w), xs = vreinterpretq_s8_s32(vdupq_n_s32(x));
#if defined(__ARM_FEATURE_DOTPROD)
  return (vi)vdotq_s32((int32x4_t)acc, ws, xs);
#else
  // two products fit 16 bits: x is -127 at least
  const int16x8_t low = vmull_s8(vget_low_s8(ws), vget_low_s8(xs)), high = vmull_high_s8(ws, xs);
  return (vi)vpadalq_s16((int32x4_t)acc, vpaddq_s16(low, high));
#endif
#elif defined(__AVX512BW__) || defined(__AVX2__) || defined(__SSE2__)
  const vi even = w & 0x00ff00ff, odd = (vi)((vu)w >> 8) & 0x00ff00ff;
  const vi xs = splat_i(x);
#if defined(__AVX512BW__)
  const __m512i x_even = _mm512_srai_epi16(_mm512_slli_epi16((__m512i)xs, 8), 8);
  const __m512i x_odd = _mm512_srai_epi16((__m512i)xs, 8);
  return acc + (vi)_mm512_madd_epi16((__m512i)even, x_even) +
         (vi)_mm512_madd_epi16((__m512i)odd, x_odd);
#elif defined(__AVX2__)
  const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)xs, 8), 8);
  const __m256i x_odd = _mm256_srai_epi16((__m256i)xs, 8);
  return acc + (vi)_mm256_madd_epi16((__m256i)even, x_even) +
         (vi)_mm256_madd_epi16((__m256i)odd, x_odd);
#else
  const __m128i x_even = _mm_srai_epi16(_mm_slli_epi16((__m128i)xs, 8), 8);
  const __m128i x_odd = _mm_srai_epi16((__m128i)xs, 8);
  return acc + (vi)_mm_madd_epi16((__m128i)even, x_even) +
         (vi)_mm_madd_epi16((__m128i)odd, x_odd);
#endif
#else
  UNROLL for (int i = 0; i < VF; ++i) {
    const uint32_t four = static_cast<uint32_t>(w[i]), own = static_cast<uint32_t>(x);
    for (int byte = 0; byte < 32; byte += 8) {
      acc[i] += static_cast<int32_t>(four >> byte & 255) * static_cast<int8_t>(own >> byte);
    }
  }
  return acc;
#endif
}

template <int MR>
INLINE void dot_group(vi (&acc)[MR][NV], const uint8_t* bytes, const uint8_t* rows,
                      int64_t stride) {
  UNROLL for (int i = 0; i < kGroup / 4; ++i) {
    vi column[NV];
    UNROLL for (int v = 0; v < NV; ++v) {
      column[v] = load_i(bytes + (i * kPanel + v * VF) * 4) ^ kTurn;
    }
    UNROLL for (int r = 0; r < MR; ++r) {
      const int32_t x = reinterpret_cast<const i32_any*>(rows + r * stride)[i];
      UNROLL for (int v = 0; v < NV; ++v) acc[r][v] = dot_bytes(acc[r][v], column[v], x);
    }
  }
}

// One scale a column: a group's whole sum, exact, times the row's own scale of that group.
template <int MR>
static void tile_int8(const Rows& a, int row, const uint8_t* panel, const float* scales,
                      const float* bias, const Out& out) {
  vf acc[MR][NV] = {};
  const uint8_t* const rows = a.data + row * a.stride;
  const int64_t first = static_cast<int64_t>(row) * a.groups;
  for (int g = 0; g < a.groups; ++g, panel += kGroup * kPanel) {
    vi whole[MR][NV];
    UNROLL for (int r = 0; r < MR; ++r) {
      const vi start = splat_i(a.total[first + static_cast<int64_t>(r) * a.groups + g] * -kExcess);
      UNROLL for (int v = 0; v < NV; ++v) whole[r][v] = start;
    }
    dot_group<MR>(whole, panel, rows + g * kGroup, a.stride);
    UNROLL for (int r = 0; r < MR; ++r) {
      const vf scale = splat(a.scale[first + static_cast<int64_t>(r) * a.groups + g]);
      UNROLL for (int v = 0; v < NV; ++v) acc[r][v] += to_float(whole[r][v]) * scale;
    }
  }
  UNROLL for (int v = 0; v < NV; ++v) {
    const vf scale = load(scales + v * VF);
    UNROLL for (int r = 0; r < MR; ++r) acc[r][v] *= scale;
  }
  finish<MR>(acc, out, bias);
}

template <int MR>
static void tile_q8(const Rows& a, int row, const uint8_t* panel, const float* bias,
                    const Out& out) {
  vf acc[MR][NV] = {};
  const uint8_t* const rows = a.data + row * a.stride;
  const int64_t first = static_cast<int64_t>(row) * a.groups;
  constexpr int kBytes = kGroup * kPanel;
  for (int g = 0; g < a.groups; ++g, panel += kBytes + 2 * kPanel) {
    vi whole[MR][NV];
    UNROLL for (int r = 0; r < MR; ++r) {
      const vi start = splat_i(a.total[first + static_cast<int64_t>(r) * a.groups + g] * -kExcess);
      UNROLL for (int v = 0; v < NV; ++v) whole[r][v] = start;
    }
    dot_group<MR>(whole, panel, rows + g * kGroup, a.stride);
    UNROLL for (int v = 0; v < NV; ++v) {
      const vf d = load_half(reinterpret_cast<const uint16_t*>(panel + kBytes) + v * VF);
      UNROLL for (int r = 0; r < MR; ++r) {
        const vf scale = splat(a.scale[first + static_cast<int64_t>(r) * a.groups + g]);
        acc[r][v] += to_float(whole[r][v]) * d * scale;
      }
    }
  }
  finish<MR>(acc, out, bias);
}

// Nibbles: a byte holds inputs i (lower) and i + 16 (upper) of its group and column.
template <int MR>
static void tile_q4(const Rows& a, int row, const uint8_t* panel, const float* bias,
                    const Out& out) {
  vf acc[MR][NV] = {};
  const uint8_t* const rows = a.data + row * a.stride;
  const int64_t first = static_cast<int64_t>(row) * a.groups;
  constexpr int kBytes = kGroup * kPanel / 2;
  for (int g = 0; g < a.groups; ++g, panel += kBytes + 4 * kPanel) {
    vi whole[MR][NV] = {};
    UNROLL for (int i = 0; i < kGroup / 8; ++i) {
      UNROLL for (int v = 0; v < NV; ++v) {
        const vi both = load_i(panel + (i * kPanel + v * VF) * 4);
        const vi low = both & 0x0f0f0f0f, high = (vi)((vu)both >> 4) & 0x0f0f0f0f;
        UNROLL for (int r = 0; r < MR; ++r) {
          const i32_any* const x =
              reinterpret_cast<const i32_any*>(rows + r * a.stride + g * kGroup);
          whole[r][v] = dot_bytes(whole[r][v], low, x[i]);
          whole[r][v] = dot_bytes(whole[r][v], high, x[i + kGroup / 8]);
        }
      }
    }
    const uint16_t* const d = reinterpret_cast<const uint16_t*>(panel + kBytes);
    UNROLL for (int v = 0; v < NV; ++v) {
      const vf step = load_half(d + v * VF), least_value = load_half(d + kPanel + v * VF);
      UNROLL for (int r = 0; r < MR; ++r) {
        const int64_t at = first + static_cast<int64_t>(r) * a.groups + g;
        acc[r][v] += to_float(whole[r][v]) * step * splat(a.scale[at]);
        acc[r][v] += least_value * splat(a.shift[at]);
      }
    }
  }
  finish<MR>(acc, out, bias);
}

}  // namespace
}  // namespace pagelab
