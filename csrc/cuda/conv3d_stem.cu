// Convolution of few gathered channels (up to 4, the stem of a network), and the gradient of its weight: the inputs of
// all taps of a voxel are one row of a matrix, where a product for each tap would be zeros mostly.
//
//   written[v, n] = bias[n] + sum over columns c of A[v, c] * weight[c, n]
//   grad_weight[n, k, tap] = sum over voxels v of grad[v, n] * A[v, tap * P + k]
//
//   A[v, tap * P + k] = gathered[source(v, tap), k], zeros where v has no source; P = K rounded up to 1, 2 or 4
//
// Forward, and with a transposed window the gradient of the input (of a network's head, whose outputs are few); any
// kernel and stride, one group.
//
// Layouts   gathered [voxels, K], written and grad [voxels, N], channels last; the weight and its gradient as torch has
//           them. A step is 64 bytes of columns, kStepTaps = 64 / (P * bytes of a number) taps. Partial sums
//           [part, tap, K, N] in float.
// Work      A warp makes rows of A for 32 voxels, a lane each: sources by next_sources (tap_sources.cuh), numbers by
//           element loads, up to 8 taps in flight, chunks of 16 bytes to shared memory. It multiplies the step itself:
//           no warp waits for another. Fragments of 16 voxels without a pair under a step's taps are not multiplied.
//           Forward: a block of 4 warps makes up to 8 tiles of 128 voxels x kColumns (32 or 64) channels, step by step;
//           the weight of all steps is brought to shared memory once, as product.cuh has it.
//           Gradient of the weight: a block makes one part of the voxels x one step of columns x kColumns channels, a
//           warp every fourth 32 voxels of the part; grad comes by cp.async while rows of A are made. The warps' sums
//           are added in their order, then the parts' (weight_parts.cuh), which the problem alone fixes.
// Memory    Forward: 8 KiB of A, 64 * kColumns bytes of weight for each step, 8 bytes for each tap and coordinate of an
//           axis: bf16, 1 -> 32, 3x3x3, blocks of side 32: 8 + 2 + 2.3 KiB. 64 columns if all of their weight takes no
//           more than 32 KiB. Gradient of the weight: 4 to 10 KiB for each warp, and the terms.
//           Chunks of a row are swizzled by stem_key: stores, ldmatrix and single loads have no bank conflicts.
//           Registers: kColumns sums a thread forward; kColumns, float half of it, for the gradient of the weight.
// Numbers   bf16 and fp16: mma.sync m16n8k16, and ldmatrix.trans where products run along voxels. float: TF32, m16n8k8,
//           or with Math::kExact multiply-adds. Sums are float, in an order that the problem alone fixes.
// Limits    Fewer than 2^31 voxels on each side; shared memory bounds the kernel and the block (conv3d_stem_applies).
//           K = 3 pays for 4. A is made once for each 64 channels; the gradient of the weight reads grad once for each
//           step.
// Expected  1 -> 32, 3x3x3 in bf16: 27 of 32 columns are of use; 66 bytes of memory a voxel, and some 500 instructions
//           of its lane to find and read its 27 sources: 25 ps on an A100, where the bytes take 42. So bound by memory.
//           On an H100 it took 109 ps.
// Source    The columns of im2col (Chellapilla et al., 2006), of a tile and in shared memory only.
#include <algorithm>
#include <type_traits>

#include "cuda/cp_async.cuh"
#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/mma.cuh"
#include "cuda/product.cuh"
#include "cuda/rows.cuh"
#include "cuda/tap_sources.cuh"
#include "cuda/weight_parts.cuh"
#include "cuda/window.cuh"

