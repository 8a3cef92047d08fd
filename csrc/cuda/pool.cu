// Average and maximum pooling over windows, and their backward.
//
//   average       out[v] = sum over taps of in[source(v, tap)] / divisor; divisor 0: the taps that lie in the volume
//   average_grad  grad_in[v] = sum over taps of grad[source(v, tap)] / divisor of that output      (transposed window)
//   maximum       out[v] = the largest in[source(v, tap)]; winner[v]: its tap
//   maximum_grad  grad_in[v] = sum of grad[source(v, tap)] where winner[source(v, tap)] = tap      (transposed window)
//
// Masked voxels count as zeros. Outside the volume the average sees zeros and the maximum nothing. Of equal numbers the
// first tap wins; NaN wins over all numbers. The winner is -1 where it is a masked voxel's zero: no gradient.
//
// Layouts   in, out, grad, winners [voxels, C], channels last. target_index [rows, 4]: where output blocks lie.
// Work      A thread makes 16 bytes of channels of one written voxel, or one channel where rows are no whole 16 bytes;
//           256 in a block, threads of one voxel side by side. It goes through the taps axis by axis, so that only the
//           innermost one costs a step of the window's arithmetic. What does not depend on channels is found again by
//           each thread of a voxel: its loads are broadcasts.
// Winners   Are stored, as int16: to find them again, a gradient would read all taps of each window that an input lies
//           in, 27 * 27 / 8 reads for 3x3x3 with stride 2, where stored ones cost two bytes for each output. They may
//           be made by the forward pass or, before the backward one, from `in`, without `out`. No atomics either way.
// Numbers   Sums are float, in the order of taps, and rounded once.
// Limits    Fewer than 2^31 voxels on each side, and 2^15 taps.
// Expected  Bound by memory where windows do not overlap; where they do, by L1 and L2, from which every tap reads its
//           rows again. Not measured yet.
#include <limits>
#include <stdexcept>

#include "cuda/channels.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/window.cuh"

