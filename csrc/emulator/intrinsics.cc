#include "emulator/intrinsics.h"

namespace s3d::emulator {

void meet_to_shuffle(Warp& warp, uint32_t group) {
  for (uint32_t rest = group; rest != 0; rest &= rest - 1) {
    Shuffle& to = *static_cast<Shuffle*>(warp.lanes[__builtin_ctz(rest)].operand);
    // What comes from a lane that does not take part is undefined.
    const bool defined = (group >> to.source & 1) != 0;
    to.result = defined ? static_cast<const Shuffle*>(warp.lanes[to.source].operand)->value : ~uint64_t{0};
  }
}

void meet_to_vote(Warp& warp, uint32_t group) {
  uint32_t ballot = 0;
  for (uint32_t rest = group; rest != 0; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    if (static_cast<const Vote*>(warp.lanes[lane].operand)->predicate) ballot |= 1u << lane;
  }
  for (uint32_t rest = group; rest != 0; rest &= rest - 1) {
    static_cast<Vote*>(warp.lanes[__builtin_ctz(rest)].operand)->ballot = ballot;
  }
}

void meet_to_sync(Warp& warp, uint32_t) { running.block->sync_warp(warp); }

}  // namespace s3d::emulator