namespace s3d::cuda {
namespace {

constexpr uint32_t kAll = 0xFFFFFFFF;
constexpr int kWarps = 4, kThreads = 32 * kWarps, kTileM = kThreads;
constexpr int kRowBytes = kRowChunks * 16, kWarpRowsBytes = 32 * kRowBytes;
constexpr int kMostChannels = 4;

template <typename T, int kPadded>
constexpr int kStepTaps = kTileK<T> / kPadded;

int padded_channels(int k) { return k <= 2 ? k : 4; }

// Eight consecutive rows have the same chunk in eight different groups of four banks, and so have two neighbouring
// chunks of four consecutive rows.
__device__ __forceinline__ int stem_key(int row) { return (row >> 1 & 1) << 1 | (row >> 2 & 1); }

template <typename T>
__device__ __forceinline__ int stem_swizzled(int row, int chunk) {
  return (row * kRowChunks + (chunk ^ stem_key(row))) * kChunk<T>;
}

// One step of the lane's row of A, of `tap` and those that follow; `tap` becomes the next step's. Returns its pairs.
template <typename T, int kPadded>
__device__ __forceinline__ int gather_step(const WindowView& window, const AxisTerms& terms, const VoxelPlace& at,
                                           bool visible, Global<const T> gathered, int channels, Tap& tap,
                                           Shared<T> rows) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  constexpr int kTaps = kStepTaps<T, kPadded> < 8 ? kStepTaps<T, kPadded> : 8;
  constexpr int kWords = kTaps * kPadded * static_cast<int>(sizeof(T)) / 4;
  const Global<const Bits> from = pointer_cast<const Bits>(gathered);
  int pairs = 0;
#pragma unroll 1
  for (int first = 0; first < kStepTaps<T, kPadded>; first += kTaps) {
    int voxels[kTaps];
    pairs += next_sources(window, terms, at, visible, tap, voxels);
    uint32_t words[kWords] = {};
#pragma unroll
    for (int i = 0; i < kTaps; ++i) {
#pragma unroll
      for (int k = 0; k < kPadded; ++k) {
        uint32_t bits = 0;
        if (voxels[i] >= 0 && k < channels) bits = from[static_cast<int64_t>(voxels[i]) * channels + k];
        const int number = i * kPadded + k;
        if constexpr (sizeof(T) == 4) {
          words[number] = bits;
        } else {
          words[number / 2] |= bits << number % 2 * 16;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const int chunk = first * kPadded / kChunk<T> + i / 4;
      store(rows + stem_swizzled<T>(threadIdx.x % 32, chunk),
            make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]));
    }
  }
  return pairs;
}

__device__ __forceinline__ bool is_visible(const WindowView& window, int64_t voxel, int64_t end) {
  if (voxel >= end) return false;
  return window.written_voxels == nullptr || window.written_voxels[voxel] != 0;
}

// On an SM, for which there must be registers.
template <Math kMath, int kColumns>
constexpr int kForwardBlocks = kMath == Math::kExact ? (kColumns == 32 ? 4 : 3) : (kColumns == 32 ? 6 : 4);

// product: of one group; taps and k are those of the window, steps those of A.
template <typename T, Math kMath, int kPadded, int kColumns>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<kMath, kColumns>)
    conv3d_stem_kernel(WindowView window, Product product, int tiles_of_block, Global<const T> gathered,
                       Global<const T> weight, Global<const T> bias, Global<T> written, bool whole_written) {
  constexpr int kStepElements = kColumns * kTileK<T>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n_first = blockIdx.y * kColumns;
  const int weight_elements = product.k_steps * kStepElements;
  const Shared<T> rows = dynamic_shared<T>(warp * kWarpRowsBytes, 32 * kTileK<T>);
  const Shared<T> columns = dynamic_shared<T>(kWarps * kWarpRowsBytes, weight_elements);
  const AxisTerms terms = axis_terms<kThreads>(
      window, kWarps * kWarpRowsBytes + weight_elements * static_cast<int>(sizeof(T)));
  for (int i = threadIdx.x; i < weight_elements; i += kThreads) {
    const int element = i % kTileK<T>, column = i / kTileK<T> % kColumns, step = i / kStepElements;
    const int tap = (step * kTileK<T> + element) / kPadded, k = element % kPadded;
    const int n = n_first + channel_of_column(column);
    T value = from_float<T>(0.0f);
    if (tap < product.taps && k < product.k && n < product.n) {
      value = weight[(product.transposed ? k * product.n + n : n * product.k + k) * product.taps + tap];
    }
    if constexpr (sizeof(T) == 4 && kMath == Math::kTensorCores) value = __uint_as_float(to_tf32(value));
    columns[step * kStepElements + swizzled<T>(column, element / kChunk<T>) + element % kChunk<T>] = value;
  }
  __syncthreads();

  const int64_t count = window.written_voxels_count;
  for (int tile = 0; tile < tiles_of_block; ++tile) {
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * tiles_of_block + tile) * kTileM + warp * 32;
    if (first >= count) break;
    const bool visible = is_visible(window, first + lane, count);
    const uint32_t visible_rows = __ballot_sync(kAll, visible);
    const VoxelPlace at = place_of(window, visible ? static_cast<int>(first + lane) : 0);
    float sums[2][kColumns / 8][4] = {};
    Tap tap = {0, 0, 0};
    for (int step = 0; step < product.k_steps && visible_rows != 0; ++step) {
      __syncwarp();  // everybody has read the rows of the step before
      const int pairs = gather_step<T, kPadded>(window, terms, at, visible, gathered, product.k, tap, rows);
      count_useful_flops(2 * int64_t{pairs} * product.k * min(kColumns, product.n - n_first));
      const uint32_t used = __ballot_sync(kAll, pairs > 0);
      __syncwarp();
      const auto row_of = [&](int m, int row, int chunk) { return rows + stem_swizzled<T>(m * 16 + row, chunk); };
      const uint32_t fragments = ((used & 0xFFFF) != 0 ? 1 : 0) | (used >> 16 != 0 ? 2 : 0);
      multiply<T, kMath, 2, kColumns>(row_of, columns + step * kStepElements, fragments, sums);
    }
    const auto place = [&](int row) {
      const bool exists = first + row < count;
      return WrittenRow{exists ? static_cast<int>(first + row) : -1, (visible_rows >> row & 1) != 0};
    };
    store_sums<T, 2, kColumns>(sums, product, 0, n_first, bias, written, whole_written, place);
  }
}

