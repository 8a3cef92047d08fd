// Convolution over lists of pairs, for small blocks: rows without an input under a tap take no part in its product.
//
//   written[v, n] = bias[n] + sum over taps and k of gathered[source(v, tap), k] * weight[tap, k, n]
//
// Where blocks have side 1 or 2, most taps leave the block, and three of four neighbours are masked: of the 16 rows of
// a fragment a few have a pair, and hardly ever none has. So the pairs of each tap are moved together first.
//
// Layouts   gathered, written and the packed weight as in conv3d_gather.
// Work      A block of 4 warps makes kTileM = 64 consecutive voxels x 64 channels of one group, for the taps of one
//           split. Per tap the rows that have a source are listed, in order; a step multiplies the tap's listed rows by
//           kTileK channels (64 bytes) of its weights. A warp makes 16 of the 64 columns. When a tap ends, its sums are
//           added to the rows that they belong to.
// Splits    Small blocks are few voxels and many channels: the taps are split among blocks until there are about 256.
//           Partial sums then go to memory, and a second kernel adds them in the order of the splits. The split depends
//           on the problem alone, so the bits are the same from run to run.
// Memory    Sums: 64 * 66 * 4 bytes; lists: 32 taps * 64 * 5 bytes; kStages of (64 + 64) * 64 bytes by cp.async, three
//           steps ahead: 59 KiB, so two blocks on an SM of 164 KiB and one on one of 99.
//           Registers: 4 fragments x 16 columns, 32 sums a thread.
// Numbers   As in conv3d_gather. The order of sums: channels of a tap, then taps, then splits.
// Limits    As in conv3d_gather; 64 columns even where there are fewer channels.
// Expected  Bound by reading the weight (2 * 27 * 320 * 320 bytes in bf16: 5.5 MB) from L2 once for each 64 voxels. Not
//           measured yet.
// Source    Gathering the rows of each tap: Choy et al., Minkowski Engine (CVPR 2019), section 3; here within a tile,
//           so that no sum leaves the block before it is complete.
#include <algorithm>

#include "cuda/cp_async.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/product.cuh"
#include "cuda/rows.cuh"
#include "cuda/window.cuh"

namespace s3d::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kTileM = 64, kTileN = 64, kFragments = kTileM / 16;
constexpr int kWarpN = kTileN / kWarps;
constexpr int kStages = 4;
constexpr int kTapsAtOnce = 32;
// Of the rows of sums, in floats: a lane's two, of four rows and four columns, lie in different banks.
constexpr int kPitch = kTileN + 2;

constexpr int kStageBytes = (kTileM + kTileN) * kRowChunks * 16;
constexpr int kSumsAt = kStages * kStageBytes;
constexpr int kSourcesAt = kSumsAt + kTileM * kPitch * 4;
constexpr int kRowsAt = kSourcesAt + kTapsAtOnce * kTileM * 4;
constexpr int kSharedBytes = kRowsAt + kTapsAtOnce * kTileM;

struct Splits {
  int count, taps;  // taps of each but the last
};

Splits splits_of(const Window& window, const Product& product) {
  constexpr int64_t kBlocks = 256;
  const int64_t voxels = window.written_rows * window.written_block.volume();
  const int64_t blocks = (voxels + kTileM - 1) / kTileM * product.groups * product.n_tiles;
  const int64_t wanted = std::clamp<int64_t>(kBlocks / std::max<int64_t>(blocks, 1), 1, product.taps);
  const int taps = static_cast<int>((product.taps + wanted - 1) / wanted);
  return {(product.taps + taps - 1) / taps, taps};
}

