// Convolution as an implicit matrix product: rows of gathered voxels, found through the neighbour table, times weights.
//
//   written[v, n] = bias[n] + sum over taps and k of gathered[source(v, tap), k] * weight[tap, k, n]
//
// over the taps for which v has a source: an input voxel that is visible. Forward, and with a transposed window the
// gradient of the input: any kernel size, stride and grouping.
//
// Layouts   gathered [voxels, groups * K], written [voxels, groups * N], channels last. The weight is packed beforehand
//           (product.cuh).
// Work      A block of 4 warps makes kTileM = 128 consecutive voxels x kTileN channels of one group; a warp 32 voxels
//           (two fragments of 16 rows) x kTileN. A thread finds the sources of one voxel under up to 32 taps; votes
//           tell which fragments have a pair. A step is one tap x kTileK channels (64 bytes). Taps without a pair in
//           the block are no steps; fragments without one are neither copied nor multiplied.
// Memory    kStages of (128 + kTileN) * 64 bytes, filled by cp.async two steps ahead, rows that are no pair with zeros;
//           16-byte chunks are swizzled: neither copies nor ldmatrix have bank conflicts. Sources: 32 * 128 * 4 bytes.
//           52 KiB with kTileN = 64, 46 KiB with 32: three blocks on an SM of 164 KiB, one or two on one of 100.
//           Registers: kTileN sums a thread, 64 or 32.
// Numbers   bf16 and fp16: mma.sync m16n8k16. float: TF32, m16n8k8, or with Math::kExact multiply-adds in float with
//           the same fragments. Sums are float, in an order that the problem alone fixes.
// Limits    Fewer than 2^31 voxels on each side. Rows whose channels are no whole 16 bytes are copied by elements.
//           Groups of few channels and K = 1 waste most of a tile.
// Expected  A step multiplies 2 * 128 * kTileN * kTileK and fetches (128 + kTileN) * 64 bytes from L2 (every tap reads
//           its rows again): 85 FLOP a byte in bf16 with kTileN = 64, so bound by the bandwidth of L2, not by tensor
//           cores. On an H100 the 17 launches of a step of a ResEnc-L encoder took 1.7 ms together.
// Source    Implicit GEMM over a gather, as in Tang et al., TorchSparse++ (MICRO 2023), section 3, with a block's table
//           in place of a hash of points.
#include "cuda/cp_async.cuh"
#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/mma.cuh"
#include "cuda/product.cuh"
#include "cuda/rows.cuh"
#include "cuda/window.cuh"

