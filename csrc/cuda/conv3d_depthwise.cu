// Convolution of each channel by itself (as many groups as input and output channels), the gradient of its input and
// that of its weight: one multiplication for each number that is read, so without tensor cores.
//
//   written[v, c] = bias[c] + sum over taps of gathered[source(v, tap), c] * weight[c, tap]
//   grad_weight[c, tap] = sum over voxels v with a source of grad[v, c] * x[source(v, tap), c]
//
// Forward, and with a transposed window the gradient of the input: any kernel and stride.
//
// Layouts   gathered, written, grad, x [voxels, C], channels last; the weight and its gradient as torch has them,
//           [C, taps]. Partial sums [part, tap, C] in float.
// Work      A block of 256 threads makes 32 channels of some voxels; a thread has 16 bytes of channels of every 64th
//           (16 bits) or 32nd (float) voxel, or one channel of every 8th where rows are no whole 16 bytes. It finds the
//           sources of kTaps = 4 taps (tap_sources.cuh) and reads them together.
//           Gradient of the weight: a block makes one part of the voxels x 4 taps x 32 channels; the sums of a warp's
//           threads are added by shuffles, those of the warps in their order, then those of the parts
//           (weight_parts.cuh). Parts are cut by the problem alone: always the same bits.
// Memory    Shared: the block's weights in float, 128 bytes a tap, and 8 bytes for each tap and coordinate of an axis
//           (3.5 + 2.3 KiB for 3x3x3 and blocks of side 32); the gradient's sums, 4 KiB. Registers: at most 80.
// Numbers   Products and sums in float, in an order that the problem alone fixes.
// Limits    Fewer than 2^31 voxels on each side; shared memory bounds the kernel and the block
//           (conv3d_depthwise_applies). Of C = 1, 2, 3 a block uses 1, 2, 3 lanes of 32.
// Expected  Each number is read once for each tap, 27 times mostly from the L1 cache and L2, and written once: bound by
//           their bandwidth and by finding the sources, some 15 instructions a tap for 16 bytes of channels. The
//           gradient of the weight besides reads grad once for 4 taps. Not measured yet.
#include <algorithm>

#include "cuda/channels.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/mma.cuh"
#include "cuda/tap_sources.cuh"
#include "cuda/weight_parts.cuh"
#include "cuda/window.cuh"

namespace s3d::cuda {
namespace {

constexpr uint32_t kAll = 0xFFFFFFFF;
constexpr int kThreads = 256, kWarps = kThreads / 32, kTile = 32;  // kTile: channels
constexpr int kTaps = 4;                                           // at once

// A thread's place in its block.
template <int kVector>
struct Share {
  static constexpr int kLanes = kTile / kVector;   // threads side by side along the channels
  static constexpr int kRows = kThreads / kLanes;  // voxels at once
  __device__ Share(int first_channel, int channels) {
    row = threadIdx.x / kLanes;
    column = threadIdx.x % kLanes * kVector;
    exists = first_channel + column < channels;
    channel = first_channel + (exists ? column : 0);
  }
  int row, column, channel;  // column: of the tile
  bool exists;
};

__device__ __forceinline__ bool is_visible(const WindowView& window, int64_t voxel) {
  return window.written_voxels == nullptr || window.written_voxels[voxel] != 0;
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, 3)
    conv3d_depthwise_kernel(WindowView window, int channels, int rounds, Global<const T> gathered,
                            Global<const T> weight, Global<const T> bias, Global<T> written) {
  constexpr int kRows = Share<kVector>::kRows;
  const int first_channel = blockIdx.y * kTile;
  const Shared<float> weights = dynamic_shared<float>(0, window.taps * kTile);
  const AxisTerms terms = axis_terms<kThreads>(window, window.taps * kTile * 4);
  for (int i = threadIdx.x; i < window.taps * kTile; i += kThreads) {
    const int channel = first_channel + i % kTile;
    float value = 0.0f;
    if (channel < channels) value = to_float(static_cast<T>(weight[channel * window.taps + i / kTile]));
    weights[i] = value;
  }
  __syncthreads();

  const Share<kVector> share(first_channel, channels);
  if (!share.exists) return;
  float start[kVector] = {};
  if (bias != nullptr) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) start[i] = to_float(static_cast<T>(bias[share.channel + i]));
  }
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * rounds * kRows;
  const int64_t end = min(begin + rounds * kRows, window.written_voxels_count);
  for (int64_t voxel = begin + share.row; voxel < end; voxel += kRows) {
    float sums[kVector] = {};
    if (is_visible(window, voxel)) {
      const VoxelPlace at = place_of(window, static_cast<int>(voxel));
      Tap tap = {0, 0, 0};
#pragma unroll
      for (int i = 0; i < kVector; ++i) sums[i] = start[i];
#pragma unroll 1
      for (int first = 0; first < window.taps; first += kTaps) {
        int sources[kTaps];
        const int pairs = next_sources(window, terms, at, true, tap, sources);
        count_useful_flops(2 * int64_t{pairs} * kVector);
        float values[kTaps][kVector];
#pragma unroll
        for (int t = 0; t < kTaps; ++t) {
          if (sources[t] >= 0) {
            load_channels(gathered + (static_cast<int64_t>(sources[t]) * channels + share.channel), values[t]);
          }
        }
#pragma unroll
        for (int t = 0; t < kTaps; ++t) {
          if (sources[t] < 0) continue;
          float of_tap[kVector];
          const Shared<float> from = weights + ((first + t) * kTile + share.column);
          if constexpr (kVector == 1) {
            of_tap[0] = from[0];
          } else {
#pragma unroll
            for (int i = 0; i < kVector; i += 4) {
              const float4 four = load<float4>(from + i);
              of_tap[i] = four.x, of_tap[i + 1] = four.y, of_tap[i + 2] = four.z, of_tap[i + 3] = four.w;
            }
          }
#pragma unroll
          for (int i = 0; i < kVector; ++i) sums[i] += values[t][i] * of_tap[i];
        }
      }
    }
    store_channels(written + (voxel * channels + share.channel), sums);
  }
}