// sums: [split, voxel, groups * N], if there are several splits; then neither bias nor written is touched.
template <typename T, Math kMath>
__global__ void __launch_bounds__(kThreads, 2)
    conv3d_pairs_kernel(WindowView window, Product product, int split_taps, Global<const T> gathered,
                        Global<const T> packed, Global<const T> bias, Global<T> written, Global<float> partial,
                        bool whole_gathered, bool whole_written) {
  constexpr uint32_t kAll = 0xFFFFFFFF;
  constexpr int kStageElements = kStageBytes / static_cast<int>(sizeof(T));
  const Shared<T> stages = dynamic_shared<T>(0, kStages * kStageElements);
  const Shared<float> sums = dynamic_shared<float>(kSumsAt, kTileM * kPitch);
  const Shared<int> sources = dynamic_shared<int>(kSourcesAt, kTapsAtOnce * kTileM);
  const Shared<uint8_t> rows = dynamic_shared<uint8_t>(kRowsAt, kTapsAtOnce * kTileM);
  S3D_SHARED(int, counts, kTapsAtOnce);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = blockIdx.y / product.n_tiles, n_first = blockIdx.y % product.n_tiles * kTileN;
  const int64_t gathered_channels = static_cast<int64_t>(product.groups) * product.k;
  gathered += static_cast<int64_t>(group) * product.k;
  packed += static_cast<int64_t>(blockIdx.y) * product.taps * product.k_steps * (kTileN * kTileK<T>);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTileM;
  for (int i = threadIdx.x; i < kTileM * kPitch; i += kThreads) sums[i] = 0.0f;

  // A lane finds the sources of two rows.
  bool visible[2];
  VoxelPlace place[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t voxel = first + half * 32 + lane;
    visible[half] = voxel < window.written_voxels_count;
    if (visible[half] && window.written_voxels != nullptr) visible[half] = window.written_voxels[voxel] != 0;
    place[half] = place_of(window, visible[half] ? static_cast<int>(voxel) : 0);
  }

  const int split_begin = blockIdx.z * split_taps, split_end = min(split_begin + split_taps, product.taps);
  for (int tap_begin = split_begin; tap_begin < split_end; tap_begin += kTapsAtOnce) {
    const int taps = min(kTapsAtOnce, split_end - tap_begin);
    for (int i = warp; i < taps; i += kWarps) {
      const Tap tap = tap_of(window, tap_begin + i);
      int listed = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int source = visible[half] ? source_of(window, place[half], tap) : -1;
        const uint32_t found = __ballot_sync(kAll, source >= 0);
        if (source >= 0) {
          const int at = i * kTileM + listed + __popc(found & ((1u << lane) - 1));
          sources[at] = source;
          rows[at] = static_cast<uint8_t>(half * 32 + lane);
        }
        listed += __popc(found);
      }
      if (lane == 0) {
        counts[i] = listed;
        count_useful_flops(2 * int64_t{listed} * product.k * min(kTileN, product.n - n_first));
      }
    }
    __syncthreads();
    int own_count = 0;  // lane i: of tap i
    if (lane < taps) own_count = counts[lane];
    const uint32_t present = __ballot_sync(kAll, own_count > 0);
    const int steps = __popc(present) * product.k_steps;

    const auto copy = [&](int stage, const Step& from) {
      const int tap = from.tap();
      const int count = __shfl_sync(kAll, own_count, tap);
      const Shared<T> to = stages + stage * kStageElements;
#pragma unroll
      for (int i = threadIdx.x; i < kTileM * kRowChunks; i += kThreads) {
        const int row = i / kRowChunks, chunk = i % kRowChunks, k = from.k_step * kTileK<T> + chunk * kChunk<T>;
        if (row >= (count + 15) / 16 * 16) continue;
        int source = -1;
        if (row < count) source = sources[tap * kTileM + row];
        copy_chunk<T>(to + swizzled<T>(row, chunk), gathered, source * gathered_channels + k,
                      source < 0 ? 0 : product.k - k, whole_gathered);
      }
      copy_weights<T, kTileN, kThreads>(to + kTileM * kTileK<T>, packed, product, tap_begin + tap, from.k_step);
    };

    Step step = {present, 0}, next = step;
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < steps) copy(i, next);
      cp_async_commit();
      next.advance(product.k_steps);
    }
    float tap_sums[kFragments][kWarpN / 8][4] = {};
    for (int i = 0; i < steps; ++i) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // everybody's copies of this step are there, and the stage of the step before is free
      if (i + kStages - 1 < steps) copy((i + kStages - 1) % kStages, next);
      cp_async_commit();
      next.advance(product.k_steps);
      const int tap = step.tap(), count = __shfl_sync(kAll, own_count, tap);
      const Shared<T> stage = stages + i % kStages * kStageElements;
      const auto row_at = [&](int fragment, int row, int chunk) {
        return stage + swizzled<T>(fragment * 16 + row, chunk);
      };
      multiply<T, kMath, kFragments, kWarpN>(row_at, stage + (kTileM + warp * kWarpN) * kTileK<T>,
                                             (1u << (count + 15) / 16) - 1, tap_sums);
      if (step.k_step == product.k_steps - 1) {
        // A column's sums are this warp's alone; another lane may have had the row under another tap.
#pragma unroll
        for (int m = 0; m < kFragments; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int pair = m * 16 + half * 8 + lane / 4;
            if (pair < count) {
              const int row = rows[tap * kTileM + pair];
#pragma unroll
              for (int j = 0; j < kWarpN / 8; ++j) {
                const Shared<float> to =
                    sums + (row * kPitch + channel_of_column(warp * kWarpN + j * 8 + lane % 4 * 2));
                float2 total = load<float2>(to);
                total.x += tap_sums[m][j][half * 2];
                total.y += tap_sums[m][j][half * 2 + 1];
                store(to, total);
              }
            }
#pragma unroll
            for (int j = 0; j < kWarpN / 8; ++j) tap_sums[m][j][half * 2] = tap_sums[m][j][half * 2 + 1] = 0.0f;
          }
        }
        __syncwarp();
      }
      step.advance(product.k_steps);
    }
    __syncthreads();  // for the next taps
  }
  __syncthreads();

  const int64_t channels = static_cast<int64_t>(product.groups) * product.n;
  for (int i = threadIdx.x; i < kTileM * (kTileN / 8); i += kThreads) {
    const int row = i / (kTileN / 8), column = i % (kTileN / 8) * 8, n = n_first + column;
    const int64_t voxel = first + row;
    if (voxel >= window.written_voxels_count || n >= product.n) continue;
    const int64_t channel = static_cast<int64_t>(group) * product.n + n;
    bool shown = true;
    if (window.written_voxels != nullptr) shown = window.written_voxels[voxel] != 0;
    float values[8];
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
      const float2 two = load<float2>(sums + (row * kPitch + column + e));
      values[e] = two.x;
      values[e + 1] = two.y;
    }
    if (gridDim.z > 1) {
      const int64_t at = (static_cast<int64_t>(blockIdx.z) * window.written_voxels_count + voxel) * channels + channel;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (n + e < product.n) partial[at + e] = values[e];
      }
      continue;
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (bias != nullptr && n + e < product.n) values[e] += to_float(static_cast<T>(bias[channel + e]));
      if (!shown) values[e] = 0.0f;
    }
    store_values<8, T>(written + voxel * channels + channel, values, product.n - n, whole_written);
  }
}

