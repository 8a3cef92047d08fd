#include "emulator/shared_memory.h"

#include <algorithm>
#include <cstring>

namespace s3d::emulator {
namespace {

constexpr uint32_t kGranuleBytes = 2;
constexpr uint16_t kThread = 1023;
constexpr uint16_t kPending = 1 << 15;  // written by an asynchronous copy that is not waited for
constexpr uint16_t kAtomic = 1 << 14;   // written by an atomic operation
constexpr uint16_t kManyLanes = 1 << 14;  // read by several threads of one warp

std::string of(int thread, int line) {
  return " of line " + std::to_string(line) + " by thread number " + std::to_string(thread & kThread);
}

bool same_warp(int a, int b) { return (a & kThread) / 32 == (b & kThread) / 32; }

// Whether something that thread `other` did at `time` may happen at the same time as what is done now.
bool unordered(uint32_t time, int other, bool other_is_me, const SharedMemory::Moment& moment) {
  if (time < moment.last_barrier) return false;
  if (!same_warp(other, moment.thread)) return true;
  return !other_is_me && time >= moment.last_sync;
}

}  // namespace

void SharedMemory::reset(uint32_t dynamic_bytes, bool find_races) {
  dynamic_bytes_ = dynamic_bytes;
  find_races_ = find_races;
  arrays_.clear();
  bytes_.assign((dynamic_bytes + kAlignment - 1) / kAlignment * kAlignment, 0xFF);
  granules_.assign(bytes_.size() / kGranuleBytes, Granule{});
}

uint32_t SharedMemory::static_array(const void* key, uint32_t bytes, Where where) {
  for (const auto& [known, address] : arrays_) {
    if (known == key) return address;
  }
  const auto address = static_cast<uint32_t>(bytes_.size());
  const uint32_t end = address + (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (end > kMostBytes) fail(FaultKind::kLaunch, "the block needs more shared memory than there is", where);
  bytes_.resize(end, 0xFF);
  granules_.resize(end / kGranuleBytes, Granule{});
  arrays_.emplace_back(key, address);
  return address;
}

std::pair<SharedMemory::Granule*, SharedMemory::Granule*> SharedMemory::granules(uint32_t address, uint32_t bytes) {
  Granule* const first = granules_.data() + address / kGranuleBytes;
  return {first, granules_.data() + (address + bytes + kGranuleBytes - 1) / kGranuleBytes};
}

void SharedMemory::check_read(uint32_t address, uint32_t bytes, const Moment& moment, bool for_warp) {
  const bool find_races = find_races_ && bytes > 1;
  const auto me = static_cast<uint16_t>(moment.thread | (for_warp ? kManyLanes : 0));
  const auto [first, end] = granules(address, bytes);
  for (Granule* granule = first; granule != end; ++granule) {
    if (granule->write_time == 0) {
      fail(FaultKind::kUninitialised, "reads shared memory that nobody wrote", moment.where);
    }
    if (granule->writer & kPending) {
      fail(FaultKind::kPendingCopy,
           "reads what the asynchronous copy" + of(granule->writer, granule->write_line) + " has not waited for",
           moment.where);
    }
    const bool wrote = !for_warp && (granule->writer & kThread) == moment.thread;
    if (find_races && unordered(granule->write_time, granule->writer, wrote, moment)) {
      fail(FaultKind::kRace,
           "reads shared memory with no barrier since the write" + of(granule->writer, granule->write_line),
           moment.where);
    }
    // A warp runs from barrier to barrier before another does. So a reader of another warp is remembered instead of
    // this one: whoever writes before the next barrier is of this warp or of one that comes later.
    if (granule->read_time >= moment.last_barrier && !same_warp(granule->reader, moment.thread)) continue;
    const bool alone = granule->read_time < std::max(moment.last_barrier, moment.last_sync) || granule->reader == me;
    granule->reader = alone ? me : me | kManyLanes;
    granule->read_time = moment.now;
    granule->read_line = static_cast<uint16_t>(moment.where.line);
  }
}

void SharedMemory::check_write(uint32_t address, uint32_t bytes, const Moment& moment, uint16_t flags) {
  const bool find_races = find_races_ && bytes > 1;
  const auto [first, end] = granules(address, bytes);
  for (Granule* granule = first; granule != end; ++granule) {
    if (granule->writer & kPending) {
      fail(FaultKind::kPendingCopy,
           "writes where the asynchronous copy" + of(granule->writer, granule->write_line) + " is not waited for",
           moment.where);
    }
    const bool wrote = (granule->writer & kThread) == moment.thread;
    const bool both_atomic = (granule->writer & flags & kAtomic) != 0;
    if (find_races && !both_atomic && granule->write_time > 0 &&
        unordered(granule->write_time, granule->writer, wrote, moment)) {
      fail(FaultKind::kRace,
           "writes shared memory with no barrier since the write" + of(granule->writer, granule->write_line),
           moment.where);
    }
    const bool read = (granule->reader & kManyLanes) == 0 && (granule->reader & kThread) == moment.thread;
    if (find_races && granule->read_time >= moment.last_barrier &&
        unordered(granule->read_time, granule->reader, read, moment)) {
      fail(FaultKind::kRace,
           "writes shared memory with no barrier since the read" + of(granule->reader, granule->read_line),
           moment.where);
    }
    granule->write_time = moment.now;
    granule->writer = static_cast<uint16_t>(moment.thread | flags);
    granule->write_line = static_cast<uint16_t>(moment.where.line);
  }
}

void SharedMemory::read(uint32_t address, void* to, uint32_t bytes, const Moment& moment) {
  check_read(address, bytes, moment, false);
  std::memcpy(to, bytes_.data() + address, bytes);
}

void SharedMemory::read_for_warp(uint32_t address, void* to, uint32_t bytes, const Moment& moment) {
  check_read(address, bytes, moment, true);
  std::memcpy(to, bytes_.data() + address, bytes);
}

void SharedMemory::write(uint32_t address, const void* from, uint32_t bytes, const Moment& moment) {
  check_write(address, bytes, moment, 0);
  std::memcpy(bytes_.data() + address, from, bytes);
}

void* SharedMemory::atomic(uint32_t address, uint32_t bytes, const Moment& moment) {
  if (granules_[address / kGranuleBytes].write_time == 0) {
    fail(FaultKind::kUninitialised, "changes shared memory that nobody wrote", moment.where);
  }
  check_write(address, bytes, moment, kAtomic);
  return bytes_.data() + address;
}

void SharedMemory::begin_copy(uint32_t address, uint32_t bytes, const Moment& moment) {
  check_write(address, bytes, moment, kPending);
  std::memset(bytes_.data() + address, 0xFF, bytes);
}

void SharedMemory::end_copy(uint32_t address, const void* from, uint32_t bytes, const Moment& moment) {
  const auto [first, end] = granules(address, bytes);
  for (Granule* granule = first; granule != end; ++granule) {
    granule->writer = static_cast<uint16_t>(moment.thread);
    granule->write_time = moment.now;
  }
  std::memcpy(bytes_.data() + address, from, bytes);
}

}  // namespace s3d::emulator
