// Counters of access patterns whose cost on the hardware is known.
#include "cuda/cp_async.cuh"
#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "emulator/tests/check.h"

namespace s3d::emulator::test {
namespace {

using cuda::Global;
using cuda::launch;
using cuda::load;
using cuda::Shared;
using cuda::store;

template <typename V>
__global__ void global_kernel(Global<const float> from, Global<float> to, int stride) {
  store(to + threadIdx.x * stride, load<V>(from + threadIdx.x * stride));
}

template <typename V>
void check_sectors(int stride, int sectors) {
  DeviceBuffer<float> from(32 * 64), to(32 * 64);
  const Counters counters =
      counters_of([&] { launch("global", global_kernel<V>, 1, 32, 0, nullptr, from.data(), to.data(), stride); });
  CHECK_EQUAL(counters.global_sectors_read, sectors);
  CHECK_EQUAL(counters.global_bytes_read, 32 * sizeof(V));
  if (stride == 0) return;  // all lanes write to one place
  CHECK_EQUAL(counters.global_sectors_written, sectors);
  CHECK_EQUAL(counters.global_bytes_written, 32 * sizeof(V));
}

// All lanes write, then read, at a stride of 4-byte words.
template <typename V>
__global__ void shared_kernel(int stride) {
  const Shared<float> shared = cuda::dynamic_shared<float>(0, 32 * 64 + 4);
  for (int i = threadIdx.x; i < 32 * 64 + 4; i += 32) shared[i] = 0;
  __syncwarp();
  const V value = load<V>(shared + threadIdx.x * stride);
  __syncwarp();
  if (stride > 0) store(shared + threadIdx.x * stride, value);
}

template <typename V>
void check_banks(int stride, int conflicts) {
  const Counters counters =
      counters_of([&] { launch("shared", shared_kernel<V>, 1, 32, (32 * 64 + 4) * 4, nullptr, stride); });
  CHECK_EQUAL(counters.shared_read_conflicts, conflicts);
  if (stride > 0) CHECK_EQUAL(counters.shared_write_conflicts, conflicts);
}

// Rows of `row_bytes`; row r has its 16-byte chunks exchanged by r >> shift.
__global__ void rows_kernel(Global<const uint4> from, int row_bytes, int shift, int mask) {
  const Shared<unsigned char> shared = cuda::dynamic_shared<unsigned char>(0, 32 * row_bytes);
  const int lane = threadIdx.x;
  for (int chunk = 0; chunk < row_bytes / 16; ++chunk) {
    store(shared + lane * row_bytes + chunk * 16, make_uint4(0, 0, 0, 0));
  }
  __syncwarp();
  const int chunk = 1 ^ (lane >> shift & mask);
  uint32_t registers[4];
  cuda::ldmatrix(registers, shared + lane * row_bytes + chunk * 16);
  __syncwarp();
  cuda::cp_async<16>(shared + lane * row_bytes + chunk * 16, from + lane);
  cuda::cp_async_commit();
  cuda::cp_async_wait<0>();
}

void check_rows(int row_bytes, int shift, int mask, int conflicts_per_phase) {
  DeviceBuffer<uint4> from(32);
  const int stores = row_bytes / 16;
  const Counters counters = counters_of([&] {
    launch("rows", rows_kernel, 1, 32, 32 * row_bytes, nullptr, from.data(), row_bytes, shift, mask);
  });
  CHECK_EQUAL(counters.ldmatrix, 1);
  CHECK_EQUAL(counters.shared_read_conflicts, 4 * conflicts_per_phase);
  // What fills the rows is not swizzled: eight lanes at the same chunk.
  const int filling = stores * 4 * (8 / (128 / std::min(row_bytes, 128)) - 1);
  CHECK_EQUAL(counters.shared_write_conflicts, filling + 4 * conflicts_per_phase);
  CHECK_EQUAL(counters.cp_async, 1);
  CHECK_EQUAL(counters.global_bytes_read, 512);
  CHECK_EQUAL(counters.global_sectors_read, 16);
}

// Lane i makes i + 1 rounds: the n-th round of all who make one is one instruction.
__global__ void diverging_kernel(Global<const float> from, Global<float> to) {
  float sum = 0;
  for (unsigned i = 0; i <= threadIdx.x; ++i) sum += from[i * 32 + threadIdx.x];
  to[threadIdx.x] = sum;
}

__global__ void barriers_kernel() {
  __syncthreads();
  for (int i = 0; i < 3; ++i) __syncthreads_or(i == static_cast<int>(threadIdx.x));
}

// More accesses than are written down before they are counted.
__global__ void long_kernel(Global<const float> from, Global<float> to, int rounds) {
  float sum = 0;
  for (int i = 0; i < rounds; ++i) sum += from[threadIdx.x];
  to[threadIdx.x] = sum;
}

__global__ void zero_fill_kernel(Global<const float> from, Global<float> to) {
  S3D_SHARED(float, tile, 64);
  cuda::cp_async<8>(tile + 2 * threadIdx.x, from + 2 * threadIdx.x, threadIdx.x < 8 ? 8 : threadIdx.x == 8 ? 4 : 0);
  cuda::cp_async_wait_all();
  to[2 * threadIdx.x] = tile[2 * threadIdx.x];
  to[2 * threadIdx.x + 1] = tile[2 * threadIdx.x + 1];
}

}  // namespace

void test_counters() {
  check_sectors<float>(1, 4);
  check_sectors<float>(2, 8);
  check_sectors<float>(8, 32);
  check_sectors<float>(0, 1);
  check_sectors<float4>(4, 16);
  check_sectors<float4>(8, 32);
  check_sectors<float2>(2, 8);

  check_banks<float>(1, 0);
  check_banks<float>(2, 1);
  check_banks<float>(3, 0);
  check_banks<float>(32, 31);
  check_banks<float>(33, 0);
  check_banks<float>(0, 0);  // broadcast
  check_banks<float2>(2, 0);
  check_banks<float2>(4, 2 * 1);
  check_banks<float4>(4, 0);
  check_banks<float4>(8, 4 * 1);
  check_banks<float4>(32, 4 * 7);
  check_banks<float4>(36, 0);

  check_rows(32, 0, 0, 1);
  check_rows(64, 0, 0, 3);
  check_rows(64, 1, 3, 0);
  check_rows(128, 0, 0, 7);
  check_rows(128, 0, 7, 0);
  check_rows(128, 0, 3, 1);

  DeviceBuffer<float> from(32 * 32), to(32);
  Counters counters =
      counters_of([&] { launch("diverging", diverging_kernel, 1, 32, 0, nullptr, from.data(), to.data()); });
  int sectors = 0;
  for (int round = 0; round < 32; ++round) sectors += 4 - round / 8;
  CHECK_EQUAL(counters.global_sectors_read, sectors);
  CHECK_EQUAL(counters.global_bytes_read, 4 * 32 * 33 / 2);

  counters = counters_of([&] { launch("barriers", barriers_kernel, 5, 96, 0, nullptr); });
  CHECK_EQUAL(counters.blocks, 5);
  CHECK_EQUAL(counters.barriers, 5 * 4);

  counters = counters_of([&] { launch("long", long_kernel, 1, 32, 0, nullptr, from.data(), to.data(), 10000); });
  CHECK_EQUAL(counters.global_sectors_read, 4 * 10000);

  for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<float>(i + 1);
  DeviceBuffer<float> filled(64);
  counters = counters_of(
      [&] { launch("zero_fill", zero_fill_kernel, 1, 32, 0, nullptr, from.data(), filled.data()); });
  CHECK_EQUAL(counters.global_bytes_read, 8 * 8 + 4);
  CHECK_EQUAL(counters.cp_async, 1);
  for (int i = 0; i < 64; ++i) CHECK_EQUAL(filled[i], i < 17 ? i + 1 : 0);
}

}  // namespace s3d::emulator::test
