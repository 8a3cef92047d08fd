// Right kernels give right results, the same bits with every seed.
#include <chrono>
#include <cmath>
#include <random>

#include "emulator/tests/check.h"
#include "emulator/tests/every_wrapper.cuh"
#include "emulator/tests/gemm.cuh"

namespace s3d::emulator::test {
namespace {

using cuda::bf16;
using cuda::fp16;
using cuda::Global;
using cuda::launch;

constexpr uint64_t kSeeds = 4;

template <typename T>
float rounded_to_format(float value) {
  if constexpr (sizeof(T) == 4) return float_of(cuda::to_tf32(value));
  return cuda::to_float(cuda::from_float<T>(value));
}

template <typename T>
void check_gemm(int m, int n, int k) {
  std::mt19937 random(m + n + k);
  DeviceBuffer<T> a(m * k, "a"), b(n * k, "b");
  for (auto* matrix : {&a, &b}) {
    for (size_t i = 0; i < matrix->size(); ++i) {
      (*matrix)[i] = cuda::from_float<T>(static_cast<float>(random() % 2048) / 1024.0f - 1.0f);
    }
  }
  std::vector<float> first;
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    set_options({seed, true});
    DeviceBuffer<float> c(m * n, "c");
    for (size_t i = 0; i < c.size(); ++i) c[i] = std::nanf("");
    const Counters counters =
        counters_of([&] { cuda::test::gemm<T>(a.data(), b.data(), c.data(), m, n, k, nullptr); });
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < n; ++j) {
        double sum = 0;
        for (int l = 0; l < k; ++l) {
          sum += static_cast<double>(rounded_to_format<T>(cuda::to_float(a[i * k + l]))) *
                 rounded_to_format<T>(cuda::to_float(b[j * k + l]));
        }
        CHECK(std::abs(c[i * n + j] - sum) < 1e-5 * k);
      }
    }
    using Traits = cuda::test::GemmTraits<T>;
    const int steps = (k + Traits::kTileK - 1) / Traits::kTileK;
    const int tiles = (m + Traits::kTileM - 1) / Traits::kTileM * ((n + Traits::kTileN - 1) / Traits::kTileN);
    CHECK_EQUAL(counters.mmas, tiles * steps * 2 * Traits::kWarps * (Traits::kTileN / 8));
    CHECK_EQUAL(counters.mma_flops, 2ll * tiles * Traits::kTileM * Traits::kTileN * steps * Traits::kTileK);
    CHECK_EQUAL(counters.useful_flops, 2ll * m * n * k);
    CHECK_EQUAL(counters.ldmatrix, tiles * steps * 2 * Traits::kWarps * 3);
    CHECK_EQUAL(counters.cp_async, tiles * steps * 3 * Traits::kWarps);
    CHECK_EQUAL(counters.barriers, tiles * steps * 2);
    CHECK_EQUAL(counters.shared_read_conflicts, 0);
    CHECK_EQUAL(counters.shared_write_conflicts, 0);
    CHECK_EQUAL(counters.global_bytes_written, 4 * m * n);
    const std::vector<float> values(c.data(), c.data() + c.size());
    if (first.empty()) first = values;
    CHECK(values == first);
  }
  set_options({});
}

// out[block] = sum of the block's part of x, by shuffles in a warp and shared memory between warps.
__global__ void sum_kernel(Global<const int> x, Global<int> out, Global<int> blocks_done, Global<int> total, int n) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  int sum = i < n ? x[i] : 0;
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xFFFFFFFF, sum, offset);
  S3D_SHARED(int, sums, 32);
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
  if (warp > 0) return;
  const int warps = blockDim.x / 32;
  sum = lane < warps ? static_cast<int>(sums[lane]) : 0;
  for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, mask);
  if (lane != 0) return;
  out[blockIdx.x] = sum;
  __threadfence();
  if (atomicAdd(blocks_done, 1) == static_cast<int>(gridDim.x) - 1) {
    int all = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) all += out[block];
    total[0] = all;
  }
}

void check_sum(int n, int threads) {
  const int blocks = (n + threads - 1) / threads;
  DeviceBuffer<int> x(n);
  int expected = 0;
  for (int i = 0; i < n; ++i) expected += x[i] = i * 37 % 1000 - 300;
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    set_options({seed, true});
    DeviceBuffer<int> out(blocks), done(1), total(1);
    launch("sum", sum_kernel, blocks, threads, 0, nullptr, x.data(), out.data(), done.data(), total.data(), n);
    CHECK_EQUAL(total[0], expected);
  }
  set_options({});
}

