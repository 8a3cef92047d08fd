// The block that runs: its threads, what they wait for, and in which order they run.
//
// A thread is a fiber. It runs until it has to wait for others: for lanes of its warp (shuffles, votes, __syncwarp,
// mma, ldmatrix) or for the block (__syncthreads). Then another lane of its warp goes on. Only when no lane of the warp
// can go on does another warp, chosen at random: a warp that is far ahead of the others finds what a missing barrier
// lets happen.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "emulator/counters.h"
#include "emulator/cuda_types.h"
#include "emulator/fault.h"
#include "emulator/fiber.h"
#include "emulator/shared_memory.h"

namespace s3d::emulator {

struct Warp;

// What lanes of a warp do together once all of `group` have come; lane i's part is warp.lanes[i].operand.
using Meeting = void (*)(Warp& warp, uint32_t group);

struct AsyncCopy {
  uint32_t address, bytes;
  alignas(16) unsigned char data[16];
};

struct Lane {
  Context context;
  uint3 index;  // threadIdx
  int thread;   // its number in the block
  // What it waits for: lanes of its warp,
  Meeting meeting;
  uint32_t mask;
  void* operand;
  // or the block.
  const char* barrier;
  bool predicate;
  Where where;

  std::vector<Access> accesses;        // not counted yet
  std::vector<AsyncCopy> copies;       // not landed, oldest first
  std::vector<uint32_t> copy_groups;   // how many of them each committed group has
  int number() const { return thread % 32; }
  uint32_t bit() const { return 1u << number(); }
};

// A lane is in one of these sets, or runs.
struct Warp {
  Lane* lanes;
  uint32_t present;     // lanes that the block has, exited ones too
  uint32_t ready;       // can run
  uint32_t meeting;     // wait for lanes of this warp
  uint32_t at_barrier;  // wait for the block
  uint32_t paused;      // run again once their accesses are counted
  uint32_t exited;
  uint32_t last_sync;   // when __syncwarp ordered its lanes, see shared_memory.h
};

struct LaunchShape {
  std::string kernel;
  dim3 grid, block;
  uint32_t shared_bytes;
};

class Block {
 public:
  Block(const LaunchShape& shape, std::function<void()> kernel, uint64_t seed, bool find_races);
  void run(uint3 index);
  Counters& counters() { return counters_; }
  SharedMemory& shared() { return shared_; }
  const LaunchShape& shape() const { return shape_; }

  // Called by the running thread.
  void meet_warp(uint32_t mask, Meeting meeting, void* operand, Where where);
  int meet_block(const char* barrier, bool predicate, Where where);  // how many threads came with true
  void sync_warp(Warp& warp) { warp.last_sync = ++time_; }
  void count(const Access& access);
  SharedMemory::Moment moment(Where where) const;
  void land_copies(size_t groups_left, bool uncommitted);

 private:
  static void thread_main();
  void reset();
  void yield();
  Lane* next_lane(const Lane* preferred);
  bool release_lanes(Warp& warp);
  bool release_barrier();
  void count_accesses_of(Warp& warp, uint32_t group);
  void enter(Lane& lane);
  uint64_t random();

  const LaunchShape& shape_;
  std::function<void()> kernel_;
  uint64_t random_state_;
  bool find_races_;
  std::vector<Lane> lanes_;
  std::vector<Warp> warps_;
  std::shared_ptr<Stacks> stacks_;
  SharedMemory shared_;
  Counters counters_;
  Context scheduler_;
  std::exception_ptr error_;
  uint32_t time_, last_barrier_;
  int arrived_with_true_ = 0;
  unsigned first_lane_ = 0;  // of those that can go on, where the search starts
};

struct Running {
  Block* block = nullptr;
  Warp* warp = nullptr;
  Lane* lane = nullptr;
};
inline Running running;

// The running block; a fault where host code calls what only kernels may.
Block& running_block(Where where);

}  // namespace s3d::emulator