template <typename T, int kColumns>
struct GradTraits {
  static constexpr int kChunks = kColumns / kChunk<T>;  // of a row of grad
  static constexpr int kFragments = kTileK<T> / 16;     // of 16 columns of A
  static constexpr int kInputBytes = kWarpRowsBytes + 32 * kColumns * static_cast<int>(sizeof(T));
  static constexpr int kSumsBytes = kTileK<T> * kColumns * 4;  // which take the inputs' place at the end
  static constexpr int kWarpBytes = kInputBytes > kSumsBytes ? kInputBytes : kSumsBytes;
};

// sums += A^T grad over 32 voxels.
template <typename T, Math kMath, int kColumns>
__device__ __forceinline__ void correlate(Shared<T> rows, Shared<T> grad,
                                          float (&sums)[GradTraits<T, kColumns>::kFragments][kColumns / 8][4]) {
  using Traits = GradTraits<T, kColumns>;
  constexpr int kFragments = Traits::kFragments, kChunks = Traits::kChunks;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if constexpr (kMath == Math::kExact) {
    static_assert(sizeof(T) == 4, "of float");
#pragma unroll 2
    for (int voxel = 0; voxel < 32; ++voxel) {
      const float low = rows[stem_swizzled<T>(voxel, g / 4) + g % 4];
      const float high = rows[stem_swizzled<T>(voxel, 2 + g / 4) + g % 4];
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
        const float2 b = load<float2>(grad + (swizzled_wide<T, kChunks>(voxel, j * 2 + t / 2) + t % 2 * 2));
        sums[0][j][0] += low * b.x;
        sums[0][j][1] += low * b.y;
        sums[0][j][2] += high * b.x;
        sums[0][j][3] += high * b.y;
      }
    }
  } else {
    constexpr int kDepth = 32 / static_cast<int>(sizeof(T));  // voxels of an mma: 16, or 8 in TF32
#pragma unroll
    for (int first = 0; first < 32; first += kDepth) {
      uint32_t a[kFragments][4], b[kColumns / 8][2];
      if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int voxel = first + t + i / 2 * 4;
          const float value = rows[stem_swizzled<T>(voxel, i % 2 * 2 + g / 4) + g % 4];
          a[0][i] = to_tf32(value);
        }
#pragma unroll
        for (int i = 0; i < kColumns / 4; ++i) {
          const int voxel = first + t + i % 2 * 4;
          const float value = grad[swizzled_wide<T, kChunks>(voxel, i / 2 * 2 + g / 4) + g % 4];
          b[i / 2][i % 2] = to_tf32(value);
        }
      } else {
        const int part = lane / 8, voxel = first + lane % 8;
#pragma unroll
        for (int m = 0; m < kFragments; ++m) {
          ldmatrix_transposed(a[m], rows + stem_swizzled<T>(voxel + part / 2 * 8, m * 2 + part % 2));
        }
#pragma unroll
        for (int j = 0; j < kColumns / 8; j += 2) {
          uint32_t two[4];
          ldmatrix_transposed(two, grad + swizzled_wide<T, kChunks>(voxel + part % 2 * 8, j + part / 2));
#pragma unroll
          for (int i = 0; i < 4; ++i) b[j + i / 2][i % 2] = two[i];
        }
      }
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) mma<T>(sums[m][j], a[m], b[j]);
      }
    }
  }
}