// Writes the indices of the odd numbers of x, in their order.
__global__ void compact_kernel(Global<const int> x, Global<int> indices, Global<int> count, int n) {
  S3D_SHARED(int, starts, 33);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int i = threadIdx.x;
  const bool odd = i < n && x[i] % 2 != 0;
  const unsigned ballot = __ballot_sync(0xFFFFFFFF, odd);
  if (lane == 0) starts[warp + 1] = __popc(ballot);
  const int all = __syncthreads_count(odd);
  if (threadIdx.x == 0) {
    starts[0] = 0;
    for (unsigned w = 1; w < blockDim.x / 32; ++w) starts[w] = starts[w] + starts[w - 1];
    count[0] = all;
  }
  __syncthreads();
  if (odd) indices[starts[warp] + __popc(ballot & ((1u << lane) - 1))] = i;
}

void check_compact(int n, int threads) {
  DeviceBuffer<int> x(n);
  std::vector<int> expected;
  for (int i = 0; i < n; ++i) {
    x[i] = i * i % 7;
    if (x[i] % 2 != 0) expected.push_back(i);
  }
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    set_options({seed, true});
    DeviceBuffer<int> indices(expected.size()), count(1);
    launch("compact", compact_kernel, 1, threads, 0, nullptr, x.data(), indices.data(), count.data(), n);
    CHECK_EQUAL(count[0], expected.size());
    for (size_t i = 0; i < expected.size(); ++i) CHECK_EQUAL(indices[i], expected[i]);
  }
  set_options({});
}

// Counts down a tree: what threads read before a barrier no longer matters behind it, whether they were lanes of the
// writer's warp or of another one, and whether all lanes read or one. `sync`: a __syncwarp comes between as well.
__global__ void tree_kernel(Global<int> out, bool sync) {
  S3D_SHARED(int, values, 64);
  S3D_SHARED(int, counts, 64);
  const int thread = threadIdx.x;
  values[thread] = thread;
  counts[thread] = 1;
  __syncthreads();
  int seen = 0;
  for (int half = 32; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) seen += counts[i];  // everybody reads what one thread changes next
    if (thread < half) values[thread] += values[thread + half];
    if (sync) __syncwarp();
    __syncthreads();
    if (thread < half) counts[thread] += counts[thread + half];
    __syncthreads();
    if (thread % 32 == 31) seen += values[0];  // a lane, before another one of its warp reads and writes
    __syncthreads();
    if (thread == 1) values[0] += 1;
    __syncthreads();
  }
  out[thread] = thread == 0 ? values[0] : seen;
}

void check_tree() {
  for (const bool sync : {false, true}) {
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
      set_options({seed, true});
      DeviceBuffer<int> out(64);
      launch("tree", tree_kernel, 1, 64, 0, nullptr, out.data(), sync);
      CHECK_EQUAL(out[0], 63 * 32 + 6);
      CHECK_EQUAL(out[1], 6 * 32);
    }
  }
  set_options({});
}

// Each lane's results of the warp's functions, in a block of two whole warps and half of one.
__global__ void warp_kernel(Global<int> out) {
  const int lane = threadIdx.x % 32, thread = threadIdx.x;
  const unsigned mask = thread < 64 ? 0xFFFFFFFF : 0xFFFF;
  out[thread * 8] = __shfl_sync(mask, thread, 5, 8);
  out[thread * 8 + 1] = __shfl_up_sync(mask, thread, 3, 16);
  out[thread * 8 + 2] = __shfl_down_sync(mask, thread, 3, 16);
  out[thread * 8 + 3] = static_cast<int>(__shfl_xor_sync(mask, static_cast<float>(thread), 9));
  out[thread * 8 + 4] = __any_sync(mask, lane == 15);
  out[thread * 8 + 5] = __all_sync(mask, lane < 31);
  // Half a warp on its own, while the other half is elsewhere.
  out[thread * 8 + 6] = lane < 16 ? __shfl_sync(0xFFFF, thread, 2) : -1;
  out[thread * 8 + 7] = __syncthreads_and(thread < 80) + 2 * __syncthreads_or(thread == 3);
}

void check_warp_functions() {
  constexpr int kThreads = 80;
  DeviceBuffer<int> out(kThreads * 8);
  launch("warp", warp_kernel, 1, kThreads, 0, nullptr, out.data());
  for (int thread = 0; thread < kThreads; ++thread) {
    const int lane = thread % 32;
    CHECK_EQUAL(out[thread * 8], thread / 8 * 8 + 5);
    CHECK_EQUAL(out[thread * 8 + 1], lane % 16 < 3 ? thread : thread - 3);
    CHECK_EQUAL(out[thread * 8 + 2], lane % 16 > 12 ? thread : thread + 3);
    CHECK_EQUAL(out[thread * 8 + 3], thread ^ 9);
    CHECK_EQUAL(out[thread * 8 + 4], 1);
    CHECK_EQUAL(out[thread * 8 + 5], thread >= 64);
    CHECK_EQUAL(out[thread * 8 + 6], lane < 16 ? thread / 32 * 32 + 2 : -1);
    CHECK_EQUAL(out[thread * 8 + 7], 3);
  }
}

