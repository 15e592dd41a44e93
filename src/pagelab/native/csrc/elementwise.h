// What a layer does to single rows: norms, rotary embedding, activations.
#pragma once

#include "vec.h"

namespace pagelab {
namespace {

// y [padded] from x [padded], both with zeros behind `size`; weights are padded with zeros, too.
static void norm_row(const Norm& norm, bool layernorm, float eps, const float* x, int size,
                     int padded, float* y) {
  float mean = 0;
  if (layernorm) {
    vf total = {};
    for (int i = 0; i < padded; i += VF) total += load(x + i);
    mean = sum(total) / static_cast<float>(size);
  }
  vf squares = {};
  for (int i = 0; i < padded; i += VF) {
    const vf value = load(x + i) - mean;
    squares += value * value;
  }
  // the padding's (0 - mean)^2 are not the row's
  const float padding = static_cast<float>(padded - size) * mean * mean;
  const float scale = 1.0f / sqrtf((sum(squares) - padding) / static_cast<float>(size) + eps);
  for (int i = 0; i < padded; i += VF) {
    vf value = (load(x + i) - mean) * scale * load(norm.weight + i);
    if (norm.bias != nullptr) value += load(norm.bias + i);
    store(y + i, value);
  }
}

// Turns one head by its position: pairs (i, i + D/2).
INLINE void rotate(float* x, const float* cosine, const float* sine, int D) {
  const int half = D / 2;
  for (int i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cosine[i] - b * sine[i];
    x[i + half] = b * cosine[i] + a * sine[i];
  }
}

INLINE vf activate(int kind, vf x) {
  if (kind == kSilu) return x / (1.0f + vexp(-x));
  if (kind == kGeluTanh) {  // x (1 + tanh u) / 2 = x / (1 + e^-2u)
    const vf u = (x + x * x * x * 0.044715f) * 0.797884561f;
    return x / (1.0f + vexp(u * -2.0f));
  }
  vf y;
  UNROLL for (int i = 0; i < VF; ++i) y[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.707106781f));
  return y;
}

}  // namespace
}  // namespace pagelab
