// All kernels for one instruction set: this file is compiled once for each, with PAGELAB_ISA its
// name and the compiler's flags for it.
#include "head.h"

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
#define JOIN_OF(a, b) a##b
#define JOIN(a, b) JOIN_OF(a, b)

namespace pagelab {
namespace {

// x [rows, k] floats → out [rows, np]; for tests and benchmarks.
void linear(Pool* pool, const Linear* w, const float* x, int32_t rows, float* out) {
  uint8_t* const memory = pool->memory(rows_bytes(w->kind, rows, w->kp) + 4 * w->kp + 256);
  float* const row = reinterpret_cast<float*>(memory);
  const Rows a = rows_at(memory + (4 * w->kp + 63) / 64 * 64, w->kind, rows, w->kp);
  for (int32_t i = 0; i < rows; ++i) {
    memcpy(row, x + static_cast<int64_t>(i) * w->k, static_cast<size_t>(w->k) * 4);
    for (int j = w->k; j < w->kp; ++j) row[j] = 0;
    set_row(a, w->kind, i, row, w->kp);
  }
  product(pool, *w, a, rows, out, false);
}

// The head alone, for rows whose hidden state a step has kept.
int32_t logits(Pool* pool, const Model* m, const float* hidden, int32_t rows, float* out) {
  const Linear& head = *m->head;
  const int64_t padded = rounded(m->hidden), own = (4 * most64(padded, head.kp) + 63) / 64 * 64;
  uint8_t* const memory = pool->memory(rows_bytes(head.kind, rows, head.kp) + own + 256);
  if (memory == nullptr) return 1;
  float* const normed = reinterpret_cast<float*>(memory);
  const Rows a = rows_at(memory + own, head.kind, rows, head.kp);
  for (int32_t i = 0; i < rows; ++i) {
    norm_row(m->final_norm, m->layernorm != 0, m->eps, hidden + i * padded, m->hidden,
             static_cast<int>(padded), normed);
    set_row(a, head.kind, i, normed, head.kp);
  }
  product(pool, head, a, rows, out, false);
  return 0;
}

void attend(Pool* pool, const Model* m, const Step* s, const float* q, int32_t layer, float* out) {
  const int64_t row_size = static_cast<int64_t>(m->heads) * m->head_dim;
  const int64_t size = row_size * s->num_tokens;
  Run run{};
  run.pool = pool, run.m = m, run.s = s, run.layer = layer;
  cut_tasks(*m, *s, &run.w);
  Workspace& w = run.w;
  const int dp = rounded(m->head_dim), group = group_of(*m);
  w.most_rows = task_queries(*m) * group;
  w.own_bytes = (prompt_scratch_bytes(w.most_rows, dp) + 63) / 64 * 64;
  float* scaled = nullptr;
  const auto cut_all = [&](uint8_t* base) {
    Cutter c{base};
    c.take(&scaled, size);
    c.take(&w.parts, static_cast<int64_t>(w.num_parts) * group * m->head_dim);
    c.take(&w.part_states, static_cast<int64_t>(w.num_parts) * group);
    c.take(&w.row_seq, s->num_tokens);
    c.take(&w.row_part, s->num_tokens);
    c.take(&w.tasks, w.num_tasks);
    c.take(&w.own, w.own_bytes * pool->threads());
    return c.used;
  };
  cut_all(pool->memory(cut_all(nullptr)));
  cut_tasks(*m, *s, &w);
  for (int64_t i = 0; i < size; ++i) scaled[i] = q[i] * m->scale;
  Alone alone{&run, scaled, out};
  pool->run(w.num_tasks, alone_piece, &alone);
  for (int seq = 0, row = 0; seq < s->num_seqs; ++seq) {
    for (int i = 0; i < s->queries[seq]; ++i, ++row) {
      w.row_seq[row] = seq;
      join_row(run, row, out + row * row_size);
    }
  }
}

}  // namespace

extern const Isa JOIN(isa_, PAGELAB_ISA);
const Isa JOIN(isa_, PAGELAB_ISA) = {
    TEXT(PAGELAB_ISA), pack, pack_blocks, linear, attend, run_step, logits};

}  // namespace pagelab
