// Convolution of blocks of side 4 and more: a tile's input and what surrounds it, its halo, is brought to shared memory
// once and serves all taps. Computes what conv3d_gather does, for stride 1, kernel sides 1 and 3 (not all 1) with
// padding (side - 1) / 2, and block sides divisible by 4; forward, and with a transposed window the gradient of the
// input.
//
// Layouts   gathered [voxels, groups * K], written [voxels, groups * N], channels last; packed weight: product.cuh.
//           In shared memory a slot is 64 bytes of channels of one voxel of the halo, zeros where there is none; slots
//           lie [plane, cuboid, line, voxel], and an *offset* (0 ... kernel - 1 along each axis) is the way from the
//           slot of a written voxel's first input to that of another: tap o of a forward window, taps - 1 - o of a
//           transposed one. ldmatrix takes an address per row, so an offset costs an addition.
// Work      A block of 4 warps makes kTileM = 256 written voxels x kTileN channels of one group; a warp 64 voxels
//           (four fragments of 16 rows) x kTileN. The voxels are a cuboid (4, 8, 8) of a block where 8 divides its
//           height and width (a warp has a plane, a fragment two lines), else four cuboids (4, 4, 4) of the same block
//           or the next ones (a warp has a cuboid, a fragment a plane). The source of each slot is found once, through
//           the neighbour table; which of a line's voxels are there is a word of bits, and from these words each lane
//           learns which fragments have a pair under one offset. A step is one offset x kTileK channels; offsets
//           without a pair in the tile are no steps, fragments without one are not multiplied.
// Fused     Sample by sample, so that tiles of four small blocks must not straddle two (TileRange). Before: each thread
//           changes the chunks that it copied, where there is a voxel, when they have landed and before the barrier
//           that shows them to others; so each of a tile's inputs is normalised once, not once a tap, and what is not
//           there stays zero. After: (count, mean, squared deviations) of each of the tile's channels, first the mean,
//           then the deviations from it; conv3d_halo_moments merges them.
// Memory    Weights: 3 stages of kTileN * 64 bytes, filled by cp.async two steps ahead. Halo: a ring of 8 planes of 100
//           slots, or 7 planes of 144. The steps of a chunk of channels go through the offsets plane by plane, so that
//           a plane is free when its last offset is done, and one of the next chunk takes its place: with 8 planes nine
//           steps before it is needed, where two whole halos of 6 would take half as much again. With 7 planes the last
//           plane of four comes late, for one wait in 27 steps, which the other block on the SM fills. One chunk only:
//           just its 6 planes. Chunks of 16 bytes are swizzled (slot_key): neither copies nor ldmatrix have bank
//           conflicts. In KiB, with kTileN = 64 (32: 6 less; one chunk: 12.5 less, or 9 less):
//             (4, 8, 8)       weights 12, sources 2.4, halo 50: 64.4
//             4 x (4, 4, 4)   weights 12, sources 3.4, halo 63: 78.4
//           so two blocks on an SM of 164 KiB always, and one on an SM of 100 (at most 99 a block). Registers: 128 sums
//           a thread with kTileN = 64, 64 with 32.
// Numbers   As conv3d_gather: bf16 and fp16 by mma.sync m16n8k16, float by m16n8k8 in TF32 or exactly by multiply-adds.
//           Sums are float, chunk by chunk and in each offset by offset, an order that the problem alone fixes.
// Limits    Fewer than 2^31 voxels on each side and fewer than 2^31 blocks of threads. Rows whose channels are no whole
//           16 bytes are copied by elements, with bank conflicts.
// Expected  bf16, 32 channels to 32, 27 taps: a tile multiplies 14.2 MFLOP and fetches 37.5 KiB of halo (2.3 times its
//           16 KiB of input, from L2) and 54 KiB of weights: 155 FLOP a byte of L2, where an A100 needs some 65 and an
//           H100, whose mma.sync is twice as fast at the same L2, 110. So weights that stream do not limit it, and
//           weights kept in shared memory by a block that walks over tiles (37.5 KiB a tile, 380 FLOP a byte) would not
//           pay on an A100: with 54 KiB of weights and a ring only one block of 4 warps fits its SM, and a single warp
//           a scheduler hides nothing, where now three blocks do. With 64 channels to 64, two chunks: 56.6 MFLOP for
//           75 + 216 KiB, 190 FLOP a byte. A step reads 4 KiB of rows and 2 or 4 KiB of weights a warp from shared
//           memory for 32 or 64 mma of 4096 FLOP: 21 or 32 FLOP a byte, where an A100 needs 16. Counted by the
//           emulator, all visible, 8 x 8 x 8 blocks: 83 KiB read for 256 voxels of 32 channels to 32 (conv3d_gather:
//           496), 273 for 64 to 64 (1201); no bank conflicts. An H100 takes 4 to 5 times as long as
//           this allows with 32 to 128 channels, 20 times with 256 and blocks of side 4 (one patch of 160^3;
//           docs/performance.md, "Measured on an H100"); why is open.
// Source    Shared-memory tiling of a stencil with its halo (e.g. Micikevicius, GPGPU-2 2009), on tensor cores as an
//           implicit matrix product.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "cuda/cp_async.cuh"
#include "cuda/device.cuh"
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

