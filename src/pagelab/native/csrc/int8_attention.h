// Attention over K/V in bytes: products of whole numbers, exact, the same code for one query and
// for many. One block of one head:
//
//   K   [D / 4][slot][4]   four numbers of 16 keys are one vector as they lie
//   V   [slot / 4][D][4]   so are 16 numbers of four keys (row by row where block_size % 4)
//       bytes of value + 128; behind them a float scale a slot
//
// Queries and the weights of keys become whole numbers of 15 bits with a scale a row: what is lost
// is lost when K/V is stored.
#pragma once

#include "prompt_attention.h"

namespace pagelab {
namespace {

constexpr int kLanes = 16;             // keys of a group: those of a tile that lie in one block
constexpr float kWidest = 127 * 128;   // the greatest whole number of a row
// Rows of a tile at most, and sums that each of its vectors takes.
constexpr int kWideRows = VF == 16 ? 6 : VF == 8 ? 2 : 1;
#if defined(__AVX512VNNI__)
constexpr int kSums = 2;
#else
constexpr int kSums = 1;
#endif

// The place of number i of a slot in a block, without its scale.
INLINE int64_t k_place(const Cache& c, int slot, int i) {
  return (static_cast<int64_t>(i / 4) * c.block_size + slot) * 4 + i % 4;
}
INLINE int64_t v_place(const Cache& c, int slot, int i) {
  const int together = c.block_size % 4 == 0 ? 4 : 1;
  return (static_cast<int64_t>(slot / together) * c.head_dim + i) * together + slot % together;
}
INLINE int64_t block_place(const Cache& c, int key) {
  return static_cast<int64_t>(c.blocks[key / c.block_size]) * c.block_size *
         (c.head_dim + static_cast<int>(sizeof(float)));
}
INLINE int64_t scale_place(const Cache& c, int slot) {
  return static_cast<int64_t>(c.block_size) * c.head_dim + slot * static_cast<int>(sizeof(float));
}

// x [n] → bytes of value + 128; returns the scale, which is not finite where x is not.
static float to_bytes(const float* x, int n, uint8_t* to) {
  vi biggest = {};
  for (int i = 0; i < n; i += VF) biggest = max_i(biggest, magnitude(load(x + i)));
  const float peak = largest_magnitude(biggest);
  const float inverse = peak > 1e-30f ? 127.0f / peak : 0.0f;
  for (int i = 0; i < n; i += VF) {
    store_bytes(to + i, nearest(load(x + i) * inverse) + 128);
  }
  return peak / 127.0f;
}

// Writes one key and its value; `bytes` is room for head_dim of them.
static void write_bytes(const Cache& c, int key, const float* k, const float* v, uint8_t* bytes) {
  const int slot = key % c.block_size;
  uint8_t* const k_block = const_cast<uint8_t*>(c.k) + block_place(c, key);
  uint8_t* const v_block = const_cast<uint8_t*>(c.v) + block_place(c, key);
  const float k_scale = to_bytes(k, c.head_dim, bytes);
  for (int i = 0; i < c.head_dim; i += 4) memcpy(k_block + k_place(c, slot, i), bytes + i, 4);
  memcpy(k_block + scale_place(c, slot), &k_scale, sizeof(float));
  const float v_scale = to_bytes(v, c.head_dim, bytes);
  for (int i = 0; i < c.head_dim; ++i) v_block[v_place(c, slot, i)] = bytes[i];
  memcpy(v_block + scale_place(c, slot), &v_scale, sizeof(float));
}

// 64 keys by groups of 16: where their bytes lie, and their scales (0 behind the last key).
struct ByteTile {
  const uint8_t *k[kKeys / kLanes], *v[kKeys / kLanes];
  int64_t k_stride;  // bytes from four numbers of the keys to the next four
  int groups;        // with keys; those behind them are the last one again
  float k_scales[kKeys], v_scales[kKeys];
};

// Keys of blocks that hold no whole groups are copied to `k` and `v`, in the form of a block of 64.
static void copy_keys(const Cache& c, int start, int count, uint8_t* k, uint8_t* v, ByteTile* t) {
  Cache whole = c;
  whole.block_size = kKeys;
  for (int key = 0; key < count; ++key) {
    const int slot = (start + key) % c.block_size;
    const uint8_t* const k_block = c.k + block_place(c, start + key);
    const uint8_t* const v_block = c.v + block_place(c, start + key);
    for (int i = 0; i < c.head_dim; i += 4) {
      memcpy(k + k_place(whole, key, i), k_block + k_place(c, slot, i), 4);
    }
    for (int i = 0; i < c.head_dim; ++i) v[v_place(whole, key, i)] = v_block[v_place(c, slot, i)];
    memcpy(t->k_scales + key, k_block + scale_place(c, slot), sizeof(float));
    memcpy(t->v_scales + key, v_block + scale_place(c, slot), sizeof(float));
  }
  t->k_stride = kKeys * 4;
  for (int group = 0; group < t->groups; ++group) {
    t->k[group] = k + k_place(whole, group * kLanes, 0);
    t->v[group] = v + v_place(whole, group * kLanes, 0);
  }
}

static void find_keys(const Cache& c, int start, int count, uint8_t* k, uint8_t* v, ByteTile* t) {
  t->groups = (count + kLanes - 1) / kLanes;
  if (c.block_size % kLanes != 0) {
    copy_keys(c, start, count, k, v, t);
  } else {
    t->k_stride = c.block_size * 4;
    for (int group = 0; group < t->groups; ++group) {
      const int key = start + group * kLanes, slot = key % c.block_size;
      const uint8_t* const k_block = c.k + block_place(c, key);
      const uint8_t* const v_block = c.v + block_place(c, key);
      t->k[group] = k_block + k_place(c, slot, 0);
      t->v[group] = v_block + v_place(c, slot, 0);
      memcpy(t->k_scales + group * kLanes, k_block + scale_place(c, slot), kLanes * sizeof(float));
      memcpy(t->v_scales + group * kLanes, v_block + scale_place(c, slot), kLanes * sizeof(float));
    }
  }
  for (int group = t->groups; group < kKeys / kLanes; ++group) {
    t->k[group] = t->k[t->groups - 1];
    t->v[group] = t->v[t->groups - 1];
  }
  for (int key = count; key < kKeys; ++key) t->k_scales[key] = t->v_scales[key] = 0;
}

// Bytes of a tile's keys (`base` is K's or V's) come from memory while something else is done.
static void fetch_keys(const Cache& c, const uint8_t* base, int start, int last) {
  if (c.block_size > kKeys) return;
  const int block_bytes = c.block_size * (c.head_dim + static_cast<int>(sizeof(float)));
  for (int key = start; key < least(last, start + kKeys); key += c.block_size) {
    const uint8_t* const block = base + block_place(c, key);
    for (int i = 0; i < block_bytes; i += 64) __builtin_prefetch(block + i);
  }
}

// Whole numbers of a row, four at a time as the two words that a vector of four bytes is multiplied
// by: either their high and their low bytes, a number being 128 * high + low, or numbers 0 and 2,
// and 1 and 3, in 16 bits each. `to` takes 2 VF bytes.
INLINE void store_wide(uint8_t* to, vi whole) {
#if defined(__AVX512VNNI__)
  const vi high = (whole + 64) >> 7;
  const __m128i highs = _mm512_cvtepi32_epi8((__m512i)high);
  const __m128i lows = _mm512_cvtepi32_epi8((__m512i)(whole - (high << 7)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi32(highs, lows));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to) + 1, _mm_unpackhi_epi32(highs, lows));
#else
  i32_any* const words = reinterpret_cast<i32_any*>(to);
  UNROLL for (int i = 0; i < VF; i += 4) {
    words[i / 2] = (whole[i] & 0xffff) | whole[i + 2] << 16;
    words[i / 2 + 1] = (whole[i + 1] & 0xffff) | whole[i + 3] << 16;
  }
#endif
}

// The products of four bytes a lane (unsigned) and the four numbers of two words.
INLINE void add_four(vi (&acc)[kSums], vi w, int32_t first, int32_t second) {
#if defined(__AVX512VNNI__)
  acc[0] = dot_bytes(acc[0], w, first);
  acc[1] = dot_bytes(acc[1], w, second);
#else
  acc[0] += add_pairs(w & 0x00ff00ff, splat_i(first));
  acc[0] += add_pairs((vi)((vu)w >> 8) & 0x00ff00ff, splat_i(second));
#endif
}

// The whole sum, less 128 (which every byte has too much) times the row's total.
INLINE vf sum_of(const vi (&acc)[kSums], int32_t total) {
  vi sum = acc[0];
  if constexpr (kSums == 2) sum = (sum << 7) + acc[kSums - 1];
  return to_float(sum - splat_i(total * 128));
}

struct WideRows {
  uint8_t* data;  // [rows, n / 4, 2 words]
  int n;
  float* step;     // [rows]
  int32_t* total;  // [rows]

