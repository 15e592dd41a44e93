// Attention of several queries of one sequence: 64 keys at a time, by the linear layers' tiles.
#pragma once

#include "attention.h"

namespace pagelab {
namespace {

// What a thread needs for one task; the sizes are for D rounded up to 32 and `rows` rows.
struct PromptScratch {
  uint8_t *q, *k, *v, *p;
  float *scores, *o;
};

INLINE int64_t prompt_scratch_bytes(int rows, int dp) {
  return static_cast<int64_t>(rows) * (dp * 8 + kKeys * 8) + 8 * static_cast<int64_t>(kKeys) * dp +
         1024;
}

static PromptScratch prompt_scratch_at(uint8_t* memory, int rows, int dp) {
  PromptScratch s;
  s.q = memory;
  s.k = s.q + static_cast<int64_t>(rows) * dp * 4;
  s.v = s.k + kKeys * dp * 4;
  s.p = s.v + kKeys * dp * 4;
  s.scores = reinterpret_cast<float*>(s.p + static_cast<int64_t>(rows) * kKeys * 4);
  s.o = s.scores + static_cast<int64_t>(rows) * kKeys;
  return s;
}

// K as a weight [keys, D]: two panels of 32 keys.
template <bool Bf16>
static void lay_out_keys(const Cache& cache, const int64_t (&places)[kKeys], int dp, uint8_t* out) {
  const int D = cache.head_dim;
  const int64_t panel = static_cast<int64_t>(dp) * kPanel;
  typedef uint32_t u32_any __attribute__((aligned(1), may_alias));
  const int words = Bf16 ? D / 2 : D;  // a word is two bfloat16 or one float
  for (int key = 0; key < kKeys; ++key) {
    // behind the last key the last one again: its scores are hidden, but must be finite
    const u32_any* const k = reinterpret_cast<const u32_any*>(cache.k + places[key]);
    uint32_t* const to =
        reinterpret_cast<uint32_t*>(out + key / kPanel * panel * cache.bytes) + key % kPanel;
    for (int i = 0; i < words; ++i) to[i * kPanel] = k[i];
  }
}

// V as a weight [D, keys]: panels of 32 of D; hidden keys are zeros.
template <bool Bf16>
static void lay_out_values(const Cache& cache, const int64_t (&places)[kKeys], int count, int dp,
                           uint8_t* out) {
  const int D = cache.head_dim;
  const int64_t panel = static_cast<int64_t>(kKeys) * kPanel;
  if (count < kKeys) memset(out, 0, static_cast<size_t>(kKeys * dp * (Bf16 ? 2 : 4)));
  if constexpr (Bf16) {
    for (int key = 0; key < count; key += 2) {
      const uint16_t* const a = reinterpret_cast<const uint16_t*>(cache.v + places[key]);
      const uint16_t* const b = reinterpret_cast<const uint16_t*>(cache.v + places[key + 1]);
      const uint32_t second = key + 1 < count ? 0xffff0000u : 0u;
      for (int i = 0; i < D; i += kPanel / 2) {
        uint32_t* const to =
            reinterpret_cast<uint32_t*>(out) + (i / kPanel * panel + key * kPanel) / 2 + i % kPanel;
        UNROLL for (int j = 0; j < kPanel / 2; ++j) {
          to[j] = a[i + j] | (static_cast<uint32_t>(b[i + j]) << 16 & second);
        }
      }
    }
  } else {
    for (int key = 0; key < count; ++key) {
      const float* const v = reinterpret_cast<const float*>(cache.v + places[key]);
      float* const to = reinterpret_cast<float*>(out) + key * kPanel;
      for (int i = 0; i < D; ++i) to[i / kPanel * panel + i % kPanel] = v[i];
    }
  }
}

template <int MR>
static void tiles_of(bool bf16, int rows, const uint8_t* a, int64_t stride, const uint8_t* panel,
                     int kp, const Out& out) {
  if constexpr (MR > 1) {
    if (rows < MR) return tiles_of<MR - 1>(bf16, rows, a, stride, panel, kp, out);
  }
  if (bf16) return tile_bf16<MR>(a, stride, panel, kp, nullptr, out);
  tile_f32<MR>(a, stride, panel, kp, nullptr, out);
}

static void multiply(bool bf16, int rows, const uint8_t* a, int64_t stride, const uint8_t* panels,
                     int num_panels, int kp, float* c, int64_t ldc, bool add) {
  for (int i = 0; i < num_panels; ++i) {
    for (int row = 0; row < rows; row += kFloatRows) {
      tiles_of<kFloatRows>(bf16, least(kFloatRows, rows - row), a + row * stride, stride,
                           panels + i * static_cast<int64_t>(kp) * kPanel * (bf16 ? 2 : 4), kp,
                           Out{c + row * ldc + i * kPanel, ldc, add});
    }
  }
}

// `queries` queries of `heads` heads, the first at `position`: row t * heads + h. q is
// [queries, stride] floats, scaled already; o likewise, its rows as q's.
template <bool Bf16>
static void several(const Cache& cache, const float* q, int64_t stride, int queries, int heads,
                    int position, float* o, int64_t o_stride, const PromptScratch& s) {
  const int D = cache.head_dim, dp = (D + kPanel - 1) / kPanel * kPanel;
  const int rows = queries * heads, size = Bf16 ? 2 : 4;
  Online state[kQueryRows * 2];
  for (int row = 0; row < rows; ++row) {
    state[row] = Online{-INFINITY, 0.0f};
    const float* const from = q + row / heads * stride + row % heads * D;
    uint8_t* const to = s.q + static_cast<int64_t>(row) * dp * size;
    memset(to, 0, static_cast<size_t>(dp * size));
    for (int i = 0; i < D; i += VF) {
      if constexpr (Bf16) {
        store_bf16(reinterpret_cast<uint16_t*>(to) + i, load(from + i));
      } else {
        store(reinterpret_cast<float*>(to) + i, load(from + i));
      }
    }
  }
  if (dp != D) memset(s.k, 0, static_cast<size_t>(kKeys * dp * size));
  if (dp != D) memset(s.v, 0, static_cast<size_t>(kKeys * dp * size));
  memset(s.o, 0, static_cast<size_t>(rows * dp) * 4);
  const int last = position + queries;
  for (int start = 0; start < last; start += kKeys) {
    const int count = least(kKeys, last - start);
    int64_t places[kKeys];
    places_of(cache, start, count, places);
    lay_out_keys<Bf16>(cache, places, dp, s.k);
    lay_out_values<Bf16>(cache, places, count, dp, s.v);
    // rows that see none of these keys (their positions are before the tile) are left out
    const int first = most(0, start - position) * heads;
    multiply(Bf16, rows - first, s.q + static_cast<int64_t>(first) * dp * size, dp * size, s.k,
             kKeys / kPanel, dp, s.scores + first * kKeys, kKeys, false);
    for (int row = first; row < rows; ++row) {
      const int visible = least(count, position + row / heads + 1 - start);
      float* const scores = s.scores + row * kKeys;
      const float keep = soften(scores, visible, state + row);
      if (keep != 1.0f) {
        float* const own = s.o + row * dp;
        for (int i = 0; i < dp; i += VF) store(own + i, load(own + i) * keep);
      }
      uint8_t* const p = s.p + static_cast<int64_t>(row) * kKeys * size;
      if constexpr (Bf16) {
        uint16_t* const to = reinterpret_cast<uint16_t*>(p);
        for (int i = 0; i < kKeys; i += VF) store_bf16(to + i, load(scores + i));
      } else {
        memcpy(p, scores, kKeys * 4);
      }
    }
    multiply(Bf16, rows - first, s.p + static_cast<int64_t>(first) * kKeys * size, kKeys * size,
             s.v, dp / kPanel, kKeys, s.o + first * dp, dp, true);
  }
  for (int row = 0; row < rows; ++row) {
    float* const to = o + row / heads * o_stride + row % heads * D;
    const float inverse = 1.0f / state[row].l;
    for (int i = 0; i < D; i += VF) store(to + i, load(s.o + row * dp + i) * inverse);
  }
}

}  // namespace
}  // namespace pagelab