template <typename T, Math kMath, int kPadded, int kColumns>
__global__ void __launch_bounds__(kThreads, 4)
    conv3d_stem_grad_weight_kernel(WindowView window, Product product, int64_t part_voxels, Global<const T> grad,
                                   Global<const T> gathered, Global<float> partial, bool whole_grad) {
  using Traits = GradTraits<T, kColumns>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int step = blockIdx.x / product.n_tiles, n_first = blockIdx.x % product.n_tiles * kColumns;
  const int part = blockIdx.y, tap_first = step * kStepTaps<T, kPadded>;
  const Shared<T> rows = dynamic_shared<T>(warp * Traits::kWarpBytes, 32 * kTileK<T>);
  const Shared<T> grad_rows = dynamic_shared<T>(warp * Traits::kWarpBytes + kWarpRowsBytes, 32 * kColumns);
  const AxisTerms terms = axis_terms<kThreads>(window, kWarps * Traits::kWarpBytes);
  __syncthreads();

  float sums[Traits::kFragments][kColumns / 8][4] = {};
  const int64_t end = min((part + 1) * part_voxels, window.written_voxels_count);
  for (int64_t first = part * part_voxels + warp * 32; first < end; first += kTileM) {
    const bool visible = is_visible(window, first + lane, end);
    const uint32_t visible_rows = __ballot_sync(kAll, visible);
    if (visible_rows == 0) continue;
    __syncwarp();  // everybody has read what was here before
#pragma unroll
    for (int i = lane; i < 32 * Traits::kChunks; i += 32) {
      const int row = i / Traits::kChunks, chunk = i % Traits::kChunks, n = n_first + chunk * kChunk<T>;
      copy_chunk<T>(grad_rows + swizzled_wide<T, Traits::kChunks>(row, chunk), grad, (first + row) * product.n + n,
                    (visible_rows >> row & 1) != 0 ? product.n - n : 0, whole_grad);
    }
    cp_async_commit();
    const VoxelPlace at = place_of(window, visible ? static_cast<int>(first + lane) : 0);
    Tap tap = tap_of(window, tap_first);
    const int pairs = gather_step<T, kPadded>(window, terms, at, visible, gathered, product.k, tap, rows);
    count_useful_flops(2 * int64_t{pairs} * product.k * min(kColumns, product.n - n_first));
    const bool any = __any_sync(kAll, pairs > 0) != 0;
    cp_async_wait_all();
    __syncwarp();
    if (any) correlate<T, kMath, kColumns>(rows, grad_rows, sums);
  }

  // [column of A, channel] of each warp, in which rows are permuted by eights so that four do not share banks.
  const auto sums_of = [&](int of) {
    return dynamic_shared<float>(of * Traits::kWarpBytes, kTileK<T> * kColumns);
  };
  const auto at = [](int row, int n) { return row * kColumns + (n ^ (row & 3) << 3); };
  __syncwarp();
#pragma unroll
  for (int m = 0; m < Traits::kFragments; ++m) {
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const int row = m * 16 + i / 2 * 8 + lane / 4, n = j * 8 + lane % 4 * 2;
        store(sums_of(warp) + at(row, n), make_float2(sums[m][j][i], sums[m][j][i + 1]));
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTileK<T> * kColumns; i += kThreads) {
    const int row = i / kColumns, n = i % kColumns, tap = tap_first + row / kPadded, k = row % kPadded;
    float sum = 0.0f;
    for (int of = 0; of < kWarps; ++of) sum += sums_of(of)[at(row, n)];
    if (tap >= product.taps || k >= product.k || n_first + n >= product.n) continue;
    partial[((static_cast<int64_t>(part) * product.taps + tap) * product.k + k) * product.n + n_first + n] = sum;
  }
}

