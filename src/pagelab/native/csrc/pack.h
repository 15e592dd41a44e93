// Weights [n, k] into panels; see `Kind` for the layouts.
#pragma once

#include "pool.h"
#include "vec.h"

namespace pagelab {
namespace {

INLINE uint16_t to_half(float x) {  // only for values that a half holds exactly or nearly
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const float size = fabsf(x);
  if (size >= 65520.0f) return sign | 0x7c00u;
  if (size < 0x1p-14f) return sign | static_cast<uint16_t>(lrintf(size * 0x1p24f));
  bits = (bits & 0x7fffffffu) - (112u << 23);
  return sign | static_cast<uint16_t>((bits + 0xfffu + (bits >> 13 & 1)) >> 13);
}

// Where byte (input i of its group, column) of a group lies among 1,024.
INLINE int byte_place(int i, int column) { return (i / 4 * kPanel + column) * 4 + i % 4; }

static void set_nibble(uint8_t* group, int i, int column, int q) {
  uint8_t* const at = group + byte_place(i % 16, column);
  *at = static_cast<uint8_t>(i < 16 ? (*at & 0xf0) | q : (*at & 0x0f) | q << 4);
}

// One column's group of 32 from floats (zeros behind k), as 8 or 4 bits.
static void set_group(const Linear& w, uint8_t* group, int column, const float* x) {
  float low = x[0], high = x[0];
  for (int i = 1; i < kGroup; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  const bool q4 = w.kind == kQ4;
  const float reach = fabsf(low) > fabsf(high) ? fabsf(low) : fabsf(high);
  const uint16_t d = to_half(q4 ? (high - low) / 15 : reach / 127), m = to_half(low);
  const float step = from_half(d), start = q4 ? from_half(m) : 0.0f;
  const float inverse = step > 0 ? 1 / step : 0.0f;
  for (int i = 0; i < kGroup; ++i) {
    const int q = static_cast<int>(lrintf((x[i] - start) * inverse));
    if (q4) {
      set_nibble(group, i, column, most(0, least(15, q)));
    } else {
      group[byte_place(i, column)] = static_cast<uint8_t>(most(-127, least(127, q)) + 128);
    }
  }
  uint16_t* const halves = reinterpret_cast<uint16_t*>(group + (q4 ? 512 : 1024));
  halves[column] = d;
  if (q4) halves[kPanel + column] = m;
}

static void pack_column(const Linear& w, uint8_t* panel, int c, const float* x, float scale) {
  const float inverse = scale > 0 ? 1 / scale : 0.0f;
  if (w.kind == kF32 && x != nullptr) {
    for (int i = 0; i < w.k; ++i) reinterpret_cast<float*>(panel)[i * kPanel + c] = x[i];
    return;  // behind k there are zeros
  }
  for (int i = 0; i < w.kp; ++i) {
    const float value = i < w.k && x != nullptr ? x[i] : 0.0f;
    if (w.kind == kF32) {
      reinterpret_cast<float*>(panel)[i * kPanel + c] = value;
    } else if (w.kind == kBf16) {
      reinterpret_cast<uint16_t*>(panel)[(i / 2 * kPanel + c) * 2 + i % 2] = to_bf16(value);
    } else if (w.kind == kInt8) {
      const int q = static_cast<int>(lrintf(value * inverse));
      panel[i / kGroup * kGroup * kPanel + byte_place(i % kGroup, c)] =
          static_cast<uint8_t>(q + 128);
    } else if (i % kGroup == 0) {
      float own[kGroup] = {};
      const int count = x == nullptr ? 0 : least(kGroup, w.k - i);
      if (count > 0) memcpy(own, x + i, static_cast<size_t>(count) * 4);
      set_group(w, panel + i / kGroup * (w.kind == kQ4 ? 640 : 1088), c, own);
    }
  }
}

// One row of W, or zeros where x is null, as a column of a panel.
static void pack_row(const Linear& w, int panel, int column, const float* x) {
  float scale = 0;
  if (w.kind == kInt8) {
    for (int i = 0; x != nullptr && i < w.k; ++i) scale = fmaxf(scale, fabsf(x[i]));
    w.scales[column] = scale /= 127;
  }
  pack_column(w, w.data + panel * w.panel_bytes, column % kPanel, x, scale);
}

struct Packing {
  Linear* w;
  const float* weight;
  const uint8_t* blocks;
  int32_t type;
};

static void pack_panel(void* context, int panel, int) {
  const Packing& p = *static_cast<Packing*>(context);
  for (int column = panel * kPanel; column < (panel + 1) * kPanel; ++column) {
    const float* const x =
        column < p.w->n ? p.weight + static_cast<int64_t>(column) * p.w->k : nullptr;
    pack_row(*p.w, panel, column, x);
  }
}

static void pack(Pool* pool, Linear* w, const float* weight) {
  Packing packing{w, weight, nullptr, 0};
  pool->run(w->np / kPanel, pack_panel, &packing);
}

INLINE int block_bytes(int type) { return type == kGgmlQ4_0 ? 18 : type == kGgmlQ4_1 ? 20 : 34; }

// The 32 values of one of ggml's blocks (Q4_0, Q4_1, Q8_0).
static void unpack_block(int32_t type, const uint8_t* block, float* x) {
  uint16_t half[2];
  memcpy(half, block, 4);
  const float d = from_half(half[0]);
  const float m = type == kGgmlQ4_1 ? from_half(half[1]) : -8 * d;
  const uint8_t* const data = block + (type == kGgmlQ4_1 ? 4 : 2);
  for (int i = 0; i < kGroup; ++i) {
    if (type == kGgmlQ8_0) {
      x[i] = static_cast<float>(static_cast<int8_t>(data[i])) * d;
    } else {
      const int q = i < 16 ? data[i] & 15 : data[i - 16] >> 4;
      x[i] = static_cast<float>(q) * d + m;
    }
  }
}

// Blocks into a kind that does not hold them as they are.
static void repack_block_panel(const Packing& p, int panel) {
  Linear* const w = p.w;
  float* const x = static_cast<float*>(malloc(sizeof(float) * static_cast<size_t>(w->kp)));
  if (x == nullptr) abort();  // some KiB
  const int groups = w->k / kGroup, size = block_bytes(p.type);
  for (int column = panel * kPanel; column < (panel + 1) * kPanel; ++column) {
    const uint8_t* const blocks = p.blocks + static_cast<int64_t>(column) * groups * size;
    for (int g = 0; column < w->n && g < groups; ++g) {
      unpack_block(p.type, blocks + g * size, x + g * kGroup);
    }
    pack_row(*w, panel, column, column < w->n ? x : nullptr);
  }
  free(x);
}

// Rows of ggml's blocks; k is a multiple of 32. 4-bit blocks into kQ4 and 8-bit ones into kQ8 are
// taken over bit by bit.
static void pack_block_panel(void* context, int panel, int) {
  const Packing& p = *static_cast<Packing*>(context);
  Linear* const w = p.w;
  if (w->kind != (p.type == kGgmlQ8_0 ? kQ8 : kQ4)) return repack_block_panel(p, panel);
  const int32_t type = p.type;
  const int size = block_bytes(type);
  const int groups = w->k / kGroup, group_bytes = w->kind == kQ4 ? 640 : 1088;
  for (int column = panel * kPanel; column < least(w->n, (panel + 1) * kPanel); ++column) {
    for (int g = 0; g < groups; ++g) {
      const uint8_t* block = p.blocks + (static_cast<int64_t>(column) * groups + g) * size;
      uint8_t* const group = w->data + column / kPanel * w->panel_bytes + g * group_bytes;
      const int c = column % kPanel;
      uint16_t d, m = 0;
      memcpy(&d, block, 2);
      if (type == kGgmlQ8_0) {
        reinterpret_cast<uint16_t*>(group + 1024)[c] = d;
        for (int i = 0; i < kGroup; ++i) {
          group[byte_place(i, c)] = static_cast<uint8_t>(block[2 + i] + 128);
        }
        continue;
      }
      if (type == kGgmlQ4_1) {
        memcpy(&m, block + 2, 2);
      } else {  // (q - 8) d = q d + m
        m = to_half(-8 * from_half(d));
      }
      const uint8_t* const nibbles = block + size - 16;
      for (int i = 0; i < 16; ++i) group[byte_place(i, c)] = nibbles[i];
      reinterpret_cast<uint16_t*>(group + 512)[c] = d;
      reinterpret_cast<uint16_t*>(group + 512)[kPanel + c] = m;
    }
  }
}

static void pack_blocks(Pool* pool, Linear* w, int32_t type, const uint8_t* blocks) {
  Packing packing{w, nullptr, blocks, type};
  pool->run(w->np / kPanel, pack_block_panel, &packing);
}

// One row of W as floats [kp], for embeddings.
static void unpack_row(const Linear& w, int row, float* x) {
  const uint8_t* const panel = w.data + row / kPanel * w.panel_bytes;
  const int c = row % kPanel;
  if (w.kind == kF32) {
    const float* const from = reinterpret_cast<const float*>(panel) + c;
    for (int i = 0; i < w.kp; ++i) x[i] = from[i * kPanel];
    return;
  }
  if (w.kind == kBf16) {
    const uint16_t* const from = reinterpret_cast<const uint16_t*>(panel) + 2 * c;
    for (int i = 0; i < w.kp; ++i) x[i] = from_bf16(from[i / 2 * 2 * kPanel + i % 2]);
    return;
  }
  const int group_bytes = w.kind == kInt8 ? 1024 : w.kind == kQ8 ? 1088 : 640;
  for (int g = 0; g < w.kp / kGroup; ++g) {
    const uint8_t* const group = panel + g * group_bytes;
    const uint16_t* const halves =
        reinterpret_cast<const uint16_t*>(group + (w.kind == kQ4 ? 512 : 1024));
    const float step = w.kind == kInt8 ? w.scales[row] : from_half(halves[c]);
    const float start = w.kind == kQ4 ? from_half(halves[kPanel + c]) : -128 * step;
    for (int i = 0; i < kGroup; ++i) {
      int q = group[byte_place(w.kind == kQ4 ? i % 16 : i, c)];
      if (w.kind == kQ4) q = i < 16 ? q & 15 : q >> 4;
      x[g * kGroup + i] = static_cast<float>(q) * step + start;
    }
  }
}

}  // namespace
}  // namespace pagelab