  const i32_any* words(int row) const {
    return reinterpret_cast<const i32_any*>(data + static_cast<int64_t>(row) * 2 * n);
  }
};

static void set_wide(const WideRows& rows, int row, const float* x) {
  vi biggest = {}, sums = {};
  for (int i = 0; i < rows.n; i += VF) biggest = max_i(biggest, magnitude(load(x + i)));
  const float peak = largest_magnitude(biggest);
  const float inverse = peak > 1e-30f ? kWidest / peak : 0.0f;
  uint8_t* const to = rows.data + static_cast<int64_t>(row) * 2 * rows.n;
  for (int i = 0; i < rows.n; i += VF) {
    const vi whole = nearest(load(x + i) * inverse);
    sums += whole;
    store_wide(to + 2 * i, whole);
  }
  int32_t total = 0;
  UNROLL for (int i = 0; i < VF; ++i) total += sums[i];
  rows.step[row] = peak / kWidest;
  rows.total[row] = total;
}

// Scores of MR rows and 32 keys, from group `group` on: scores [rows, 64].
template <int MR>
INLINE void score_bytes(const ByteTile& t, int group, const WideRows& q, int row, float* scores) {
  vi acc[MR][NV][kSums] = {};
  const uint8_t* k[NV];
  UNROLL for (int v = 0; v < NV; ++v) {
    k[v] = t.k[group + v * VF / kLanes] + v * VF % kLanes * 4;
  }
  const i32_any* words[MR];
  UNROLL for (int r = 0; r < MR; ++r) words[r] = q.words(row + r);
  for (int i = 0; i < q.n / 4; ++i) {
    vi own[NV];
    UNROLL for (int v = 0; v < NV; ++v) own[v] = load_i(k[v] + i * t.k_stride);
    UNROLL for (int r = 0; r < MR; ++r) {
      const int32_t one = words[r][2 * i], two = words[r][2 * i + 1];
      UNROLL for (int v = 0; v < NV; ++v) add_four(acc[r][v], own[v], one, two);
    }
  }
  UNROLL for (int r = 0; r < MR; ++r) {
    UNROLL for (int v = 0; v < NV; ++v) {
      const int key = group * kLanes + v * VF;
      const vf scale = load(t.k_scales + key) * q.step[row + r];
      store(scores + (row + r) * kKeys + key, sum_of(acc[r][v], q.total[row + r]) * scale);
    }
  }
}

// o [rows, D] += weights times values, for MR rows and DV vectors from number `first` on.
template <int MR, int DV>
INLINE void add_bytes(const ByteTile& t, const WideRows& p, int row, int first, int D, float* o) {
  vi acc[MR][DV][kSums] = {};
  const i32_any* words[MR];
  UNROLL for (int r = 0; r < MR; ++r) words[r] = p.words(row + r);
  for (int group = 0, four = 0; group < t.groups; ++group) {
    const uint8_t* v = t.v[group] + first * 4;
    UNROLL for (int j = 0; j < kLanes / 4; ++j, ++four, v += D * 4) {
      vi own[DV];
      UNROLL for (int i = 0; i < DV; ++i) own[i] = load_i(v + i * VF * 4);
      UNROLL for (int r = 0; r < MR; ++r) {
        const int32_t one = words[r][2 * four], two = words[r][2 * four + 1];
        UNROLL for (int i = 0; i < DV; ++i) add_four(acc[r][i], own[i], one, two);
      }
    }
  }
  UNROLL for (int r = 0; r < MR; ++r) {
    UNROLL for (int i = 0; i < DV; ++i) {
      float* const to = o + static_cast<int64_t>(row + r) * D + first + i * VF;
      store(to, load(to) + sum_of(acc[r][i], p.total[row + r]) * p.step[row + r]);
    }
  }
}

template <int MR>
static void score_rows(const ByteTile& t, const WideRows& q, int row, int rows, float* scores) {
  if constexpr (MR > 1) {
    if (rows < MR) return score_rows<MR - 1>(t, q, row, rows, scores);
  }
  for (int group = 0; group < t.groups; group += 2) score_bytes<MR>(t, group, q, row, scores);
}

template <int MR>
static void add_rows(const ByteTile& t, const WideRows& p, int row, int rows, int D, float* o) {
  if constexpr (MR > 1) {
    if (rows < MR) return add_rows<MR - 1>(t, p, row, rows, D, o);
  }
  int first = 0;
  for (; first + 2 * VF <= D; first += 2 * VF) add_bytes<MR, 2>(t, p, row, first, D, o);
  if (first < D) add_bytes<MR, 1>(t, p, row, first, D, o);
}

// As `several`, over keys first .. last; leaves the sums in s.o [rows, D], not divided by l.
static void over_bytes(const Cache& cache, const float* q, int64_t stride, int queries, int heads,
                       int position, int first, int last, const PromptScratch& s, Online* state) {
  const int D = cache.head_dim, rows = queries * heads;
  float q_step[kQueryRows * 2], p_step[kQueryRows * 2];
  int32_t q_total[kQueryRows * 2], p_total[kQueryRows * 2];
  const WideRows wide_q{s.q, D, q_step, q_total}, wide_p{s.p, kKeys, p_step, p_total};
  for (int row = 0; row < rows; ++row) {
    state[row] = Online{-INFINITY, 0.0f};
    set_wide(wide_q, row, q + row / heads * stride + row % heads * D);
  }
  memset(s.o, 0, static_cast<size_t>(rows) * D * 4);
  fetch_keys(cache, cache.k, first, last);
  for (int start = first; start < last; start += kKeys) {
    const int count = least(kKeys, last - start);
    fetch_keys(cache, cache.v, start, last);
    ByteTile tile;
    find_keys(cache, start, count, s.k, s.v, &tile);
    // rows that see none of these keys (their positions are before the tile) are left out
    const int from = most(0, start - position) * heads;
    for (int row = from; row < rows; row += kWideRows) {
      score_rows<kWideRows>(tile, wide_q, row, least(kWideRows, rows - row), s.scores);
    }
    for (int row = from; row < rows; ++row) {
      float* const scores = s.scores + row * kKeys;
      const int visible = least(count, position + row / heads + 1 - start);
      const float keep = soften(scores, visible, state + row);
      if (keep != 1.0f) {
        float* const own = s.o + static_cast<int64_t>(row) * D;
        for (int i = 0; i < D; i += VF) store(own + i, load(own + i) * keep);
      }
      for (int i = 0; i < kKeys; i += VF) {
        store(scores + i, load(scores + i) * load(tile.v_scales + i));
      }
      set_wide(wide_p, row, scores);
    }
    fetch_keys(cache, cache.k, start + kKeys, last);
    for (int row = from; row < rows; row += kWideRows) {
      add_rows<kWideRows>(tile, wide_p, row, least(kWideRows, rows - row), D, s.o);
    }
  }
}

}  // namespace
}  // namespace pagelab
