// Sources of many taps of a voxel, for kernels in which finding them is most of the work. The column of the neighbour
// table and the voxel's number in its block are sums over the axes (window.cuh); the terms, one for each tap and each
// written coordinate of an axis, are the same for all blocks, so a block of threads computes them once, to shared
// memory. A tap then takes three loads, two additions and the table.
//
//   axis_terms<kThreads>   computes the terms, to be read after a __syncthreads
//   next_sources           sources of the next few taps of one voxel
#pragma once

#include "cuda/memory.cuh"
#include "cuda/window.cuh"

namespace s3d::cuda {

// Of each axis [tap, written coordinate]: (term of the table's column, term of the voxel's number).
struct AxisTerms {
  Shared<int2> d, h, w;
};

inline int64_t axis_terms_bytes(const Window& window) {
  int64_t terms = 0;
  for (int axis = 0; axis < 3; ++axis) terms += window.kernel[axis] * window.written_block[axis];
  return terms * static_cast<int64_t>(sizeof(int2));
}

constexpr int kNoTerm = -(1 << 28);  // three of them, or one and two columns, are negative still

template <int kThreads>
__device__ __forceinline__ void compute_terms(const WindowAxis& axis, bool transposed, int column, int voxel,
                                              Shared<int2> terms) {
  for (int i = threadIdx.x; i < axis.kernel * axis.written_side; i += kThreads) {
    int local;
    int2 term = make_int2(kNoTerm, 0);
    if (locate(axis, transposed, i % axis.written_side, i / axis.written_side, local)) {
      term.x = neighbour_at(axis, local) * column;
      term.y = local * voxel;
    }
    store(terms + i, term);
  }
}

// At `byte_offset` of the dynamic shared memory.
template <int kThreads>
__device__ __forceinline__ AxisTerms axis_terms(const WindowView& window, uint32_t byte_offset) {
  const int of_d = window.d.kernel * window.d.written_side, of_h = window.h.kernel * window.h.written_side;
  const int of_w = window.w.kernel * window.w.written_side;
  const Shared<int2> all = dynamic_shared<int2>(byte_offset, of_d + of_h + of_w);
  const AxisTerms terms = {all, all + of_d, all + of_d + of_h};
  const int columns_w = 2 * window.w.radius + 1, columns_h = 2 * window.h.radius + 1;
  const int side_w = window.w.gathered_side, side_h = window.h.gathered_side;
  compute_terms<kThreads>(window.d, window.transposed, columns_h * columns_w, side_h * side_w, terms.d);
  compute_terms<kThreads>(window.h, window.transposed, columns_w, side_w, terms.h);
  compute_terms<kThreads>(window.w, window.transposed, 1, 1, terms.w);
  return terms;
}

// The gathered voxels under `tap` and those that follow, or -1: all -1 if `visible` is false, and beyond the last tap.
// `tap` becomes the next one. Returns how many there are.
template <int kTaps>
__device__ __forceinline__ int next_sources(const WindowView& window, const AxisTerms& terms, const VoxelPlace& at,
                                            bool visible, Tap& tap, int (&voxels)[kTaps]) {
  const Global<const int32_t> row = window.table + static_cast<int64_t>(at.row) * window.columns;
  const int block = window.d.gathered_side * window.h.gathered_side * window.w.gathered_side;
  int2 line = make_int2(kNoTerm, 0);
#pragma unroll
  for (int i = 0; i < kTaps; ++i) {
    if (i == 0 || tap.w == 0) {
      line.x = kNoTerm;
      if (tap.d < window.d.kernel) {
        const int2 d = load<int2>(terms.d + (tap.d * window.d.written_side + at.d));
        const int2 h = load<int2>(terms.h + (tap.h * window.h.written_side + at.h));
        line = make_int2(d.x + h.x, d.y + h.y);
      }
    }
    const int2 w = load<int2>(terms.w + (tap.w * window.w.written_side + at.w));
    const int column = line.x + w.x;
    int found = -1;
    if (visible && column >= 0) found = row[column];
    voxels[i] = found < 0 ? -1 : found * block + line.y + w.y;
    if (++tap.w == window.w.kernel) {
      tap.w = 0;
      if (++tap.h == window.h.kernel) {
        tap.h = 0;
        ++tap.d;
      }
    }
  }
  if (window.gathered_voxels != nullptr) {
#pragma unroll
    for (int i = 0; i < kTaps; ++i) {
      if (voxels[i] >= 0 && window.gathered_voxels[voxels[i]] == 0) voxels[i] = -1;
    }
  }
  int count = 0;
#pragma unroll
  for (int i = 0; i < kTaps; ++i) count += voxels[i] >= 0 ? 1 : 0;
  return count;
}

}  // namespace s3d::cuda
