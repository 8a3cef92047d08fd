// Gradient of a convolution's weight for blocks of side 4 and more: a tile's grad and the halo of its input are brought
// to shared memory once and serve all taps. Computes what conv3d_grad_weight does, where conv3d_halo_applies.
//
//   grad_weight[n, k, tap] = sum over voxels v with a source of grad[v, n] * x[source(v, tap), k]
//
// Layouts   grad [voxels, groups * N] and x [voxels, groups * K], channels last; the result as torch has it. Partial
//           sums [part, group, tap, K, N] in float. Tiles, slots and offsets as in conv3d_halo; a row of the tile's
//           grad has 64 bytes, too. Slots without a voxel and rows that are not visible are zeros.
// Work      A block of 9 warps makes one part of one (group, kTileK input channels, kTileK output channels), 32 x 32 in
//           16 bits and 16 x 16 in float: all taps, three to a warp, those of a line of offsets. It walks over the
//           tiles of its part with its sums in registers; a fragment of 16 voxels is a step of the contraction, and one
//           without a pair under an offset is left out. Parts are cut by the problem alone, and a second kernel adds
//           them in their order: the bits are the same from run to run. Kernels with fewer than 9 lines of taps leave
//           warps with copies only.
// Memory    Two buffers of a halo and a grad, where a block may have so much (else one: the copies of a tile then wait
//           for the multiplications of the one before), and the sources of a halo. In KiB: (4, 8, 8) 109 (or 56),
//           4 x (4, 4, 4) 143 (or 73): a block on an SM of 164 KiB, and of 100. Chunks are swizzled (slot_key):
//           neither copies nor loads have bank conflicts. Registers: 96 sums a thread, 24 in float.
// Numbers   Both operands have voxels as rows, and products run along voxels: numbers of 16 bits go through
//           ldmatrix.trans; TF32 by single loads, of voxels 0 1 4 5 and 2 3 6 7 of eight so that the banks differ; or
//           with Math::kExact by multiply-adds. Sums are float.
// Limits    As conv3d_halo. Rows whose channels are no whole 16 bytes are copied by elements.
// Expected  bf16: a tile multiplies 14.2 MFLOP and fetches 37.5 + 16 KiB: 260 FLOP a byte of L2, where
//           conv3d_grad_weight has 16 to 32. A warp reads 1 KiB of grad and 3 of halo from shared memory for 24 mma of
//           4096 FLOP: 24 FLOP a byte, where an A100 needs 16. Sources are found between the multiplications of tiles,
//           with nothing else to do: an estimated fifth of the time. Counted by the emulator, all visible, 8 x 8 x 8
//           blocks: 45 KiB read for 256 voxels of 32 channels to 32 (conv3d_grad_weight: 769), 181 for 64 to 64 (1529);
//           92 % of what is multiplied is useful, no bank conflicts. An H100 took 176 microseconds (mean
//           of 32 to 128 channels) and 57 (256) with one patch of 160^3.
// Source    As conv3d_halo; parts as in conv3d_grad_weight.
#include <algorithm>

#include "cuda/cp_async.cuh"
#include "cuda/device.cuh"
#include "cuda/grad_weight_sum.cuh"
#include "cuda/halo.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/mma.cuh"
#include "cuda/product.cuh"
#include "cuda/rows.cuh"
#include "cuda/window.cuh"

