// One instruction set: define S3D_SET (its name, also the function that returns it), VECTOR_BYTES, REGISTER_ROWS (rows
// of two vectors that fit in the registers beside their operands) and S3D_SUPPORTED, then include this.
#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <new>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

#define S3D_TEXT2(x) #x
#define S3D_TEXT(x) S3D_TEXT2(x)

namespace s3d::cpu {
namespace {
#include "cpu/conv.inl"
#include "cpu/few.inl"
#include "cpu/shallow.inl"
#include "cpu/winograd.inl"
#include "cpu/norm.inl"

bool supported() { return S3D_SUPPORTED; }
}  // namespace

const InstructionSet& S3D_SET() {
  static const InstructionSet set = {
      S3D_TEXT(S3D_SET),
      supported,
      winograd_applies,
      {conv3d<float>, conv3d_winograd<float>, conv3d_grad_weight<float>,
       conv3d_grad_weight_winograd<float>},
      {conv3d<double>, conv3d_winograd<double>, conv3d_grad_weight<double>,
       conv3d_grad_weight_winograd<double>},
      {norm_statistics<float>, norm_apply<float>, norm_grad_sums<float>, norm_grad_input<float>,
       channel_sums<float>},
      {norm_statistics<double>, norm_apply<double>, norm_grad_sums<double>, norm_grad_input<double>,
       channel_sums<double>},
  };
  return set;
}

}  // namespace s3d::cpu