template <typename T>
__global__ void __launch_bounds__(256)
    conv3d_pairs_sum_kernel(Global<const float> partial, int splits, int64_t voxels, int channels,
                            Global<const uint8_t> voxel_mask, Global<const T> bias, Global<T> written) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, sums = voxels * channels;
  if (i >= sums) return;
  float total = 0.0f;
  for (int split = 0; split < splits; ++split) total += partial[split * sums + i];
  if (bias != nullptr) total += to_float(static_cast<T>(bias[i % channels]));
  if (voxel_mask != nullptr && voxel_mask[i / channels] == 0) total = 0.0f;
  written[i] = from_float<T>(total);
}

}  // namespace

bool conv3d_pairs_applies(const Window& window, const ConvChannels& channels) {
  const Triple block = window.written_block;
  const int n = (window.transposed ? channels.in : channels.out) / channels.groups;
  return window.taps() > 1 && std::min({block.d, block.h, block.w}) < 4 && n > 32;
}

template <typename T>
int64_t conv3d_pairs_partial_sums(const Window& window, const ConvChannels& channels) {
  const Product product = product_of<T>(window, channels);
  const int splits = splits_of(window, product).count;
  return splits == 1 ? 0 : window.written_rows * window.written_block.volume() * product.groups * product.n * splits;
}

template <typename T>
void conv3d_pairs(const Window& window, const ConvChannels& channels, Math math, const T* gathered, const T* packed,
                  const T* bias, float* partial, T* written, cudaStream_t stream) {
  const Product product = product_of<T>(window, channels);
  const Splits splits = splits_of(window, product);
  const WindowView shape = view(window);
  const int64_t tiles = (shape.written_voxels_count + kTileM - 1) / kTileM;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(product.groups * product.n_tiles),
                  static_cast<unsigned>(splits.count));
  auto kernel = conv3d_pairs_kernel<T, Math::kTensorCores>;
  if constexpr (sizeof(T) == 4) {
    if (math == Math::kExact) kernel = conv3d_pairs_kernel<T, Math::kExact>;
  }
  launch("conv3d_pairs", kernel, grid, kThreads, kSharedBytes, stream, shape, product, splits.taps, gathered, packed,
         bias, written, partial, whole_chunks(gathered, product.groups * product.k, product.k),
         whole_chunks(written, product.groups * product.n, product.n));
  if (splits.count == 1) return;
  const int channels_written = product.groups * product.n;
  launch("conv3d_pairs_sum", conv3d_pairs_sum_kernel<T>,
         static_cast<unsigned>((shape.written_voxels_count * channels_written + 255) / 256), 256, 0, stream, partial,
         splits.count, shape.written_voxels_count, channels_written, window.written_voxels, bias, written);
}

#define S3D_INSTANTIATE(T)                                                                                          \
  template int64_t conv3d_pairs_partial_sums<T>(const Window&, const ConvChannels&);                                \
  template void conv3d_pairs<T>(const Window&, const ConvChannels&, Math, const T*, const T*, const T*, float*, T*, \
                                cudaStream_t);
S3D_INSTANTIATE(float)
S3D_INSTANTIATE(bf16)
S3D_INSTANTIATE(fp16)
#undef S3D_INSTANTIATE

}  // namespace s3d::cuda