namespace s3d::cuda {
namespace {

constexpr int kWarps = 9, kThreads = 32 * kWarps;
constexpr int kTapsOfWarp = 3;
constexpr int kSlotsAtOnce = kThreads / kRowChunks;  // that all threads copy

struct Correlation {
  int taps, groups, k, n;
  int k_tiles, n_tiles;  // of kTileK channels
  int parts, tiles;      // of voxels
  int64_t sums() const { return int64_t{groups} * taps * k * n; }
};

// Parts make enough blocks for any GPU where there are few channels; of at least some tiles.
template <typename T>
Correlation correlation_of(const Window& window, const ConvChannels& channels) {
  constexpr int64_t kBlocks = 256, kLeastTiles = 4, kMostSums = int64_t{16} << 20;
  Correlation c{};
  c.taps = static_cast<int>(window.taps());
  c.groups = channels.groups;
  c.k = channels.in / channels.groups;
  c.n = channels.out / channels.groups;
  c.k_tiles = (c.k + kTileK<T> - 1) / kTileK<T>;
  c.n_tiles = (c.n + kTileK<T> - 1) / kTileK<T>;
  c.tiles = static_cast<int>(halo_tiles(window, 0));
  const int64_t room = kMostSums / std::max<int64_t>(c.sums(), 1);
  const int64_t wanted = std::min({kBlocks / (int64_t{c.groups} * c.k_tiles * c.n_tiles), c.tiles / kLeastTiles, room});
  c.parts = static_cast<int>(std::max<int64_t>(wanted, 1));
  return c;
}

// Where number `channel` of a swizzled row of 64 bytes is.
template <typename T>
__device__ __forceinline__ int element_of(int row, int channel, int key) {
  return (row * kRowChunks + (channel / kChunk<T> ^ key)) * kChunk<T> + channel % kChunk<T>;
}

// sums[tap] += x^T grad over a fragment of 16 voxels, for each of the taps with its bit in `taps`. x_at(voxel, tap,
// channel) and grad_at(voxel, channel): where they are in shared memory.
template <typename T, Math kMath, int kRows, int kColumns, typename X, typename Grad>
__device__ __forceinline__ void correlate(const X& x_at, const Grad& grad_at, uint32_t taps,
                                          float (&sums)[kTapsOfWarp][kRows][kColumns][4]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if constexpr (kMath == Math::kExact) {
    static_assert(sizeof(T) == 4 && kRows == 1, "of float");
#pragma unroll 1
    for (int voxel = 0; voxel < 16; ++voxel) {
      float2 b[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) b[j] = load<float2>(grad_at(voxel, j * 8 + 2 * t));
#pragma unroll
      for (int tap = 0; tap < kTapsOfWarp; ++tap) {
        if ((taps >> tap & 1) == 0) continue;
        const float low = load<float>(x_at(voxel, tap, g)), high = load<float>(x_at(voxel, tap, g + 8));
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          sums[tap][0][j][0] += low * b[j].x;
          sums[tap][0][j][1] += low * b[j].y;
          sums[tap][0][j][2] += high * b[j].x;
          sums[tap][0][j][3] += high * b[j].y;
        }
      }
    }
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int eight = 0; eight < 16; eight += 8) {
      const auto voxel = [&](int i) { return eight + t % 2 + t / 2 * 4 + i * 2; };  // of k = t + 4 * i
      uint32_t b[kColumns][2];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) b[j][i] = to_tf32(load<float>(grad_at(voxel(i), j * 8 + g)));
      }
#pragma unroll
      for (int tap = 0; tap < kTapsOfWarp; ++tap) {
        if ((taps >> tap & 1) == 0) continue;
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
          uint32_t a[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) a[i] = to_tf32(load<float>(x_at(voxel(i / 2), tap, m * 16 + i % 2 * 8 + g)));
#pragma unroll
          for (int j = 0; j < kColumns; ++j) mma<T>(sums[tap][m][j], a, b[j]);
        }
      }
    }
  } else {
    uint32_t b[kColumns][2];
#pragma unroll
    for (int j = 0; j < kColumns; j += 2) {
      uint32_t pair[4];
      ldmatrix_transposed(pair, grad_at(lane % 16, j * 8 + lane / 16 * 8));
#pragma unroll
      for (int i = 0; i < 4; ++i) b[j + i / 2][i % 2] = pair[i];
    }
#pragma unroll
    for (int tap = 0; tap < kTapsOfWarp; ++tap) {
      if ((taps >> tap & 1) == 0) continue;
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        uint32_t a[4];
        ldmatrix_transposed(a, x_at(lane / 16 * 8 + lane % 8, tap, m * 16 + lane / 8 % 2 * 8));
#pragma unroll
        for (int j = 0; j < kColumns; ++j) mma<T>(sums[tap][m][j], a, b[j]);
      }
    }
  }
}

