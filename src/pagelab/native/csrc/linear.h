// Products with packed weights: rows cut into tiles, panels shared among the threads.
#pragma once

#include "pool.h"
#include "tiles.h"

namespace pagelab {
namespace {

template <int MR>
INLINE void tile(const Linear& w, const Rows& a, int row, const uint8_t* panel, int column,
                 const Out& out) {
  const float* const bias = w.bias == nullptr ? nullptr : w.bias + column;
  const uint8_t* const rows = a.data + row * a.stride;
  switch (w.kind) {
    case kF32: return tile_f32<MR>(rows, a.stride, panel, w.kp, bias, out);
    case kBf16: return tile_bf16<MR>(rows, a.stride, panel, w.kp, bias, out);
    default: break;
  }
  if constexpr (MR <= kByteRows) {
    switch (w.kind) {
      case kInt8: return tile_int8<MR>(a, row, panel, w.scales + column, bias, out);
      case kQ8: return tile_q8<MR>(a, row, panel, bias, out);
      default: return tile_q4<MR>(a, row, panel, bias, out);
    }
  }
}

template <int MR>
static void tile_of(int rows, const Linear& w, const Rows& a, int row, const uint8_t* panel,
                    int column, const Out& out) {
  if constexpr (MR > 1) {
    if (rows < MR) return tile_of<MR - 1>(rows, w, a, row, panel, column, out);
  }
  tile<MR>(w, a, row, panel, column, out);
}

INLINE int tile_rows(int kind) { return kind <= kBf16 ? kFloatRows : kByteRows; }

// Rows `row .. row + rows` of one panel; `out` is where the first of them goes.
// The panel behind it is fetched meanwhile if `more`: a part of it before each tile.
static void panel_product(const Linear& w, const Rows& a, int row, int rows, int panel, bool more,
                          Out out) {
  const uint8_t* const data = w.data + panel * w.panel_bytes;
  const uint8_t* next = data + w.panel_bytes;
  int tiles = (rows + tile_rows(w.kind) - 1) / tile_rows(w.kind);
  while (rows > 0) {  // tiles of about the same height: 16 rows are 8 + 8, not 14 + 2
    const int height = (rows + tiles - 1) / tiles;
    if (more) {
      const int64_t part = w.panel_bytes / ((rows + height - 1) / height);
      for (int64_t i = 0; i < part; i += 64) __builtin_prefetch(next + i, 0, 2);
      next += part;
    }
    --tiles;
    tile_of<kFloatRows>(height, w, a, row, data, panel * kPanel, out);
    row += height;
    rows -= height;
    out.c += height * out.ldc;
  }
}

struct Product {
  const Linear* w;
  const Rows* a;
  float* c;
  int rows, grain, row_chunk, row_chunks;
  bool add;
};

static void product_piece(void* context, int piece, int) {
  const Product& p = *static_cast<Product*>(context);
  const int row = piece % p.row_chunks * p.row_chunk;
  const int rows = least(p.row_chunk, p.rows - row);
  const int first = piece / p.row_chunks * p.grain;
  const int64_t ldc = p.w->np;
  const int end = least(first + p.grain, p.w->np / kPanel);
  for (int i = first; i < end; ++i) {
    const bool more = i + 1 < end && rows > tile_rows(p.w->kind);
    panel_product(*p.w, *p.a, row, rows, i, more, Out{p.c + row * ldc + i * kPanel, ldc, p.add});
  }
}

// Panels that are one piece: some 50 us of work at most, and not less than taking it costs.
INLINE int panels_a_piece(const Linear& w, int rows, int threads) {
  const int panels = w.np / kPanel;
  const int64_t work = w.panel_bytes * (rows < 4 ? 4 : rows);
  const int by_work = static_cast<int>((1 << 18) / work);
  return most(1, least(by_work, panels / (4 * threads)));
}

// c[rows, np] = a W^T + bias, or that added to c.
static void product(Pool* pool, const Linear& w, const Rows& a, int rows, float* c, bool add) {
  const int grain = panels_a_piece(w, rows, pool->threads());
  const int pieces = (w.np / kPanel + grain - 1) / grain;
  int chunks = 1;  // rows are shared, too, where panels are few for so many threads
  while (chunks * pieces < 4 * pool->threads() && rows / (chunks * 2) >= 2 * kFloatRows) {
    chunks *= 2;
  }
  const int chunk = (rows + chunks - 1) / chunks;
  Product p{&w, &a, c, rows, grain, chunk, (rows + chunk - 1) / chunk, add};
  pool->run(pieces * p.row_chunks, product_piece, &p);
}

}  // namespace
}  // namespace pagelab
