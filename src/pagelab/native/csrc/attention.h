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

  // Where a key's K or V lies.
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

// The sums of 16 vectors, in their order: a tree of shuffles with AVX-512, of pairs with NEON.
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
#elif defined(__aarch64__)
  UNROLL for (int i = 0; i < 16; i += 4) {
    const float32x4_t low = vpaddq_f32((float32x4_t)x[i], (float32x4_t)x[i + 1]);
    const float32x4_t high = vpaddq_f32((float32x4_t)x[i + 2], (float32x4_t)x[i + 3]);
    store(out + i, (vf)vpaddq_f32(low, high));
  }
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

// Where `count` keys lie, in bytes from a head's first; the last one again behind them.
static void places_of(const Cache& cache, int start, int count, int64_t (&places)[kKeys]) {
  const int64_t row = static_cast<int64_t>(cache.head_dim) * cache.bytes;
  int block = start / cache.block_size, offset = start % cache.block_size;
  for (int key = 0; key < count; ++key) {
    places[key] = (static_cast<int64_t>(cache.blocks[block]) * cache.block_size + offset) * row;
    if (++offset == cache.block_size) offset = 0, ++block;
  }
  for (int key = count; key < kKeys; ++key) places[key] = places[count - 1];
}

// The scores of a tile's keys: q [G, D], each head's D numbers in DV vectors (0: as many as D has).
template <bool Bf16, int G, int DV>
INLINE void score_keys(const Cache& cache, const float* q, const int64_t (&places)[kKeys],
                       int count, float (&scores)[G][kKeys]) {
  const int D = DV > 0 ? DV * VF : cache.head_dim, row = D * cache.bytes;
  for (int key = 0; key < count; key += 16) {
    vf acc[G][16];
    UNROLL for (int j = 0; j < 16; ++j) {
      const uint8_t* const k = cache.k + places[key + j];
      // the values come next: from memory meanwhile
      const uint8_t* const v = cache.v + places[key + j];
      for (int i = 0; i < row; i += 64) __builtin_prefetch(v + i);
      vf part[G] = {};
      UNROLL for (int i = 0; i < D / VF; ++i) {
        const vf own = load_kv<Bf16>(k, i * VF);
        UNROLL for (int g = 0; g < G; ++g) part[g] += own * load(q + g * D + i * VF);
      }
      UNROLL for (int g = 0; g < G; ++g) acc[g][j] = part[g];
    }
    UNROLL for (int g = 0; g < G; ++g) sums_of_16(acc[g], scores[g] + key);
  }
}

// o [G, D] += weights times values, DV vectors of each head at a time, from vector `first` on.
template <bool Bf16, int G, int DV>
INLINE void add_values(const Cache& cache, const int64_t (&places)[kKeys], int count, int first,
                       const float (&weights)[G][kKeys], float* o) {
  const int D = cache.head_dim;
  vf acc[G][DV];
  UNROLL for (int g = 0; g < G; ++g) {
    UNROLL for (int i = 0; i < DV; ++i) acc[g][i] = load(o + g * D + (first + i) * VF);
  }
  for (int j = 0; j < count; ++j) {
    const uint8_t* const v = cache.v + places[j];
    vf own[DV];
    UNROLL for (int i = 0; i < DV; ++i) own[i] = load_kv<Bf16>(v, (first + i) * VF);
    UNROLL for (int g = 0; g < G; ++g) {
      const vf weight = splat(weights[g][j]);
      UNROLL for (int i = 0; i < DV; ++i) acc[g][i] += own[i] * weight;
    }
  }
  UNROLL for (int g = 0; g < G; ++g) {
    UNROLL for (int i = 0; i < DV; ++i) store(o + g * D + (first + i) * VF, acc[g][i]);
  }
}

// One query of a group of G heads over keys first .. last; q [G, D] is scaled already.
template <bool Bf16, int G>
static void few(const Cache& cache, const float* q, int first, int last, float* o, Online* state) {
  const int D = cache.head_dim;
  float scores[G][kKeys];
  int64_t places[kKeys];
  for (int g = 0; g < G; ++g) state[g] = Online{-INFINITY, 0.0f};
  memset(o, 0, sizeof(float) * static_cast<size_t>(G * D));
  for (int start = first; start < last; start += kKeys) {
    const int count = least(kKeys, last - start);
    places_of(cache, start, count, places);
    for (int key = 0; key < count; ++key) {  // in flight while the first of them are used
      for (int i = 0; i < D * cache.bytes; i += 64) __builtin_prefetch(cache.k + places[key] + i);
    }
    if (D == 4 * VF) {
      score_keys<Bf16, G, 4>(cache, q, places, count, scores);
    } else {
      score_keys<Bf16, G, 0>(cache, q, places, count, scores);
    }
    for (int g = 0; g < G; ++g) {
      const float keep = soften(scores[g], count, state + g);
      if (keep != 1.0f) {
        for (int i = 0; i < D; i += VF) store(o + g * D + i, load(o + g * D + i) * keep);
      }
    }
    int done = 0;
    for (; done + 4 <= D / VF; done += 4) {
      add_values<Bf16, G, 4>(cache, places, count, done, scores, o);
    }
    for (; done < D / VF; ++done) add_values<Bf16, G, 1>(cache, places, count, done, scores, o);
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
