// What bindings call: every operator on pointers to device memory. Nothing is allocated and nothing waits: work is put
// on `stream`. T: float, bf16 or fp16. Features are block-compact, [rows, block, channels], channels last. What lies at
// masked voxels is never read; results there are zeros.
#pragma once

#include "cuda/device.cuh"
#include "s3d/window.h"

namespace s3d::cuda {

// How float is multiplied; numbers of 16 bits go to tensor cores always.
enum class Math { kTensorCores, kExact };

struct ConvChannels {
  int in, out, groups;  // of the forward direction
};

// ---- conv3d_pack.cu. Pointers in a Window are to device memory.

// Elements of the packed weight, 16-byte aligned, that conv3d_gather and conv3d_halo take.
template <typename T>
int64_t conv3d_packed_elements(const Window& window, const ConvChannels& channels);

// weight: [out, in / groups, taps] as torch has it. Packed for the direction of `window` and for `math`.
template <typename T>
void conv3d_pack_weight(const Window& window, const ConvChannels& channels, Math math, const T* weight, T* packed,
                        cudaStream_t stream);

// ---- conv3d_gather.cu: any kernel, stride and block.

// Forward: gathered has `in` channels, written `out`; window.transposed (gradient of the input): the reverse. bias:
// [written channels] or null.
template <typename T>
void conv3d_gather(const Window& window, const ConvChannels& channels, Math math, const T* gathered, const T* packed,
                   const T* bias, T* written, cudaStream_t stream);

// ---- conv3d_halo.cu: the same results with less traffic, for stride 1, kernel sides 1 and 3 with their padding, and
// block sides divisible by 4.

// Whether conv3d_halo can compute it.
bool conv3d_halo_applies(const Window& window, const ConvChannels& channels);

// What conv3d_halo can do besides, sample by sample. Pointers are to device memory, of floats to 16-byte aligned.
struct ConvFusion {
  int samples = 0;  // 0: nothing of this
  // [samples + 1]; the written blocks of sample n, and the gathered ones around them, are rows offsets[n] ...
  // offsets[n + 1] - 1 of theirs; these are offsets of written rows.
  const int32_t* sample_offsets = nullptr;
  // Null, or [samples, gathered channels]: a gathered x is leaky((x - mean) * scale + shift), rounded to T, where it is
  // visible. leaky(y) is y or, where that is negative, slope * y. Elsewhere there are zeros still.
  const float *mean = nullptr, *scale = nullptr, *shift = nullptr;
  float slope = 0;
  // Null, or conv3d_halo_partials() floats, for conv3d_halo_moments.
  float* partials = nullptr;
};

int64_t conv3d_halo_partials(const Window& window, const ConvChannels& channels, int samples);

// As conv3d_gather.
template <typename T>
void conv3d_halo(const Window& window, const ConvChannels& channels, Math math, const T* gathered, const T* packed,
                 const T* bias, T* written, cudaStream_t stream, const ConvFusion& fusion = {});

// ---- conv3d_halo_moments.cu

// Of what conv3d_halo wrote to visible voxels, before it was rounded to T: [samples, written channels] each. squares:
// sum of the squared deviations from the mean. Both are 0 where no voxel is visible.
void conv3d_halo_moments(const Window& window, const ConvChannels& channels, const ConvFusion& fusion, float* mean,
                         float* squares, cudaStream_t stream);

// ---- conv3d_pairs.cu: the same results with less work for blocks with a side below 4.

// Whether conv3d_pairs is the better choice.
bool conv3d_pairs_applies(const Window& window, const ConvChannels& channels);

// Floats that conv3d_pairs needs to work with, possibly none.
template <typename T>
int64_t conv3d_pairs_partial_sums(const Window& window, const ConvChannels& channels);

// As conv3d_gather.
template <typename T>
void conv3d_pairs(const Window& window, const ConvChannels& channels, Math math, const T* gathered, const T* packed,
                  const T* bias, float* partial, T* written, cudaStream_t stream);

// ---- conv3d_stem.cu: the same results, and the gradient of the weight, for up to 4 gathered channels and one group.

// Whether conv3d_stem, and for a forward window conv3d_stem_grad_weight, is the better choice.
bool conv3d_stem_applies(const Window& window, const ConvChannels& channels);

// As conv3d_gather, of the weight as torch has it.
template <typename T>
void conv3d_stem(const Window& window, const ConvChannels& channels, Math math, const T* gathered, const T* weight,
                 const T* bias, T* written, cudaStream_t stream);

// Floats that conv3d_stem_grad_weight needs to work with.
template <typename T>
int64_t conv3d_stem_grad_weight_partial_sums(const Window& window, const ConvChannels& channels);

// As conv3d_grad_weight.
template <typename T>
void conv3d_stem_grad_weight(const Window& window, const ConvChannels& channels, Math math, const T* grad, const T* x,
                             float* partial, T* grad_weight, cudaStream_t stream);

// ---- conv3d_depthwise.cu: the same for as many groups as channels, in float always.

// Whether the two below are the better choice.
bool conv3d_depthwise_applies(const Window& window, const ConvChannels& channels);

// As conv3d_gather, of the weight as torch has it.
template <typename T>
void conv3d_depthwise(const Window& window, const ConvChannels& channels, const T* gathered, const T* weight,
                      const T* bias, T* written, cudaStream_t stream);

// Floats that conv3d_depthwise_grad_weight needs to work with.
int64_t conv3d_depthwise_grad_weight_partial_sums(const Window& window, const ConvChannels& channels);

// As conv3d_grad_weight.
template <typename T>
void conv3d_depthwise_grad_weight(const Window& window, const ConvChannels& channels, const T* grad, const T* x,
                                  float* partial, T* grad_weight, cudaStream_t stream);

// ---- conv3d_grad_weight.cu

// Floats that conv3d_grad_weight needs to work with.
int64_t conv3d_grad_weight_partial_sums(const Window& window, const ConvChannels& channels);

// grad is written, x gathered (forward window). grad_weight: [out, in / groups, taps].
template <typename T>
void conv3d_grad_weight(const Window& window, const ConvChannels& channels, Math math, const T* grad, const T* x,
                        float* partial, T* grad_weight, cudaStream_t stream);

// ---- conv3d_grad_weight_halo.cu: the same with less traffic, where conv3d_halo_applies to the forward window.

// Floats that conv3d_grad_weight_halo needs to work with.
template <typename T>
int64_t conv3d_grad_weight_halo_partial_sums(const Window& window, const ConvChannels& channels);

// As conv3d_grad_weight.
template <typename T>
void conv3d_grad_weight_halo(const Window& window, const ConvChannels& channels, Math math, const T* grad, const T* x,
                             float* partial, T* grad_weight, cudaStream_t stream);

// ---- norm.cu. Tables are [samples, channels] in float.

// Rows of a block-compact tensor, sample by sample.
struct SampleRows {
  int samples;
  const int32_t* offsets;  // [samples + 1] on the device: rows of each sample
  int64_t rows;            // of all
  int64_t block;           // voxels of a block
  const uint8_t* voxels;   // [rows, block] on the device, or null: all visible
};

// Floats that the functions with `partial` need to work with.
int64_t norm_partial_sums(const SampleRows& rows, int channels);

// mean, and the sum of the squared distances from it; zeros for a sample of which nothing is visible.
template <typename T>
void norm_statistics(const SampleRows& rows, const T* x, float* partial, float* mean, float* squares, int channels,
                     cudaStream_t stream);

// y = leaky((x - mean) * scale + shift + residual); residual may be null, y may be x.
template <typename T>
void norm_apply(const SampleRows& rows, const T* x, const float* mean, const float* scale, const float* shift,
                const T* residual, float slope, T* y, int channels, cudaStream_t stream);

// before: the gradient in front of the activation, null if slope is 1. The activation's sign is that of y, or where y
// is null of the affine of x. of_grad, of_product: sums of before and of before * (x - mean) * rstd.
template <typename T>
void norm_grad_sums(const SampleRows& rows, const T* grad, const T* x, const T* y, const float* mean,
                    const float* rstd, const float* scale, const float* shift, float slope, T* before, float* partial,
                    float* of_grad, float* of_product, int channels, cudaStream_t stream);

// grad_x = scale * grad - offset - tilt * (x - mean) * rstd
template <typename T>
void norm_grad_input(const SampleRows& rows, const T* grad, const T* x, const float* mean, const float* rstd,
                     const float* scale, const float* offset, const float* tilt, T* grad_x, int channels,
                     cudaStream_t stream);

// Sums over the visible voxels of all samples: the gradient of a convolution's bias. sums: [channels]
template <typename T>
void channel_sums(const SampleRows& rows, const T* x, float* partial, T* sums, int channels, cudaStream_t stream);

// ---- table.cu. index: [rows, 4], (n, gd, gh, gw) of each stored block, 16-byte aligned.

// cells: [batch, grid], the row of the block that is stored there, -1: none.
void cell_rows(const int32_t* index, int64_t rows, int64_t batch, const Triple& grid, int32_t* cells,
               cudaStream_t stream);

// table: [rows, prod(2 * radius + 1)] as in Window, from the index of the written blocks and the cells of the gathered.
void neighbour_table(const int32_t* index, int64_t rows, const int32_t* cells, const Triple& grid,
                     const Triple& radius, int32_t* table, cudaStream_t stream);

// reverse: [reverse_rows, columns], the table of the opposite direction, as s3d::reverse_table makes it on the host.
void reverse_table(const int32_t* table, int64_t rows, int64_t columns, int64_t reverse_rows, int32_t* reverse,
                   cudaStream_t stream);

// ---- blocks.cu

struct DenseVolume {
  int batch, channels;
  Triple shape;
  int64_t strides[5];  // elements, of [N, C, D, H, W]
};

struct BlockRows {
  const int32_t* index;   // as in table.cu
  const uint8_t* voxels;  // [rows, block] on the device, or null: all visible
  Triple block;
  int64_t rows;
};

// Zeros at masked voxels and beyond the volume. Bits are moved as they are.
template <typename T>
void gather_blocks(const BlockRows& rows, const DenseVolume& volume, const T* dense, T* blocks, cudaStream_t stream);

// cells: of the same blocks (cell_rows), on the grid that covers the volume. fill: [channels], for all that is not
// visible, or null for zeros. Of `rows` the index is not needed.
template <typename T>
void scatter_blocks(const BlockRows& rows, const DenseVolume& volume, const int32_t* cells, const T* blocks,
                    const T* fill, T* dense, cudaStream_t stream);

// ---- pool.cu. Masked voxels count as zeros; outside the volume the average sees zeros and the maximum nothing.

struct PoolOutputs {
  const int32_t* index;  // of the blocks of outputs, as in table.cu
  Triple volume;         // of the inputs
};

// divisor 0: the voxels of a window that lie in the volume.
template <typename T>
void pool_average(const Window& window, const PoolOutputs& outputs, const T* in, T* out, int channels, int divisor,
                  cudaStream_t stream);
template <typename T>
void pool_average_grad(const Window& transposed, const PoolOutputs& outputs, const T* grad, T* grad_in, int channels,
                       int divisor, cudaStream_t stream);

// winners [outputs, channels]: the tap at which each maximum lies, the first of equal ones, as in torch, and -1 for a
// masked voxel's zero. out or winners may be null.
template <typename T>
void pool_maximum(const Window& window, const PoolOutputs& outputs, const T* in, T* out, int16_t* winners,
                  int channels, cudaStream_t stream);
template <typename T>
void pool_maximum_grad(const Window& transposed, const int16_t* winners, const T* grad, T* grad_in, int channels,
                       cudaStream_t stream);

}  // namespace s3d::cuda
