// Kernels with a planted fault: each must be found with every seed, and told with kernel, block, thread and line.
#include <cmath>

#include "emulator/tests/check.h"
#include "emulator/tests/gemm.cuh"

namespace s3d::emulator::test {
namespace {

using cuda::bf16;
using cuda::Global;
using cuda::launch;
using cuda::load;
using cuda::Shared;
using cuda::store;
using cuda::test::GemmFault;

template <GemmFault kFault>
void faulty_gemm() {
  DeviceBuffer<bf16> a(64 * 128), b(32 * 128);
  DeviceBuffer<float> c(64 * 32);
  cuda::test::gemm<bf16, kFault>(a.data(), b.data(), c.data(), 64, 32, 128, nullptr);
}

// Each thread gives its number to the thread `distance` on.
template <bool kBarrier>
__global__ void rotate_kernel(Global<int> out, int distance) {
  S3D_SHARED(int, values, 128);
  values[threadIdx.x] = 0;
  __syncthreads();
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + distance) % 128];
}

__global__ void one_place_kernel() {
  S3D_SHARED(int, value, 1);
  if (threadIdx.x % 32 == 0) value[0] = static_cast<int>(threadIdx.x);
}

// Neighbouring elements of 2 bytes, or of 1 byte, are no race.
template <typename T>
__global__ void neighbours_kernel() {
  S3D_SHARED(T, values, 128);
  values[threadIdx.x] = 0;
  values[threadIdx.x] += 1;
}

// All lanes read one place, one of them writes it. A shuffle orders no accesses to memory.
__global__ void read_then_write_kernel(int writer, bool sync) {
  S3D_SHARED(int, value, 1);
  if (threadIdx.x == 0) value[0] = 0;
  __syncthreads();
  const int read = value[0];
  const int same = __shfl_xor_sync(0xFFFFFFFF, read, 1);
  if (sync) __syncwarp();
  if (static_cast<int>(threadIdx.x) == writer) value[0] = same + 1;
}

// Each warp's lanes read before a barrier; behind it thread 0 alone reads and writes, or thread `reader` reads too.
__global__ void read_barrier_write_kernel(int reader) {
  S3D_SHARED(int, value, 1);
  if (threadIdx.x == 0) value[0] = 0;
  __syncthreads();
  int read = value[0];
  __syncthreads();
  if (static_cast<int>(threadIdx.x) == reader) read += value[0];
  if (threadIdx.x == 0) value[0] += read + 1;
}

__global__ void matrix_then_write_kernel(bool sync) {
  S3D_SHARED(uint16_t, tile, 8 * 8);
  for (int i = threadIdx.x; i < 8 * 8; i += 32) tile[i] = 0;
  __syncwarp();
  uint32_t registers[1];
  cuda::ldmatrix(registers, tile + threadIdx.x % 8 * 8);
  if (sync) __syncwarp();
  if (threadIdx.x == 2) tile[2 * 8] = 1;
}

__global__ void atomic_kernel(bool read_too) {
  S3D_SHARED(int, count, 1);
  if (threadIdx.x == 0) count[0] = 0;
  __syncthreads();
  atomicAdd(count, 1);
  if (read_too && threadIdx.x == 40) count[0] += 1;
}

__global__ void read_kernel(Global<const float> x, Global<float> y, int offset) {
  y[threadIdx.x] = x[static_cast<int>(threadIdx.x) + offset];
}

__global__ void write_kernel(Global<float> y, int offset) { y[static_cast<int>(threadIdx.x) + offset] = 0; }

__global__ void shared_range_kernel(int i) {
  S3D_SHARED(float, before, 8);
  S3D_SHARED(float, values, 8);
  S3D_SHARED(float, behind, 8);
  before[threadIdx.x] = behind[threadIdx.x] = values[threadIdx.x] = 0;
  __syncthreads();
  if (threadIdx.x == 3) values[i] = 1;
}

__global__ void dynamic_range_kernel(int first) {
  const Shared<float> part = cuda::dynamic_shared<float>(first * 4, 8);
  part[threadIdx.x] = 0;
}

__global__ void aligned_global_kernel(Global<const float> x, Global<float> y, int first) {
  store(y, load<float4>(x + first));
}

__global__ void aligned_copy_kernel(Global<const float> x, int first) {
  cuda::cp_async<8>(cuda::dynamic_shared<float>(0, 16), x + first, 0);
  cuda::cp_async_wait_all();
}

__global__ void aligned_shared_kernel(int first) {
  const Shared<float> values = cuda::dynamic_shared<float>(0, 16);
  store(values + first, make_float2(0, 0));
}

