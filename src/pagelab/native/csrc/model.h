// Plain structures that Python fills (pagelab.native.structures mirrors them field by field).
#pragma once

#include <stdint.h>

namespace pagelab {

constexpr int kPanel = 32;  // output columns that lie together in a packed weight
constexpr int kGroup = 32;  // inputs that share a scale

enum Kind : int32_t {
  kF32 = 0,   // [panel][k][32] float
  kBf16 = 1,  // [panel][k/2][32][2] bfloat16
  kInt8 = 2,  // [panel][k/4][32][4] bytes of value + 128; one float scale a column
  kQ8 = 3,    // [panel][group]: 1024 bytes as above, then d[32] in half precision
  kQ4 = 4,    // [panel][group]: 512 bytes of nibbles, then d[32], m[32]: value = q * d + m
};

enum KvType : int32_t { kKvF32 = 0, kKvBf16 = 1, kKvInt8 = 2 };  // kKvInt8: int8_attention.h
enum Activation : int32_t { kSilu = 0, kGeluTanh = 1, kGelu = 2 };

// W [n, k] packed; np and kp are n and k rounded up to 32, the rest is zeros.
struct Linear {
  int32_t kind, n, k, np, kp, unused;
  uint8_t* data;
  float* scales;  // kInt8: [np]
  float* bias;    // [np], or null
  int64_t panel_bytes;
};

// RMSNorm where bias is null, LayerNorm otherwise; absent where weight is null.
struct Norm {
  const float* weight;
  const float* bias;
};

struct Layer {
  Norm attention_norm, q_norm, k_norm, mlp_norm;
  const Linear *qkv, *output, *up, *down;
};

struct Model {
  int32_t hidden, inner, layers, heads, kv_heads, head_dim, vocab;
  int32_t gated, activation, layernorm, kv_type, unused;
  float eps, scale;
  const float* frequencies;         // [head_dim / 2], or null: no rotary embedding
  const float* position_embedding;  // [positions, hidden], or null
  const Linear* embedding;
  const Linear* head;
  Norm final_norm;
  const Layer* layer;
};

// One step. Sequence s brings queries[s] new tokens; with them it has keys[s]. Its blocks are
// block_ids[table[s] ..]. token_ids follow each other in the order of the sequences.
struct Step {
  int32_t num_tokens, num_seqs, num_sampled, num_blocks, block_size, num_kept;
  const int32_t *token_ids, *queries, *keys, *table, *block_ids;
  const int32_t* sampled;  // rows
  // a layer's cache [2, kv_heads, num_blocks, block_size, head_dim]; kKvInt8: head_dim + 4 bytes
  // a slot, in the order of int8_attention.h within a block
  void* const* kv;
  float* logits;           // [num_sampled, head->np], or null: only tokens
  int32_t* tokens;         // [num_sampled]: the greatest logit; -1 where none is finite
  uint8_t* finite;         // [num_seqs]: whether the last row's hidden state is
  const int32_t* kept;     // [num_kept] rows whose last hidden state is wanted, and
  float* hidden;           // [num_kept, hidden rounded up to 32] where it goes; see Isa::logits
  double* seconds;         // [kParts], added to: the caller's time by part of a step
};

enum Part { kEmbed, kNorm, kLinear, kPlace, kAttention, kActivation, kHead, kParts };

class Pool;

// What is compiled once for each instruction set.
struct Isa {
  const char* name;
  void (*pack)(Pool*, Linear*, const float* weight);
  void (*pack_blocks)(Pool*, Linear*, int32_t type, const uint8_t* blocks);
  void (*linear)(Pool*, const Linear*, const float* x, int32_t rows, float* out);
  void (*attend)(Pool*, const Model*, const Step*, const float* q, int32_t layer, float* out);
  int32_t (*step)(Pool*, const Model*, const Step*);
  // hidden [rows, hidden rounded up to 32], as Step::hidden → out [rows, head->np]
  int32_t (*logits)(Pool*, const Model*, const float* hidden, int32_t rows, float* out);
};

// ggml's numbers of the block types that `pack_blocks` reads.
constexpr int32_t kGgmlQ4_0 = 2, kGgmlQ4_1 = 3, kGgmlQ8_0 = 8;

}  // namespace pagelab