namespace s3d::cuda {
namespace {

constexpr int kThreads = 256, kBlocks = 4;  // on an SM; left to itself nvcc takes more blocks and spills

// A thread's voxel and the first of its channels.
struct Share {
  int64_t voxel;
  int channel;
  bool exists;
};

template <int kVector>
__device__ __forceinline__ Share share_of(const WindowView& window, int channels) {
  // Thread 256 * block + thread, divided by the vectors of a voxel, without division of 64 bits.
  const int vectors = channels / kVector, block = static_cast<int>(blockIdx.x);
  const int i = block % vectors * kThreads + static_cast<int>(threadIdx.x);
  const int64_t voxel = int64_t{block / vectors} * kThreads + i / vectors;
  return {voxel, i % vectors * kVector, voxel < window.written_voxels_count};
}

__device__ __forceinline__ bool is_visible(Global<const uint8_t> voxels, int64_t voxel) {
  if (voxels == nullptr) return true;
  return voxels[voxel] != 0;
}

// A gathered voxel: its number, its block and its coordinates there. voxel -1: none, or masked.
struct Gathered {
  int voxel, row, d, h, w;
};

// Calls use(tap, tap's number, gathered voxel) for each tap, in order, but for those between the steps of a stride.
template <typename Use>
__device__ __forceinline__ void for_each_tap(const WindowView& window, const VoxelPlace& at, const Use& use) {
  const int span_h = 2 * window.h.radius + 1, span_w = 2 * window.w.radius + 1;
  const Global<const int32_t> table = window.table + int64_t{at.row} * window.columns;
#pragma unroll 1
  for (int td = 0; td < window.d.kernel; ++td) {
    int d;
    if (!locate(window.d, window.transposed, at.d, td, d)) continue;
    const int block_d = neighbour_at(window.d, d);
#pragma unroll 1
    for (int th = 0; th < window.h.kernel; ++th) {
      int h;
      if (!locate(window.h, window.transposed, at.h, th, h)) continue;
      const int block_h = neighbour_at(window.h, h);
#pragma unroll 1
      for (int tw = 0; tw < window.w.kernel; ++tw) {
        int w;
        if (!locate(window.w, window.transposed, at.w, tw, w)) continue;
        const int block_w = neighbour_at(window.w, w);
        const int row = table[(block_d * span_h + block_h) * span_w + block_w];
        int voxel = -1;
        if (row >= 0) {
          voxel = ((row * window.d.gathered_side + d) * window.h.gathered_side + h) * window.w.gathered_side + w;
          if (!is_visible(window.gathered_voxels, voxel)) voxel = -1;
        }
        use(Tap{td, th, tw}, (td * window.h.kernel + th) * window.w.kernel + tw, Gathered{voxel, row, d, h, w});
      }
    }
  }
}

// Where outputs lie.
struct OutputsView {
  Global<const int32_t> index;
  int volume_d, volume_h, volume_w;
};

// The taps first ... last - 1 of an axis that lie in the volume.
struct Range {
  int first, last;
  __device__ int count() const { return max(0, last - first); }
  __device__ bool has(int tap) const { return tap >= first && tap < last; }
};

// Of an output; side: of its block.
__device__ __forceinline__ Range inside(const WindowAxis& axis, int side, int cell, int local, int volume) {
  const int start = (cell * side + local) * axis.stride - axis.padding;
  return {max(0, -start), min(axis.kernel, volume - start)};
}

// What the sum of an output is multiplied by; row, d, h, w: its place, in blocks of side_d, side_h, side_w.
__device__ __forceinline__ float share_of_output(const WindowView& window, const OutputsView& outputs, int divisor,
                                                 const VoxelPlace& at, int side_d, int side_h, int side_w) {
  if (divisor > 0) return 1.0f / static_cast<float>(divisor);
  const int4 cell = load<int4>(outputs.index + int64_t{at.row} * 4);
  const int count = inside(window.d, side_d, cell.y, at.d, outputs.volume_d).count() *
                    inside(window.h, side_h, cell.z, at.h, outputs.volume_h).count() *
                    inside(window.w, side_w, cell.w, at.w, outputs.volume_w).count();
  return 1.0f / static_cast<float>(max(count, 1));
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, kBlocks)
    pool_average_kernel(WindowView window, OutputsView outputs, Global<const T> in, Global<T> out, int channels,
                        int divisor) {
  const Share share = share_of<kVector>(window, channels);
  if (!share.exists) return;
  float sums[kVector] = {};
  if (is_visible(window.written_voxels, share.voxel)) {
    const VoxelPlace at = place_of(window, static_cast<int>(share.voxel));
    for_each_tap(window, at, [&](const Tap&, int, const Gathered& gathered) {
      if (gathered.voxel < 0) return;
      float values[kVector];
      load_channels(in + (int64_t{gathered.voxel} * channels + share.channel), values);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sums[i] += values[i];
    });
    const float factor = share_of_output(window, outputs, divisor, at, window.d.written_side, window.h.written_side,
                                         window.w.written_side);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sums[i] *= factor;
  }
  store_channels(out + (share.voxel * channels + share.channel), sums);
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, kBlocks)
    pool_average_grad_kernel(WindowView window, OutputsView outputs, Global<const T> grad, Global<T> grad_in,
                             int channels, int divisor) {
  const Share share = share_of<kVector>(window, channels);
  if (!share.exists) return;
  float sums[kVector] = {};
  if (is_visible(window.written_voxels, share.voxel)) {
    for_each_tap(window, place_of(window, static_cast<int>(share.voxel)),
                 [&](const Tap&, int, const Gathered& output) {
      if (output.voxel < 0) return;
      const float factor =
          share_of_output(window, outputs, divisor, {output.row, output.d, output.h, output.w},
                          window.d.gathered_side, window.h.gathered_side, window.w.gathered_side);
      float values[kVector];
      load_channels(grad + (int64_t{output.voxel} * channels + share.channel), values);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sums[i] += values[i] * factor;
    });
  }
  store_channels(grad_in + (share.voxel * channels + share.channel), sums);
}

// Two winners in a word.
template <int kVector>
__device__ __forceinline__ void store_winners(Global<int16_t> to, const int (&winners)[kVector]) {
  if constexpr (kVector == 1) {
    to[0] = static_cast<int16_t>(winners[0]);
  } else {
    uint32_t words[kVector / 2];
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      words[i] = (static_cast<uint32_t>(winners[2 * i]) & 0xFFFF) | static_cast<uint32_t>(winners[2 * i + 1]) << 16;
    }
    if constexpr (kVector == 8) {
      store(to, make_uint4(words[0], words[1], words[2], words[3]));
    } else {
      store(to, make_uint2(words[0], words[1]));
    }
  }
}

template <int kVector>
__device__ __forceinline__ void load_winners(Global<const int16_t> from, int (&winners)[kVector]) {
  if constexpr (kVector == 1) {
    winners[0] = static_cast<int16_t>(from[0]);
  } else {
    uint32_t words[kVector / 2];
    if constexpr (kVector == 8) {
      const uint4 all = load<uint4>(from);
      words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
    } else {
      const uint2 all = load<uint2>(from);
      words[0] = all.x, words[1] = all.y;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) winners[i] = static_cast<int16_t>(words[i / 2] >> i % 2 * 16 & 0xFFFF);
  }
}

// out or winners may be null.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, kBlocks)
    pool_maximum_kernel(WindowView window, OutputsView outputs, Global<const T> in, Global<T> out,
                        Global<int16_t> winners, int channels) {
  const Share share = share_of<kVector>(window, channels);
  if (!share.exists) return;
  const bool visible = is_visible(window.written_voxels, share.voxel);
  float most[kVector];
  int winner[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    most[i] = visible ? __uint_as_float(0xFF800000) : 0.0f;  // -inf
    winner[i] = -1;
  }
  if (visible) {
    const VoxelPlace at = place_of(window, static_cast<int>(share.voxel));
    const int4 cell = load<int4>(outputs.index + int64_t{at.row} * 4);
    const Range inside_d = inside(window.d, window.d.written_side, cell.y, at.d, outputs.volume_d);
    const Range inside_h = inside(window.h, window.h.written_side, cell.z, at.h, outputs.volume_h);
    const Range inside_w = inside(window.w, window.w.written_side, cell.w, at.w, outputs.volume_w);
    bool first = true;  // a -inf wins too
    for_each_tap(window, at, [&](const Tap& tap, int number, const Gathered& gathered) {
      if (!inside_d.has(tap.d) || !inside_h.has(tap.h) || !inside_w.has(tap.w)) return;
      float values[kVector] = {};
      if (gathered.voxel >= 0) {
        load_channels(in + (int64_t{gathered.voxel} * channels + share.channel), values);
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (first || values[i] > most[i] || values[i] != values[i]) {
          most[i] = values[i];
          winner[i] = gathered.voxel < 0 ? -1 : number;
        }
      }
      first = false;
    });
  }
  const int64_t to = share.voxel * channels + share.channel;
  if (out != nullptr) store_channels(out + to, most);
  if (winners != nullptr) store_winners(winners + to, winner);
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, kBlocks)
    pool_maximum_grad_kernel(WindowView window, Global<const int16_t> winners, Global<const T> grad, Global<T> grad_in,
                             int channels) {
  const Share share = share_of<kVector>(window, channels);
  if (!share.exists) return;
  float sums[kVector] = {};
  if (is_visible(window.written_voxels, share.voxel)) {
    for_each_tap(window, place_of(window, static_cast<int>(share.voxel)),
                 [&](const Tap&, int number, const Gathered& output) {
      if (output.voxel < 0) return;
      const int64_t from = int64_t{output.voxel} * channels + share.channel;
      int winner[kVector];
      float values[kVector];
      load_winners(winners + from, winner);
      load_channels(grad + from, values);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (winner[i] == number) sums[i] += values[i];
      }
    });
  }
  store_channels(grad_in + (share.voxel * channels + share.channel), sums);
}