template <typename T, Math kMath, bool kWide>
__global__ void __launch_bounds__(kThreads, 1)
    conv3d_grad_weight_halo_kernel(WindowView window, Halo halo, Correlation c, Global<const T> grad, Global<const T> x,
                                   Global<float> partial, int buffers, bool whole_grad, bool whole_x) {
  using Shape = Tile<kWide>;
  constexpr int kVoxels = Shape::kVoxels, kCuboids = Shape::kCuboids, kSide = Shape::kSide;
  constexpr int kRows = kTileK<T> / 16, kColumns = kTileK<T> / 8;
  constexpr uint32_t kAll = 0xFFFFFFFF;
  const int all_slots = halo.planes * halo.plane_slots, buffer_elements = (all_slots + kVoxels) * kTileK<T>;
  const Shared<T> stages = dynamic_shared<T>(0, buffers * buffer_elements);
  const Shared<int> sources =
      dynamic_shared<int>(buffers * buffer_elements * static_cast<int>(sizeof(T)), all_slots);
  S3D_SHARED(Cuboid, cuboids_of_buffer, 2 * kCuboids);
  S3D_SHARED(uint32_t, lines, 2 * Shape::kLineWords);
  S3D_SHARED(uint32_t, visible_rows, 2 * kVoxels / 32);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int n_tile = blockIdx.x % c.n_tiles, k_tile = blockIdx.x / c.n_tiles % c.k_tiles;
  const int group = blockIdx.x / c.n_tiles / c.k_tiles, part = blockIdx.y;
  const int k_first = k_tile * kTileK<T>, n_first = n_tile * kTileK<T>;
  const int64_t x_channels = static_cast<int64_t>(c.groups) * c.k, grad_channels = static_cast<int64_t>(c.groups) * c.n;
  const int k_copied = k_first + lane % kRowChunks * kChunk<T>, n_copied = n_first + lane % kRowChunks * kChunk<T>;
  x += static_cast<int64_t>(group) * c.k + k_copied;
  grad += static_cast<int64_t>(group) * c.n + n_copied;

  uint32_t keys = 0;  // of the slots that the thread copies, two bits each
  for (int slot = threadIdx.x / kRowChunks, i = 0; slot < all_slots; slot += kSlotsAtOnce, i += 2) {
    keys |= static_cast<uint32_t>(slot_key<kWide>(slot / halo.pitch % halo.lines, slot % halo.pitch)) << i;
  }
  // Others may still multiply what is in the buffer when a thread comes here, but not behind the first barrier.
  const auto bring = [&](int tile, int buffer) {
    const Shared<Cuboid> cuboids = cuboids_of_buffer + buffer * kCuboids;
    if (threadIdx.x < kCuboids) {
      const int number = tile * kCuboids + static_cast<int>(threadIdx.x);
      Cuboid cuboid = {-1, 0, 0, 0};
      if (number < halo.cuboids) cuboid = cuboid_at<kWide>(halo, number);
      store(cuboids + threadIdx.x, cuboid);
    }
    __syncthreads();
    find_sources<kWide>(window, halo, cuboids, sources, lines + buffer * Shape::kLineWords);
    const auto voxel_of = [&](int row) {
      const Cuboid cuboid = load<Cuboid>(cuboids + row / (kVoxels / kCuboids));
      return written_voxel<kWide>(window, cuboid, row);
    };
    for (int first = warp * 32; first < kVoxels; first += kThreads) {
      const int voxel = voxel_of(first + lane);
      bool visible = voxel >= 0;
      if (visible && window.written_voxels != nullptr) visible = window.written_voxels[voxel] != 0;
      const uint32_t rows = __ballot_sync(kAll, visible);
      if (lane == 0) visible_rows[(buffer * kVoxels + first) / 32] = rows;
    }
    __syncthreads();
    const Shared<T> slots = stages + buffer * buffer_elements, rows = slots + all_slots * kTileK<T>;
    const int chunk = lane % kRowChunks;
    uint32_t rest = keys;
    for (int slot = threadIdx.x / kRowChunks; slot < all_slots; slot += kSlotsAtOnce, rest >>= 2) {
      const int source = sources[slot];
      copy_chunk<T>(slots + (slot * kRowChunks + (chunk ^ static_cast<int>(rest & 3))) * kChunk<T>, x,
                    source * x_channels, source < 0 ? 0 : c.k - k_copied, whole_x);
    }
    for (int row = threadIdx.x / kRowChunks; row < kVoxels; row += kSlotsAtOnce) {
      const uint32_t seen = visible_rows[(buffer * kVoxels + row) / 32];
      const bool visible = (seen >> row % 32 & 1) != 0;
      copy_chunk<T>(rows + swizzled<T>(row, chunk), grad, voxel_of(row) * grad_channels,
                    visible ? c.n - n_copied : 0, whole_grad);
    }
  };

  // The warp's line of offsets.
  const bool multiplies = warp < window.d.kernel * window.h.kernel;
  const int offset_d = warp / window.h.kernel, offset_h = warp % window.h.kernel;
  float sums[kTapsOfWarp][kRows][kColumns][4] = {};
  const auto multiply_tile = [&](int buffer) {
    // Lane i: fragment i of 16 voxels.
    uint32_t fragments[kTapsOfWarp];
    int pairs = 0;
#pragma unroll
    for (int tap = 0; tap < kTapsOfWarp; ++tap) {
      bool any = false;
      if (lane < kVoxels / 16 && tap < window.w.kernel) {
#pragma unroll
        for (int i = 0; i < 16 / kSide; ++i) {
          const int z = kWide ? lane / 4 : lane % 4, y = kWide ? lane % 4 * 2 + i : i;
          const int slice = (z + offset_d) * kCuboids + (kWide ? 0 : lane / 4);
          const int row = lane * 16 + i * kSide;
          const uint32_t found = lines[buffer * Shape::kLineWords + slice * Shape::kLinePitch + y + offset_h];
          const uint32_t seen = visible_rows[(buffer * kVoxels + row) / 32];
          const uint32_t both = found >> tap & seen >> row % 32 & ((1u << kSide) - 1);
          pairs += __popc(both);
          any = any || both != 0;
        }
      }
      fragments[tap] = __ballot_sync(kAll, any);
    }
    count_useful_flops(int64_t{2} * pairs * min(kTileK<T>, c.k - k_first) * min(kTileK<T>, c.n - n_first));
    const Shared<T> slots = stages + buffer * buffer_elements, rows = slots + all_slots * kTileK<T>;
#pragma unroll 1
    for (int fragment = 0; fragment < kVoxels / 16; ++fragment) {
      uint32_t taps = 0;
#pragma unroll
      for (int tap = 0; tap < kTapsOfWarp; ++tap) taps |= (fragments[tap] >> fragment & 1) << tap;
      if (taps == 0) continue;
      const int z = kWide ? fragment / 4 : fragment % 4;
      const int slice = (z + offset_d) * kCuboids + (kWide ? 0 : fragment / 4);
      const int first_y = offset_h + (kWide ? fragment % 4 * 2 : 0);
      const auto x_at = [&](int voxel, int tap, int channel) {
        const int y = first_y + voxel / kSide, at = voxel % kSide + tap;
        return slots + element_of<T>((slice * halo.lines + y) * halo.pitch + at, channel, slot_key<kWide>(y, at));
      };
      const auto grad_at = [&](int voxel, int channel) {
        return rows + element_of<T>(fragment * 16 + voxel, channel, voxel >> 1 & 3);
      };
      correlate<T, kMath, kRows, kColumns>(x_at, grad_at, taps, sums);
    }
  };

  const int first = static_cast<int>(static_cast<int64_t>(c.tiles) * part / c.parts);
  const int end = static_cast<int>(static_cast<int64_t>(c.tiles) * (part + 1) / c.parts);
  if (first < end) bring(first, 0);
  cp_async_commit();
  for (int tile = first; tile < end; ++tile) {
    const int buffer = buffers == 2 ? (tile - first) % 2 : 0;
    if (buffers == 2 && tile + 1 < end) {
      bring(tile + 1, 1 - buffer);
      cp_async_commit();
      cp_async_wait<1>();
    } else {
      cp_async_wait_all();
    }
    __syncthreads();  // everybody's copies of this tile are there
    if (multiplies) multiply_tile(buffer);
    if (buffers == 1 && tile + 1 < end) {
      bring(tile + 1, 0);
      cp_async_commit();
    }
  }

  if (!multiplies) return;
#pragma unroll
  for (int tap = 0; tap < kTapsOfWarp; ++tap) {
    if (tap >= window.w.kernel) continue;
    const int64_t matrix = (static_cast<int64_t>(part) * c.groups + group) * c.taps + warp * window.w.kernel + tap;
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int k = k_first + m * 16 + i / 2 * 8 + lane / 4, n = n_first + j * 8 + lane % 4 * 2 + i % 2;
          if (k < c.k && n < c.n) partial[(matrix * c.k + k) * c.n + n] = sums[tap][m][j][i];
        }
      }
    }
  }
}