// Counts of values, by atomics in shared and in global memory; threads and blocks of three dimensions.
__global__ void histogram_kernel(Global<const int> x, Global<unsigned> counts, Global<int> most) {
  S3D_SHARED(unsigned, block_counts, 16);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  if (thread < 16) block_counts[thread] = 0;
  __syncthreads();
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int value = x[block * threads + thread];
  atomicAdd(block_counts + value, 1);
  atomicMax(most, value);
  __syncthreads();
  if (thread < 16) atomicAdd(counts + thread, block_counts[thread]);
}

void check_histogram() {
  const dim3 grid(3, 2, 2), block(5, 4, 3);
  DeviceBuffer<int> x(12 * 60), most(1);
  DeviceBuffer<unsigned> counts(16);
  std::vector<unsigned> expected(16);
  for (size_t i = 0; i < x.size(); ++i) ++expected[x[i] = static_cast<int>(i * i % 13)];
  launch("histogram", histogram_kernel, grid, block, 0, nullptr, x.data(), counts.data(), most.data());
  for (int i = 0; i < 16; ++i) CHECK_EQUAL(counts[i], expected[i]);
  CHECK_EQUAL(most[0], 12);
}

template <typename T>
void check_every_wrapper() {
  constexpr int kThreads = cuda::test::kWrapperThreads, kResults = cuda::test::kWrapperResults;
  DeviceBuffer<T> x(kThreads * 8);
  // In steps that bfloat16 tells apart.
  const auto number = [](int row, int column) { return static_cast<float>(row * 4 % 128 + column % 4); };
  for (int i = 0; i < kThreads * 8; ++i) x[i] = cuda::from_float<T>(number(i / 8, i % 8));
  DeviceBuffer<float> optional(1);
  optional[0] = 9;
  for (const bool given : {false, true}) {
    DeviceBuffer<int> counts(4);
    DeviceBuffer<float> out(kThreads * kResults);
    cuda::test::every_wrapper<T>(x.data(), given ? optional.data() : nullptr, counts.data(), out.data(), nullptr);
    CHECK_EQUAL(counts[0], 64);
    CHECK_EQUAL(counts[1], -63);
    CHECK_EQUAL(counts[2], 255);
    CHECK_EQUAL(counts[3], 7);
    for (int thread = 0; thread < kThreads; ++thread) {
      const int lane = thread % 32, row = thread / 32 * 32, g = lane / 4, t = lane % 4 * 2;
      const float expected[kResults] = {
          number(row + g, t), number(row + g, t + 1),             // ldmatrix
          number(row + 8 + t, g), number(row + 9 + t, g),         // transposed, matrix 1 of 2
          number(row + 24 + t, g), number(row + 25 + t, g),       // transposed, matrix 3 of 4
          number(row + 8 + g, t), number(row + 8 + g, t + 1),     // matrix 1 of 2
          number(row + t, g), number(row + t + 1, g),             // transposed, the only one
          63, 32 * 4 + 1, 1, static_cast<float>(thread / 16 * 16 + 3),
          static_cast<float>(lane == 0 ? thread : thread - 1), static_cast<float>(lane == 31 ? thread : thread + 1),
          5 + 4 + 31, 1, given ? 9.0f : 0.5f, number(thread, 2) + 1};
      for (int i = 0; i < kResults; ++i) CHECK_EQUAL(out[thread * kResults + i] * 2, expected[i] * 2);
    }
  }
}

}  // namespace

void test_kernels() {
  check_every_wrapper<bf16>();
  check_every_wrapper<fp16>();
  check_gemm<bf16>(64, 32, 96);
  check_gemm<bf16>(100, 45, 72);
  check_gemm<fp16>(70, 33, 40);
  check_gemm<float>(65, 40, 52);
  check_sum(5000, 256);
  check_sum(77, 1024);
  check_compact(200, 224);
  check_tree();
  check_warp_functions();
  check_histogram();
}

// Milliseconds for a block of 4 warps that makes a tile of 64 x 32 with k = 864.
void measure() {
  constexpr int kM = 64 * 8, kN = 32, kK = 864;
  DeviceBuffer<bf16> a(kM * kK), b(kN * kK);
  DeviceBuffer<float> c(kM * kN);
  for (const bool find_races : {true, false}) {
    set_options({0, find_races});
    const auto start = std::chrono::steady_clock::now();
    cuda::test::gemm<bf16>(a.data(), b.data(), c.data(), kM, kN, kK, nullptr);
    const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - start;
    std::printf("a block of 64 x 32 x 864%s: %.2f ms\n", find_races ? "" : ", races not looked for",
                taken.count() / (kM / 64));
  }
}

}  // namespace s3d::emulator::test
