// The shared memory of the running block, and who touched it when.
//
// Time counts the block's barriers and its warps' __syncwarp. Two accesses to the same bytes by different threads, one
// of them a write, need a __syncthreads between them, or a __syncwarp if both threads are of one warp. That is checked
// for every 2 bytes from the last write and the reads since, so a race is found whatever order the threads ran in.
// Accesses of one byte are not checked: their neighbours may belong to other threads.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "emulator/fault.h"

namespace s3d::emulator {

class SharedMemory {
 public:
  static constexpr uint32_t kMostBytes = 227 << 10;  // sm_90 and sm_100; less on sm_80 (163) and sm_86, 89, 120 (99)
  static constexpr uint32_t kAlignment = 128;

  // Who accesses, and since when everything earlier is ordered before it.
  struct Moment {
    uint32_t now;           // > 0
    uint32_t last_barrier;  // of the block
    uint32_t last_sync;     // of the thread's warp
    int thread;             // < 1024; its warp is thread / 32
    Where where;
  };

  // For a new block: nothing written, all bytes 0xFF, which are NaNs of every type.
  void reset(uint32_t dynamic_bytes, bool find_races);
  uint32_t dynamic_bytes() const { return dynamic_bytes_; }
  // Address of a static array, the same for all threads of a block that come with the same key.
  uint32_t static_array(const void* key, uint32_t bytes, Where where);

  void read(uint32_t address, void* to, uint32_t bytes, const Moment& moment);
  // For ldmatrix: one lane says where, others of its warp get the data.
  void read_for_warp(uint32_t address, void* to, uint32_t bytes, const Moment& moment);
  void write(uint32_t address, const void* from, uint32_t bytes, const Moment& moment);
  // Returns the bytes to be read and changed by an atomic operation.
  void* atomic(uint32_t address, uint32_t bytes, const Moment& moment);
  // An asynchronous copy: between the two, the bytes are 0xFF and nobody may touch them.
  void begin_copy(uint32_t address, uint32_t bytes, const Moment& moment);
  void end_copy(uint32_t address, const void* from, uint32_t bytes, const Moment& moment);

 private:
  // The last write of two bytes, and of the reads since then as many as it takes to see that another write is a race.
  struct Granule {
    uint32_t write_time;  // 0: never
    uint16_t writer;      // thread and flags
    uint16_t write_line;
    uint32_t read_time;  // 0: never
    uint16_t reader;
    uint16_t read_line;
  };

  void check_read(uint32_t address, uint32_t bytes, const Moment& moment, bool for_warp);
  void check_write(uint32_t address, uint32_t bytes, const Moment& moment, uint16_t flags);
  std::pair<Granule*, Granule*> granules(uint32_t address, uint32_t bytes);

  uint32_t dynamic_bytes_ = 0;
  bool find_races_ = true;
  std::vector<std::pair<const void*, uint32_t>> arrays_;
  std::vector<unsigned char> bytes_;
  std::vector<Granule> granules_;
};

}  // namespace s3d::emulator
