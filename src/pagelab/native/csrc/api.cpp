// The C ABI that Python calls, and the choice of an instruction set.
#include <cstdlib>
#include <cstring>
#include <new>

#include "model.h"
#include "pool.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace pagelab {

#if defined(__x86_64__)
extern const Isa isa_avx512_vnni, isa_avx512, isa_avx2;
#endif
#if defined(__aarch64__)
extern const Isa isa_neon_bf16, isa_neon_dotprod, isa_neon;
#else
extern const Isa isa_baseline;
#endif

namespace {

struct Choice {
  const Isa* isa;
  bool runs;
};

#if defined(__aarch64__)
struct Features {
  bool dotprod, bf16;
};

Features features() {
#if defined(__linux__)  // the bits of <asm/hwcap.h>, which old systems lack
  return {(getauxval(AT_HWCAP) >> 20 & 1) != 0, (getauxval(AT_HWCAP2) >> 14 & 1) != 0};
#elif defined(__APPLE__)
  const auto has = [](const char* name) {
    int value = 0;
    std::size_t size = sizeof(value);
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
  };
  return {has("hw.optional.arm.FEAT_DotProd"), has("hw.optional.arm.FEAT_BF16")};
#else
  return {false, false};
#endif
}
#endif

#if defined(__x86_64__)
bool has_f16c() {  // clang's __builtin_cpu_supports does not know it
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

// The fastest first.
const Choice* choices(int* count) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni") &&
                    __builtin_cpu_supports("avx512bf16");
  static const Choice all[] = {
      {&isa_avx512_vnni, vnni}, {&isa_avx512, avx512}, {&isa_avx2, avx2}, {&isa_baseline, true}};
#elif defined(__aarch64__)
  const Features has = features();
  static const Choice all[] = {{&isa_neon_bf16, has.dotprod && has.bf16},
                               {&isa_neon_dotprod, has.dotprod},
                               {&isa_neon, true}};
#else
  static const Choice all[] = {{&isa_baseline, true}};
#endif
  *count = static_cast<int>(sizeof(all) / sizeof(all[0]));
  return all;
}

}  // namespace
}  // namespace pagelab

using namespace pagelab;

#define API extern "C" __attribute__((visibility("default")))

// Grows whenever a structure or a function changes: Python loads no other.
API int32_t pagelab_version() { return 2; }

// The i-th instruction set that runs here, the fastest first; null behind the last.
API const Isa* pagelab_isa(int32_t index) {
  int count = 0;
  const Choice* const all = choices(&count);
  for (int i = 0; i < count; ++i) {
    if (all[i].runs && index-- == 0) return all[i].isa;
  }
  return nullptr;
}

API const char* pagelab_isa_name(const Isa* isa) { return isa->name; }

API Pool* pagelab_pool_new(int32_t threads) { return new (std::nothrow) Pool(threads); }
API void pagelab_pool_free(Pool* pool) { delete pool; }

// An empty weight with room for its panels in the pool's lasting memory; its data is null without
// memory. `biased` makes room for a bias.
API Linear* pagelab_linear_new(Pool* pool, int32_t kind, int32_t n, int32_t k, int32_t biased) {
  Linear* const w = new (std::nothrow) Linear{};
  if (w == nullptr) return nullptr;
  w->kind = kind, w->n = n, w->k = k;
  w->np = (n + kPanel - 1) / kPanel * kPanel;
  w->kp = (k + kGroup - 1) / kGroup * kGroup;
  const int64_t numbers = static_cast<int64_t>(w->kp) * kPanel, groups = w->kp / kGroup;
  switch (kind) {
    case kF32: w->panel_bytes = numbers * 4; break;
    case kBf16: w->panel_bytes = numbers * 2; break;
    case kInt8: w->panel_bytes = numbers; break;
    case kQ8: w->panel_bytes = numbers + groups * kPanel * 2; break;
    default: w->panel_bytes = numbers / 2 + groups * kPanel * 4; break;
  }
  w->data = pool->lasting(w->panel_bytes * (w->np / kPanel));
  w->scales = reinterpret_cast<float*>(pool->lasting(w->np * 4));
  w->bias = biased ? reinterpret_cast<float*>(pool->lasting(w->np * 4)) : nullptr;
  if (w->scales == nullptr || (biased && w->bias == nullptr)) w->data = nullptr;
  return w;
}

API void pagelab_linear_free(Linear* w) { delete w; }

API void pagelab_pack(const Isa* isa, Pool* pool, Linear* w, const float* weight,
                      const float* bias) {
  if (bias != nullptr) std::memcpy(w->bias, bias, static_cast<std::size_t>(w->n) * 4);
  isa->pack(pool, w, weight);
}

API void pagelab_pack_blocks(const Isa* isa, Pool* pool, Linear* w, int32_t type,
                             const uint8_t* blocks, const float* bias) {
  if (bias != nullptr) std::memcpy(w->bias, bias, static_cast<std::size_t>(w->n) * 4);
  isa->pack_blocks(pool, w, type, blocks);
}

API void pagelab_linear(const Isa* isa, Pool* pool, const Linear* w, const float* x, int32_t rows,
                        float* out) {
  isa->linear(pool, w, x, rows, out);
}

API void pagelab_attend(const Isa* isa, Pool* pool, const Model* model, const Step* step,
                        const float* q, int32_t layer, float* out) {
  isa->attend(pool, model, step, q, layer, out);
}

API int32_t pagelab_step(const Isa* isa, Pool* pool, const Model* model, const Step* step) {
  return isa->step(pool, model, step);
}

API int32_t pagelab_logits(const Isa* isa, Pool* pool, const Model* model, const float* hidden,
                           int32_t rows, float* out) {
  return isa->logits(pool, model, hidden, rows, out);
}
