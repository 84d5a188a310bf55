// Counts the global memory that emulated kernels touch (flavour "count").
//
// The .cu files of this flavour are compiled with -fsanitize=thread, which puts a call of
// __tsan_readN or __tsan_writeN before every access to memory that is not a local variable. The
// sanitizer's own library is not linked: these functions are defined here. So no kernel source, and
// no pointer type, has to know about counting, and nothing can be forgotten.
//
// An access counts if it falls into one of the arrays that the test names. Per launch and array:
// the distinct bytes read and written, which is what a perfect cache would move, and the bytes all
// threads together asked for. One thread only (fibers).
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr uint8_t kRead = 1, kWritten = 2;

struct Span {
  uintptr_t begin, end;
  std::vector<uint8_t> flags;  // per byte
};

struct Traffic {
  int64_t read = 0, written = 0;    // distinct bytes
  int64_t loaded = 0, stored = 0;  // bytes asked for
};

struct Launch {
  std::string kernel;
  int64_t sizes[7];  // grid, block, dynamic shared bytes
  std::vector<Traffic> arrays;
};

// Plain data comes first: instrumented code runs before anything here is constructed, and vectors
// are never destroyed because it runs until the process ends.
bool active = false;
uintptr_t lowest = 0, highest = 0;

std::vector<Span>& spans() {
  static auto& all = *new std::vector<Span>;
  return all;
}

std::vector<Launch>& launches() {
  static auto& all = *new std::vector<Launch>;
  return all;
}

void touch(const volatile void* address, size_t bytes, uint8_t flag) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (!active || at >= highest || at + bytes <= lowest) return;
  for (size_t i = 0; i < spans().size(); ++i) {
    Span& span = spans()[i];
    const uintptr_t first = std::max(at, span.begin), last = std::min(at + bytes, span.end);
    if (first >= last) continue;
    for (uintptr_t b = first; b < last; ++b) span.flags[b - span.begin] |= flag;
    Traffic& traffic = launches().back().arrays[i];
    (flag == kRead ? traffic.loaded : traffic.stored) += static_cast<int64_t>(last - first);
  }
}

}  // namespace

// ---- what cuda_emulator.h calls ----------------------------------------------------------------

extern "C" void wsis_count_launch(const char* kernel, const unsigned* sizes) {
  if (spans().empty()) return;
  Launch launch{kernel, {}, std::vector<Traffic>(spans().size())};
  for (int i = 0; i < 7; ++i) launch.sizes[i] = sizes[i];
  launches().push_back(launch);
  active = true;
}

extern "C" void wsis_count_landing() {
  if (!active) return;
  active = false;
  for (size_t i = 0; i < spans().size(); ++i) {
    Traffic& traffic = launches().back().arrays[i];
    for (uint8_t& flag : spans()[i].flags) {
      traffic.read += (flag & kRead) != 0;
      traffic.written += (flag & kWritten) != 0;
      flag = 0;
    }
  }
}

extern "C" void wsis_count_write(const void* address, size_t bytes) {
  touch(address, bytes, kWritten);
}

// ---- what Python calls -------------------------------------------------------------------------

EXPORT void wsis_count_start(int arrays, const uint64_t* addresses, const uint64_t* bytes) {
  launches().clear();
  spans().clear();
  lowest = UINTPTR_MAX;
  highest = 0;
  for (int i = 0; i < arrays; ++i) {
    const uintptr_t begin = addresses[i], end = begin + bytes[i];
    spans().push_back({begin, end, std::vector<uint8_t>(bytes[i])});
    if (begin < lowest) lowest = begin;
    if (end > highest) highest = end;
  }
}

EXPORT int wsis_count_stop() {
  active = false;
  spans().clear();
  return static_cast<int>(launches().size());
}

EXPORT const char* wsis_count_kernel(int launch, int64_t* sizes) {
  std::memcpy(sizes, launches()[launch].sizes, sizeof(Launch::sizes));
  return launches()[launch].kernel.c_str();
}

EXPORT void wsis_count_traffic(int launch, int array, int64_t* out) {
  std::memcpy(out, &launches()[launch].arrays[array], sizeof(Traffic));
}

// ---- what the compiler calls -------------------------------------------------------------------

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* p, size_t n) { touch(p, n, kRead); }
void __tsan_write_range(void* p, size_t n) { touch(p, n, kWritten); }

#define SIZED(n)                                                          \
  void __tsan_read##n(void* p) { touch(p, n, kRead); }            \
  void __tsan_write##n(void* p) { touch(p, n, kWritten); }        \
  void __tsan_unaligned_read##n(void* p) { touch(p, n, kRead); }  \
  void __tsan_unaligned_write##n(void* p) { touch(p, n, kWritten); } \
  void __tsan_volatile_read##n(void* p) { touch(p, n, kRead); }   \
  void __tsan_volatile_write##n(void* p) { touch(p, n, kWritten); }
SIZED(1)
SIZED(2)
SIZED(4)
SIZED(8)
SIZED(16)

// Atomics come as calls altogether. One thread: plain operations; a read-modify-write is both.
#define CHANGE(bits, name, expression)                                                 \
  uint##bits##_t __tsan_atomic##bits##_##name(volatile uint##bits##_t* p, uint##bits##_t v, int) { \
    touch(p, bits / 8, kRead);                    \
    touch(p, bits / 8, kWritten);                 \
    const uint##bits##_t old = *p;                                                     \
    *p = static_cast<uint##bits##_t>(expression);                                      \
    return old;                                                                        \
  }
#define ATOMICS(bits)                                                                            \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* p, int) {             \
    touch(p, bits / 8, kRead);                              \
    return *p;                                                                                   \
  }                                                                                              \
  void __tsan_atomic##bits##_store(volatile uint##bits##_t* p, uint##bits##_t v, int) {          \
    touch(p, bits / 8, kWritten);                           \
    *p = v;                                                                                      \
  }                                                                                              \
  int __tsan_atomic##bits##_compare_exchange_strong(                                             \
      volatile uint##bits##_t* p, uint##bits##_t* expected, uint##bits##_t v, int, int) {        \
    touch(p, bits / 8, kWritten);                           \
    const uint##bits##_t old = *p;                                                               \
    const int same = old == *expected;                                                           \
    if (same) *p = v;                                                                            \
    *expected = old;                                                                             \
    return same;                                                                                 \
  }                                                                                              \
  int __tsan_atomic##bits##_compare_exchange_weak(                                               \
      volatile uint##bits##_t* p, uint##bits##_t* expected, uint##bits##_t v, int a, int b) {    \
    return __tsan_atomic##bits##_compare_exchange_strong(p, expected, v, a, b);                  \
  }                                                                                              \
  uint##bits##_t __tsan_atomic##bits##_compare_exchange_val(                                     \
      volatile uint##bits##_t* p, uint##bits##_t expected, uint##bits##_t v, int a, int b) {     \
    __tsan_atomic##bits##_compare_exchange_strong(p, &expected, v, a, b);                        \
    return expected;                                                                             \
  }                                                                                              \
  CHANGE(bits, exchange, v)                                                                      \
  CHANGE(bits, fetch_add, old + v)                                                               \
  CHANGE(bits, fetch_sub, old - v)                                                               \
  CHANGE(bits, fetch_and, old & v)                                                               \
  CHANGE(bits, fetch_or, old | v)                                                                \
  CHANGE(bits, fetch_xor, old ^ v)
ATOMICS(8)
ATOMICS(16)
ATOMICS(32)
ATOMICS(64)

void __tsan_atomic_thread_fence(int) {}
void __tsan_atomic_signal_fence(int) {}

}  // extern "C"