template <typename T, int kColumns, bool kWide>
struct HaloTraits : Tile<kWide> {
  static constexpr int kWarps = 4, kStages = 3;
  static constexpr int kFragments = 4;  // of 16 rows, of a warp
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRing = kWide ? 8 : 7;  // planes
  static constexpr int kSlotsAtOnce = kThreads / kRowChunks;  // that all threads copy
  static constexpr int kStageElements = kColumns * kTileK<T>;
  static constexpr int kStagesBytes = kStages * kStageElements * static_cast<int>(sizeof(T));
  static constexpr int kBlocks = kColumns == 32 ? 3 : 2;  // on an SM, for which there must be registers
  static_assert(Tile<kWide>::kVoxels == 16 * kFragments * kWarps);
};

// ConvFusion as the kernel sees it.
struct Fusion {
  SampleOffsets samples;
  Global<const float> mean, scale, shift;
  float slope;
  Global<float> counts, moments;  // [tiles], [tiles, mean or squares, channels], or null
};

// What comes next: the lowest of `offsets`, which are those of `all` that are left, of channels `chunk`.
struct HaloStep {
  uint32_t all, offsets;
  int chunk;
  __device__ int offset() const { return __ffs(static_cast<int>(offsets)) - 1; }
  __device__ void advance() {
    offsets &= offsets - 1;
    if (offsets != 0) return;
    offsets = all;
    ++chunk;
  }
};

// (x - mean) * scale + shift, leaky, of a thread's chunk.
template <typename T>
struct Affine {
  float mean[kChunk<T>], scale[kChunk<T>], shift[kChunk<T>];

  __device__ __forceinline__ void fetch(const Fusion& fusion, int64_t first, int count, bool whole) {
    load_floats(mean, fusion.mean + first, count, whole);
    load_floats(scale, fusion.scale + first, count, whole);
    load_floats(shift, fusion.shift + first, count, whole);
  }
  __device__ __forceinline__ void apply(Shared<T> chunk, float slope) const {
    float values[kChunk<T>];
    unpack_chunk<T>(load<uint4>(chunk), values);
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      const float value = (values[i] - mean[i]) * scale[i] + shift[i];
      values[i] = !(value < 0) ? value : slope == 0 ? 0.0f : value * slope;  // a zero for -inf too
    }
    store(chunk, pack_chunk<T>(values));
  }
};

// Adds up over the lanes with the same columns, in one order.
__device__ __forceinline__ float sum_of_rows(float value) {
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) value += __shfl_xor_sync(0xFFFFFFFF, value, lanes);
  return value;
}

// The count, mean and squared deviations of the sums of the tile's visible rows, a column of each thread: by the mean
// of the tile, so that a mean far from zero costs no digits. scratch: 2 * kWarps * kColumns + kWarps floats that nobody
// needs any more after a barrier.
struct Moments {
  float count, mean, squares;
};

