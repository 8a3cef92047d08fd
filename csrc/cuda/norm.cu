// Normalisation over the visible voxels of each sample: statistics, the elementwise pass, and their backward.
//
//   statistics    mean[n, c], squares[n, c] = sum of (x - mean)^2
//   apply         y = leaky((x - mean) * scale + shift + residual),   leaky(v) = v or, below 0, slope * v
//   grad_sums     before = grad * leaky'(...), of_grad = sum of before, of_product = sum of before * (x - mean) * rstd
//   grad_input    grad_x = scale * grad - offset - tilt * (x - mean) * rstd
//   channel_sums  sums[c] = sum of x
//
// Layouts   x, y, residual, grad, before [voxels, C], channels last; tables [samples, C] in float.
// Work      Each sample is cut into parts of its voxels, by the problem alone. A block of 256 threads makes 32 channels
//           of one part; a thread has 16 bytes of channels of every 64th (16 bits) or 32nd (float) voxel, or one
//           channel of every 8th where rows are no whole 16 bytes. Blocks side by side have neighbouring channels.
// Sums      A thread's in float, Welford's method for moments; those of a warp by shuffles, those of the block's warps
//           in their order; then the parts in double by a second kernel, 16 warps for 32 channels of a sample. Moments
//           are merged as Chan, Golub and LeVeque (1979). The problem alone fixes the order: always the same bits.
//           Where a result needs sums it takes two launches, else one.
// Memory    Shared: 8 warps * 32 channels * 2 sums; in the second kernel 16 warps in double, 12 KiB at most.
//           Masked voxels are not read. Registers: up to 79, with 8 channels a thread.
// Limits    A part has fewer than 2^24 voxels, so that float counts them. Of C = 1, 2, 3 a block uses 1, 2, 3 lanes of
//           32.
// Expected  Bound by memory: each tensor is read or written once; grad_sums reads two or three and writes one. Not
//           measured yet.
#include <algorithm>

#include "cuda/channels.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"

namespace s3d::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kMergeWarps = 16, kTile = 32;  // kTile: channels
constexpr uint32_t kAll = 0xFFFFFFFF;

struct RowsView {
  Global<const int32_t> offsets;  // null: one sample
  Global<const uint8_t> voxels;
  int64_t all;    // voxels
  int64_t block;  // voxels of one
  int channels, tiles, parts;
};

// What a block makes: blockIdx.x counts tiles of channels within parts within samples.
struct Part {
  __device__ explicit Part(const RowsView& rows) {
    number = static_cast<int>(blockIdx.x) / rows.tiles;
    first_channel = static_cast<int>(blockIdx.x) % rows.tiles * kTile;
    sample = number / rows.parts;
    begin = 0;
    int64_t end_of_sample = rows.all;
    if (rows.offsets != nullptr) {
      begin = int64_t{rows.offsets[sample]} * rows.block;
      end_of_sample = int64_t{rows.offsets[sample + 1]} * rows.block;
    }
    const int64_t count = end_of_sample - begin, part = number % rows.parts;
    end = begin + count * (part + 1) / rows.parts;
    begin += count * part / rows.parts;
  }
  int number, first_channel, sample;  // number: of all samples
  int64_t begin, end;                 // voxels
};

// What a thread makes of it: kVector channels of the voxels first, first + kRows, ... before `end`.
template <int kVector>
struct Share {
  static constexpr int kLanes = kTile / kVector;   // threads side by side along the channels
  static constexpr int kRows = kThreads / kLanes;  // voxels at once
  __device__ explicit Share(const RowsView& rows) : Share(rows, Part(rows)) {}
  __device__ Share(const RowsView& rows, const Part& part) : part(part) {
    column = threadIdx.x % kLanes * kVector;
    exists = part.first_channel + column < rows.channels;
    first = exists ? part.begin + threadIdx.x / kLanes : part.end;
    channel = part.first_channel + (exists ? column : 0);
  }
  Part part;
  int64_t first;
  int column, channel;  // of the tile and of all
  bool exists;
};

__device__ __forceinline__ bool is_visible(const RowsView& rows, int64_t voxel) {
  if (rows.voxels == nullptr) return true;
  return rows.voxels[voxel] != 0;
}

// A thread's channels of a table.
template <int kVector>
struct Line {
  __device__ Line(Global<const float> table, const Share<kVector>& share, const RowsView& rows) {
    const int64_t at = int64_t{share.part.sample} * rows.channels + share.channel;
    if constexpr (kVector == 1) {
      values[0] = table[at];
    } else {
#pragma unroll
      for (int i = 0; i < kVector; i += 4) {
        const float4 four = load<float4>(table + (at + i));
        values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
      }
    }
  }
  __device__ float operator[](int i) const { return values[i]; }
  float values[kVector];
};