__global__ void aligned_matrix_kernel(int step) {
  const Shared<uint16_t> values = cuda::dynamic_shared<uint16_t>(0, 1024);
  for (int i = threadIdx.x; i < 1024; i += 32) values[i] = 0;
  __syncwarp();
  uint32_t registers[4];
  cuda::ldmatrix(registers, values + step * threadIdx.x);
}

__global__ void exit_before_barrier_kernel(int end) {
  if (static_cast<int>(threadIdx.x) >= end) return;
  __syncthreads();
}

__global__ void two_barriers_kernel(int end) {
  if (static_cast<int>(threadIdx.x) < end) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void barrier_in_warp_kernel(Global<int> out) {
  if (threadIdx.x % 32 < 4) __syncthreads();
  out[threadIdx.x] = __shfl_sync(0xFFFFFFFF, static_cast<int>(threadIdx.x), 0);
  if (threadIdx.x % 32 >= 4) __syncthreads();
}

__global__ void exit_before_shuffle_kernel(Global<int> out) {
  if (threadIdx.x == 37) return;
  out[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFF, static_cast<int>(threadIdx.x), 1);
}

__global__ void two_masks_kernel() { __syncwarp(threadIdx.x % 2 == 0 ? 0xFFFFFFFF : 0xFFFFFFFE); }

__global__ void not_in_mask_kernel() { __syncwarp(0xFFFF); }

__global__ void half_warp_mma_kernel() {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  cuda::mma<bf16>(d, a, b);
}

__global__ void uninitialised_kernel(Global<float> out) {
  S3D_SHARED(float, values, 32);
  if (threadIdx.x != 7) values[threadIdx.x] = 0;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void shared_bits_kernel(Global<uint32_t> out) {
  const Shared<uint32_t> values = cuda::dynamic_shared<uint32_t>(0, 32);
  out[threadIdx.x] = values[threadIdx.x];
}

// Copies its 4 bytes, waits or not, and reads them or those of another lane.
__global__ void early_read_kernel(Global<const float> x, Global<float> out, int groups_left, bool other, bool sync) {
  S3D_SHARED(float, values, 64);
  cuda::cp_async<4>(values + threadIdx.x, x + threadIdx.x);
  cuda::cp_async_commit();
  cuda::cp_async<4>(values + 32 + threadIdx.x, x + threadIdx.x);
  cuda::cp_async_commit();
  if (groups_left == 0) cuda::cp_async_wait<0>();
  if (groups_left == 1) cuda::cp_async_wait<1>();
  if (sync) __syncwarp();
  out[threadIdx.x] = values[32 + (threadIdx.x ^ (other ? 1 : 0))];
}

__global__ void overwriting_kernel(Global<const float> x) {
  S3D_SHARED(float, values, 32);
  cuda::cp_async<4>(values + threadIdx.x, x + threadIdx.x);
  cuda::cp_async_commit();
  values[threadIdx.x] = 0;
}

void planted_races() {
  DeviceBuffer<int> out(128);
  // What comes first depends on how far the other warps have come.
  expect_fault("missing __syncthreads before reads",
               {FaultKind::kRace, FaultKind::kPendingCopy, FaultKind::kUninitialised},
               {"gemm_kernel, block (0, 0, 0), thread (", "gemm.cuh:"}, faulty_gemm<GemmFault::kNoBarrierBeforeReads>);
  expect_fault("missing __syncthreads after reads", {FaultKind::kRace}, {"gemm_kernel", "since the read", "gemm.cuh:"},
               faulty_gemm<GemmFault::kNoBarrierAfterReads>);
  expect_fault("race of warps", {FaultKind::kRace}, {"rotate", "test_faults.cu:"},
               [&] { launch("rotate", rotate_kernel<false>, 1, 128, 0, nullptr, out.data(), 32); });
  expect_fault("race of lanes", {FaultKind::kRace}, {"rotate"},
               [&] { launch("rotate", rotate_kernel<false>, 1, 128, 0, nullptr, out.data(), 127); });
  launch("rotate", rotate_kernel<true>, 1, 128, 0, nullptr, out.data(), 127);
  expect_fault("two writes", {FaultKind::kRace}, {"since the write"},
               [] { launch("one_place", one_place_kernel, 1, 64, 0, nullptr); });
  launch("one_place", one_place_kernel, 1, 32, 0, nullptr);
  for (int writer = 0; writer < 32; ++writer) {
    launch("read_then_write", read_then_write_kernel, 1, 32, 0, nullptr, writer, true);
    if (writer % 8 != 0) continue;
    expect_fault("write after reads of the warp", {FaultKind::kRace}, {"since the read"},
                 [=] { launch("read_then_write", read_then_write_kernel, 1, 32, 0, nullptr, writer, false); });
  }
  expect_fault("write after reads of two warps", {FaultKind::kRace}, {"read_then_write"},
               [] { launch("read_then_write", read_then_write_kernel, 1, 64, 0, nullptr, 40, true); });
  for (const int threads : {32, 64}) {
    launch("read_barrier_write", read_barrier_write_kernel, 1, threads, 0, nullptr, 0);
    expect_fault("read of another thread behind the barrier", {FaultKind::kRace}, {"read_barrier_write"},
                 [=] { launch("read_barrier_write", read_barrier_write_kernel, 1, threads, 0, nullptr, threads - 1); });
  }
  launch("matrix_then_write", matrix_then_write_kernel, 1, 32, 0, nullptr, true);
  expect_fault("write after ldmatrix", {FaultKind::kRace}, {"thread (2, 0, 0)", "since the read"},
               [] { launch("matrix_then_write", matrix_then_write_kernel, 1, 32, 0, nullptr, false); });
  launch("neighbours", neighbours_kernel<uint16_t>, 1, 128, 0, nullptr);
  launch("neighbours", neighbours_kernel<uint8_t>, 1, 128, 0, nullptr);
  launch("atomic", atomic_kernel, 1, 64, 0, nullptr, false);
  expect_fault("atomic and plain", {FaultKind::kRace}, {"atomic, block", "40"},
               [] { launch("atomic", atomic_kernel, 1, 64, 0, nullptr, true); });
}

// Where races are not looked for, the order of the warps shows a missing barrier in the results.
void race_seen_in_results() {
  for (uint64_t seed = 0; seed < 8; ++seed) {
    set_options({seed, false});
    DeviceBuffer<int> out(128);
    launch("rotate", rotate_kernel<false>, 1, 128, 0, nullptr, out.data(), 32);
    int wrong = 0;
    for (int i = 0; i < 128; ++i) wrong += out[i] != (i + 32) % 128;
    CHECK(wrong > 0);
  }
  set_options({});
}

void planted_copies() {
  DeviceBuffer<float> x(32), out(32);
  const auto early = [&](int groups_left, bool other, bool sync) {
    return [&, groups_left, other, sync] {
      launch("early_read", early_read_kernel, 1, 32, 0, nullptr, x.data(), out.data(), groups_left, other, sync);
    };
  };
  expect_fault("missing wait", {FaultKind::kPendingCopy}, {"gemm_kernel", "has not waited for"},
               faulty_gemm<GemmFault::kNoWait>);
  expect_fault("no wait", {FaultKind::kPendingCopy}, {"early_read"}, early(-1, false, false));
  expect_fault("wait for too few", {FaultKind::kPendingCopy}, {"early_read"}, early(1, false, false));
  // Which of them depends on whether the other lane has run.
  expect_fault("another lane's copy", {FaultKind::kRace, FaultKind::kUninitialised}, {"early_read"},
               early(0, true, false));
  early(0, false, false)();
  early(0, true, true)();
  expect_fault("write under a copy", {FaultKind::kPendingCopy}, {"writes where"},
               [&] { launch("overwriting", overwriting_kernel, 1, 32, 0, nullptr, x.data()); });
}

void planted_addresses() {
  DeviceBuffer<float> x(40, "x"), y(40, "y");
  std::vector<float> unknown(40);
  const auto read = [&](float* from, int offset) {
    return [&, from, offset] { launch("read", read_kernel, 1, 32, 0, nullptr, from, y.data(), offset); };
  };
  read(x.data(), 8)();
  expect_fault("read behind the end", {FaultKind::kOutOfRange},
               {"read, block (0, 0, 0), thread (", "test_faults.cu:", "at byte 160 of buffer x, which has 160"},
               read(x.data(), 9));
  expect_fault("read before the begin", {FaultKind::kOutOfRange}, {"byte -4"}, read(x.data(), -1));
  expect_fault("read far outside", {FaultKind::kOutOfRange}, {"buffer x"}, read(x.data(), 1 << 28));
  expect_fault("read of unregistered memory", {FaultKind::kOutOfRange}, {"no registered"}, read(unknown.data(), 0));
  expect_fault("read through null", {FaultKind::kOutOfRange}, {"a null pointer"}, read(nullptr, 0));
  expect_fault("write behind the end", {FaultKind::kOutOfRange}, {"write", "buffer y"},
               [&] { launch("write", write_kernel, 1, 32, 0, nullptr, y.data(), 9); });
  const auto shared_range = [](int i) {
    return [i] { launch("shared_range", shared_range_kernel, 1, 8, 0, nullptr, i); };
  };
  shared_range(7)();
  expect_fault("static shared array", {FaultKind::kOutOfRange}, {"thread (3, 0, 0)", "byte 32"}, shared_range(8));
  expect_fault("static shared array", {FaultKind::kOutOfRange}, {"byte -4"}, shared_range(-1));
  const auto dynamic_range = [](int first) {
    return [first] { launch("dynamic_range", dynamic_range_kernel, 1, 8, 64, nullptr, first); };
  };
  dynamic_range(8)();
  expect_fault("dynamic shared memory", {FaultKind::kOutOfRange}, {"64 bytes of dynamic"}, dynamic_range(9));
  expect_fault("part of dynamic shared memory", {FaultKind::kOutOfRange}, {"byte 32"},
               [] { launch("dynamic_range", dynamic_range_kernel, 1, 9, 64, nullptr, 0); });
  expect_fault("misaligned global vector", {FaultKind::kMisaligned}, {"16-byte"}, [&] {
    launch("aligned_global", aligned_global_kernel, 1, 1, 0, nullptr, x.data(), y.data(), 2);
  });
  launch("aligned_copy", aligned_copy_kernel, 1, 1, 64, nullptr, x.data(), 2);
  expect_fault("misaligned source of a copy", {FaultKind::kMisaligned}, {"8-byte access to global"},
               [&] { launch("aligned_copy", aligned_copy_kernel, 1, 1, 64, nullptr, x.data(), 3); });
  expect_fault("misaligned shared vector", {FaultKind::kMisaligned}, {"8-byte", "byte 12"},
               [] { launch("aligned_shared", aligned_shared_kernel, 1, 1, 64, nullptr, 3); });
  launch("aligned_matrix", aligned_matrix_kernel, 1, 32, 2048, nullptr, 8);
  expect_fault("misaligned ldmatrix", {FaultKind::kMisaligned}, {"thread (1, 0, 0)"},
               [] { launch("aligned_matrix", aligned_matrix_kernel, 1, 32, 2048, nullptr, 4); });
}

void planted_barriers() {
  DeviceBuffer<int> out(64);
  const auto plain = [](const char* name, void (*kernel)(), int threads) {
    return [=] { launch(name, kernel, 1, threads, 0, nullptr); };
  };
  expect_fault("some threads have exited", {FaultKind::kDivergentBarrier}, {"number 33 has exited"},
               [] { launch("exit_before_barrier", exit_before_barrier_kernel, 2, 34, 0, nullptr, 33); });
  expect_fault("two barriers", {FaultKind::kDivergentBarrier}, {"waits at another"},
               [] { launch("two_barriers", two_barriers_kernel, 1, 64, 0, nullptr, 32); });
  expect_fault("barrier in part of a warp", {FaultKind::kDeadlock}, {"lanes 0xf ", "wait for the block"},
               [&] { launch("barrier_in_warp", barrier_in_warp_kernel, 1, 64, 0, nullptr, out.data()); });
  expect_fault("shuffle with an exited lane", {FaultKind::kDeadlock}, {"lanes 0x20 ", "have exited"},
               [&] { launch("exit_before_shuffle", exit_before_shuffle_kernel, 1, 64, 0, nullptr, out.data()); });
  expect_fault("two masks", {FaultKind::kDeadlock}, {"another mask"}, plain("two_masks", two_masks_kernel, 32));
  expect_fault("not in the mask", {FaultKind::kDeadlock}, {"not in the mask"},
               plain("not_in_mask", not_in_mask_kernel, 32));
  expect_fault("mma of half a warp", {FaultKind::kDeadlock}, {"all 32 lanes"},
               plain("half_warp_mma", half_warp_mma_kernel, 16));
}

}  // namespace

void test_faults() {
  planted_races();
  race_seen_in_results();
  planted_copies();
  planted_addresses();
  planted_barriers();

  DeviceBuffer<float> out(32);
  DeviceBuffer<uint32_t> bits(32);
  expect_fault("uninitialised shared memory", {FaultKind::kUninitialised}, {"thread (7, 0, 0)"},
               [&] { launch("uninitialised", uninitialised_kernel, 1, 32, 0, nullptr, out.data()); });
  expect_fault("uninitialised shared memory", {FaultKind::kUninitialised}, {"shared_bits"},
               [&] { launch("shared_bits", shared_bits_kernel, 1, 32, 128, nullptr, bits.data()); });
  expect_fault("too many threads", {FaultKind::kLaunch}, {"exit_before_barrier", "1025 threads"},
               [] { launch("exit_before_barrier", exit_before_barrier_kernel, 1, 1025, 0, nullptr, 0); });
  expect_fault("too much shared memory", {FaultKind::kLaunch}, {"bytes of shared memory"},
               [] { launch("exit_before_barrier", exit_before_barrier_kernel, 1, 32, 1 << 18, nullptr, 0); });
  expect_fault("device code on the host", {FaultKind::kLaunch}, {"host code"}, [] { __syncthreads(); });
  // A fault leaves nothing behind.
  launch("exit_before_barrier", exit_before_barrier_kernel, 3, 64, 0, nullptr, 64);
}

}  // namespace s3d::emulator::test