template <int kWarps, int kFragments, int kColumns>
__device__ __forceinline__ Moments moments_of(const float (&sums)[kFragments][kColumns / 8][4],
                                              const uint32_t (&visible_rows)[kFragments / 2], Shared<float> scratch) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Shared<float> squares = scratch + kWarps * kColumns, counts = squares + kWarps * kColumns;
  const auto visible = [&](int half) { return (visible_rows[half / 4] >> (half % 4 * 8 + lane / 4) & 1) != 0; };
  const auto of_all_warps = [](Shared<float> from, int column) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += static_cast<float>(from[i * kColumns + column]);
    return sum;
  };
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kColumns / 4; ++i) {
    const int column = i / 8 * 32 + lane % 4 * 8 + i % 8;
    float sum = 0;
#pragma unroll
    for (int half = 0; half < 2 * kFragments; ++half) {
      if (visible(half)) sum += sums[half / 2][i / 2][half % 2 * 2 + i % 2];
    }
    sum = sum_of_rows(sum);
    if (lane < 4) scratch[warp * kColumns + column] = sum;
  }
  int rows = 0;
#pragma unroll
  for (int i = 0; i < kFragments / 2; ++i) rows += __popc(visible_rows[i]);
  if (lane == 0) counts[warp] = static_cast<float>(rows);
  __syncthreads();
  float count = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) count += static_cast<float>(counts[i]);
  const float share = count > 0 ? 1.0f / count : 0.0f;
#pragma unroll
  for (int i = 0; i < kColumns / 4; ++i) {
    const int column = i / 8 * 32 + lane % 4 * 8 + i % 8;
    const float mean = of_all_warps(scratch, column) * share;
    float sum = 0;
#pragma unroll
    for (int half = 0; half < 2 * kFragments; ++half) {
      const float off = sums[half / 2][i / 2][half % 2 * 2 + i % 2] - mean;
      if (visible(half)) sum += off * off;
    }
    sum = sum_of_rows(sum);
    if (lane < 4) squares[warp * kColumns + column] = sum;
  }
  __syncthreads();
  const int column = threadIdx.x % kColumns;
  return {count, of_all_warps(scratch, column) * share, of_all_warps(squares, column)};
}

