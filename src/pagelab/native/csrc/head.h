// The end of a step: whether it is finite, logits of the sampled rows, and the greatest of each.
#pragma once

#include "step.h"

namespace pagelab {
namespace {

constexpr int kHeadPieces = 128;  // at most

struct Head {
  Run* run;
  int grain;
};

// Some panels of the head for all sampled rows: logits, or only the best of each row.
static void head_piece(void* context, int piece, int) {
  const Head& head = *static_cast<Head*>(context);
  const Run& run = *head.run;
  const Linear& w = *run.target;
  const int rows = run.s->num_sampled, first = piece * head.grain;
  float* const best = run.w.best + static_cast<int64_t>(piece) * rows;
  int32_t* const token = run.w.best_token + static_cast<int64_t>(piece) * rows;
  for (int row = 0; row < rows; ++row) best[row] = -INFINITY, token[row] = -1;
  const int end = least(first + head.grain, w.np / kPanel);
  for (int panel = first; panel < end; ++panel) {
    for (int row = 0; row < rows; row += kFloatRows) {
      float local[kFloatRows * kPanel];
      const int count = least(kFloatRows, rows - row);
      Out out{local, kPanel, false};
      if (run.s->logits != nullptr) {
        out = Out{run.s->logits + static_cast<int64_t>(row) * w.np + panel * kPanel, w.np, false};
      }
      panel_product(w, run.rows, row, count, panel, row == 0 && panel + 1 < end, out);
      for (int r = 0; r < count; ++r) {
        const float* const logits = out.c + r * out.ldc;
        const int columns = least(kPanel, w.n - panel * kPanel);
        float top = best[row + r];
        if (columns == kPanel) {  // mostly none of them is better
          vf all = load(logits);
          bool odd = false;
          UNROLL for (int v = 0; v < NV; ++v) {
            const vf x = load(logits + v * VF);
            all = vmax(all, x);
            odd |= !(sum(x - x) == 0);
          }
          if (!odd && largest(all) <= top) continue;
        }
        for (int c = 0; c < columns; ++c) {
          if (logits[c] > top || logits[c] != logits[c]) {  // a NaN stays the best
            top = logits[c];
            token[row + r] = panel * kPanel + c;
            if (top != top) break;
          }
        }
        best[row + r] = top;
      }
    }
  }
}

static void run_head(Run* run) {
  const int rows = run->s->num_sampled;
  if (rows == 0) return;
  aim(run, run->m->head, rows);
  over_rows(run, rows, norm_before_head);
  const int panels = run->target->np / kPanel;
  Head head{run, (panels + kHeadPieces - 1) / kHeadPieces};
  const int pieces = (panels + head.grain - 1) / head.grain;
  run->pool->run(pieces, head_piece, &head);
  for (int row = 0; row < rows; ++row) {
    float top = -INFINITY;
    int32_t token = -1;
    for (int i = 0; i < pieces && top == top; ++i) {
      const float own = run->w.best[static_cast<int64_t>(i) * rows + row];
      if (own > top || own != own) {
        top = own;
        token = run->w.best_token[static_cast<int64_t>(i) * rows + row];
      }
    }
    run->s->tokens[row] = top - top == 0 ? token : -1;
  }
}

static void check_finite(const Run& run) {
  const int padded = rounded(run.m->hidden);
  int row = -1;
  for (int seq = 0; seq < run.s->num_seqs; ++seq) {
    row += run.s->queries[seq];
    const float* const x = run.w.x + static_cast<int64_t>(row) * padded;
    vf differences = {};
    for (int i = 0; i < padded; i += VF) differences += load(x + i) - load(x + i);
    run.s->finite[seq] = sum(differences) == 0;
  }
}

// 0, or 1 where there is no memory.
static int32_t run_step(Pool* pool, const Model* m, const Step* s) {
  Run run{};
  run.pool = pool, run.m = m, run.s = s, run.since = now();
  cut_tasks(*m, *s, &run.w);
  const int64_t bytes = cut(*m, *s, pool->threads(), kHeadPieces, nullptr, &run.w);
  uint8_t* const memory = pool->memory(bytes);
  if (memory == nullptr) return 1;
  cut(*m, *s, pool->threads(), kHeadPieces, memory, &run.w);
  cut_tasks(*m, *s, &run.w);
  for (int seq = 0, row = 0; seq < s->num_seqs; ++seq) {
    for (int i = 0; i < s->queries[seq]; ++i, ++row) {
      run.w.row_seq[row] = seq;
      run.w.row_position[row] = s->keys[seq] - s->queries[seq] + i;
    }
  }
  // the padding of `attended` may hold anything: it is multiplied by zeros, but must be finite
  const int64_t attended = static_cast<int64_t>(s->num_tokens) * m->layer[0].output->kp;
  if (m->layer[0].output->k != m->layer[0].output->kp) {
    memset(run.w.attended, 0, static_cast<size_t>(attended) * 4);
  }
  over_rows(&run, s->num_tokens, embed);
  ended(&run, kEmbed);
  for (int layer = 0; layer < m->layers; ++layer) run_layer(&run, layer);
  check_finite(run);
  const int64_t padded = rounded(m->hidden);
  for (int i = 0; i < s->num_kept; ++i) {
    memcpy(s->hidden + i * padded, run.w.x + s->kept[i] * padded,
           static_cast<size_t>(padded) * 4);
  }
  run_head(&run);
  ended(&run, kHead);
  return 0;
}

// Attention alone, for tests: q [T, heads, head_dim] floats, not scaled → out, the same shape.
struct Alone {
  const Run* run;
  const float* q;
  float* out;
};

static void alone_piece(void* context, int piece, int worker) {
  const Alone& alone = *static_cast<Alone*>(context);
  const int64_t stride = static_cast<int64_t>(alone.run->m->heads) * alone.run->m->head_dim;
  attend_task(*alone.run, alone.run->w.tasks[piece], alone.q, stride, alone.out, stride, worker);
}

}  // namespace
}  // namespace pagelab
