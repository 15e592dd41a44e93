// Paged attention straight from the blocks: the queries of a sequence and one K/V head a task.
//
//   few rows (decode)     each key is read once for all query heads of its group; long contexts
//                         are split, and the parts are added up by who takes the result
//   several (a prompt)    64 keys at a time are laid out like a packed weight, and the tiles of
//                         the linear layers multiply queries by them
//
// Keys are taken in the same tiles of 64 whatever else is in the batch, so that a row's result
// depends on its sequence alone.
#pragma once

#include "tiles.h"

namespace pagelab {
namespace {

constexpr int kKeys = 64;       // keys of a tile
constexpr int kSplit = 256;     // keys of a split, whole tiles
constexpr int kQueryRows = 192;  // rows of a task of several queries, about

struct Cache {  // one layer, one K/V head
  const uint8_t *k, *v;
  const int32_t* blocks;
  int block_size, head_dim, bytes;

  const uint8_t* at(const uint8_t* base, int key) const {
    const int64_t slot =
        static_cast<int64_t>(blocks[key / block_size]) * block_size + key % block_size;
    return base + slot * head_dim * bytes;
  }
};

template <bool Bf16>
INLINE vf load_kv(const uint8_t* p, int i) {
  if constexpr (Bf16) return load_bf16(reinterpret_cast<const uint16_t*>(p) + i);
  return load(reinterpret_cast<const float*>(p) + i);
}

// The sums of 16 vectors, in their order: a tree of shuffles where there are 16 lanes.
INLINE void sums_of_16(const vf (&x)[16], float* out) {
#if defined(__AVX512F__)
  __m512d pairs[8];
  UNROLL for (int i = 0; i < 8; ++i) {
    const __m512 a = (__m512)x[2 * i], b = (__m512)x[2 * i + 1];
    pairs[i] = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  }
  __m512 fours[4];
  UNROLL for (int i = 0; i < 4; ++i) {
    const __m512d a = pairs[2 * i], b = pairs[2 * i + 1];
    fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(fours[0], fours[1], 0x88),
                                   _mm512_shuffle_f32x4(fours[0], fours[1], 0xdd));
  const __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2], fours[3], 0x88),
                                    _mm512_shuffle_f32x4(fours[2], fours[3], 0xdd));
  store(out, (vf)_mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88),
                               _mm512_shuffle_f32x4(low, high, 0xdd)));
#else
  UNROLL for (int i = 0; i < 16; ++i) out[i] = sum(x[i]);
#endif
}

// Where an online softmax stands: the result so far is o / l, relative to the maximum m.
struct Online {
  float m, l;
};

// scores[0 .. kKeys) become e^(score - m), those from `count` on 0; returns what o must be
// multiplied by.
static float soften(float* scores, int count, Online* state) {
  for (int i = count; i < kKeys; ++i) scores[i] = -INFINITY;
  vf top = load(scores);
  for (int i = VF; i < kKeys; i += VF) top = vmax(top, load(scores + i));
  const float m = fmaxf(state->m, largest(top));
  vf total = {};
  for (int i = 0; i < kKeys; i += VF) {
    const vf p = vexp(load(scores + i) - m);
    store(scores + i, p);
    total += p;
  }
  const float keep = state->m == m ? 1.0f : expf(state->m - m);
  state->l = state->l * keep + sum(total);
  state->m = m;
  return keep;
}

// One query of a group of G heads over keys first .. last; q [G, D] is scaled already.
template <bool Bf16, int G>
static void few(const Cache& cache, const float* q, int first, int last, float* o, Online* state) {
  const int D = cache.head_dim;
  float scores[G][kKeys];
  for (int g = 0; g < G; ++g) state[g] = Online{-INFINITY, 0.0f};
  memset(o, 0, sizeof(float) * static_cast<size_t>(G * D));
  for (int start = first; start < last; start += kKeys) {
    const int count = least(kKeys, last - start);
    for (int key = 0; key < count; key += 16) {
      vf acc[G][16] = {};
      for (int j = 0; j < 16; ++j) {
        // beyond the last key the last one again: it is hidden later
        const uint8_t* const k = cache.at(cache.k, start + least(key + j, count - 1));
        vf part[G] = {};
        for (int i = 0; i < D; i += VF) {
          const vf own = load_kv<Bf16>(k, i);
          UNROLL for (int g = 0; g < G; ++g) part[g] += own * load(q + g * D + i);
        }
        UNROLL for (int g = 0; g < G; ++g) acc[g][j] = part[g];
      }
      UNROLL for (int g = 0; g < G; ++g) sums_of_16(acc[g], scores[g] + key);
    }
    for (int g = 0; g < G; ++g) {
      const float keep = soften(scores[g], count, state + g);
      if (keep != 1.0f) {
        for (int i = 0; i < D; i += VF) store(o + g * D + i, load(o + g * D + i) * keep);
      }
    }
    for (int i = 0; i < D; i += 2 * VF) {  // D is a multiple of 16: the second half may be none
      const bool two = i + VF < D;
      vf low[G], high[G];
      UNROLL for (int g = 0; g < G; ++g) {
        low[g] = load(o + g * D + i);
        high[g] = two ? load(o + g * D + i + VF) : vf{};
      }
      for (int j = 0; j < count; ++j) {
        const uint8_t* const v = cache.at(cache.v, start + j);
        const vf a = load_kv<Bf16>(v, i), b = two ? load_kv<Bf16>(v, i + VF) : vf{};
        UNROLL for (int g = 0; g < G; ++g) {
          low[g] += a * scores[g][j];
          high[g] += b * scores[g][j];
        }
      }
      UNROLL for (int g = 0; g < G; ++g) {
        store(o + g * D + i, low[g]);
        if (two) store(o + g * D + i + VF, high[g]);
      }
    }
  }
}

template <bool Bf16>
static void few_heads(int heads, const Cache& cache, const float* q, int first, int last, float* o,
                      Online* state) {
  const int D = cache.head_dim;
  while (heads >= 4) {
    few<Bf16, 4>(cache, q, first, last, o, state);
    q += 4 * D, o += 4 * D, state += 4, heads -= 4;
  }
  if (heads == 3) few<Bf16, 3>(cache, q, first, last, o, state);
  if (heads == 2) few<Bf16, 2>(cache, q, first, last, o, state);
  if (heads == 1) few<Bf16, 1>(cache, q, first, last, o, state);
}

}  // namespace
}  // namespace pagelab