// kFused: with what of `fusion` is not null.
template <typename T, Math kMath, int kColumns, bool kWide, bool kFused>
__global__ void __launch_bounds__(HaloTraits<T, kColumns, kWide>::kThreads, HaloTraits<T, kColumns, kWide>::kBlocks)
    conv3d_halo_kernel(WindowView window, Halo halo, Product product, Global<const T> gathered, Global<const T> packed,
                       Global<const T> bias, Global<T> written, Fusion fusion, int ring_slots, bool whole_gathered,
                       bool whole_written) {
  using Traits = HaloTraits<T, kColumns, kWide>;
  constexpr int kStages = Traits::kStages, kCuboids = Traits::kCuboids, kSide = Traits::kSide;
  constexpr uint32_t kAll = 0xFFFFFFFF;
  const int all_slots = halo.planes * halo.plane_slots;
  const Shared<T> stages = dynamic_shared<T>(0, kStages * Traits::kStageElements);
  const Shared<int> sources = dynamic_shared<int>(Traits::kStagesBytes, all_slots);
  const Shared<T> slots = dynamic_shared<T>(Traits::kStagesBytes + 4 * all_slots, ring_slots * kTileK<T>);
  S3D_SHARED(Cuboid, cuboids, kCuboids);
  S3D_SHARED(uint32_t, lines, Traits::kLineWords);
  S3D_SHARED(uint32_t, offsets_of_warp, Traits::kWarps);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int parts = product.groups * product.n_tiles;
  const int tile = blockIdx.x / parts, part = blockIdx.x % parts;
  const int group = part / product.n_tiles, n_first = part % product.n_tiles * kColumns;
  const int64_t gathered_channels = static_cast<int64_t>(product.groups) * product.k;
  gathered += static_cast<int64_t>(group) * product.k;
  packed += static_cast<int64_t>(part) * product.taps * product.k_steps * Traits::kStageElements;

  TileRange range = {tile * kCuboids, halo.cuboids, 0};
  if constexpr (kFused) range = range_of_tile<kWide>(halo, fusion.samples, tile);
  if (threadIdx.x < kCuboids) {
    const int number = range.begin + static_cast<int>(threadIdx.x);
    Cuboid cuboid = {-1, 0, 0, 0};
    if (number < range.end) cuboid = cuboid_at<kWide>(halo, number);
    store(cuboids + threadIdx.x, cuboid);
  }
  __syncthreads();

  find_sources<kWide>(window, halo, cuboids, sources, lines);
  // The warp's rows.
  const Cuboid own = load<Cuboid>(cuboids + (kWide ? 0 : warp));
  const auto voxel_of = [&](int row) { return written_voxel<kWide>(window, own, warp * 64 + row); };
  uint32_t visible_rows[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int voxel = voxel_of(i * 32 + lane);
    bool visible = voxel >= 0;
    if (visible && window.written_voxels != nullptr) visible = window.written_voxels[voxel] != 0;
    visible_rows[i] = __ballot_sync(kAll, visible);
  }
  __syncthreads();

  // Lane i: offset i along each axis, two bits each from bit 4 on, and which of the warp's fragments have a pair.
  uint32_t about_offset = 0;
  int pairs = 0;
  if (lane < product.taps) {
    const Tap offset = tap_of(window, lane);
    about_offset = offset.d << 4 | offset.h << 6 | offset.w << 8;
#pragma unroll
    for (int i = 0; i < 64 / kSide; ++i) {
      const int slice = kWide ? warp + offset.d : (i / kSide + offset.d) * kCuboids + warp;
      const uint32_t found = lines[slice * Traits::kLinePitch + i % kSide + offset.h];
      const uint32_t rows = visible_rows[i * kSide / 32] >> i * kSide % 32 & ((1u << kSide) - 1);
      pairs += __popc(found >> offset.w & rows);
      if ((found >> offset.w & rows) != 0) about_offset |= 1u << i * kSide / 16;
    }
  }
  const uint32_t own_offsets = __ballot_sync(kAll, pairs != 0);
  if (lane == 0) offsets_of_warp[warp] = own_offsets;
  count_useful_flops(int64_t{2} * pairs * product.k * min(kColumns, product.n - n_first));
  __syncthreads();
  HaloStep step = {0, 0, 0};
  for (int i = 0; i < Traits::kWarps; ++i) step.all |= static_cast<uint32_t>(offsets_of_warp[i]);
  step.offsets = step.all;
  const int steps = __popc(step.all) * product.k_steps;

  // Planes are numbered through all chunks. A thread copies the same slots of each.
  const int all_planes = halo.planes * product.k_steps, copied_chunk = lane % kRowChunks;
  uint32_t keys = 0;
  for (int slot = threadIdx.x / kRowChunks, i = 0; slot < halo.plane_slots; slot += Traits::kSlotsAtOnce, i += 2) {
    keys |= static_cast<uint32_t>(slot_key<kWide>(slot / halo.pitch % halo.lines, slot % halo.pitch)) << i;
  }
  // use(source, chunk in shared memory) for each chunk that the thread copies, of plane z of a halo.
  const auto each_chunk = [&](int plane, int z, const auto& use) {
    const Shared<T> first = slots + plane % Traits::kRing * halo.plane_slots * kTileK<T>;
    const Shared<int> source_of_slot = sources + z * halo.plane_slots;
    uint32_t rest = keys;
    for (int slot = threadIdx.x / kRowChunks; slot < halo.plane_slots; slot += Traits::kSlotsAtOnce, rest >>= 2) {
      const int source = source_of_slot[slot], chunk = copied_chunk ^ static_cast<int>(rest & 3);
      use(source, first + (slot * kRowChunks + chunk) * kChunk<T>);
    }
  };
  int brought = 0, next_z = 0, next_chunk = 0;  // planes that are on their way or there; what comes next
  const auto bring = [&](int end) {
    for (; brought < min(end, all_planes); ++brought) {
      const int k = next_chunk * kTileK<T> + copied_chunk * kChunk<T>;
      each_chunk(brought, next_z, [&](int source, Shared<T> to) {
        copy_chunk<T>(to, gathered, source * gathered_channels + k, source < 0 ? 0 : product.k - k, whole_gathered);
      });
      if (++next_z == halo.planes) {
        next_z = 0;
        ++next_chunk;
      }
    }
  };
  // After the thread's own copies have landed, and before a barrier lets others read them.
  int published = 0;  // planes that everybody may read after the next barrier
  const auto publish = [&] {
    if constexpr (kFused) {
      for (int plane = published; fusion.mean != nullptr && plane < brought; ++plane) {
        const int k = plane / halo.planes * kTileK<T> + copied_chunk * kChunk<T>;
        Affine<T> affine;
        affine.fetch(fusion, range.sample * gathered_channels + group * product.k + k, product.k - k, whole_gathered);
        each_chunk(plane, plane % halo.planes, [&](int source, Shared<T> chunk) {
          if (source >= 0) affine.apply(chunk, fusion.slope);
        });
      }
    }
    published = brought;
  };
  const auto copy_step = [&](int stage, const HaloStep& from) {
    const int offset = from.offset();
    copy_weights<T, kColumns, Traits::kThreads>(stages + stage * Traits::kStageElements, packed, product,
                                                product.transposed ? product.taps - 1 - offset : offset, from.chunk);
  };

  float sums[Traits::kFragments][kColumns / 8][4] = {};
  HaloStep next = step;
  if (steps > 0) bring(halo.planes);
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < steps) copy_step(i, next);
    cp_async_commit();
    next.advance();
  }
  int all_there_from = 0;  // the step from which on all planes brought so far have landed
  for (int i = 0; i < steps; ++i) {
    cp_async_wait<kStages - 2>();
    if (i >= all_there_from) publish();
    __syncthreads();  // everybody's copies of this step are there; the stage and the planes before it are free
    const uint32_t about = __shfl_sync(kAll, about_offset, step.offset());
    const int offset_d = about >> 4 & 3, offset_h = about >> 6 & 3, offset_w = about >> 8 & 3;
    const int low = halo.planes * step.chunk + offset_d;  // the planes of this step and all that follow are not lower
    const int before = brought;
    bring(min(low, published) + Traits::kRing);  // not over what is still on its way either
    const bool late = low + Traits::kDepth > published;
    while (low + Traits::kDepth > published) {
      cp_async_wait_all();
      publish();
      bring(low + Traits::kRing);
    }
    if (brought != before) all_there_from = i + kStages - 1;
    if (i + kStages - 1 < steps) copy_step((i + kStages - 1) % kStages, next);
    cp_async_commit();
    next.advance();
    if (late) __syncthreads();
    const Shared<T> weights = stages + i % kStages * Traits::kStageElements;
    const auto row_of = [&](int m, int row, int chunk) {
      const int plane = (low + (kWide ? warp : m)) % Traits::kRing;
      const int y = (kWide ? 2 * m : 0) + row / kSide + offset_h, x = row % kSide + offset_w;
      const int slot = plane * halo.plane_slots + ((kWide ? 0 : warp * halo.lines) + y) * halo.pitch + x;
      return slots + (slot * kRowChunks + (chunk ^ slot_key<kWide>(y, x))) * kChunk<T>;
    };
    multiply<T, kMath, Traits::kFragments, kColumns>(row_of, weights, about & 0xF, sums);
    step.advance();
  }
  cp_async_wait_all();

  if constexpr (kFused) {
    if (fusion.moments != nullptr) {
      const Moments moments = moments_of<Traits::kWarps, Traits::kFragments, kColumns>(sums, visible_rows,
                                                                                      pointer_cast<float>(stages));
      const int n = n_first + static_cast<int>(threadIdx.x), channel = group * product.n + n;
      const int64_t channels = static_cast<int64_t>(product.groups) * product.n;
      if (threadIdx.x < kColumns && n < product.n) {
        const float start = bias != nullptr && moments.count > 0 ? to_float(static_cast<T>(bias[channel])) : 0.0f;
        fusion.moments[tile * 2 * channels + channel] = moments.mean + start;
        fusion.moments[(tile * 2 + 1) * channels + channel] = moments.squares;
      }
      if (part == 0 && threadIdx.x == 0) fusion.counts[tile] = moments.count;
    }
  }

  const auto place = [&](int row) {
    return WrittenRow{voxel_of(row), (visible_rows[row / 32] >> row % 32 & 1) != 0};
  };
  store_sums<T, Traits::kFragments, kColumns>(sums, product, group, n_first, bias, written, whole_written, place);
}

