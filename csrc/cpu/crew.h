// Threads that share several loops in a row, each of which needs all of the one before: starting
// them once costs less than starting them for every loop.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/barrier.h"
#include "cpu/parallel.h"

namespace wsis::cpu {

// One of the threads, as its loops see it.
class Crew {
 public:
  Crew(int part, int parts, Barrier* barrier) : part_(part), parts_(parts), barrier_(barrier) {}

  int parts() const { return parts_; }

  // Splits [0, n) into equal ranges, as parallel_for does, one for each of the crew, or of its first
  // `most`: calls body(part, begin, end) and returns when all have come so far.
  template <class Body>
  void share(int64_t n, int64_t most, Body body) const {
    const int64_t ranges = std::min<int64_t>(most, parts_);
    if (part_ < ranges) body(part_, n * part_ / ranges, n * (part_ + 1) / ranges);
    barrier_->wait();
  }
  template <class Body>
  void share(int64_t n, Body body) const {
    share(n, parts_, body);
  }

 private:
  int part_, parts_;
  Barrier* barrier_;
};

// Calls body(crew) on as many threads.
template <class Body>
void with_crew(int parts, Body body) {
  Barrier barrier(parts);
  parallel_for(parts, parts,
               [&](int part, int64_t, int64_t) { body(Crew(part, parts, &barrier)); });
}

}  // namespace wsis::cpu
