// Number formats, and mma.sync and ldmatrix against the tables of the PTX manual ("Matrix Fragments for mma.m16n8k16"
// and ".m16n8k8", "Warp-level matrix load instruction: ldmatrix"), written down here from the manual, element by
// element.
#include <cmath>
#include <limits>

#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "emulator/tests/check.h"

namespace s3d::emulator::test {
namespace {

using cuda::bf16;
using cuda::fp16;
using cuda::Global;
using cuda::launch;
using cuda::Shared;

// Where an element of a fragment lies: its row and column from groupID and threadID_in_group.
struct Element {
  int row_per_group, row_per_thread, row;
  int column_per_group, column_per_thread, column;
};

// .bf16 and .f16 of m16n8k16: a0 ... a7, b0 ... b3
constexpr Element kA16[8] = {{1, 0, 0, 0, 2, 0}, {1, 0, 0, 0, 2, 1}, {1, 0, 8, 0, 2, 0}, {1, 0, 8, 0, 2, 1},
                             {1, 0, 0, 0, 2, 8}, {1, 0, 0, 0, 2, 9}, {1, 0, 8, 0, 2, 8}, {1, 0, 8, 0, 2, 9}};
constexpr Element kB16[4] = {{0, 2, 0, 1, 0, 0}, {0, 2, 1, 1, 0, 0}, {0, 2, 8, 1, 0, 0}, {0, 2, 9, 1, 0, 0}};
// .tf32 of m16n8k8: a0 ... a3, b0, b1
constexpr Element kA32[4] = {{1, 0, 0, 0, 1, 0}, {1, 0, 8, 0, 1, 0}, {1, 0, 0, 0, 1, 4}, {1, 0, 8, 0, 1, 4}};
constexpr Element kB32[2] = {{0, 1, 0, 1, 0, 0}, {0, 1, 4, 1, 0, 0}};
// c0 ... c3 of both
constexpr Element kC[4] = {{1, 0, 0, 0, 2, 0}, {1, 0, 0, 0, 2, 1}, {1, 0, 8, 0, 2, 0}, {1, 0, 8, 0, 2, 1}};

int row_of(const Element& e, int lane) {
  return e.row_per_group * (lane >> 2) + e.row_per_thread * (lane % 4) + e.row;
}
int column_of(const Element& e, int lane) {
  return e.column_per_group * (lane >> 2) + e.column_per_thread * (lane % 4) + e.column;
}

template <typename T>
__global__ void mma_kernel(Global<const uint32_t> a, Global<const uint32_t> b, Global<float> d) {
  const int lane = threadIdx.x;
  uint32_t fragment_a[4], fragment_b[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) fragment_a[i] = a[lane * 4 + i];
  for (int i = 0; i < 2; ++i) fragment_b[i] = b[lane * 2 + i];
  for (int i = 0; i < 4; ++i) sums[i] = d[lane * 4 + i];
  cuda::mma<T>(sums, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sums[i];
}

uint32_t bits(float value) { return bits_of(value); }
uint32_t bits(bf16 value) { return value.bits; }
uint32_t bits(fp16 value) { return value.bits; }

template <typename T, int kK, int kElementsA, int kElementsB>
void check_mma(const Element (&layout_a)[kElementsA], const Element (&layout_b)[kElementsB]) {
  constexpr int kPerRegister = kElementsA / 4;
  constexpr uint32_t kIgnored = kPerRegister == 1 ? 0x1ABC : 0;  // of the bits that TF32 does not have
  float a[16][kK], b[kK][8], c[16][8];
  // Small whole numbers: exact in every format, and no two rows or columns alike.
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < kK; ++k) a[i][k] = static_cast<float>((i * 7 + k * 3 + i * k) % 61 - 30);
  }
  for (int k = 0; k < kK; ++k) {
    for (int j = 0; j < 8; ++j) b[k][j] = static_cast<float>((k * 5 + j * 11 + k * j * 2) % 53 - 26);
  }
  DeviceBuffer<uint32_t> registers_a(32 * 4), registers_b(32 * 2);
  DeviceBuffer<float> registers_c(32 * 4);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < kElementsA; ++i) {
      const float value = a[row_of(layout_a[i], lane)][column_of(layout_a[i], lane)];
      registers_a[lane * 4 + i / kPerRegister] |= kIgnored | bits(cuda::from_float<T>(value)) << i % kPerRegister * 16;
    }
    for (int i = 0; i < kElementsB; ++i) {
      const float value = b[row_of(layout_b[i], lane)][column_of(layout_b[i], lane)];
      registers_b[lane * 2 + i / kPerRegister] |= kIgnored | bits(cuda::from_float<T>(value)) << i % kPerRegister * 16;
    }
    for (int i = 0; i < 4; ++i) {
      c[row_of(kC[i], lane)][column_of(kC[i], lane)] = registers_c[lane * 4 + i] = static_cast<float>(lane * 4 + i);
    }
  }
  launch("mma", mma_kernel<T>, 1, 32, 0, nullptr, registers_a.data(), registers_b.data(), registers_c.data());
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = row_of(kC[i], lane), column = column_of(kC[i], lane);
      float sum = c[row][column];
      for (int k = 0; k < kK; ++k) sum += a[row][k] * b[k][column];
      CHECK_EQUAL(registers_c[lane * 4 + i], sum);
    }
  }
}

