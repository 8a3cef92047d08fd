// What a launch did, counted as the hardware counts it: per warp and instruction.
//
// Lanes run one after the other, so each writes its accesses down, and those of a warp are put together when its lanes
// meet: the n-th time that lanes come to the same line for an access of the same kind and size is taken for one
// instruction.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace s3d::emulator {

struct Counters {
  int64_t blocks = 0;
  int64_t barriers = 0;                // of a block, counted once for all of its threads
  int64_t mmas = 0;                    // mma.sync, of a warp
  int64_t mma_flops = 0;               // 2 * m * n * k each
  int64_t useful_flops = 0;            // what the kernel reports by count_useful_flops()
  int64_t ldmatrix = 0;                // of a warp
  int64_t cp_async = 0;                // of a warp
  int64_t global_bytes_read = 0;       // requested by threads, asynchronous copies included
  int64_t global_bytes_written = 0;
  int64_t global_sectors_read = 0;     // different sectors of 32 bytes in each access of a warp
  int64_t global_sectors_written = 0;
  int64_t shared_read_conflicts = 0;   // passes over the banks beyond the first of each phase, ldmatrix included
  int64_t shared_write_conflicts = 0;  // the same of stores, asynchronous copies and atomics
};

enum class AccessKind : uint8_t { kGlobalRead, kGlobalWrite, kSharedRead, kSharedWrite, kSharedCopy };

struct Access {
  const char* file;
  uint64_t address;  // in bytes; 0 has the alignment of every sector and bank
  int32_t line;
  AccessKind kind;
  uint8_t bytes;
};

// Passes over the 32 banks that `count` words of 4 bytes need beyond the first.
int bank_conflicts(const uint64_t* words, int count);

// Counts the accesses that the lanes of a warp wrote down, lane i in logs[i] (null: not counted now), and empties them.
void count_accesses(std::vector<Access>* const (&logs)[32], Counters& counters);

}  // namespace s3d::emulator
