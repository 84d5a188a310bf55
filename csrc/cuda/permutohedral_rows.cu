#include "cuda/permutohedral_rows.h"

#include "cuda/launch.h"

namespace wsis::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLineThreads = 512;

template <class T>
__device__ void add(Quad<T>& sum, const Quad<T>& value) {
#pragma unroll
  for (int k = 0; k < 4; ++k) sum.value[k] += value.value[k];
}

// What a thread of the kernels below works on: a row and a quad of it; blockIdx.y is the copy,
// blockIdx.z the term.
struct Cell {
  int64_t row, index;  // the latter among all quads of `rows`
  int32_t quad;
  bool inside;
};

template <class T>
__device__ Cell my_cell(const Pairwise<T>& term, int32_t quads) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t all = (term.lattice.vertices + 1) * quads;
  const bool inside = i < all && (blockIdx.y == 0 || term.lattice.shared);
  return {i / quads, blockIdx.y * all + i, static_cast<int32_t>(i % quads), inside};
}

// The entries of a vertex are added up in their order, which is that of the tiles.
template <class T>
__global__ void __launch_bounds__(kThreads) gather_kernel(Terms<T> terms, int32_t quads) {
  const Pairwise<T>& term = terms.term[blockIdx.z];
  const Cell i = my_cell(term, quads);
  if (!i.inside) return;
  const LatticeView& lattice = term.lattice;
  const Quad<T>* partial = term.partial + blockIdx.y * lattice.entries * quads;
  Quad<T> sum{};
  for (int32_t k = lattice.begin[i.row]; k < lattice.begin[i.row + 1]; ++k)
    add(sum, partial[static_cast<int64_t>(lattice.list[k]) * quads + i.quad]);
  term.rows[0][i.index] = sum;
}

template <class T>
__device__ T factor_of(const Pairwise<T>& term, int32_t channel, int32_t classes) {
  return term.matrix ? T(1) : channel < classes ? term.mix[channel] : T(0);
}

// One axis, between two buffers; the last one multiplies with the labels' factors.
template <class T>
__global__ void __launch_bounds__(kThreads)
    blur_kernel(Terms<T> terms, int32_t step, bool reverse, int32_t classes, int32_t quads) {
  const Pairwise<T>& term = terms.term[blockIdx.z];
  const LatticeView& lattice = term.lattice;
  const Cell i = my_cell(term, quads);
  if (!i.inside || step >= lattice.corners) return;
  const int32_t axis = reverse ? lattice.corners - 1 - step : step;
  const Sides near = lattice.neighbours[axis * (lattice.vertices + 1) + i.row];
  const Quad<T>* from = term.rows[step % 2] + (i.index - i.row * quads);
  Quad<T> value = from[i.row * quads], sides = from[static_cast<int64_t>(near.next) * quads];
  add(sides, from[static_cast<int64_t>(near.previous) * quads]);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    value.value[k] += T(0.5) * sides.value[k];
    if (step + 1 == lattice.corners) value.value[k] *= factor_of(term, 4 * i.quad + k, classes);
  }
  term.rows[(step + 1) % 2][i.index] = value;
}

// One block per channel, image (blockIdx.y) and term: gathers, blurs along all axes in shared
// memory, and multiplies. So an iteration needs no barrier between blocks but its two launches.
template <class T>
__global__ void __launch_bounds__(kLineThreads)
    channel_kernel(Terms<T> terms, bool reverse, int32_t classes, int32_t quads) {
  WSIS_DYNAMIC_SHARED(T, buffer);
  const Pairwise<T>& term = terms.term[blockIdx.z];
  const LatticeView& lattice = term.lattice;
  const int32_t channel = static_cast<int32_t>(blockIdx.x);
  const int32_t before = lattice.shared ? 0 : lattice.image_rows[blockIdx.y];
  const int32_t count = lattice.shared ? static_cast<int32_t>(lattice.vertices)
                                       : lattice.image_rows[blockIdx.y + 1] - before;
  const int64_t copy = lattice.shared ? blockIdx.y : 0;
  const T* partial =
      reinterpret_cast<const T*>(term.partial + copy * lattice.entries * quads) + channel;
  T *from = buffer, *to = buffer + count + 1;
  if (threadIdx.x == 0) from[0] = to[0] = 0;
  for (int32_t v = threadIdx.x + 1; v <= count; v += kLineThreads) {
    T sum = 0;
    for (int32_t k = lattice.begin[before + v]; k < lattice.begin[before + v + 1]; ++k)
      sum += partial[static_cast<int64_t>(lattice.list[k]) * quads * 4];
    from[v] = sum;
  }
  for (int32_t step = 0; step < lattice.corners; ++step) {
    __syncthreads();
    const int32_t axis = reverse ? lattice.corners - 1 - step : step;
    const Sides* near = lattice.neighbours + axis * (lattice.vertices + 1) + before;
    for (int32_t v = threadIdx.x + 1; v <= count; v += kLineThreads) {
      const Sides both = near[v];
      const T next = from[both.next ? both.next - before : 0];
      const T previous = from[both.previous ? both.previous - before : 0];
      to[v] = from[v] + T(0.5) * (next + previous);
    }
    T* other = from;
    from = to;
    to = other;
  }
  const T factor = factor_of(term, channel, classes);
  Quad<T>* rows = term.rows[lattice.corners % 2] + (copy * (lattice.vertices + 1) + before) * quads;
  T* out = reinterpret_cast<T*>(rows) + channel;
  for (int32_t v = threadIdx.x + 1; v <= count; v += kLineThreads)  // its own values only
    out[static_cast<int64_t>(v) * quads * 4] = from[v] * factor;
}

