// The kernels of one instruction set, for float and double. Each set is one compilation of kernels.inl.
#pragma once

#include <cstdint>

#include "s3d/window.h"

namespace s3d::cpu {

// Features are block-compact, [rows, block, channels].
template <typename T>
struct Kernels {
  // weight [out_channels, in_channels / groups, taps] as torch has it. Forward: gathered = in, written = out channels;
  // transposed: the reverse. bias [written channels] or null.
  void (*conv3d)(const Window&, const T* gathered, const T* weight, const T* bias, T* written, int64_t in_channels,
                 int64_t out_channels, int64_t groups, int threads);
  // The same by Winograd's method, for one group, where it applies.
  void (*conv3d_winograd)(const Window&, const T* gathered, const T* weight, const T* bias, T* written,
                          int64_t in_channels, int64_t out_channels, int threads);
  // grad is written, x gathered (forward window). grad_weight as weight.
  void (*conv3d_grad_weight)(const Window&, const T* grad, const T* x, T* grad_weight, int64_t in_channels,
                             int64_t out_channels, int64_t groups, int threads);
  void (*conv3d_grad_weight_winograd)(const Window&, const T* grad, const T* x, T* grad_weight, int64_t in_channels,
                                      int64_t out_channels, int threads);
};

// Rows of a block-compact tensor, sample by sample.
struct Rows {
  int64_t samples;
  const int32_t* offsets;  // [samples + 1] rows of each sample
  int64_t block;           // voxels of a block
  const uint8_t* voxels;   // [rows, block] or null
};

template <typename T>
struct NormKernels {
  void (*statistics)(const Rows&, const T* x, T* mean, T* squares, int64_t channels, int threads);
  void (*apply)(const Rows&, const T* x, const T* mean, const T* scale, const T* shift, const T* residual, T slope,
                T* y, int64_t channels, int threads);
  // before: null if slope is 1. y null: the sign of the affine of x.
  void (*grad_sums)(const Rows&, const T* grad, const T* x, const T* y, const T* mean, const T* rstd, const T* scale,
                    const T* shift, T slope, T* before, T* of_grad, T* of_product, int64_t channels, int threads);
  void (*grad_input)(const Rows&, const T* grad, const T* x, const T* mean, const T* rstd, const T* scale,
                     const T* offset, const T* tilt, T* grad_x, int64_t channels, int threads);
  void (*channel_sums)(const Rows&, const T* x, T* sums, int64_t channels, int threads);
};

struct InstructionSet {
  const char* name;
  bool (*supported)();
  bool (*winograd_applies)(const Window&);
  Kernels<float> f32;
  Kernels<double> f64;
  NormKernels<float> norm_f32;
  NormKernels<double> norm_f64;
};

const InstructionSet& generic();
#ifdef __x86_64__
const InstructionSet& avx2();
const InstructionSet& avx512();
#endif

}  // namespace s3d::cpu
