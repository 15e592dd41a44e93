// The memory of one step: what it is cut into.
#pragma once

#include "int8_attention.h"

namespace pagelab {
namespace {

// One piece of a layer's attention: queries of one sequence under one K/V head.
struct Task {
  int32_t seq, head, row, queries, position;  // `position` of the first query
  int32_t first, last, part;                  // keys; where a split's result goes, or -1
};

struct Workspace {
  float *x, *qkv, *attended, *inner, *cosine, *sine, *parts;
  Online* part_states;
  uint8_t* rows;  // the left side of a product
  int32_t *row_seq, *row_position, *row_part;
  Task* tasks;
  int num_tasks, num_parts, most_rows;
  uint8_t* own;  // each thread's
  int64_t own_bytes;
  float* best;  // the head's greatest logits and their tokens: [pieces, sampled]
  int32_t* best_token;
};

INLINE int rounded(int n) { return (n + kPanel - 1) / kPanel * kPanel; }

INLINE int group_of(const Model& m) { return m.heads / m.kv_heads; }

// Queries of a task of several.
INLINE int task_queries(const Model& m) { return most(1, kQueryRows / group_of(m)); }

INLINE int splits_of(int keys) { return (keys + kSplit - 1) / kSplit; }

// Counts tasks and parts; writes the tasks where there is room for them. Long ones come first.
static void cut_tasks(const Model& m, const Step& s, Workspace* w) {
  int count = 0, parts = 0;
  const int most_queries = task_queries(m);
  for (int several_first = 1; several_first >= 0; --several_first) {
    int row = 0;
    for (int i = 0; i < s.num_seqs; row += s.queries[i], ++i) {
      if ((s.queries[i] > 1) != (several_first == 1)) continue;
      const int position = s.keys[i] - s.queries[i];
      if (s.queries[i] > 1) {
        const int pieces = (s.queries[i] + most_queries - 1) / most_queries;
        for (int piece = pieces - 1; piece >= 0; --piece) {
          const int from = piece * most_queries, own = least(most_queries, s.queries[i] - from);
          for (int head = 0; head < m.kv_heads; ++head, ++count) {
            if (w->tasks == nullptr) continue;
            w->tasks[count] = Task{i, head, row + from, own, position + from, 0, 0, -1};
          }
        }
        continue;
      }
      const int splits = splits_of(s.keys[i]);
      if (w->tasks != nullptr) w->row_part[row] = splits > 1 ? parts : -1;
      for (int head = 0; head < m.kv_heads; ++head) {
        for (int split = 0; split < splits; ++split, ++count) {
          const int part = splits > 1 ? parts++ : -1;
          if (w->tasks == nullptr) continue;
          w->tasks[count] = Task{i, head, row, 1, position, split * kSplit,
                                 least(s.keys[i], (split + 1) * kSplit), part};
        }
      }
    }
  }
  w->num_tasks = count;
  w->num_parts = parts;
}

// Takes memory in turn; with no base it only adds up.
struct Cutter {
  uint8_t* base;
  int64_t used = 0;
  template <typename T>
  void take(T** to, int64_t count) {
    *to = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += (count * static_cast<int64_t>(sizeof(T)) + 256 + 63) / 64 * 64;
  }
};

INLINE int64_t most64(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t product_rows_bytes(const Model& m, const Step& s) {
  int64_t bytes = rows_bytes(m.head->kind, s.num_sampled, m.head->kp);
  for (int i = 0; i < m.layers; ++i) {
    const Layer& own = m.layer[i];
    const Linear* const all[] = {own.qkv, own.output, own.up, own.down};
    for (const Linear* l : all) {
      bytes = most64(bytes, rows_bytes(l->kind, s.num_tokens, l->kp));
    }
  }
  return bytes;
}

static int64_t cut(const Model& m, const Step& s, int threads, int head_pieces, uint8_t* base,
                   Workspace* w) {
  const Layer& first = m.layer[0];
  const int64_t tokens = s.num_tokens;
  const int dp = rounded(m.head_dim), group = group_of(m);
  w->most_rows = task_queries(m) * group;
  w->own_bytes = most64(prompt_scratch_bytes(w->most_rows, dp),
                        4 * static_cast<int64_t>(most(first.down->kp, rounded(m.hidden))) + 256);
  w->own_bytes = (w->own_bytes + 63) / 64 * 64;
  Cutter c{base};
  c.take(&w->x, tokens * rounded(m.hidden));
  c.take(&w->qkv, tokens * first.qkv->np);
  c.take(&w->attended, tokens * first.output->kp);
  c.take(&w->inner, tokens * first.up->np);
  c.take(&w->cosine, tokens * m.head_dim);
  c.take(&w->sine, tokens * m.head_dim);
  c.take(&w->parts, static_cast<int64_t>(w->num_parts) * group * m.head_dim);
  c.take(&w->part_states, static_cast<int64_t>(w->num_parts) * group);
  c.take(&w->rows, product_rows_bytes(m, s));
  c.take(&w->row_seq, tokens);
  c.take(&w->row_position, tokens);
  c.take(&w->row_part, tokens);
  c.take(&w->tasks, w->num_tasks);
  c.take(&w->own, w->own_bytes * threads);
  c.take(&w->best, static_cast<int64_t>(head_pieces) * s.num_sampled);
  c.take(&w->best_token, static_cast<int64_t>(head_pieces) * s.num_sampled);
  return c.used;
}

}  // namespace
}  // namespace pagelab