namespace s3d::cuda {
namespace {

template <typename T, int kColumns>
struct GatherTraits {
  static constexpr int kWarps = 4, kStages = 3;
  static constexpr int kFragments = 2;  // of 16 rows, of a warp
  static constexpr int kTileM = 16 * kFragments * kWarps, kTileN = kColumns;
  static constexpr int kTapsAtOnce = 32;  // a bit each
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocks = 3;  // on an SM, for which there must be registers
  static constexpr int kStageElements = (kTileM + kTileN) * kTileK<T>;
  static constexpr int kStagesBytes = kStages * kStageElements * static_cast<int>(sizeof(T));
  static constexpr int kSharedBytes = kStagesBytes + kTapsAtOnce * kTileM * 4;
  static_assert(kTileM == kThreads, "a thread finds the sources of one voxel");
};

__device__ __forceinline__ bool fragment_has(uint32_t rows, int fragment) {
  return (rows >> 16 * fragment & 0xFFFF) != 0;
}

template <typename T, Math kMath, int kColumns>
__global__ void __launch_bounds__(GatherTraits<T, kColumns>::kThreads, GatherTraits<T, kColumns>::kBlocks)
    conv3d_gather_kernel(WindowView window, Product product, Global<const T> gathered, Global<const T> packed,
                         Global<const T> bias, Global<T> written, bool whole_gathered, bool whole_written) {
  using Traits = GatherTraits<T, kColumns>;
  constexpr int kStages = Traits::kStages, kTileM = Traits::kTileM;
  constexpr uint32_t kAll = 0xFFFFFFFF;
  const Shared<T> stages = dynamic_shared<T>(0, kStages * Traits::kStageElements);
  const Shared<int> sources = dynamic_shared<int>(Traits::kStagesBytes, Traits::kTapsAtOnce * kTileM);
  S3D_SHARED(uint32_t, taps_of_warp, Traits::kWarps);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_row = warp * 32;
  const int group = blockIdx.y / product.n_tiles, n_first = blockIdx.y % product.n_tiles * kColumns;
  const int64_t gathered_channels = static_cast<int64_t>(product.groups) * product.k;
  gathered += static_cast<int64_t>(group) * product.k;
  packed += static_cast<int64_t>(blockIdx.y) * product.taps * product.k_steps * (kColumns * kTileK<T>);

  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTileM, voxel = first + threadIdx.x;
  bool visible = voxel < window.written_voxels_count;
  if (visible && window.written_voxels != nullptr) visible = window.written_voxels[voxel] != 0;
  const uint32_t visible_rows = __ballot_sync(kAll, visible);
  const VoxelPlace at = place_of(window, visible ? static_cast<int>(voxel) : 0);

  float sums[Traits::kFragments][kColumns / 8][4] = {};
  for (int tap_begin = 0; tap_begin < product.taps; tap_begin += Traits::kTapsAtOnce) {
    // A warp finds the sources of the rows that it copies and multiplies itself; only the taps are the block's.
    const int taps = min(Traits::kTapsAtOnce, product.taps - tap_begin);
    uint32_t pairs_of_tap = 0;  // lane i: which of the warp's rows have a source under tap i
    for (int i = 0; i < taps; ++i) {
      const int source = visible ? source_of(window, at, tap_of(window, tap_begin + i)) : -1;
      sources[i * kTileM + threadIdx.x] = source;
      const uint32_t pairs = __ballot_sync(kAll, source >= 0);
      if (lane == i) pairs_of_tap = pairs;
    }
    const uint32_t own_taps = __ballot_sync(kAll, pairs_of_tap != 0);
    if (lane == 0) taps_of_warp[warp] = own_taps;
    count_useful_flops(2 * int64_t{__popc(pairs_of_tap)} * product.k * min(kColumns, product.n - n_first));
    __syncthreads();
    Step step = {0, 0};
    for (int i = 0; i < Traits::kWarps; ++i) step.taps |= static_cast<uint32_t>(taps_of_warp[i]);
    const int steps = __popc(step.taps) * product.k_steps;

    const auto copy = [&](int stage, const Step& from) {
      const int tap = from.tap();
      const uint32_t pairs = __shfl_sync(kAll, pairs_of_tap, tap);
      const Shared<T> rows = stages + stage * Traits::kStageElements;
      const int chunk = lane % 4, k = from.k_step * kTileK<T> + chunk * kChunk<T>;
#pragma unroll
      for (int i = 0; i < 32; i += 8) {
        if (!fragment_has(pairs, i / 16)) continue;
        const int row = warp_row + i + lane / 4;
        const int source = sources[tap * kTileM + row];
        copy_chunk<T>(rows + swizzled<T>(row, chunk), gathered, source * gathered_channels + k,
                      source < 0 ? 0 : product.k - k, whole_gathered);
      }
      copy_weights<T, kColumns, Traits::kThreads>(rows + kTileM * kTileK<T>, packed, product, tap_begin + tap,
                                                  from.k_step);
    };

    Step next = step;
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < steps) copy(i, next);
      cp_async_commit();
      next.advance(product.k_steps);
    }
    for (int i = 0; i < steps; ++i) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // everybody's copies of this step are there, and the stage of the step before is free
      if (i + kStages - 1 < steps) copy((i + kStages - 1) % kStages, next);
      cp_async_commit();
      next.advance(product.k_steps);
      const uint32_t pairs = __shfl_sync(kAll, pairs_of_tap, step.tap());
      const Shared<T> rows = stages + i % kStages * Traits::kStageElements;
      if (pairs != 0) {
        const auto row_of = [&](int m, int row, int chunk) {
          return rows + swizzled<T>(warp_row + m * 16 + row, chunk);
        };
        const uint32_t fragments = (fragment_has(pairs, 0) ? 1 : 0) | (fragment_has(pairs, 1) ? 2 : 0);
        multiply<T, kMath, Traits::kFragments, kColumns>(row_of, rows + kTileM * kTileK<T>, fragments, sums);
      }
      step.advance(product.k_steps);
    }
    __syncthreads();  // for the next taps
  }

  const auto place = [&](int row) {
    const int64_t to = first + warp_row + row;
    const bool exists = to < window.written_voxels_count;
    return WrittenRow{exists ? static_cast<int>(to) : -1, (visible_rows >> row & 1) != 0};
  };
  store_sums<T, Traits::kFragments, kColumns>(sums, product, group, n_first, bias, written, whole_written, place);
}

template <typename T, Math kMath, int kColumns>
void gather(const Window& window, const Product& product, const T* gathered, const T* packed, const T* bias, T* written,
            cudaStream_t stream) {
  using Traits = GatherTraits<T, kColumns>;
  const WindowView shape = view(window);
  const int64_t tiles = (shape.written_voxels_count + Traits::kTileM - 1) / Traits::kTileM;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(product.groups * product.n_tiles));
  launch("conv3d_gather", conv3d_gather_kernel<T, kMath, kColumns>, grid, Traits::kThreads, Traits::kSharedBytes,
         stream, shape, product, gathered, packed, bias, written,
         whole_chunks(gathered, product.groups * product.k, product.k),
         whole_chunks(written, product.groups * product.n, product.n));
}

}  // namespace

template <typename T>
void conv3d_gather(const Window& window, const ConvChannels& channels, Math math, const T* gathered, const T* packed,
                   const T* bias, T* written, cudaStream_t stream) {
  const Product product = product_of<T>(window, channels);
  const auto start = [&](auto narrow, auto wide) {
    (product.tile_n == 32 ? narrow : wide)(window, product, gathered, packed, bias, written, stream);
  };
  if constexpr (sizeof(T) == 4) {
    if (math == Math::kExact) return start(gather<T, Math::kExact, 32>, gather<T, Math::kExact, 64>);
  }
  start(gather<T, Math::kTensorCores, 32>, gather<T, Math::kTensorCores, 64>);
}

#define S3D_INSTANTIATE(T)                                                                                   \
  template void conv3d_gather<T>(const Window&, const ConvChannels&, Math, const T*, const T*, const T*, T*, \
                                 cudaStream_t);
S3D_INSTANTIATE(float)
S3D_INSTANTIATE(bf16)
S3D_INSTANTIATE(fp16)
#undef S3D_INSTANTIATE

}  // namespace s3d::cuda