template <int kMatrices, bool kTransposed>
__global__ void ldmatrix_kernel(Global<uint32_t> out) {
  const int lane = threadIdx.x;
  S3D_SHARED(uint16_t, tile, 32 * 8);
  for (int i = lane; i < 32 * 8; i += 32) tile[i] = static_cast<uint16_t>(i);
  __syncwarp();
  uint32_t registers[kMatrices];
  // Rows in reverse: lane i's address is what counts, not its place.
  const Shared<uint16_t> row = tile + (31 - lane) * 8;
  if (kTransposed) {
    cuda::ldmatrix_transposed(registers, row);
  } else {
    cuda::ldmatrix(registers, row);
  }
  for (int i = 0; i < kMatrices; ++i) out[lane * kMatrices + i] = registers[i];
}

// Thread 4 i + j holds elements 2 j and 2 j + 1 of row i; transposed, of column i. Threads 8 m ... 8 m + 7 address
// matrix m.
template <int kMatrices, bool kTransposed>
void check_ldmatrix() {
  DeviceBuffer<uint32_t> out(32 * kMatrices);
  launch("ldmatrix", ldmatrix_kernel<kMatrices, kTransposed>, 1, 32, 0, nullptr, out.data());
  for (int matrix = 0; matrix < kMatrices; ++matrix) {
    for (int thread = 0; thread < 32; ++thread) {
      for (int half = 0; half < 2; ++half) {
        const int i = thread / 4, j = thread % 4 * 2 + half;
        const int row = kTransposed ? j : i, column = kTransposed ? i : j;
        const int expected = (31 - (matrix * 8 + row)) * 8 + column;
        CHECK_EQUAL(out[thread * kMatrices + matrix] >> 16 * half & 0xFFFF, expected);
      }
    }
  }
}

// Every number of the format comes back, and a float between two neighbours goes to the nearer one or to the even one.
template <typename T>
void check_format(uint16_t infinity, int first_exponent, int mantissa_bits) {
  for (uint32_t i = 0; i < infinity; ++i) {
    const T number{static_cast<uint16_t>(i)}, negative{static_cast<uint16_t>(i | 0x8000)};
    const float value = cuda::to_float(number);
    const auto exponent = static_cast<int>(i >> mantissa_bits);
    const double mantissa = i & ((1u << mantissa_bits) - 1);
    const double expected = std::ldexp(mantissa + (exponent > 0 ? std::ldexp(1, mantissa_bits) : 0),
                                       std::max(exponent, 1) - 1 + first_exponent - mantissa_bits);
    CHECK(value == expected);
    CHECK(cuda::to_float(negative) == -value);
    CHECK_EQUAL(cuda::from_float<T>(value).bits, i);
    CHECK_EQUAL(cuda::from_float<T>(-value).bits, i | 0x8000);
    if (i + 1 == infinity) continue;
    const float next = cuda::to_float(T{static_cast<uint16_t>(i + 1)});
    const auto middle = static_cast<float>((static_cast<double>(value) + next) / 2);
    if (middle == value || middle == next) continue;  // of two subnormals: not a float
    CHECK_EQUAL(cuda::from_float<T>(middle).bits, i % 2 == 0 ? i : i + 1);
    CHECK_EQUAL(cuda::from_float<T>(std::nextafter(middle, value)).bits, i);
    CHECK_EQUAL(cuda::from_float<T>(std::nextafter(middle, next)).bits, i + 1);
  }
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  CHECK_EQUAL(cuda::from_float<T>(kInfinity).bits, infinity);
  CHECK_EQUAL(cuda::from_float<T>(std::numeric_limits<float>::max()).bits, infinity);
  CHECK(cuda::to_float(T{infinity}) == kInfinity);
  CHECK(std::isnan(cuda::to_float(cuda::from_float<T>(std::nanf("")))));
  CHECK(std::isnan(cuda::to_float(T{0xFFFF})));
}

}  // namespace

void test_numbers() {
  check_format<bf16>(0x7F80, -126, 7);
  check_format<fp16>(0x7C00, -14, 10);
  CHECK_EQUAL(cuda::pack<bf16>(1.0f, -2.0f), 0xC0003F80u);
  float low, high;
  cuda::unpack<fp16>(cuda::pack<fp16>(0.5f, 3.0f), low, high);
  CHECK(low == 0.5f && high == 3.0f);
  CHECK_EQUAL(cuda::to_tf32(1.0f + 0x1p-11f), bits_of(1.0f + 0x1p-10f));  // a tie: away from zero
  CHECK_EQUAL(cuda::to_tf32(-1.0f - 0x1p-11f), bits_of(-1.0f - 0x1p-10f));
  CHECK_EQUAL(cuda::to_tf32(1.0f + 0x1p-12f), bits_of(1.0f));
}

void test_layouts() {
  check_mma<bf16, 16>(kA16, kB16);
  check_mma<fp16, 16>(kA16, kB16);
  check_mma<float, 8>(kA32, kB32);
  check_ldmatrix<1, false>();
  check_ldmatrix<2, false>();
  check_ldmatrix<4, false>();
  check_ldmatrix<1, true>();
  check_ldmatrix<2, true>();
  check_ldmatrix<4, true>();
}

}  // namespace s3d::emulator::test