template <typename T>
Product stem_product(const Window& window, const ConvChannels& channels) {
  constexpr int kMostWeightBytes = 32 << 10;
  const int k = window.transposed ? channels.out : channels.in, n = window.transposed ? channels.in : channels.out;
  const int taps = static_cast<int>(window.taps()), step_taps = kTileK<T> / padded_channels(k);
  const int steps = (taps + step_taps - 1) / step_taps;
  const int tile_n = n <= 32 || steps * 64 * kRowBytes > kMostWeightBytes ? 32 : 64;
  return {taps, 1, k, n, window.transposed, steps, (n + tile_n - 1) / tile_n, tile_n};
}

int64_t forward_shared_bytes(const Window& window, const Product& product) {
  return kWarps * kWarpRowsBytes + int64_t{product.k_steps} * product.tile_n * kRowBytes + axis_terms_bytes(window);
}

struct StemParts {
  int count;
  int64_t voxels;  // of each but the last
};

// Enough blocks for any GPU, of at least 8 rounds of their warps.
StemParts stem_parts(const Window& window, int blocks_of_part) {
  constexpr int64_t kBlocks = 1024, kLeastVoxels = 8 * kTileM;
  const int64_t voxels = window.written_rows * window.written_block.volume();
  const int64_t wanted = std::max<int64_t>(std::min(kBlocks / blocks_of_part, voxels / kLeastVoxels), 1);
  const int64_t rounds = (voxels + wanted * kTileM - 1) / (wanted * kTileM);
  return {static_cast<int>(wanted), rounds * kTileM};
}

template <typename T, Math kMath, int kPadded, int kColumns>
void stem(const Window& window, const Product& product, const T* gathered, const T* weight, const T* bias, T* written,
          cudaStream_t stream) {
  constexpr int64_t kBlocks = 1024, kMostTiles = 8;  // blocks that there are before they make several tiles
  const WindowView shape = view(window);
  const int64_t tiles = (shape.written_voxels_count + kTileM - 1) / kTileM;
  const int64_t of_block = std::clamp<int64_t>(tiles * product.n_tiles / kBlocks, 1, kMostTiles);
  const dim3 grid(static_cast<unsigned>((tiles + of_block - 1) / of_block), static_cast<unsigned>(product.n_tiles));
  launch("conv3d_stem", conv3d_stem_kernel<T, kMath, kPadded, kColumns>, grid, kThreads,
         static_cast<size_t>(forward_shared_bytes(window, product)), stream, shape, product, static_cast<int>(of_block),
         gathered, weight, bias, written, whole_chunks(written, product.n, product.n));
}

template <typename T, Math kMath, int kPadded, int kColumns>
void stem_grad_weight(const Window& window, const Product& product, const T* grad, const T* gathered, float* partial,
                      cudaStream_t stream) {
  const int blocks = product.k_steps * product.n_tiles;
  const StemParts parts = stem_parts(window, blocks);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(parts.count));
  launch("conv3d_stem_grad_weight", conv3d_stem_grad_weight_kernel<T, kMath, kPadded, kColumns>, grid, kThreads,
         static_cast<size_t>(kWarps * GradTraits<T, kColumns>::kWarpBytes + axis_terms_bytes(window)), stream,
         view(window), product, parts.voxels, grad, gathered, partial, whole_chunks(grad, product.n, product.n));
}

