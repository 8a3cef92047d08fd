#include "emulator/counters.h"

#include <algorithm>

namespace s3d::emulator {
namespace {

constexpr int kLanes = 32;
constexpr int kBanks = 32;
constexpr int kSectorBytes = 32;
constexpr int kPhaseBytes = 4 * kBanks;  // what shared memory moves at once

bool same_instruction(const Access& a, const Access& b) {
  return a.line == b.line && a.kind == b.kind && a.bytes == b.bytes && a.file == b.file;
}

int64_t count_sectors(const Access* const (&lanes)[kLanes]) {
  uint64_t sectors[kLanes];
  int count = 0;
  for (const Access* access : lanes) {
    if (access == nullptr) continue;
    const uint64_t sector = access->address / kSectorBytes;  // an aligned access lies in one
    if (count > 0 && sectors[count - 1] == sector) continue;
    if (std::find(sectors, sectors + count, sector) == sectors + count) sectors[count++] = sector;
  }
  return count;
}

// Accesses of 8 bytes are served by half-warps, those of 16 bytes by quarter-warps.
int64_t count_conflicts(const Access* const (&lanes)[kLanes], int bytes) {
  const int words_per_lane = std::max(bytes / 4, 1);
  const int lanes_per_phase = std::min(kLanes, kPhaseBytes / (4 * words_per_lane));
  int64_t conflicts = 0;
  for (int first = 0; first < kLanes; first += lanes_per_phase) {
    uint64_t words[kBanks];
    int count = 0;
    for (int lane = first; lane < first + lanes_per_phase; ++lane) {
      if (lanes[lane] == nullptr) continue;
      for (int word = 0; word < words_per_lane; ++word) words[count++] = lanes[lane]->address / 4 + word;
    }
    conflicts += bank_conflicts(words, count);
  }
  return conflicts;
}

void count_instruction(const Access* const (&lanes)[kLanes], const Access& one, Counters& counters) {
  int64_t bytes = 0;
  for (const Access* access : lanes) bytes += access == nullptr ? 0 : access->bytes;
  switch (one.kind) {
    case AccessKind::kGlobalRead:
      counters.global_bytes_read += bytes;
      counters.global_sectors_read += count_sectors(lanes);
      break;
    case AccessKind::kGlobalWrite:
      counters.global_bytes_written += bytes;
      counters.global_sectors_written += count_sectors(lanes);
      break;
    case AccessKind::kSharedRead:
      counters.shared_read_conflicts += count_conflicts(lanes, one.bytes);
      break;
    case AccessKind::kSharedCopy:
      ++counters.cp_async;
      [[fallthrough]];
    case AccessKind::kSharedWrite:
      counters.shared_write_conflicts += count_conflicts(lanes, one.bytes);
      break;
  }
}

// Lanes that took different ways: the visits of a line with equal numbers, counted by each lane, are put together.
void count_diverged(std::vector<Access>* const (&logs)[kLanes], Counters& counters) {
  struct Visit {
    const Access* lanes[kLanes] = {};
  };
  struct Place {
    const Access* one;
    std::vector<Visit> visits;
    size_t seen;  // by the present lane
  };
  std::vector<Place> places;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (logs[lane] == nullptr) continue;
    for (Place& place : places) place.seen = 0;
    for (const Access& access : *logs[lane]) {
      auto place = std::find_if(places.begin(), places.end(),
                                [&](const Place& other) { return same_instruction(*other.one, access); });
      if (place == places.end()) place = places.insert(place, {&access, {}, 0});
      if (place->seen == place->visits.size()) place->visits.emplace_back();
      place->visits[place->seen++].lanes[lane] = &access;
    }
  }
  for (const Place& place : places) {
    for (const Visit& visit : place.visits) count_instruction(visit.lanes, *place.one, counters);
  }
}

}  // namespace

int bank_conflicts(const uint64_t* words, int count) {
  uint64_t of_bank[kBanks][kLanes];
  uint8_t counts[kBanks] = {};
  int most = 1;
  for (int i = 0; i < count; ++i) {
    const int bank = static_cast<int>(words[i] % kBanks);
    uint64_t* const end = of_bank[bank] + counts[bank];
    if (std::find(of_bank[bank], end, words[i]) != end) continue;  // one word goes to all lanes that ask for it
    *end = words[i];
    most = std::max<int>(most, ++counts[bank]);
  }
  return most - 1;
}

void count_accesses(std::vector<Access>* const (&logs)[kLanes], Counters& counters) {
  const std::vector<Access>* first = nullptr;
  bool together = true;
  for (const auto* log : logs) {
    if (log == nullptr || log->empty()) continue;
    if (first == nullptr) first = log;
    together = together && log->size() == first->size() &&
               std::equal(log->begin(), log->end(), first->begin(), same_instruction);
  }
  if (first == nullptr) return;
  if (together) {
    for (size_t i = 0; i < first->size(); ++i) {
      const Access* lanes[kLanes] = {};
      for (int lane = 0; lane < kLanes; ++lane) {
        if (logs[lane] != nullptr && !logs[lane]->empty()) lanes[lane] = &(*logs[lane])[i];
      }
      count_instruction(lanes, (*first)[i], counters);
    }
  } else {
    count_diverged(logs, counters);
  }
  for (auto* log : logs) {
    if (log != nullptr) log->clear();
  }
}

}  // namespace s3d::emulator
