// Gradient of a convolution's weight: products over the pairs of each tap, in parts that are added in a fixed order.
//
//   grad_weight[n, k, tap] = sum over voxels v with a source of grad[v, n] * x[source(v, tap), k]
//
// Layouts   grad [voxels, groups * N] and x [voxels, groups * K], channels last; the result as torch has it. Partial
//           sums [part, group, tap, K, N] in float.
// Work      A block of 4 warps makes one part of one (group, tap, kTile input channels, kTile output channels); kTile
//           is 32 or 64. It takes kBatch voxels of its part at a time, lists those that have a source under its tap (so
//           no product is wasted on others) and multiplies them in steps of kPairs. A warp makes a quarter of the tile.
//           Parts are cut by the problem alone; a second kernel adds them in their order. No atomics: the bits are the
//           same from run to run.
// Memory    kStages of kPairs * 2 * kTile numbers, by cp.async two steps ahead; chunks swizzled. The list: kBatch * 8
//           bytes. bf16 with kTile = 64: 24 + 8 KiB; float: 48 + 8 KiB. Registers: kTile^2 / 128 sums, 32 or 8.
// Numbers   Both operands have pairs as rows, and products run along pairs: those of 16 bits go through ldmatrix.trans,
//           float by single loads (TF32 and, with Math::kExact, multiply-adds). Sums are float.
// Limits    As conv3d_gather. Every tap reads its rows again.
// Expected  A step multiplies 2 * kPairs * kTile^2 and fetches kPairs * 2 * kTile numbers: 32 FLOP a byte in bf16 with
//           kTile = 64; bound by the bandwidth of L2. On an H100 those of a step of a
//           ResEnc-L encoder took 1.1 ms together.
// Source    As conv3d_gather; split sums in fixed order as in "stream-K" without its atomics (Osama et al., 2023).
#include "cuda/cp_async.cuh"
#include "cuda/device.cuh"
#include "cuda/grad_weight_sum.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/mma.cuh"
#include "cuda/rows.cuh"
#include "cuda/window.cuh"

#include <algorithm>