template <int kValue>
using Number = std::integral_constant<int, kValue>;

// Calls use(math, padded, columns) with the constants of a product.
template <typename T, typename Use>
void with_constants(const Product& product, Math math, const Use& use) {
  const auto with_columns = [&](auto of_math, auto padded) {
    product.tile_n == 32 ? use(of_math, padded, Number<32>()) : use(of_math, padded, Number<64>());
  };
  const auto with_channels = [&](auto of_math) {
    const int padded = padded_channels(product.k);
    padded == 1   ? with_columns(of_math, Number<1>())
    : padded == 2 ? with_columns(of_math, Number<2>())
                  : with_columns(of_math, Number<4>());
  };
  if constexpr (sizeof(T) == 4) {
    if (math == Math::kExact) return with_channels(std::integral_constant<Math, Math::kExact>());
  }
  with_channels(std::integral_constant<Math, Math::kTensorCores>());
}

}  // namespace

bool conv3d_stem_applies(const Window& window, const ConvChannels& channels) {
  constexpr int64_t kMostSharedBytes = 96 << 10;  // sm_86 has 99 KiB for a block
  const int k = window.transposed ? channels.out : channels.in;
  if (channels.groups != 1 || k < 1 || k > kMostChannels || window.taps() > kMostSharedBytes / kRowBytes) return false;
  const Product product = stem_product<float>(window, channels);  // the largest
  const int64_t grad_weight = kWarps * GradTraits<float, 64>::kWarpBytes + axis_terms_bytes(window);
  return std::max(forward_shared_bytes(window, product), grad_weight) <= kMostSharedBytes;
}

template <typename T>
void conv3d_stem(const Window& window, const ConvChannels& channels, Math math, const T* gathered, const T* weight,
                 const T* bias, T* written, cudaStream_t stream) {
  const Product product = stem_product<T>(window, channels);
  with_constants<T>(product, math, [&](auto of_math, auto padded, auto columns) {
    stem<T, of_math(), padded(), columns()>(window, product, gathered, weight, bias, written, stream);
  });
}

template <typename T>
int64_t conv3d_stem_grad_weight_partial_sums(const Window& window, const ConvChannels& channels) {
  const Product product = stem_product<T>(window, channels);
  return int64_t{stem_parts(window, product.k_steps * product.n_tiles).count} * product.taps * product.k * product.n;
}

template <typename T>
void conv3d_stem_grad_weight(const Window& window, const ConvChannels& channels, Math math, const T* grad, const T* x,
                             float* partial, T* grad_weight, cudaStream_t stream) {
  const Product product = stem_product<T>(window, channels);
  with_constants<T>(product, math, [&](auto of_math, auto padded, auto columns) {
    stem_grad_weight<T, of_math(), padded(), columns()>(window, product, grad, x, partial, stream);
  });
  add_weight_parts("conv3d_stem_grad_weight_sum", partial,
                   stem_parts(window, product.k_steps * product.n_tiles).count, product.taps, product.k, product.n,
                   grad_weight, stream);
}

#define S3D_INSTANTIATE(T)                                                                                           \
  template void conv3d_stem<T>(const Window&, const ConvChannels&, Math, const T*, const T*, const T*, T*,           \
                               cudaStream_t);                                                                        \
  template int64_t conv3d_stem_grad_weight_partial_sums<T>(const Window&, const ConvChannels&);                      \
  template void conv3d_stem_grad_weight<T>(const Window&, const ConvChannels&, Math, const T*, const T*, float*, T*, \
                                           cudaStream_t);
S3D_INSTANTIATE(float)
S3D_INSTANTIATE(bf16)
S3D_INSTANTIATE(fp16)
#undef S3D_INSTANTIATE

}  // namespace s3d::cuda
