// Threads of the CPU kernels.
#pragma once

#include <cstdint>
#include <thread>
#include <vector>

namespace wsis::cpu {

// Splits [0, n) into `parts` equal ranges and calls body(part, begin, end) for each: part 0 here,
// the others on threads of their own. Threads live for one call, so nothing has to survive a fork
// and nothing is left to spin beside torch's pool; starting one costs about 20 us, which the caller
// keeps small by asking for one part per 100 us of work or more.
template <class Body>
void parallel_for(int64_t n, int parts, Body body) {
  const auto run = [&](int part) { body(part, n * part / parts, n * (part + 1) / parts); };
  std::vector<std::thread> threads;
  threads.reserve(parts - 1);
  for (int part = 1; part < parts; ++part) threads.emplace_back(run, part);
  run(0);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace wsis::cpu
