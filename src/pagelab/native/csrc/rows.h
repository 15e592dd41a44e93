// The left side of a product: rows of activations in the form that a kind of weight takes.
#pragma once

#include "vec.h"

namespace pagelab {
namespace {

// kF32: floats; kBf16: bfloat16; others: bytes in -127..127 with a scale for each token and
// group of 32 inputs, so that a row depends on nothing but itself:
//
//   x[r, i] ~ scale[r, i / 32] * q[r, i]      total[r, g] = sum of a group's q
struct Rows {
  uint8_t* data;
  int64_t stride;  // bytes from a row to the next
  float* scale;    // [rows, groups]
  float* shift;    // [rows, groups]: scale * total
  int32_t* total;  // [rows, groups]
  int groups;
};

INLINE int bytes_a_number(int kind) { return kind == kF32 ? 4 : kind == kBf16 ? 2 : 1; }

static int64_t rows_bytes(int kind, int rows, int kp) {
  const int64_t groups = static_cast<int64_t>(rows) * (kp / kGroup);
  return static_cast<int64_t>(rows) * kp * bytes_a_number(kind) + groups * 12 + 256;
}

static Rows rows_at(uint8_t* memory, int kind, int rows, int kp) {
  Rows r;
  r.data = memory;
  r.stride = static_cast<int64_t>(kp) * bytes_a_number(kind);
  r.groups = kp / kGroup;
  const int64_t end = (r.stride * rows + 63) / 64 * 64;
  r.scale = reinterpret_cast<float*>(memory + end);
  r.shift = r.scale + static_cast<int64_t>(rows) * r.groups;
  r.total = reinterpret_cast<int32_t*>(r.shift + static_cast<int64_t>(rows) * r.groups);
  return r;
}

static void quantize_row(const float* x, int groups, int8_t* q, float* scale, float* shift,
                         int32_t* total) {
  for (int g = 0; g < groups; ++g) {
    vi biggest = {};
    UNROLL for (int v = 0; v < NV; ++v) {
      biggest = max_i(biggest, magnitude(load(x + g * kGroup + v * VF)));
    }
    const float peak = largest_magnitude(biggest);
    const float inverse = peak > 0 ? 127.0f / peak : 0.0f;
    vi sums = {};
    UNROLL for (int v = 0; v < NV; ++v) {
      const vi whole = nearest(load(x + g * kGroup + v * VF) * inverse);
      sums += whole;
      store_bytes(q + g * kGroup + v * VF, whole);
    }
    int32_t sum_q = 0;
    UNROLL for (int i = 0; i < VF; ++i) sum_q += sums[i];
    // a group that is not finite makes the row so
    const float step = peak / 127.0f;
    scale[g] = step;
    shift[g] = step * static_cast<float>(sum_q);
    total[g] = sum_q;
  }
}

// Put a row of floats [kp] (zeros behind k) into its form.
static void set_row(const Rows& rows, int kind, int row, const float* x, int kp) {
  uint8_t* const at = rows.data + row * rows.stride;
  if (kind == kF32) {
    memcpy(at, x, static_cast<size_t>(kp) * 4);
  } else if (kind == kBf16) {
    uint16_t* const out = reinterpret_cast<uint16_t*>(at);
    for (int i = 0; i < kp; i += VF) store_bf16(out + i, load(x + i));
  } else {
    const int64_t first = static_cast<int64_t>(row) * rows.groups;
    quantize_row(x, rows.groups, reinterpret_cast<int8_t*>(at), rows.scale + first,
                 rows.shift + first, rows.total + first);
  }
}

}  // namespace
}  // namespace pagelab