// Compatibility matrices: labels mix at the vertices, of which there are fewer than pixels.
template <class T>
__global__ void __launch_bounds__(kThreads)
    mix_kernel(Terms<T> terms, int32_t classes, int32_t quads) {
  const Pairwise<T>& term = terms.term[blockIdx.z];
  const Cell i = my_cell(term, quads);
  if (!i.inside || i.row == 0 || !term.matrix) return;
  const int32_t before = term.lattice.corners % 2;
  const Quad<T>* row = term.rows[before] + (i.index - i.quad);
  Quad<T> sum{};
  for (int32_t c = 0; c < classes; ++c) {
    const T value = row[c / 4].value[c % 4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (4 * i.quad + k < classes)
        sum.value[k] += term.mix[(4 * i.quad + k) * static_cast<int64_t>(classes) + c] * value;
  }
  term.rows[1 - before][i.index] = sum;
}

}  // namespace

template <class T>
void blur_rows(const Terms<T>& terms, int64_t batch, int32_t classes, bool reverse,
               int64_t shared_bytes, uintptr_t stream) {
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  const int32_t quads = (classes + 3) / 4;
  Terms<T> small{}, large{};
  bool any_matrix = false;
  int64_t need = 0, vertices = 0, most_vertices = 0;
  int32_t corners = 0;
  for (int32_t k = 0; k < terms.count; ++k) {
    const Pairwise<T>& term = terms.term[k];
    const int64_t bytes = 2 * (int64_t{term.lattice.most} + 1) * sizeof(T);
    any_matrix = any_matrix || term.matrix;
    most_vertices = std::max(most_vertices, term.lattice.vertices);
    if (bytes <= shared_bytes) {
      small.term[small.count++] = term;
      need = std::max(need, bytes);
    } else {
      large.term[large.count++] = term;
      vertices = std::max(vertices, term.lattice.vertices);
      corners = std::max(corners, term.lattice.corners);
    }
  }
  const auto images = static_cast<unsigned>(batch);
  const auto grid = [&](int64_t rows, int32_t count) {
    const int64_t cells = (rows + 1) * quads;
    return dim3(static_cast<unsigned>((cells + kThreads - 1) / kThreads), images, count);
  };
  if (small.count > 0) {
    if (need > kSharedBytes)
      check(cudaFuncSetAttribute(&channel_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(need)),
            "blur_rows");
    WSIS_LAUNCH(&channel_kernel<T>, dim3(4 * quads, images, small.count), kLineThreads, need, queue,
                small, reverse, classes, quads);
  }
  if (large.count > 0) {
    WSIS_LAUNCH(&gather_kernel<T>, grid(vertices, large.count), kThreads, 0, queue, large, quads);
    for (int32_t step = 0; step < corners; ++step)
      WSIS_LAUNCH(&blur_kernel<T>, grid(vertices, large.count), kThreads, 0, queue, large, step,
                  reverse, classes, quads);
  }
  if (any_matrix)
    WSIS_LAUNCH(&mix_kernel<T>, grid(most_vertices, terms.count), kThreads, 0, queue, terms,
                classes, quads);
  check(cudaGetLastError(), "blur_rows");
}

template void blur_rows(const Terms<float>&, int64_t, int32_t, bool, int64_t, uintptr_t);
template void blur_rows(const Terms<double>&, int64_t, int32_t, bool, int64_t, uintptr_t);

}  // namespace wsis::cuda