namespace s3d::cuda {
namespace {

template <typename T, int kSide>
struct GradWeightTraits {
  static constexpr int kWarps = 4, kStages = 3;
  static constexpr int kTile = kSide;         // channels of both operands
  static constexpr int kWarpTile = kTile / 2;  // warps are 2 x 2
  static constexpr int kPairs = 32;            // of a step
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocks = 4;  // on an SM, for which there must be registers
  static constexpr int kRounds = 8, kBatch = kRounds * kThreads;  // voxels that are listed at once
  static constexpr int kChunks = kTile / kChunk<T>;               // of a row in a stage
  static constexpr int kOperandElements = kPairs * kTile;
  static constexpr int kStagesBytes = kStages * 2 * kOperandElements * static_cast<int>(sizeof(T));
  static constexpr int kSharedBytes = kStagesBytes + kBatch * 8;
  static constexpr int kColumns = kWarpTile / 8, kRows = kWarpTile / 16;  // fragments of a warp
};

struct Correlation {
  int taps, groups, k, n;
  int k_tiles, n_tiles;
  int tile;
  int parts;
  int64_t part_voxels;
  int64_t sums() const { return int64_t{groups} * taps * k * n; }
};

// Parts make enough blocks for any GPU where there are few taps and channels; of at least some thousand voxels.
Correlation correlation_of(const Window& window, const ConvChannels& channels) {
  constexpr int64_t kBlocks = 1024, kLeastVoxels = 2048, kMostSums = int64_t{16} << 20;
  Correlation c{};
  c.taps = static_cast<int>(window.taps());
  c.groups = channels.groups;
  c.k = channels.in / channels.groups;
  c.n = channels.out / channels.groups;
  c.tile = std::min(c.k, c.n) <= 32 ? 32 : 64;
  c.k_tiles = (c.k + c.tile - 1) / c.tile;
  c.n_tiles = (c.n + c.tile - 1) / c.tile;
  const int64_t voxels = window.written_rows * window.written_block.volume();
  const int64_t blocks = int64_t{c.groups} * c.taps * c.k_tiles * c.n_tiles;
  const int64_t room = kMostSums / std::max<int64_t>(c.sums(), 1);
  const int64_t wanted = std::min(std::min(kBlocks / blocks, voxels / kLeastVoxels), room);
  c.parts = static_cast<int>(std::max<int64_t>(wanted, 1));
  c.part_voxels = (voxels + c.parts - 1) / c.parts;
  return c;
}

// sums += x^T grad over the first `count` pairs of a step, rounded up to what an mma takes: rows x_first ... of the
// tile's input, columns grad_first ... of its output channels.
template <typename T, Math kMath, int kTile>
__device__ __forceinline__ void correlate(
    Shared<T> x, Shared<T> grad, int x_first, int grad_first, int count,
    float (&sums)[GradWeightTraits<T, kTile>::kRows][GradWeightTraits<T, kTile>::kColumns][4]) {
  using Traits = GradWeightTraits<T, kTile>;
  constexpr int kChunks = Traits::kChunks, kRows = Traits::kRows, kColumns = Traits::kColumns;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if constexpr (kMath == Math::kExact) {
    static_assert(sizeof(T) == 4, "of float");
#pragma unroll 2
    for (int pair = 0; pair < min(count, Traits::kPairs); ++pair) {
      float a[kRows][2];
#pragma unroll
      for (int i = 0; i < 2 * kRows; ++i) {
        const int channel = x_first + i * 8 + g;
        a[i / 2][i % 2] = x[swizzled_wide<T, kChunks>(pair, channel / 4) + channel % 4];
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int channel = grad_first + j * 8 + 2 * t;
        const float2 b = load<float2>(grad + (swizzled_wide<T, kChunks>(pair, channel / 4) + channel % 4));
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
          sums[m][j][0] += a[m][0] * b.x;
          sums[m][j][1] += a[m][0] * b.y;
          sums[m][j][2] += a[m][1] * b.x;
          sums[m][j][3] += a[m][1] * b.y;
        }
      }
    }
  } else {
    constexpr int kDepth = 32 / static_cast<int>(sizeof(T));  // pairs of an mma: 16, or 8 in TF32
#pragma unroll
    for (int first = 0; first < Traits::kPairs; first += kDepth) {
      if (first >= count) break;
      uint32_t a[kRows][4], b[kColumns][2];
      if constexpr (sizeof(T) == 4) {
        const auto number = [&](Shared<T> from, int pair, int channel) {
          const float value = from[swizzled_wide<T, kChunks>(pair, channel / 4) + channel % 4];
          return to_tf32(value);
        };
#pragma unroll
        for (int i = 0; i < 4 * kRows; ++i) {
          a[i / 4][i % 4] = number(x, first + t + i % 4 / 2 * 4, x_first + i / 4 * 16 + i % 2 * 8 + g);
        }
#pragma unroll
        for (int i = 0; i < 2 * kColumns; ++i) {
          b[i / 2][i % 2] = number(grad, first + t + i % 2 * 4, grad_first + i / 2 * 8 + g);
        }
      } else {
        const int part = lane / 8, row = first + lane % 8;
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
          const int chunk = x_first / 8 + m * 2 + part % 2;
          ldmatrix_transposed(a[m], x + swizzled_wide<T, kChunks>(row + part / 2 * 8, chunk));
        }
#pragma unroll
        for (int j = 0; j < kColumns; j += 2) {
          uint32_t two[4];
          const int chunk = grad_first / 8 + j + part / 2;
          ldmatrix_transposed(two, grad + swizzled_wide<T, kChunks>(row + part % 2 * 8, chunk));
#pragma unroll
          for (int i = 0; i < 4; ++i) b[j + i / 2][i % 2] = two[i];
        }
      }
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) mma<T>(sums[m][j], a[m], b[j]);
      }
    }
  }
}

