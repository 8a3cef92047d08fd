// Mean and squared deviations of what a convolution wrote, from those of its tiles (conv3d_halo.cu).
//
//   mean[s, c], squares[s, c] = of all visible voxels of sample s, merged from (count, mean, squares) of its tiles
//
// Layouts   partials: counts [tiles], then moments [tiles, mean or squares, channels], floats; results [samples,
//           channels].
// Work      A block makes 32 channels of one sample: a lane a channel, a warp every kWarps-th tile in their order; then
//           halves of the warps are merged with each other, in shared memory. Neighbouring lanes read neighbouring
//           floats.
// Numbers   Pairs of (count, mean, squares) are merged by the deviation of one mean from the other, in float; counts
//           are integers. The order is fixed by the problem alone.
// Expected  Reads 8 bytes a tile and channel, 64 times less than the convolution wrote in bf16: some microseconds,
//           which the latency of a warp's chain of merges makes. Not measured yet.
// Source    Chan, Golub, LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances (1979).
#include "cuda/device.cuh"
#include "cuda/halo.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"

namespace s3d::cuda {
namespace {

constexpr int kWarps = 16;

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
__global__ void __launch_bounds__(32 * kWarps)
    conv3d_halo_moments_kernel(SampleOffsets samples, int cuboids_of_block, int channels, Global<const float> counts,
                               Global<const float> moments, Global<float> mean, Global<float> squares) {
  S3D_SHARED(int, shared_counts, 32 * kWarps);
  S3D_SHARED(float, shared_means, 32 * kWarps);
  S3D_SHARED(float, shared_squares, 32 * kWarps);
  const int warp = threadIdx.x / 32, sample = blockIdx.y;
  const int channel = static_cast<int>(blockIdx.x) * 32 + static_cast<int>(threadIdx.x % 32);
  const auto tile_of_sample = [&](int n) {
    const int row = samples.rows[n];
    return first_tile<kWide>(static_cast<int64_t>(row) * cuboids_of_block, n);
  };
  Merged merged = {0, 0.0f, 0.0f};
  if (channel < channels) {
    const int end = tile_of_sample(sample + 1);
    for (int tile = tile_of_sample(sample) + warp; tile < end; tile += kWarps) {
      const int64_t at = static_cast<int64_t>(tile) * 2 * channels + channel;
      const float count = counts[tile], its_mean = moments[at], its_squares = moments[at + channels];
      merged.add(static_cast<int>(count), its_mean, its_squares);
    }
  }
  for (int half = kWarps / 2; half > 0; half /= 2) {
    if (warp >= half && warp < 2 * half) {
      shared_counts[threadIdx.x] = merged.count;
      shared_means[threadIdx.x] = merged.mean;
      shared_squares[threadIdx.x] = merged.squares;
    }
    __syncthreads();
    if (warp < half) {
      const int other = static_cast<int>(threadIdx.x) + 32 * half;
      merged.add(shared_counts[other], shared_means[other], shared_squares[other]);
    }
  }
  if (warp == 0 && channel < channels) {
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
    const dim3 grid(static_cast<unsigned>((written + 31) / 32), static_cast<unsigned>(fusion.samples));
    launch("conv3d_halo_moments", kernel, grid, 32 * kWarps, 0, stream,
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
