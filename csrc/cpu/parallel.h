// Threads and SIMD of the CPU kernels.
#pragma once

#include <cstdint>
#include <thread>
#include <vector>

// One clone of the function per instruction set, chosen by the loader; functions it calls must be
// inline to be cloned with it. x86-64-v3 is AVX2 + FMA + F16C, v4 adds AVX-512 F/BW/CD/DQ/VL.
// Sanitizers cannot run the loader's resolvers, so their builds define WSIS_NO_CLONES.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(WSIS_NO_CLONES)
#define WSIS_CLONES
#define WSIS_SIMD __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define WSIS_SIMD
#endif

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