template <typename T, Math kMath, int kTile>
__global__ void __launch_bounds__(GradWeightTraits<T, kTile>::kThreads, GradWeightTraits<T, kTile>::kBlocks)
    conv3d_grad_weight_kernel(WindowView window, Correlation c, Global<const T> grad, Global<const T> x,
                              Global<float> partial, bool whole_grad, bool whole_x) {
  using Traits = GradWeightTraits<T, kTile>;
  constexpr int kStages = Traits::kStages, kPairs = Traits::kPairs, kChunks = Traits::kChunks;
  const Shared<T> stages = dynamic_shared<T>(0, kStages * 2 * Traits::kOperandElements);
  const Shared<int2> pairs = dynamic_shared<int2>(Traits::kStagesBytes, Traits::kBatch);  // (written, gathered) voxel
  S3D_SHARED(int, counts, Traits::kWarps);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int part = blockIdx.y;
  int rest = blockIdx.x;
  const int n_first = rest % c.n_tiles * kTile;
  rest /= c.n_tiles;
  const int k_first = rest % c.k_tiles * kTile;
  rest /= c.k_tiles;
  const int tap = rest % c.taps, group = rest / c.taps;
  const int64_t x_channels = static_cast<int64_t>(c.groups) * c.k, grad_channels = static_cast<int64_t>(c.groups) * c.n;
  x += static_cast<int64_t>(group) * c.k + k_first;
  grad += static_cast<int64_t>(group) * c.n + n_first;
  const Tap at = tap_of(window, tap);
  const int x_first = warp / 2 * Traits::kWarpTile, grad_first = warp % 2 * Traits::kWarpTile;

  float sums[Traits::kRows][Traits::kColumns][4] = {};
  const int64_t end = min((part + 1) * c.part_voxels, window.written_voxels_count);
  for (int64_t begin = part * c.part_voxels; begin < end; begin += Traits::kBatch) {
    // A thread looks at voxels kThreads apart; pairs are listed round by round, warp by warp, lane by lane.
    int sources[Traits::kRounds];
    int own = 0;  // pairs of the warp
#pragma unroll
    for (int i = 0; i < Traits::kRounds; ++i) {
      const int64_t voxel = begin + warp * (Traits::kRounds * 32) + i * 32 + lane;
      bool visible = voxel < end;
      if (visible && window.written_voxels != nullptr) visible = window.written_voxels[voxel] != 0;
      sources[i] = visible ? source_of(window, place_of(window, static_cast<int>(voxel)), at) : -1;
      own += __popc(__ballot_sync(0xFFFFFFFF, sources[i] >= 0));
    }
    if (lane == 0) counts[warp] = own;
    __syncthreads();
    int place = 0, count = 0;
    for (int i = 0; i < Traits::kWarps; ++i) {
      if (i == warp) place = count;
      count += counts[i];
    }
#pragma unroll
    for (int i = 0; i < Traits::kRounds; ++i) {
      const uint32_t found = __ballot_sync(0xFFFFFFFF, sources[i] >= 0);
      const int voxel = static_cast<int>(begin) + warp * (Traits::kRounds * 32) + i * 32 + lane;
      if (sources[i] >= 0) store(pairs + (place + __popc(found & ((1u << lane) - 1))), make_int2(voxel, sources[i]));
      place += __popc(found);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      count_useful_flops(2 * int64_t{count} * min(kTile, c.k - k_first) * min(kTile, c.n - n_first));
    }

    const auto copy = [&](int step) {
      const Shared<T> to = stages + step % kStages * (2 * Traits::kOperandElements);
#pragma unroll
      for (int i = threadIdx.x; i < kPairs * kChunks; i += Traits::kThreads) {
        const int row = i / kChunks, chunk = i % kChunks, channel = chunk * kChunk<T>;
        const bool exists = step * kPairs + row < count;
        const int2 pair = exists ? load<int2>(pairs + (step * kPairs + row)) : make_int2(0, 0);
        const int place = swizzled_wide<T, kChunks>(row, chunk);
        copy_chunk<T>(to + place, x, pair.y * x_channels + channel, exists ? c.k - k_first - channel : 0, whole_x);
        copy_chunk<T>(to + Traits::kOperandElements + place, grad, pair.x * grad_channels + channel,
                      exists ? c.n - n_first - channel : 0, whole_grad);
      }
    };
    const int steps = (count + kPairs - 1) / kPairs;
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < steps) copy(i);
      cp_async_commit();
    }
    for (int i = 0; i < steps; ++i) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // everybody's copies of this step are there, and the stage of the step before is free
      if (i + kStages - 1 < steps) copy(i + kStages - 1);
      cp_async_commit();
      const Shared<T> step_x = stages + i % kStages * (2 * Traits::kOperandElements);
      correlate<T, kMath, kTile>(step_x, step_x + Traits::kOperandElements, x_first, grad_first, count - i * kPairs,
                                 sums);
    }
    __syncthreads();  // for the next list
  }

  const int64_t matrix = (static_cast<int64_t>(part) * c.groups + group) * c.taps + tap;
