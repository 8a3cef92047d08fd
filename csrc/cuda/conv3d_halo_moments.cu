// Mean and squared deviations of what a convolution wrote, from those of its tiles (conv3d_halo.cu).
//
//   mean[s, c], squares[s, c] = of all visible voxels of sample s, merged from (count, mean, squares) of its tiles
//
// Layouts   partials: counts [tiles], then moments [tiles, mean or squares, channels], floats; results [samples,
//           channels].
// Work      A block makes 8 channels of one sample, 32 bytes of a tile: eight lanes, one channel each, have every
//           kSlots-th tile in their order and fetch kAtOnce tiles before they merge them; then halves of these slots
//           are merged with each other, in shared memory.
// Numbers   Pairs of (count, mean, squares) are merged by the deviation of one mean from the other, in float; counts
//           are integers. The order is fixed by the problem alone.
// Expected  Reads 8 bytes a tile and channel, 64 times less than the convolution wrote in bf16, so latency counts: a
//           sample of 10^6 voxels has 4096 tiles, 16 rounds of a fetch from L2 and four merges of some 60 cycles: 15
//           microseconds, a tenth of the convolution's time on an H100. Not measured yet.
// Source    Chan, Golub, LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances (1979).
#include "cuda/device.cuh"
#include "cuda/halo.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"

namespace s3d::cuda {
namespace {

constexpr int kChannels = 8, kThreads = 512, kSlots = kThreads / kChannels, kAtOnce = 4;

struct Merged {
  int count;
  float mean, squares;
  __device__ __forceinline__ void add(int other_count, float other_mean, float other_squares) {
    if (other_count == 0) return;
    const int both = count + other_count;
    const float share = static_cast<float>(other_count) / static_cast<float>(both), off = other_mean - mean;
    mean += off * share;
    squares += other_squares + off * off * share * static_cast<float>(count);
    count = both;
  }
};

template <bool kWide>
__global__ void __launch_bounds__(kThreads)
    conv3d_halo_moments_kernel(SampleOffsets samples, int cuboids_of_block, int channels, Global<const float> counts,
                               Global<const float> moments, Global<float> mean, Global<float> squares) {
  S3D_SHARED(int, shared_counts, kThreads);
  S3D_SHARED(float, shared_means, kThreads);
  S3D_SHARED(float, shared_squares, kThreads);
  const int slot = threadIdx.x / kChannels, sample = blockIdx.y;
  const int channel = static_cast<int>(blockIdx.x) * kChannels + static_cast<int>(threadIdx.x % kChannels);
  const auto tile_of_sample = [&](int n) {
    const int row = samples.rows[n];
    return first_tile<kWide>(static_cast<int64_t>(row) * cuboids_of_block, n);
  };
  Merged merged = {0, 0.0f, 0.0f};
  if (channel < channels) {
    const int end = tile_of_sample(sample + 1);
    for (int first = tile_of_sample(sample) + slot; first < end; first += kAtOnce * kSlots) {
      float its_count[kAtOnce], its_mean[kAtOnce], its_squares[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int tile = first + i * kSlots;
        its_count[i] = its_mean[i] = its_squares[i] = 0;
        if (tile >= end) continue;
        const int64_t at = static_cast<int64_t>(tile) * 2 * channels + channel;
        its_count[i] = counts[tile];
        its_mean[i] = moments[at];
        its_squares[i] = moments[at + channels];
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) merged.add(static_cast<int>(its_count[i]), its_mean[i], its_squares[i]);
    }
  }
  for (int half = kSlots / 2; half > 0; half /= 2) {
    if (slot >= half && slot < 2 * half) {
      shared_counts[threadIdx.x] = merged.count;
      shared_means[threadIdx.x] = merged.mean;
      shared_squares[threadIdx.x] = merged.squares;
    }
    __syncthreads();
    if (slot < half) {
      const int other = static_cast<int>(threadIdx.x) + kChannels * half;
      merged.add(shared_counts[other], shared_means[other], shared_squares[other]);
    }
  }
  if (slot == 0 && channel < channels) {
    const int64_t at = static_cast<int64_t>(sample) * channels + channel;
    mean[at] = merged.mean;
    squares[at] = merged.squares;
  }
}

}  // namespace

void conv3d_halo_moments(const Window& window, const ConvChannels& channels, const ConvFusion& fusion, float* mean,
                         float* squares, cudaStream_t stream) {
  const int written = window.transposed ? channels.in : channels.out;
  const auto start = [&](auto kernel, const Halo& halo) {
    const int parts = (written + kChannels - 1) / kChannels;
    const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(fusion.samples));
    launch("conv3d_halo_moments", kernel, grid, kThreads, 0, stream,
           SampleOffsets{fusion.samples, fusion.sample_offsets}, halo.cuboids_of_block(), written, fusion.partials,
           fusion.partials + halo_tiles(window, fusion.samples), mean, squares);
  };
  if (is_wide(window)) {
    start(conv3d_halo_moments_kernel<true>, halo_of<true>(window));
  } else {
    start(conv3d_halo_moments_kernel<false>, halo_of<false>(window));
  }
}

}  // namespace s3d::cuda