template <typename Number>
struct Moments {
  Number count, mean, squares;
};

template <typename Number>
__device__ __forceinline__ Moments<Number> merged(const Moments<Number>& a, const Moments<Number>& b) {
  if (b.count == 0) return a;
  if (a.count == 0) return b;
  const Number count = a.count + b.count, share = b.count / count, difference = b.mean - a.mean;
  return {count, a.mean + difference * share, a.squares + b.squares + difference * difference * a.count * share};
}

// means, squares: [samples * parts, channels]; counts: [samples * parts].
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    norm_statistics_kernel(RowsView rows, Global<const T> x, Global<float> means, Global<float> squares,
                           Global<float> counts) {
  S3D_SHARED(float, warp_means, kWarps* kTile);
  S3D_SHARED(float, warp_squares, kWarps* kTile);
  S3D_SHARED(float, warp_counts, kWarps);
  const Share<kVector> share(rows);
  float count = 0, mean[kVector] = {}, spread[kVector] = {};
#pragma unroll 1  // or the calls of the division's rare cases make nvcc spill
  for (int64_t v = share.first; v < share.part.end; v += Share<kVector>::kRows) {
    if (!is_visible(rows, v)) continue;
    float values[kVector];
    load_channels(x + v * rows.channels + share.channel, values);
    count += 1;
    const float part = 1 / count;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float difference = values[i] - mean[i];
      mean[i] += difference * part;
      spread[i] += difference * (values[i] - mean[i]);
    }
  }
#pragma unroll
  for (int step = Share<kVector>::kLanes; step < 32; step *= 2) {
    const float other_count = __shfl_xor_sync(kAll, count, step);
    Moments<float> all = {};
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float other_mean = __shfl_xor_sync(kAll, mean[i], step);
      const float other_spread = __shfl_xor_sync(kAll, spread[i], step);
      all = merged<float>({count, mean[i], spread[i]}, {other_count, other_mean, other_spread});
      mean[i] = all.mean;
      spread[i] = all.squares;
    }
    count = all.count;
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane < Share<kVector>::kLanes) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      warp_means[warp * kTile + share.column + i] = mean[i];
      warp_squares[warp * kTile + share.column + i] = spread[i];
    }
  }
  if (lane == 0) warp_counts[warp] = count;  // the first lane always has channels
  __syncthreads();
  if (warp > 0) return;
  Moments<float> all = {};
  for (int i = 0; i < kWarps; ++i) {
    all = merged<float>(all, {warp_counts[i], warp_means[i * kTile + lane], warp_squares[i * kTile + lane]});
  }
  const int channel = share.part.first_channel + lane;
  if (channel < rows.channels) {
    const int64_t at = int64_t{share.part.number} * rows.channels + channel;
    means[at] = all.mean;
    squares[at] = all.squares;
  }
  if (lane == 0 && share.part.first_channel == 0) counts[share.part.number] = all.count;
}

// Blocks of 32 channels of a sample; a thread takes every kMergeWarps-th part of a channel.
__global__ void __launch_bounds__(32 * kMergeWarps)
    norm_statistics_merge_kernel(RowsView rows, Global<const float> means, Global<const float> squares,
                                 Global<const float> counts, Global<float> mean, Global<float> spread) {
  S3D_SHARED(double, warp_counts, kMergeWarps);
  S3D_SHARED(double, warp_means, kMergeWarps* kTile);
  S3D_SHARED(double, warp_squares, kMergeWarps* kTile);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t sample = static_cast<int>(blockIdx.x) / rows.tiles;
  const int channel = static_cast<int>(blockIdx.x) % rows.tiles * kTile + lane;
  const bool exists = channel < rows.channels;
  Moments<double> all = {};
  for (int part = warp; part < rows.parts; part += kMergeWarps) {
    const int64_t row = sample * rows.parts + part, at = row * rows.channels + (exists ? channel : 0);
    const float part_count = counts[row], part_mean = means[at], part_squares = squares[at];
    all = merged<double>(all, {part_count, part_mean, part_squares});
  }
  if (lane == 0) warp_counts[warp] = all.count;
  warp_means[threadIdx.x] = all.mean;
  warp_squares[threadIdx.x] = all.squares;
  __syncthreads();
  if (warp > 0 || !exists) return;
  for (int i = 1; i < kMergeWarps; ++i) {
    all = merged<double>(all, {warp_counts[i], warp_means[i * kTile + lane], warp_squares[i * kTile + lane]});
  }
  mean[sample * rows.channels + channel] = static_cast<float>(all.mean);
  spread[sample * rows.channels + channel] = static_cast<float>(all.squares);
}

