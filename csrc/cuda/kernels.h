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

}  // namespace s3d::cuda