#pragma unroll
  for (int m = 0; m < Traits::kRows; ++m) {
#pragma unroll
    for (int j = 0; j < Traits::kColumns; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int k = k_first + x_first + m * 16 + i / 2 * 8 + lane / 4;
        const int n = n_first + grad_first + j * 8 + lane % 4 * 2 + i % 2;
        if (k < c.k && n < c.n) partial[(matrix * c.k + k) * c.n + n] = sums[m][j][i];
      }
    }
  }
}

template <typename T, Math kMath, int kTile>
void correlate_all(const Window& window, const Correlation& c, const T* grad, const T* x, float* partial,
                   cudaStream_t stream) {
  using Traits = GradWeightTraits<T, kTile>;
  const dim3 grid(static_cast<unsigned>(int64_t{c.groups} * c.taps * c.k_tiles * c.n_tiles),
                  static_cast<unsigned>(c.parts));
  launch("conv3d_grad_weight", conv3d_grad_weight_kernel<T, kMath, kTile>, grid, Traits::kThreads, Traits::kSharedBytes,
         stream, view(window), c, grad, x, partial, whole_chunks(grad, c.groups * c.n, c.n),
         whole_chunks(x, c.groups * c.k, c.k));
}

}  // namespace

int64_t conv3d_grad_weight_partial_sums(const Window& window, const ConvChannels& channels) {
  const Correlation c = correlation_of(window, channels);
  return c.parts * c.sums();
}

template <typename T>
void conv3d_grad_weight(const Window& window, const ConvChannels& channels, Math math, const T* grad, const T* x,
                        float* partial, T* grad_weight, cudaStream_t stream) {
  const Correlation c = correlation_of(window, channels);
  const auto start = [&](auto narrow, auto wide) {
    (c.tile == 32 ? narrow : wide)(window, c, grad, x, partial, stream);
  };
  bool exact = false;
  if constexpr (sizeof(T) == 4) {
    exact = math == Math::kExact;
    if (exact) start(correlate_all<T, Math::kExact, 32>, correlate_all<T, Math::kExact, 64>);
  }
  if (!exact) start(correlate_all<T, Math::kTensorCores, 32>, correlate_all<T, Math::kTensorCores, 64>);
  sum_grad_weight(c.groups, c.taps, c.k, c.n, c.parts, partial, grad_weight, stream);
}

#define S3D_INSTANTIATE(T)                                                                                           \
  template void conv3d_grad_weight<T>(const Window&, const ConvChannels&, Math, const T*, const T*, float*, T*,     \
                                      cudaStream_t);
S3D_INSTANTIATE(float)
S3D_INSTANTIATE(bf16)
S3D_INSTANTIATE(fp16)
#undef S3D_INSTANTIATE

}  // namespace s3d::cuda