// slope 0 is ReLU: a zero for -inf too, and NaN stays NaN.
__device__ __forceinline__ float leaky(float value, float slope) {
  if (!(value < 0)) return value;
  return slope == 0 ? 0.0f : slope * value;
}

__device__ __forceinline__ float leaky_grad(float value, float grad, float slope) {
  if (value > 0) return grad;
  return slope == 0 ? 0.0f : slope * grad;
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    norm_apply_kernel(RowsView rows, Global<const T> x, Global<const float> mean, Global<const float> scale,
                      Global<const float> shift, Global<const T> residual, float slope, Global<T> y) {
  const Share<kVector> share(rows);
  const Line<kVector> m(mean, share, rows), a(scale, share, rows), b(shift, share, rows);
  for (int64_t v = share.first; v < share.part.end; v += Share<kVector>::kRows) {
    const int64_t at = v * rows.channels + share.channel;
    float values[kVector] = {}, add[kVector] = {};
    if (is_visible(rows, v)) {
      load_channels(x + at, values);
      if (residual != nullptr) load_channels(residual + at, add);
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] = leaky((values[i] - m[i]) * a[i] + b[i] + add[i], slope);
    }
    store_channels(y + at, values);
  }
}

// partial: kTables of [samples * parts, channels], sums over the block's threads.
template <int kVector, int kTables>
__device__ __forceinline__ void add_block(const RowsView& rows, const Share<kVector>& share,
                                          float (&sums)[kTables][kVector], Global<float> partial) {
  S3D_SHARED(float, of_warp, kTables* kWarps* kTile);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int table = 0; table < kTables; ++table) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
#pragma unroll
      for (int step = Share<kVector>::kLanes; step < 32; step *= 2) {
        sums[table][i] += __shfl_xor_sync(kAll, sums[table][i], step);
      }
      if (lane < Share<kVector>::kLanes) of_warp[(table * kWarps + warp) * kTile + share.column + i] = sums[table][i];
    }
  }
  __syncthreads();
  const int channel = share.part.first_channel + lane;
  if (warp >= kTables || channel >= rows.channels) return;
  float sum = 0;
  for (int i = 0; i < kWarps; ++i) sum += of_warp[(warp * kWarps + i) * kTile + lane];
  const int64_t rows_of_table = gridDim.x / rows.tiles;
  partial[(warp * rows_of_table + share.part.number) * rows.channels + channel] = sum;
}

// before: null if slope is 1. y null: the sign of the affine of x. partial: sums, then products.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    norm_grad_sums_kernel(RowsView rows, Global<const T> grad, Global<const T> x, Global<const T> y,
                          Global<const float> mean, Global<const float> rstd, Global<const float> scale,
                          Global<const float> shift, float slope, Global<T> before, Global<float> partial) {
  const Share<kVector> share(rows);
  const Line<kVector> m(mean, share, rows), d(rstd, share, rows), a(scale, share, rows), b(shift, share, rows);
  float sums[2][kVector] = {};
  for (int64_t v = share.first; v < share.part.end; v += Share<kVector>::kRows) {
    const int64_t at = v * rows.channels + share.channel;
    float g[kVector] = {};
    if (is_visible(rows, v)) {
      float in[kVector], sign[kVector] = {};
      load_channels(grad + at, g);
      load_channels(x + at, in);
      if (y != nullptr) load_channels(y + at, sign);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float centred = in[i] - m[i];
        if (before != nullptr) g[i] = leaky_grad(y != nullptr ? sign[i] : centred * a[i] + b[i], g[i], slope);
        sums[0][i] += g[i];
        sums[1][i] += g[i] * (centred * d[i]);
      }
    }
    if (before != nullptr) store_channels(before + at, g);
  }
  add_block(rows, share, sums, partial);
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    channel_sums_kernel(RowsView rows, Global<const T> x, Global<float> partial) {
  const Share<kVector> share(rows);
  float sums[1][kVector] = {};
  for (int64_t v = share.first; v < share.part.end; v += Share<kVector>::kRows) {
    if (!is_visible(rows, v)) continue;
    float values[kVector];
    load_channels(x + v * rows.channels + share.channel, values);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sums[0][i] += values[i];
  }
  add_block(rows, share, sums, partial);
}