// blockIdx.x counts tiles of channels within groups of kTaps taps, blockIdx.y parts.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, 3)
    conv3d_depthwise_grad_weight_kernel(WindowView window, int channels, int tiles, int64_t part_voxels,
                                        Global<const T> grad, Global<const T> x, Global<float> partial) {
  constexpr int kRows = Share<kVector>::kRows;
  S3D_SHARED(float, of_warp, kTaps* kWarps* kTile);
  const AxisTerms terms = axis_terms<kThreads>(window, 0);
  const int first_channel = blockIdx.x % tiles * kTile, first_tap = blockIdx.x / tiles * kTaps;
  const Share<kVector> share(first_channel, channels);
  __syncthreads();

  float sums[kTaps][kVector] = {};
  const int64_t begin = blockIdx.y * part_voxels;
  const int64_t end = share.exists ? min(begin + part_voxels, window.written_voxels_count) : begin;
#pragma unroll 1
  for (int64_t voxel = begin + share.row; voxel < end; voxel += kRows) {
    if (!is_visible(window, voxel)) continue;
    Tap tap = tap_of(window, first_tap);
    int sources[kTaps];
    const int pairs = next_sources(window, terms, place_of(window, static_cast<int>(voxel)), true, tap, sources);
    if (pairs == 0) continue;
    count_useful_flops(2 * int64_t{pairs} * kVector);
    float of_voxel[kVector];
    load_channels(grad + (voxel * channels + share.channel), of_voxel);
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      if (sources[t] < 0) continue;
      float values[kVector];
      load_channels(x + (static_cast<int64_t>(sources[t]) * channels + share.channel), values);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sums[t][i] += of_voxel[i] * values[i];
    }
  }

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
#pragma unroll
      for (int step = Share<kVector>::kLanes; step < 32; step *= 2) {
        sums[t][i] += __shfl_xor_sync(kAll, sums[t][i], step);
      }
      if (lane < Share<kVector>::kLanes) of_warp[(t * kWarps + warp) * kTile + share.column + i] = sums[t][i];
    }
  }
  __syncthreads();
  const int tap = first_tap + warp, channel = first_channel + lane;
  if (warp >= kTaps || tap >= window.taps || channel >= channels) return;
  float sum = 0.0f;
  for (int i = 0; i < kWarps; ++i) sum += of_warp[(warp * kWarps + i) * kTile + lane];
  partial[(static_cast<int64_t>(blockIdx.y) * window.taps + tap) * channels + channel] = sum;
}

int tiles_of(const ConvChannels& channels) { return (channels.out + kTile - 1) / kTile; }

int64_t written_voxels_of(const Window& window) { return window.written_rows * window.written_block.volume(); }