template <typename T, Math kMath, bool kWide>
void correlate_all(const Window& window, const Correlation& c, const T* grad, const T* x, float* partial,
                   cudaStream_t stream) {
  constexpr size_t kStatic = 2048;  // at most
  const Halo halo = halo_of<kWide>(window);
  const size_t buffer_bytes = (halo.slots() + Tile<kWide>::kVoxels) * kTileK<T> * sizeof(T);
  const size_t sources_bytes = halo.slots() * sizeof(int);
  const int buffers = 2 * buffer_bytes + sources_bytes + kStatic <= most_shared_bytes() ? 2 : 1;
  const dim3 grid(static_cast<unsigned>(int64_t{c.groups} * c.k_tiles * c.n_tiles), static_cast<unsigned>(c.parts));
  launch("conv3d_grad_weight_halo", conv3d_grad_weight_halo_kernel<T, kMath, kWide>, grid, kThreads,
         buffers * buffer_bytes + sources_bytes, stream, view(window), halo, c, grad, x, partial, buffers,
         whole_chunks(grad, c.groups * c.n, c.n), whole_chunks(x, c.groups * c.k, c.k));
}

}  // namespace

template <typename T>
int64_t conv3d_grad_weight_halo_partial_sums(const Window& window, const ConvChannels& channels) {
  const Correlation c = correlation_of<T>(window, channels);
  return c.parts * c.sums();
}