OutputsView view(const PoolOutputs& outputs) {
  return {outputs.index, static_cast<int>(outputs.volume.d), static_cast<int>(outputs.volume.h),
          static_cast<int>(outputs.volume.w)};
}

// Starts the kernel of 16 bytes or that of one channel a thread.
template <typename T, typename Vectors, typename Single, typename... Arguments>
void start(const char* name, Vectors vectors, Single single, bool whole, const WindowView& window, int channels,
           cudaStream_t stream, Arguments... arguments) {
  const int64_t threads = window.written_voxels_count * (whole ? channels / kChunk<T> : channels);
  launch(name, whole ? vectors : single, blocks_of(threads, kThreads), kThreads, 0, stream, window, arguments...);
}

bool whole_winners(const int16_t* winners) { return reinterpret_cast<uintptr_t>(winners) % 16 == 0; }

}  // namespace

template <typename T>
void pool_average(const Window& window, const PoolOutputs& outputs, const T* in, T* out, int channels, int divisor,
                  cudaStream_t stream) {
  start<T>("pool_average", pool_average_kernel<T, kChunk<T>>, pool_average_kernel<T, 1>,
           all_whole_chunks(channels, in, out), view(window), channels, stream, view(outputs), in, out, channels,
           divisor);
}

template <typename T>
void pool_average_grad(const Window& transposed, const PoolOutputs& outputs, const T* grad, T* grad_in, int channels,
                       int divisor, cudaStream_t stream) {
  start<T>("pool_average_grad", pool_average_grad_kernel<T, kChunk<T>>, pool_average_grad_kernel<T, 1>,
           all_whole_chunks(channels, grad, grad_in), view(transposed), channels, stream, view(outputs), grad, grad_in,
           channels, divisor);
}

