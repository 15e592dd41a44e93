// A step of a decoder: from token ids to the tokens with the greatest logits, in one call.
#pragma once

#include "elementwise.h"
#include "linear.h"
#include "pack.h"
#include "workspace.h"

namespace pagelab {
namespace {

struct Run {
  Pool* pool;
  const Model* m;
  const Step* s;
  Workspace w;
  int layer;
  Rows rows;  // the left side of the product that comes next
  const Linear* target;
  double since;

  const Layer& here() const { return m->layer[layer]; }
  float* own(int worker) const {
    return reinterpret_cast<float*>(w.own + worker * w.own_bytes);
  }
};

static double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// The time since the last part ended belongs to this one.
static void ended(Run* run, Part part) {
  const double time = now();
  run->s->seconds[part] += time - run->since;
  run->since = time;
}

struct OverRows {
  Run* run;
  PieceFn fn;
  int rows, chunk;
};

static void rows_piece(void* context, int piece, int worker) {
  const OverRows& over = *static_cast<OverRows*>(context);
  const int first = piece * over.chunk;
  for (int row = first; row < least(first + over.chunk, over.rows); ++row) {
    over.fn(over.run, row, worker);
  }
}

// Rows are little work each: few are done by the caller alone, many in pieces.
static void over_rows(Run* run, int rows, PieceFn fn) {
  const int chunk = rows <= 2 ? 2 : most(1, least(16, rows / (4 * run->pool->threads())));
  OverRows over{run, fn, rows, chunk};
  run->pool->run((rows + chunk - 1) / chunk, rows_piece, &over);
}

static void aim(Run* run, const Linear* target, int rows) {
  run->target = target;
  run->rows = rows_at(run->w.rows, target->kind, rows, target->kp);
}

static void multiply(Run* run, int rows, float* out, bool add) {
  product(run->pool, *run->target, run->rows, rows, out, add);
}

static void embed(void* context, int row, int) {
  Run& run = *static_cast<Run*>(context);
  const Model& m = *run.m;
  const int padded = rounded(m.hidden), position = run.w.row_position[row];
  float* const x = run.w.x + static_cast<int64_t>(row) * padded;
  unpack_row(*m.embedding, run.s->token_ids[row], x);
  if (m.position_embedding != nullptr) {
    const float* const own = m.position_embedding + static_cast<int64_t>(position) * m.hidden;
    for (int i = 0; i < m.hidden; ++i) x[i] += own[i];
  }
  if (m.frequencies == nullptr) return;
  const int half = m.head_dim / 2;
  for (int i = 0; i < half; ++i) {
    const float angle = static_cast<float>(position) * m.frequencies[i];
    run.w.cosine[row * half + i] = cosf(angle);
    run.w.sine[row * half + i] = sinf(angle);
  }
}

static void norm_into(Run& run, const Norm& norm, int from, int row, int worker) {
  const int padded = rounded(run.m->hidden);
  float* const y = run.own(worker);
  norm_row(norm, run.m->layernorm != 0, run.m->eps,
           run.w.x + static_cast<int64_t>(from) * padded, run.m->hidden, padded, y);
  set_row(run.rows, run.target->kind, row, y, run.target->kp);
}

static void norm_before_attention(void* context, int row, int worker) {
  Run& run = *static_cast<Run*>(context);
  norm_into(run, run.here().attention_norm, row, row, worker);
}

static void norm_before_mlp(void* context, int row, int worker) {
  Run& run = *static_cast<Run*>(context);
  norm_into(run, run.here().mlp_norm, row, row, worker);
}

static void norm_before_head(void* context, int row, int worker) {
  Run& run = *static_cast<Run*>(context);
  norm_into(run, run.m->final_norm, run.s->sampled[row], row, worker);
}

static Cache cache_of(const Model& m, const Step& s, int layer, int seq, int head) {
  const int bytes = m.kv_type == kKvF32 ? 4 : m.kv_type == kKvBf16 ? 2 : 1;
  const int slot_bytes = m.head_dim * bytes + (m.kv_type == kKvInt8 ? 4 : 0);  // with its scale
  const int64_t head_bytes = static_cast<int64_t>(s.num_blocks) * s.block_size * slot_bytes;
  const uint8_t* const k = static_cast<const uint8_t*>(s.kv[layer]) + head * head_bytes;
  return Cache{k, k + m.kv_heads * head_bytes, s.block_ids + s.table[seq], s.block_size,
               m.head_dim, bytes};
}

static void write_floats(const Model& m, const float* from, const uint8_t* to) {
  uint8_t* const own = const_cast<uint8_t*>(to);
  if (m.kv_type == kKvBf16) {
    for (int i = 0; i < m.head_dim; i += VF) {
      store_bf16(reinterpret_cast<uint16_t*>(own) + i, load(from + i));
    }
  } else {
    memcpy(own, from, static_cast<size_t>(m.head_dim) * 4);
  }
}

// Norms and turns q and k of a row, scales q, and writes k and v into the cache.
static void place_row(void* context, int row, int worker) {
  Run& run = *static_cast<Run*>(context);
  const Model& m = *run.m;
  const Layer& layer = run.here();
  const int D = m.head_dim, half = D / 2;
  float* const qkv = run.w.qkv + static_cast<int64_t>(row) * layer.qkv->np;
  for (int head = 0; head < m.heads + m.kv_heads; ++head) {
    float* const x = qkv + head * D;
    const Norm& norm = head < m.heads ? layer.q_norm : layer.k_norm;
    if (norm.weight != nullptr) norm_row(norm, false, m.eps, x, D, D, x);
    if (m.frequencies != nullptr) rotate(x, run.w.cosine + row * half, run.w.sine + row * half, D);
    if (head >= m.heads) continue;
    for (int i = 0; i < D; i += VF) store(x + i, load(x + i) * m.scale);
  }
  const int position = run.w.row_position[row];
  for (int head = 0; head < m.kv_heads; ++head) {
    const Cache cache = cache_of(m, *run.s, run.layer, run.w.row_seq[row], head);
    const float* const k = qkv + (m.heads + head) * D;
    const float* const v = k + m.kv_heads * D;
    if (m.kv_type == kKvInt8) {
      write_bytes(cache, position, k, v, reinterpret_cast<uint8_t*>(run.own(worker)));
    } else {
      write_floats(m, k, cache.at(cache.k, position));
      write_floats(m, v, cache.at(cache.v, position));
    }
  }
}

INLINE void divide(const float* x, float by, int n, float* to) {
  const float inverse = 1.0f / by;
  for (int i = 0; i < n; i += VF) store(to + i, load(x + i) * inverse);
}

// One task; q's rows are `q_stride` floats apart, the result's `o_stride`.
static void attend_task(const Run& run, const Task& t, const float* q, int64_t q_stride, float* o,
                        int64_t o_stride, int worker) {
  const Model& m = *run.m;
  const int D = m.head_dim, group = group_of(m);
  const Cache cache = cache_of(m, *run.s, run.layer, t.seq, t.head);
  const bool bf16 = m.kv_type == kKvBf16;
  q += t.row * q_stride + t.head * group * D;
  o += t.row * o_stride + t.head * group * D;
  const PromptScratch scratch = prompt_scratch_at(reinterpret_cast<uint8_t*>(run.own(worker)),
                                                  run.w.most_rows, rounded(D));
  Online alone[kQueryRows * 2];
  if (t.queries > 1) {
    if (m.kv_type == kKvInt8) {
      over_bytes(cache, q, q_stride, t.queries, group, t.position, 0, t.position + t.queries,
                 scratch, alone);
      for (int row = 0; row < t.queries * group; ++row) {
        divide(scratch.o + static_cast<int64_t>(row) * D, alone[row].l, D,
               o + row / group * o_stride + row % group * D);
      }
      return;
    }
    const auto work = bf16 ? several<true> : several<false>;
    work(cache, q, q_stride, t.queries, group, t.position, o, o_stride, scratch);
    return;
  }
  Online* const state = t.part < 0 ? alone : run.w.part_states + t.part * group;
  float* const to = t.part < 0 ? o : run.w.parts + static_cast<int64_t>(t.part) * group * D;
  if (m.kv_type == kKvInt8) {
    over_bytes(cache, q, 0, 1, group, t.position, t.first, t.last, scratch, state);
    memcpy(to, scratch.o, sizeof(float) * static_cast<size_t>(group * D));
  } else {
    const auto work = bf16 ? few_heads<true> : few_heads<false>;
    work(group, cache, q, t.first, t.last, to, state);
  }
  if (t.part >= 0) return;
  for (int head = 0; head < group; ++head) divide(o + head * D, state[head].l, D, o + head * D);
}

static void attention_piece(void* context, int piece, int worker) {
  const Run& run = *static_cast<Run*>(context);
  attend_task(run, run.w.tasks[piece], run.w.qkv, run.here().qkv->np, run.w.attended,
              run.here().output->kp, worker);
}

// Adds up the splits of a row's attention.
static void join_row(const Run& run, int row, float* out) {
  const Model& m = *run.m;
  if (run.s->queries[run.w.row_seq[row]] > 1 || run.w.row_part[row] < 0) return;
  const int D = m.head_dim, group = group_of(m);
  const int splits = splits_of(run.s->keys[run.w.row_seq[row]]);
  for (int head = 0; head < m.heads; ++head) {
    const int first = run.w.row_part[row] + head / group * splits, own = head % group;
    float m_all = -INFINITY, l_all = 0;
    for (int i = 0; i < splits; ++i) {
      m_all = fmaxf(m_all, run.w.part_states[(first + i) * group + own].m);
    }
    float* const o = out + head * D;
    memset(o, 0, static_cast<size_t>(D) * 4);
    for (int i = 0; i < splits; ++i) {
      const Online& state = run.w.part_states[(first + i) * group + own];
      const float weight = expf(state.m - m_all);
      const float* const part = run.w.parts + (static_cast<int64_t>(first + i) * group + own) * D;
      l_all += state.l * weight;
      for (int j = 0; j < D; j += VF) store(o + j, load(o + j) + load(part + j) * weight);
    }
    for (int j = 0; j < D; j += VF) store(o + j, load(o + j) * (1.0f / l_all));
  }
}

static void take_attended(void* context, int row, int) {
  Run& run = *static_cast<Run*>(context);
  float* const own = run.w.attended + static_cast<int64_t>(row) * run.target->kp;
  join_row(run, row, own);
  set_row(run.rows, run.target->kind, row, own, run.target->kp);
}

static void activate_row(void* context, int row, int worker) {
  Run& run = *static_cast<Run*>(context);
  const Model& m = *run.m;
  const float* const gate = run.w.inner + static_cast<int64_t>(row) * run.here().up->np;
  float* const y = run.own(worker);
  for (int i = 0; i < m.inner; i += VF) {
    vf value = activate(m.activation, load(gate + i));
    if (m.gated != 0) value *= load(gate + m.inner + i);
    store(y + i, value);
  }
  for (int i = m.inner; i < run.target->kp; ++i) y[i] = 0;
  set_row(run.rows, run.target->kind, row, y, run.target->kp);
}

static void run_layer(Run* run, int layer) {
  const int rows = run->s->num_tokens;
  run->layer = layer;
  const Layer& l = run->here();
  aim(run, l.qkv, rows);
  over_rows(run, rows, norm_before_attention);
  ended(run, kNorm);
  multiply(run, rows, run->w.qkv, false);
  ended(run, kLinear);
  over_rows(run, rows, place_row);
  ended(run, kPlace);
  run->pool->run(run->w.num_tasks, attention_piece, run);
  aim(run, l.output, rows);
  over_rows(run, rows, take_attended);
  ended(run, kAttention);
  multiply(run, rows, run->w.x, true);
  ended(run, kLinear);
  aim(run, l.up, rows);
  over_rows(run, rows, norm_before_mlp);
  ended(run, kNorm);
  multiply(run, rows, run->w.inner, false);
  ended(run, kLinear);
  aim(run, l.down, rows);
  over_rows(run, rows, activate_row);
  ended(run, kActivation);
  multiply(run, rows, run->w.x, true);
  ended(run, kLinear);
}

}  // namespace
}  // namespace pagelab
