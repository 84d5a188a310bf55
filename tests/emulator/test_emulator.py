"""The emulator itself: a small .cu file whose results are known, in every engine."""

from __future__ import annotations

import os
import subprocess
import textwrap

import pytest

from tests import emulator

pytestmark = pytest.mark.skipif(not emulator.has_compiler(), reason="needs a host compiler")

# Prints a line per failed check; launches as csrc/cuda does.
PROGRAM = """
#include <cstdio>
#include "cuda/launch.h"

#define CHECK(condition) if (!(condition)) std::printf("line %d\\n", __LINE__)

// Shuffles, votes and their masks; the last warp of a block may be partial.
__global__ void warps(int* out) {
  const unsigned lanes = blockDim.x - threadIdx.x / 32 * 32;
  const unsigned all = lanes >= 32 ? ~0u : (1u << lanes) - 1;
  const int lane = threadIdx.x % 32;
  int sum = lane;
  if (all == ~0u) {
    for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(all, sum, step);
    sum = __shfl_sync(all, sum, 0);
  }
  int seen = __shfl_xor_sync(all, lane, 1) * 100 + __shfl_up_sync(all, lane, 2);
  seen += __any_sync(all, lane == 3) ? 10000 : 0;
  seen += __all_sync(all, lane >= 0) ? 20000 : 0;
  out[threadIdx.x * 3] = sum;
  out[threadIdx.x * 3 + 1] = seen;
  out[threadIdx.x * 3 + 2] = static_cast<int>(__ballot_sync(all, lane % 3 == 0));
}

// Lower lanes work alone in their warp, under a mask of their own.
__global__ void half_a_warp(int* out) {
  if (threadIdx.x >= 16) return;
  out[threadIdx.x] = __shfl_down_sync(0xffffu, static_cast<int>(threadIdx.x), 8);
}

// Static and dynamic shared memory, a barrier, and a block reduction.
__global__ void reverse(const float* in, float* out, int n) {
  WSIS_DYNAMIC_SHARED(float, dynamic);
  __shared__ float fixed[64];
  const int i = threadIdx.x + blockIdx.x * blockDim.x;
  dynamic[threadIdx.x] = i < n ? in[i] : 0;
  fixed[threadIdx.x] = 2;
  __syncthreads();
  const int other = blockDim.x - 1 - threadIdx.x;
  if (i < n) out[i] = dynamic[other] * fixed[other];
}

__global__ void garbage(unsigned char* out) {
  WSIS_DYNAMIC_SHARED(unsigned char, dynamic);
  out[threadIdx.x] = dynamic[threadIdx.x];
}

__global__ void atomics(unsigned long long* counts, float* sum, int* extremes) {
  atomicAdd(&counts[0], 1ull);
  atomicAdd(sum, 0.5f);
  atomicMax(&extremes[0], static_cast<int>(threadIdx.x));
  atomicMin(&extremes[1], -static_cast<int>(threadIdx.x));
  if (atomicCAS(&extremes[2], 0, 7) == 0) atomicAdd(&counts[1], 1ull);
}

__global__ void coordinates(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned size = blockDim.x * blockDim.y * blockDim.z;
  out[block * size + thread] += static_cast<int>(block * 1000 + thread);
}

__global__ void vectors(const float4* in, double2* out) {
  const float4 v = __ldg(in + threadIdx.x);
  out[threadIdx.x] = make_double2(v.x + v.y, v.z + v.w);
}

__global__ void order(int* next, int* out) { out[threadIdx.x] = atomicAdd(next, 1); }

__global__ void divergence(int* out) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

int main(int arguments, char**) {
  cudaStream_t queue = nullptr;
  int ints[192] = {};
  WSIS_LAUNCH(&warps, 1, 44, 0, queue, ints);
  for (int t = 0; t < 44; ++t) {
    const int lane = t % 32, lanes = t < 32 ? 32 : 12;
    CHECK(ints[t * 3] == (t < 32 ? 496 : lane));
    const int up = lane >= 2 ? lane - 2 : lane;
    CHECK(ints[t * 3 + 1] == (lane ^ 1) * 100 + up + 30000);
    unsigned votes = 0;
    for (int i = 0; i < lanes; i += 3) votes |= 1u << i;
    CHECK(static_cast<unsigned>(ints[t * 3 + 2]) == votes);
  }
  WSIS_LAUNCH(&half_a_warp, 1, 32, 0, queue, ints);
  for (int t = 0; t < 8; ++t) CHECK(ints[t] == t + 8);

  float in[75], out[75];
  for (int i = 0; i < 75; ++i) in[i] = static_cast<float>(i);
  WSIS_LAUNCH(&reverse, 2, 50, 50 * sizeof(float), queue, in, out, 75);
  for (int i = 0; i < 50; ++i) CHECK(out[i] == 2.0f * static_cast<float>(49 - i));
  for (int i = 50; i < 75; ++i) CHECK(out[i] == (149 - i < 75 ? 2.0f * (149 - i) : 0.0f));

  unsigned char bytes[4] = {};
  WSIS_LAUNCH(&garbage, 1, 4, 4, queue, bytes);
  for (unsigned char byte : bytes) CHECK(byte == 0xA5);

  unsigned long long counts[2] = {};
  float sum = 0;
  int extremes[3] = {};
  WSIS_LAUNCH(&atomics, 3, 33, 0, queue, counts, &sum, extremes);
  CHECK(counts[0] == 99 && counts[1] == 1 && sum == 49.5f);
  CHECK(extremes[0] == 32 && extremes[1] == -32 && extremes[2] == 7);

  int where[2 * 3 * 2 * 2 * 4 * 2] = {};
  WSIS_LAUNCH(&coordinates, dim3(2, 3, 2), dim3(2, 4, 2), 0, queue, where);
  for (int i = 0; i < 192; ++i) CHECK(where[i] == i / 16 * 1000 + i % 16);

  alignas(16) float4 four[2] = {{1, 2, 3, 4}, {5, 6, 7, 8}};
  double2 two[2];
  WSIS_LAUNCH(&vectors, 1, 2, 0, queue, four, two);
  CHECK(two[0].x == 3 && two[0].y == 7 && two[1].x == 11 && two[1].y == 15);

  int memory[3] = {1, 2, 3};
  CHECK(cudaMemsetAsync(memory, 0, 8, queue) == cudaSuccess);
  CHECK(memory[0] == 0 && memory[1] == 0 && memory[2] == 3);

  int next = 0;
  WSIS_LAUNCH(&order, 1, 40, 0, queue, &next, ints);
  bool ascending = true;
  for (int t = 0; t < 40; ++t) ascending = ascending && ints[t] == t;
  std::printf(ascending ? "in order\\n" : "shuffled\\n");

  if (arguments > 1) try {
      WSIS_LAUNCH(&divergence, 1, 40, 0, queue, ints);
    } catch (const std::exception& error) {
      std::printf("%s\\n", error.what());
    }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulator")
    source = folder / "program.cu"
    source.write_text(textwrap.dedent(PROGRAM))

    def compiled(flavour):
        target = folder / flavour
        command = [
            emulator.CXX, "-std=c++17", "-O1", "-g1", "-pthread", "-x", "c++", str(source),
            f'-DWSIS_EMULATOR="{emulator.HERE / "cuda_emulator.h"}"',
            f"-I{emulator.ROOT / 'csrc'}", *emulator.FLAVOURS[flavour], "-o", str(target),
        ]  # fmt: skip
        if not target.exists():
            subprocess.run(command, check=True)
        return target

    return compiled


def run(path, *arguments, seed=0):
    environment = {**os.environ, "WSIS_EMULATOR_SEED": str(seed), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [str(path), *arguments], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def test_fibers(program):
    assert run(program("fibers")) == ["in order"]
    for seed in range(1, 6):
        assert run(program("fibers"), seed=seed) == ["shuffled"]


def test_divergence_is_an_error(program):
    expected = "barrier divergence: 39 threads wait, 1/40 have left"
    for seed in (0, 3):
        assert run(program("fibers"), "diverge", seed=seed)[-1] == expected


@pytest.mark.parametrize("flavour", ["asan", pytest.param("tsan", marks=pytest.mark.long)])
def test_threads_under_sanitizers(program, flavour):
    (line,) = run(program(flavour))  # the order of real threads is theirs
    assert line in ("in order", "shuffled")