template <typename T>
void conv3d_grad_weight_halo(const Window& window, const ConvChannels& channels, Math math, const T* grad, const T* x,
                             float* partial, T* grad_weight, cudaStream_t stream) {
  const Correlation c = correlation_of<T>(window, channels);
  const auto start = [&](auto narrow, auto wide) {
    (is_wide(window) ? wide : narrow)(window, c, grad, x, partial, stream);
  };
  bool exact = false;
  if constexpr (sizeof(T) == 4) {
    exact = math == Math::kExact;
    if (exact) start(correlate_all<T, Math::kExact, false>, correlate_all<T, Math::kExact, true>);
  }
  if (!exact) start(correlate_all<T, Math::kTensorCores, false>, correlate_all<T, Math::kTensorCores, true>);
  sum_grad_weight(c.groups, c.taps, c.k, c.n, c.parts, partial, grad_weight, stream);
}

#define S3D_INSTANTIATE(T)                                                                                      \
  template int64_t conv3d_grad_weight_halo_partial_sums<T>(const Window&, const ConvChannels&);                 \
  template void conv3d_grad_weight_halo<T>(const Window&, const ConvChannels&, Math, const T*, const T*, float*, \
                                           T*, cudaStream_t);
S3D_INSTANTIATE(float)
S3D_INSTANTIATE(bf16)
S3D_INSTANTIATE(fp16)
#undef S3D_INSTANTIATE

}  // namespace s3d::cuda