// Blocks of 32 channels of a sample (x) and of a table (y): the first's sums go to `first`, the second's to `second`.
template <typename T>
__global__ void __launch_bounds__(32 * kMergeWarps)
    add_parts_kernel(RowsView rows, Global<const float> partial, Global<T> first, Global<T> second) {
  S3D_SHARED(double, of_warp, kMergeWarps* kTile);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t sample = static_cast<int>(blockIdx.x) / rows.tiles, samples = gridDim.x / rows.tiles;
  const int channel = static_cast<int>(blockIdx.x) % rows.tiles * kTile + lane;
  const bool exists = channel < rows.channels;
  const int64_t row = (blockIdx.y * samples + sample) * rows.parts;
  double sum = 0;
  for (int part = warp; part < rows.parts; part += kMergeWarps) {
    const float value = partial[(row + part) * rows.channels + (exists ? channel : 0)];
    sum += value;
  }
  of_warp[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || !exists) return;
  for (int i = 1; i < kMergeWarps; ++i) sum += of_warp[i * kTile + lane];
  const Global<T> sums = blockIdx.y == 0 ? first : second;
  sums[sample * rows.channels + channel] = from_float<T>(static_cast<float>(sum));
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    norm_grad_input_kernel(RowsView rows, Global<const T> grad, Global<const T> x, Global<const float> mean,
                           Global<const float> rstd, Global<const float> scale, Global<const float> offset,
                           Global<const float> tilt, Global<T> grad_x) {
  const Share<kVector> share(rows);
  const Line<kVector> m(mean, share, rows), d(rstd, share, rows), a(scale, share, rows), o(offset, share, rows),
      s(tilt, share, rows);
  for (int64_t v = share.first; v < share.part.end; v += Share<kVector>::kRows) {
    const int64_t at = v * rows.channels + share.channel;
    float g[kVector] = {};
    if (is_visible(rows, v)) {
      float in[kVector];
      load_channels(grad + at, g);
      load_channels(x + at, in);
#pragma unroll
      for (int i = 0; i < kVector; ++i) g[i] = a[i] * g[i] - o[i] - s[i] * ((in[i] - m[i]) * d[i]);
    }
    store_channels(grad_x + at, g);
  }
}

// Parts are merged one after the other, so sums have no more of them than fill a GPU; the elementwise passes have more,
// so that blocks which end early make room for others.
enum class Parts { kSummed, kSeparate };

RowsView view(const SampleRows& rows, int channels, Parts kind) {
  constexpr int64_t kLeastVoxels = 256, kMostVoxels = 1 << 23;
  const int64_t all = rows.rows * rows.block, samples = std::max(rows.samples, 1);
  const int64_t tiles = (channels + kTile - 1) / kTile;
  const int64_t blocks = kind == Parts::kSummed ? 1024 : 4096;
  const int64_t wanted = std::min(all / samples / kLeastVoxels, blocks / std::max<int64_t>(samples * tiles, 1));
  const int64_t parts = std::max({wanted, all / kMostVoxels, int64_t{1}});
  return {rows.offsets, rows.voxels, all, rows.block, channels, static_cast<int>(tiles), static_cast<int>(parts)};
}

SampleRows as_one_sample(const SampleRows& rows) { return {1, nullptr, rows.rows, rows.block, rows.voxels}; }

dim3 grid_of(const SampleRows& rows, const RowsView& shape, int parts) {
  return dim3(blocks_of(int64_t{rows.samples} * parts * shape.tiles, 1));
}

}  // namespace

int64_t norm_partial_sums(const SampleRows& rows, int channels) {
  const int64_t of_samples = int64_t{rows.samples} * view(rows, channels, Parts::kSummed).parts;
  const int64_t of_one = view(as_one_sample(rows), channels, Parts::kSummed).parts;
  return std::max(of_samples * (2 * int64_t{channels} + 1), of_one * channels);
}

template <typename T>
void norm_statistics(const SampleRows& rows, const T* x, float* partial, float* mean, float* squares, int channels,
                     cudaStream_t stream) {
  const RowsView shape = view(rows, channels, Parts::kSummed);
  const int64_t sums = int64_t{rows.samples} * shape.parts * channels;
  const auto kernel =
      all_whole_chunks(channels, x) ? norm_statistics_kernel<T, kChunk<T>> : norm_statistics_kernel<T, 1>;
  launch("norm_statistics", kernel, grid_of(rows, shape, shape.parts), kThreads, 0, stream, shape, x, partial,
         partial + sums, partial + 2 * sums);
  launch("norm_statistics_merge", norm_statistics_merge_kernel, grid_of(rows, shape, 1), 32 * kMergeWarps, 0, stream,
         shape, partial, partial + sums, partial + 2 * sums, mean, squares);
}