template <typename T>
void pool_maximum(const Window& window, const PoolOutputs& outputs, const T* in, T* out, int16_t* winners,
                  int channels, cudaStream_t stream) {
  if (window.taps() > std::numeric_limits<int16_t>::max()) throw std::invalid_argument("more than 2^15 - 1 taps");
  start<T>("pool_maximum", pool_maximum_kernel<T, kChunk<T>>, pool_maximum_kernel<T, 1>,
           all_whole_chunks(channels, in, out) && whole_winners(winners), view(window), channels, stream,
           view(outputs), in, out, winners, channels);
}

template <typename T>
void pool_maximum_grad(const Window& transposed, const int16_t* winners, const T* grad, T* grad_in, int channels,
                       cudaStream_t stream) {
  start<T>("pool_maximum_grad", pool_maximum_grad_kernel<T, kChunk<T>>, pool_maximum_grad_kernel<T, 1>,
           all_whole_chunks(channels, grad, grad_in) && whole_winners(winners), view(transposed), channels, stream,
           winners, grad, grad_in, channels);
}

#define S3D_INSTANTIATE(T)                                                                                     \
  template void pool_average<T>(const Window&, const PoolOutputs&, const T*, T*, int, int, cudaStream_t);      \
  template void pool_average_grad<T>(const Window&, const PoolOutputs&, const T*, T*, int, int, cudaStream_t); \
  template void pool_maximum<T>(const Window&, const PoolOutputs&, const T*, T*, int16_t*, int, cudaStream_t); \
  template void pool_maximum_grad<T>(const Window&, const int16_t*, const T*, T*, int, cudaStream_t);
S3D_INSTANTIATE(float)
S3D_INSTANTIATE(bf16)
S3D_INSTANTIATE(fp16)
#undef S3D_INSTANTIATE

}  // namespace s3d::cuda
