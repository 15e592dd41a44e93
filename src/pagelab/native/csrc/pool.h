// Threads that share work in small pieces.
#pragma once

#include <stdint.h>

namespace pagelab {

// One piece of work. `worker` is 0 for the caller's own thread, 1.. for the pool's.
using PieceFn = void (*)(void* context, int piece, int worker);

// A pool for one caller at a time:
//
//   run(n, fn)   pieces 0 .. n-1 are taken one by one from a counter, by the caller too, and it
//                returns when all are done. A thread that the system has taken off its core
//                holds up nothing but the piece that it is in: nobody waits for it to arrive.
//
// Between two runs the threads spin briefly (a step is hundreds of runs, microseconds apart) and
// then sleep, so that an idle engine takes no core.
class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const;
  void run(int pieces, PieceFn fn, void* context);
  // The caller's own memory, at least so many bytes, aligned to 64; valid until it asks again.
  uint8_t* memory(int64_t bytes);
  // Memory for weights, zeros, in huge pages: a step reads every page of it, and the hardware
  // fetches ahead only within a page. It lives as long as the pool. Null where there is none.
  uint8_t* lasting(int64_t bytes);

 private:
  struct State;
  State* state_;
};

}  // namespace pagelab