template <typename T>
void norm_apply(const SampleRows& rows, const T* x, const float* mean, const float* scale, const float* shift,
                const T* residual, float slope, T* y, int channels, cudaStream_t stream) {
  const RowsView shape = view(rows, channels, Parts::kSeparate);
  const bool whole = all_whole_chunks(channels, x, mean, scale, shift, residual, y);
  const auto kernel = whole ? norm_apply_kernel<T, kChunk<T>> : norm_apply_kernel<T, 1>;
  launch("norm_apply", kernel, grid_of(rows, shape, shape.parts), kThreads, 0, stream, shape, x, mean, scale, shift,
         residual, slope, y);
}

template <typename T>
void norm_grad_sums(const SampleRows& rows, const T* grad, const T* x, const T* y, const float* mean,
                    const float* rstd, const float* scale, const float* shift, float slope, T* before, float* partial,
                    float* of_grad, float* of_product, int channels, cudaStream_t stream) {
  const RowsView shape = view(rows, channels, Parts::kSummed);
  const bool whole = all_whole_chunks(channels, grad, x, y, mean, rstd, scale, shift, before);
  const auto kernel = whole ? norm_grad_sums_kernel<T, kChunk<T>> : norm_grad_sums_kernel<T, 1>;
  launch("norm_grad_sums", kernel, grid_of(rows, shape, shape.parts), kThreads, 0, stream, shape, grad, x, y, mean,
         rstd, scale, shift, slope, before, partial);
  dim3 grid = grid_of(rows, shape, 1);
  grid.y = 2;
  launch("add_parts", add_parts_kernel<float>, grid, 32 * kMergeWarps, 0, stream, shape, partial, of_grad, of_product);
}

template <typename T>
void norm_grad_input(const SampleRows& rows, const T* grad, const T* x, const float* mean, const float* rstd,
                     const float* scale, const float* offset, const float* tilt, T* grad_x, int channels,
                     cudaStream_t stream) {
  const RowsView shape = view(rows, channels, Parts::kSeparate);
  const bool whole = all_whole_chunks(channels, grad, x, mean, rstd, scale, offset, tilt, grad_x);
  const auto kernel = whole ? norm_grad_input_kernel<T, kChunk<T>> : norm_grad_input_kernel<T, 1>;
  launch("norm_grad_input", kernel, grid_of(rows, shape, shape.parts), kThreads, 0, stream, shape, grad, x, mean, rstd,
         scale, offset, tilt, grad_x);
}

template <typename T>
void channel_sums(const SampleRows& rows, const T* x, float* partial, T* sums, int channels, cudaStream_t stream) {
  const SampleRows one = as_one_sample(rows);
  const RowsView shape = view(one, channels, Parts::kSummed);
  const auto kernel = all_whole_chunks(channels, x) ? channel_sums_kernel<T, kChunk<T>> : channel_sums_kernel<T, 1>;
  launch("channel_sums", kernel, grid_of(one, shape, shape.parts), kThreads, 0, stream, shape, x, partial);
  launch("add_parts", add_parts_kernel<T>, grid_of(one, shape, 1), 32 * kMergeWarps, 0, stream, shape, partial, sums,
         nullptr);
}

#define S3D_INSTANTIATE(T)                                                                                            \
  template void norm_statistics<T>(const SampleRows&, const T*, float*, float*, float*, int, cudaStream_t);           \
  template void norm_apply<T>(const SampleRows&, const T*, const float*, const float*, const float*, const T*, float, \
                              T*, int, cudaStream_t);                                                                 \
  template void norm_grad_sums<T>(const SampleRows&, const T*, const T*, const T*, const float*, const float*,        \
                                  const float*, const float*, float, T*, float*, float*, float*, int, cudaStream_t);  \
  template void norm_grad_input<T>(const SampleRows&, const T*, const T*, const float*, const float*, const float*,   \
                                   const float*, const float*, T*, int, cudaStream_t);                                \
  template void channel_sums<T>(const SampleRows&, const T*, float*, T*, int, cudaStream_t);
S3D_INSTANTIATE(float)
S3D_INSTANTIATE(bf16)
S3D_INSTANTIATE(fp16)
#undef S3D_INSTANTIATE

}  // namespace s3d::cuda
