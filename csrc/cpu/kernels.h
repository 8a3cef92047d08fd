// The kernels of one instruction set, for each type of features in memory. Each set is one compilation of kernels.inl.
#pragma once

#include <cstdint>
#include <tuple>

#include "cpu/half.h"
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

// A fused up-convolution of whole volumes: the coarse [batch, shape, in_channels], the fine one of twice the sides
// [batch, 2 * shape, out_channels].
struct Upconv {
  int64_t batch;
  Triple shape;
  int64_t in_channels, out_channels;
  int64_t inputs() const { return batch * shape.volume() * in_channels; }
  int64_t outputs() const { return 8 * batch * shape.volume() * out_channels; }
  int64_t weights() const { return 64 * out_channels * in_channels; }
};

// weight [2, 2, 2, out_channels, in_channels, 2, 2, 2]: phase, channels, tap. bias [out_channels] or null.
template <typename T>
struct UpconvKernels {
  void (*upconv3d)(const Upconv&, const T* x, const T* weight, const T* bias, T* y, int threads);
  void (*grad_input)(const Upconv&, const T* grad, const T* weight, T* grad_x, int threads);
  void (*grad_weight)(const Upconv&, const T* grad, const T* x, T* grad_weight, int threads);
};

// Rows of a block-compact tensor, sample by sample.
struct Rows {
  int64_t samples;
  const int32_t* offsets;  // [samples + 1] rows of each sample
  int64_t block;           // voxels of a block
  const uint8_t* voxels;   // [rows, block] or null
};

// Features are stored as S; tables [samples, channels] have the type in which they are computed.
template <typename S>
struct NormKernels {
  using T = computed<S>;
  void (*statistics)(const Rows&, const S* x, T* mean, T* squares, int64_t channels, int threads);
  void (*apply)(const Rows&, const S* x, const T* mean, const T* scale, const T* shift, const S* residual, T slope,
                S* y, int64_t channels, int threads);
  // before: null if slope is 1. y null: the sign of the affine of x.
  void (*grad_sums)(const Rows&, const S* grad, const S* x, const S* y, const T* mean, const T* rstd, const T* scale,
                    const T* shift, T slope, S* before, T* of_grad, T* of_product, int64_t channels, int threads);
  void (*grad_input)(const Rows&, const S* grad, const S* x, const T* mean, const T* rstd, const T* scale,
                     const T* offset, const T* tilt, S* grad_x, int64_t channels, int threads);
  void (*channel_sums)(const Rows&, const S* x, S* sums, int64_t channels, int threads);
};

// Where the windows of an output block lie in its volume.
struct Place {
  const int32_t* target_index;  // [rows, 4] (n, gd, gh, gw)
  Triple shape;                 // of the input volume
};

template <typename S>
struct PoolKernels {
  using T = computed<S>;
  // divisor 0: the voxels of a window that lie in the volume.
  void (*average)(const Window&, const Place&, const S* in, S* out, int64_t channels, int64_t divisor, int threads);
  // The forward window, whose outputs are averages, and its transposed, which writes inputs and gathers outputs.
  void (*average_grad)(const Window& forward, const Window& transposed, const Place&, const S* grad, S* grad_in,
                       int64_t channels, int64_t divisor, int threads);
  // winners [outputs, channels] or null: the tap at which each maximum lies, the first of equal ones, as in torch, and
  // -1 for a masked voxel's zero.
  void (*maximum)(const Window&, const Place&, const S* in, S* out, int32_t* winners, int64_t channels, int threads);
  void (*maximum_grad)(const Window& transposed, const int32_t* winners, const S* grad, S* grad_in, int64_t channels,
                       int threads);
};

// One for each type of features.
template <template <typename> class K>
using OfEachType = std::tuple<K<float>, K<double>, K<bfloat16>, K<float16>>;

struct InstructionSet {
  const char* name;
  bool (*supported)();
  bool (*winograd_applies)(const Window&);
  OfEachType<Kernels> conv;
  OfEachType<UpconvKernels> upconv;
  OfEachType<NormKernels> norm;
  OfEachType<PoolKernels> pool;
};

const InstructionSet& generic();
#ifdef __x86_64__
const InstructionSet& avx2();
const InstructionSet& avx512();
#endif

}  // namespace s3d::cpu