int64_t forward_shared_bytes(const Window& window) { return window.taps() * kTile * 4 + axis_terms_bytes(window); }

struct DepthwiseParts {
  int count;
  int64_t voxels;  // of each but the last
};

DepthwiseParts parts_of(const Window& window, const ConvChannels& channels) {
  constexpr int64_t kBlocks = 2048, kLeastVoxels = 1024;
  const int64_t voxels = written_voxels_of(window);
  const int64_t blocks = (window.taps() + kTaps - 1) / kTaps * tiles_of(channels);
  const int64_t count = std::max<int64_t>(std::min(kBlocks / blocks, voxels / kLeastVoxels), 1);
  return {static_cast<int>(count), (voxels + count - 1) / count};
}

template <typename T, int kVector>
void depthwise(const Window& window, const ConvChannels& channels, const T* gathered, const T* weight, const T* bias,
               T* written, cudaStream_t stream) {
  constexpr int64_t kBlocks = 2048, kMostRounds = 8;  // blocks that there are before they make several rounds
  constexpr int64_t kRows = Share<kVector>::kRows;
  const WindowView shape = view(window);
  const int tiles = tiles_of(channels);
  const int64_t rows = (shape.written_voxels_count + kRows - 1) / kRows;
  const int64_t rounds = std::clamp<int64_t>(rows * tiles / kBlocks, 1, kMostRounds);
  const dim3 grid(blocks_of(rows, rounds), static_cast<unsigned>(tiles));
  launch("conv3d_depthwise", conv3d_depthwise_kernel<T, kVector>, grid, kThreads,
         static_cast<size_t>(forward_shared_bytes(window)), stream, shape, channels.out, static_cast<int>(rounds),
         gathered, weight, bias, written);
}

}  // namespace

bool conv3d_depthwise_applies(const Window& window, const ConvChannels& channels) {
  constexpr int64_t kMostSharedBytes = 90 << 10;  // sm_86 has 99 KiB for a block, of which the gradient takes 4
  return channels.groups == channels.in && channels.groups == channels.out &&
         forward_shared_bytes(window) <= kMostSharedBytes;
}

template <typename T>
void conv3d_depthwise(const Window& window, const ConvChannels& channels, const T* gathered, const T* weight,
                      const T* bias, T* written, cudaStream_t stream) {
  const auto start = all_whole_chunks(channels.out, gathered, written) ? depthwise<T, kChunk<T>> : depthwise<T, 1>;
  start(window, channels, gathered, weight, bias, written, stream);
}

int64_t conv3d_depthwise_grad_weight_partial_sums(const Window& window, const ConvChannels& channels) {
  return parts_of(window, channels).count * window.taps() * channels.out;
}

template <typename T>
void conv3d_depthwise_grad_weight(const Window& window, const ConvChannels& channels, const T* grad, const T* x,
                                  float* partial, T* grad_weight, cudaStream_t stream) {
  const WindowView shape = view(window);
  const int tiles = tiles_of(channels);
  const DepthwiseParts parts = parts_of(window, channels);
  const auto kernel = all_whole_chunks(channels.out, grad, x) ? conv3d_depthwise_grad_weight_kernel<T, kChunk<T>>
                                                              : conv3d_depthwise_grad_weight_kernel<T, 1>;
  const dim3 grid(static_cast<unsigned>((shape.taps + kTaps - 1) / kTaps * tiles), static_cast<unsigned>(parts.count));
  launch("conv3d_depthwise_grad_weight", kernel, grid, kThreads, static_cast<size_t>(axis_terms_bytes(window)), stream,
         shape, channels.out, tiles, parts.voxels, grad, x, partial);
  add_weight_parts("conv3d_depthwise_grad_weight_sum", partial, parts.count, shape.taps, 1, channels.out, grad_weight,
                   stream);
}

#define S3D_INSTANTIATE(T)                                                                                          \
  template void conv3d_depthwise<T>(const Window&, const ConvChannels&, const T*, const T*, const T*, T*,           \
                                    cudaStream_t);                                                                  \
  template void conv3d_depthwise_grad_weight<T>(const Window&, const ConvChannels&, const T*, const T*, float*, T*, \
                                                cudaStream_t);
S3D_INSTANTIATE(float)
S3D_INSTANTIATE(bf16)
S3D_INSTANTIATE(fp16)
#undef S3D_INSTANTIATE

}  // namespace s3d::cuda