template <typename T, Math kMath, int kColumns, bool kWide, bool kFused>
void convolve(const Window& window, const Product& product, const T* gathered, const T* packed, const T* bias,
              T* written, const ConvFusion& with, cudaStream_t stream) {
  using Traits = HaloTraits<T, kColumns, kWide>;
  const Halo halo = halo_of<kWide>(window);
  const int ring_slots = std::min(halo.planes * product.k_steps, Traits::kRing) * halo.plane_slots;
  constexpr int kSlotBytes = kTileK<T> * static_cast<int>(sizeof(T));
  const size_t shared_bytes = Traits::kStagesBytes + 4 * halo.slots() + kSlotBytes * ring_slots;
  const int64_t tiles = halo_tiles(window, with.samples);
  const Fusion fusion = {{with.samples, with.sample_offsets}, with.mean, with.scale, with.shift, with.slope,
                         with.partials, with.partials == nullptr ? nullptr : with.partials + tiles};
  const auto grid = static_cast<unsigned>(tiles * product.groups * product.n_tiles);
  launch("conv3d_halo", conv3d_halo_kernel<T, kMath, kColumns, kWide, kFused>, grid, Traits::kThreads, shared_bytes,
         stream, view(window), halo, product, gathered, packed, bias, written, fusion, ring_slots,
         whole_chunks(gathered, product.groups * product.k, product.k),
         whole_chunks(written, product.groups * product.n, product.n));
}

}  // namespace

