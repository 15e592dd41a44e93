#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pagelab {
namespace {

// Longer than the gaps between two runs of a step, shorter than anybody would notice.
constexpr int kSpins = 20000;
// The caller waits for the last piece: after so many turns it lets others have the core.
constexpr int kSpinsBeforeYield = 2000;

constexpr int kBits = 20;  // of a piece's number
constexpr uint64_t kMask = (1u << kBits) - 1;
uint64_t number_of(uint64_t ticket) { return ticket >> (2 * kBits); }
int pieces_of(uint64_t ticket) { return static_cast<int>(ticket >> kBits & kMask); }
int next_of(uint64_t ticket) { return static_cast<int>(ticket & kMask); }

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

struct Pool::State {
  // The run's number, its pieces and the next piece in one word: a thread that comes late can
  // neither take a piece of a later run for one of its own nor one that does not exist.
  alignas(64) std::atomic<uint64_t> ticket{0};
  alignas(64) std::atomic<int> done{0};
  std::atomic<PieceFn> fn{nullptr};
  std::atomic<void*> context{nullptr};
  std::atomic<int> sleeping{0};
  std::atomic<bool> stop{false};
  std::mutex mutex;
  std::condition_variable wake;
  std::vector<std::thread> threads;
  uint8_t* memory = nullptr;
  int64_t memory_bytes = 0;
  std::vector<uint8_t*> chunks;
  uint8_t* chunk_at = nullptr;
  int64_t chunk_left = 0, chunk_bytes = 4 << 20;

  void take_pieces(int worker) {
    uint64_t ticket_now = ticket.load(std::memory_order_acquire);
    for (;;) {
      const int count = pieces_of(ticket_now), piece = next_of(ticket_now);
      if (piece >= count) return;
      const PieceFn run_piece = fn.load(std::memory_order_relaxed);
      void* const own = context.load(std::memory_order_relaxed);
      if (!ticket.compare_exchange_weak(ticket_now, ticket_now + 1, std::memory_order_acq_rel,
                                        std::memory_order_acquire)) {
        continue;
      }
      run_piece(own, piece, worker);
      done.fetch_add(1, std::memory_order_release);
      ticket_now = ticket.load(std::memory_order_acquire);
    }
  }

  void work(int worker) {
    uint64_t seen = 0;  // the number of the run that this thread has looked at
    while (!stop.load(std::memory_order_relaxed)) {
      int spins = 0;
      while (number_of(ticket.load(std::memory_order_acquire)) == seen &&
             !stop.load(std::memory_order_relaxed)) {
        if (++spins < kSpins) {
          pause();
          continue;
        }
        std::unique_lock<std::mutex> lock(mutex);
        sleeping.fetch_add(1);
        wake.wait(lock, [&] { return number_of(ticket.load()) != seen || stop.load(); });
        sleeping.fetch_sub(1);
        spins = 0;
      }
      seen = number_of(ticket.load(std::memory_order_acquire));
      take_pieces(worker);
    }
  }
};

Pool::Pool(int threads) : state_(new State) {
  for (int i = 1; i < threads; ++i) state_->threads.emplace_back([this, i] { state_->work(i); });
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    state_->stop.store(true);
  }
  state_->wake.notify_all();
  for (auto& thread : state_->threads) thread.join();
  std::free(state_->memory);
  for (uint8_t* chunk : state_->chunks) std::free(chunk);
  delete state_;
}

uint8_t* Pool::lasting(int64_t bytes) {
  State& s = *state_;
  bytes = (bytes + 63) / 64 * 64;
  if (bytes > s.chunk_left) {
    constexpr int64_t kHugePage = 2 << 20;
    if (s.chunk_bytes < 64 << 20) s.chunk_bytes *= 2;
    const int64_t wanted = bytes > s.chunk_bytes ? bytes : s.chunk_bytes;
    const int64_t size = (wanted + kHugePage - 1) / kHugePage * kHugePage;
    auto* const chunk = static_cast<uint8_t*>(std::aligned_alloc(kHugePage, size));
    if (chunk == nullptr) return nullptr;
#if defined(__linux__)
    madvise(chunk, size, MADV_HUGEPAGE);
#endif
    s.chunks.push_back(chunk);
    s.chunk_left = size;
    s.chunk_at = chunk;
  }
  uint8_t* const at = s.chunk_at;
  s.chunk_at += bytes;
  s.chunk_left -= bytes;
  std::memset(at, 0, bytes);
  return at;
}

uint8_t* Pool::memory(int64_t bytes) {
  State& s = *state_;
  if (bytes > s.memory_bytes) {
    std::free(s.memory);
    s.memory_bytes = (bytes + bytes / 4 + 63) / 64 * 64;
    s.memory = static_cast<uint8_t*>(std::aligned_alloc(64, s.memory_bytes));
    if (s.memory == nullptr) {
      s.memory_bytes = 0;
      return nullptr;
    }
    std::memset(s.memory, 0, s.memory_bytes);
  }
  return s.memory;
}

int Pool::threads() const { return static_cast<int>(state_->threads.size()) + 1; }

void Pool::run(int pieces, PieceFn fn, void* context) {
  State& s = *state_;
  if (pieces <= 1 || s.threads.empty()) {
    for (int i = 0; i < pieces; ++i) fn(context, i, 0);
    return;
  }
  // nobody takes a piece before the ticket changes: the last run's are all gone
  s.fn.store(fn, std::memory_order_relaxed);
  s.context.store(context, std::memory_order_relaxed);
  s.done.store(0, std::memory_order_relaxed);
  const uint64_t number = number_of(s.ticket.load(std::memory_order_relaxed)) + 1;
  s.ticket.store(number << (2 * kBits) | static_cast<uint64_t>(pieces) << kBits);
  if (s.sleeping.load() > 0) {
    { std::lock_guard<std::mutex> lock(s.mutex); }  // who is about to sleep has looked, or will
    s.wake.notify_all();
  }
  s.take_pieces(0);
  for (int spins = 0; s.done.load(std::memory_order_acquire) < pieces; ++spins) {
    if (spins < kSpinsBeforeYield) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace pagelab
