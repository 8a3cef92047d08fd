#include "emulator/launch.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <utility>

namespace s3d::emulator {
namespace {

constexpr unsigned kMostThreads = 1024;
constexpr unsigned kMostBlocksYZ = 65535;

Options options;
std::vector<LaunchRecord> launches;

void check(const LaunchShape& shape) {
  const auto refuse = [&](const std::string& why) {
    throw Fault(FaultKind::kLaunch, shape.kernel + " cannot be launched: " + why);
  };
  const dim3 &grid = shape.grid, &block = shape.block;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMostThreads || block.z > 64) refuse(std::to_string(threads) + " threads in a block");
  if (grid.x > 0x7FFFFFFF || grid.y > kMostBlocksYZ || grid.z > kMostBlocksYZ) refuse("more blocks than a grid has");
  if (shape.shared_bytes > options.most_shared_bytes) {
    refuse(std::to_string(shape.shared_bytes) + " bytes of shared memory");
  }
}

}  // namespace

void set_options(const Options& value) { options = value; }

uint32_t most_shared_bytes() { return options.most_shared_bytes; }

std::vector<LaunchRecord> take_launches() { return std::exchange(launches, {}); }

void run(const LaunchShape& shape, const std::function<void()>& kernel) {
  const uint64_t blocks = uint64_t{shape.grid.x} * shape.grid.y * shape.grid.z;
  if (blocks == 0) return;  // as in cuda/launch.cuh
  check(shape);
  gridDim = shape.grid;
  blockDim = shape.block;
  // No block may rely on another one to run first.
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), uint64_t{0});
  std::shuffle(order.begin(), order.end(), std::mt19937_64(options.seed));
  Block block(shape, kernel, options.seed, options.find_races);
  for (const uint64_t i : order) {
    const uint64_t plane = uint64_t{shape.grid.x} * shape.grid.y;
    block.run({static_cast<unsigned>(i % shape.grid.x), static_cast<unsigned>(i % plane / shape.grid.x),
               static_cast<unsigned>(i / plane)});
  }
  launches.push_back({shape.kernel, shape.grid, shape.block, block.counters()});
}

}  // namespace s3d::emulator