bool conv3d_halo_applies(const Window& window, const ConvChannels& channels) {
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t kernel = window.kernel[axis];
    if (kernel != 1 && kernel != 3) return false;
    if (window.stride[axis] != 1 || window.padding[axis] != (kernel - 1) / 2) return false;
    if (window.written_block[axis] != window.gathered_block[axis] || window.written_block[axis] % 4 != 0) return false;
  }
  if (window.taps() == 1) return false;  // nothing is read twice
  const Product product = product_of<bf16>(window, channels);  // parts are those of all types
  const int64_t parts = int64_t{product.groups} * product.n_tiles;
  return halo_tiles(window, 0) * parts <= std::numeric_limits<int32_t>::max();
}

int64_t conv3d_halo_partials(const Window& window, const ConvChannels& channels, int samples) {
  const int64_t written = window.transposed ? channels.in : channels.out;
  return halo_tiles(window, samples) * (1 + 2 * written);
}

template <typename T>
void conv3d_halo(const Window& window, const ConvChannels& channels, Math math, const T* gathered, const T* packed,
                 const T* bias, T* written, cudaStream_t stream, const ConvFusion& fusion) {
  const Product product = product_of<T>(window, channels);
  const auto start = [&](auto plain, auto fused) {
    (fusion.samples == 0 ? plain : fused)(window, product, gathered, packed, bias, written, fusion, stream);
  };
  const auto choose = [&](auto chosen_math, auto columns, auto wide) {
    constexpr Math kMath = decltype(chosen_math)::value;
    constexpr int kColumns = decltype(columns)::value;
    constexpr bool kWide = decltype(wide)::value;
    start(convolve<T, kMath, kColumns, kWide, false>, convolve<T, kMath, kColumns, kWide, true>);
  };
  const auto choose_tile = [&](auto chosen_math) {
    using Narrow = std::integral_constant<int, 32>;
    using Broad = std::integral_constant<int, 64>;
    if (product.tile_n == 32) {
      is_wide(window) ? choose(chosen_math, Narrow(), std::true_type())
                      : choose(chosen_math, Narrow(), std::false_type());
    } else {
      is_wide(window) ? choose(chosen_math, Broad(), std::true_type())
                      : choose(chosen_math, Broad(), std::false_type());
    }
  };
  if constexpr (sizeof(T) == 4) {
    if (math == Math::kExact) return choose_tile(std::integral_constant<Math, Math::kExact>());
  }
  choose_tile(std::integral_constant<Math, Math::kTensorCores>());
}

#define S3D_INSTANTIATE(T)                                                                                 \
  template void conv3d_halo<T>(const Window&, const ConvChannels&, Math, const T*, const T*, const T*, T*, \
                               cudaStream_t, const ConvFusion&);
S3D_INSTANTIATE(float)
S3D_INSTANTIATE(bf16)
S3D_INSTANTIATE(fp16)
#undef S3D_INSTANTIATE

}  // namespace s3d::cuda
