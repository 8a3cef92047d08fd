#include "emulator/block.h"

#include <cstring>
#include <sstream>

namespace s3d::emulator {
namespace {

constexpr int kLanes = 32;
constexpr size_t kMostAccesses = 4096;  // that a lane writes down before they are counted

std::string lanes_text(uint32_t lanes) {
  std::ostringstream text;
  text << "lanes 0x" << std::hex << lanes;
  return text.str();
}

std::string text(Where where) {
  const char* const slash = std::strrchr(where.file, '/');
  return std::string(slash == nullptr ? where.file : slash + 1) + ":" + std::to_string(where.line);
}

template <typename Index>
std::string text(const Index& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

// Stacks are kept from launch to launch: making them costs more than a small kernel.
std::shared_ptr<Stacks> stacks_for(int threads) {
  static std::shared_ptr<Stacks> stacks;
  if (!stacks || stacks->count() < threads) stacks = std::make_shared<Stacks>(threads);
  return stacks;
}

}  // namespace

bool same(Where a, Where b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

void fail(FaultKind kind, const std::string& what, Where where) {
  if (running.lane != nullptr) fail(kind, what, where, *running.lane);
  throw Fault(kind, what + " (host code, " + text(where) + ")");
}

void fail(FaultKind kind, const std::string& what, Where where, const Lane& lane) {
  throw Fault(kind, running.block->shape().kernel + ", block " + text(blockIdx) + ", thread " + text(lane.index) +
                        " (number " + std::to_string(lane.thread) + "), " + text(where) + ": " + what);
}

Block& running_block(Where where) {
  if (running.lane == nullptr) fail(FaultKind::kLaunch, "host code calls what only kernels may", where);
  return *running.block;
}

Block::Block(const LaunchShape& shape, std::function<void()> kernel, uint64_t seed, bool find_races)
    : shape_(shape), kernel_(std::move(kernel)), random_state_(seed), find_races_(find_races) {
  const auto threads = static_cast<int>(shape.block.x * shape.block.y * shape.block.z);
  lanes_.resize(threads);
  warps_.resize((threads + kLanes - 1) / kLanes);
  stacks_ = stacks_for(threads);
}

// splitmix64
uint64_t Block::random() {
  uint64_t z = random_state_ += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

void Block::reset() {
  shared_.reset(shape_.shared_bytes, find_races_);
  time_ = last_barrier_ = 1;
  first_lane_ = static_cast<unsigned>(random() % kLanes);
  const auto threads = static_cast<int>(lanes_.size());
  for (int thread = 0; thread < threads; ++thread) {
    Lane& lane = lanes_[thread];
    const unsigned plane = shape_.block.x * shape_.block.y;
    lane.index = {thread % shape_.block.x, thread % plane / shape_.block.x, thread / plane};
    lane.thread = thread;
    lane.accesses.clear();
    lane.copies.clear();
    lane.copy_groups.clear();
    stacks_->start(thread, lane.context, thread_main);
  }
  for (size_t warp = 0; warp < warps_.size(); ++warp) {
    const int present = threads - static_cast<int>(warp) * kLanes;
    const uint32_t all = present >= kLanes ? ~0u : (1u << present) - 1;
    warps_[warp] = {&lanes_[warp * kLanes], all, all, 0, 0, 0, 0, time_};
  }
}

void Block::run(uint3 index) {
  blockIdx = index;
  running.block = this;
  struct Done {
    ~Done() { running = {}; }
  } done;
  reset();
  ++counters_.blocks;
  std::vector<Warp*> ready;
  do {
    for (;;) {
      ready.clear();
      for (Warp& warp : warps_) {
        if (warp.ready != 0) ready.push_back(&warp);
      }
      if (ready.empty()) break;
      running.warp = ready[random() % ready.size()];
      Lane* const lane = next_lane(nullptr);
      enter(*lane);
      switch_context(scheduler_, lane->context);
      if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
      count_accesses_of(*running.warp, ~0u);
      running.lane = nullptr;
    }
  } while (release_barrier());
}

void Block::enter(Lane& lane) {
  running.lane = &lane;
  threadIdx = lane.index;
}

// The bottom of a fiber's stack: it must not return, and no exception may pass it.
void Block::thread_main() {
  Block& block = *running.block;
  Context& context = running.lane->context;
  try {
    block.kernel_();
    running.warp->exited |= running.lane->bit();
    if (Lane* const next = block.next_lane(nullptr)) {
      block.enter(*next);
      switch_context(context, next->context);
    }
  } catch (...) {
    block.error_ = std::current_exception();
  }
  switch_context(context, block.scheduler_);
}

// Of the running warp, a lane that can go on; null: all of them wait for the block or have exited.
Lane* Block::next_lane(const Lane* preferred) {
  Warp& warp = *running.warp;
  if (warp.ready == 0 && !release_lanes(warp)) return nullptr;
  int number;
  if (preferred != nullptr && (warp.ready & preferred->bit())) {
    number = preferred->number();
  } else {
    const uint32_t later = warp.ready >> first_lane_ << first_lane_;
    number = __builtin_ctz(later != 0 ? later : warp.ready);
  }
  warp.ready &= ~(1u << number);
  return &warp.lanes[number];
}

// The running lane waits: another one goes on.
void Block::yield() {
  Lane& self = *running.lane;
  Lane* const next = next_lane(&self);
  if (next == &self) return;
  if (next != nullptr) enter(*next);
  switch_context(self.context, next != nullptr ? next->context : scheduler_);
}

// No lane of the warp can go on: lets those meet whose partners have all come. False if there are none.
bool Block::release_lanes(Warp& warp) {
  uint32_t released = 0;
  for (uint32_t rest = warp.meeting; rest != 0;) {
    Lane& lane = warp.lanes[__builtin_ctz(rest)];
    const uint32_t group = lane.mask & warp.present;
    rest &= ~lane.bit();
    if ((group & warp.meeting) != group) continue;
    for (uint32_t others = group & ~lane.bit(); others != 0; others &= others - 1) {
      const Lane& other = warp.lanes[__builtin_ctz(others)];
      if (other.mask != lane.mask || other.meeting != lane.meeting) {
        fail(FaultKind::kDeadlock,
             "waits for its warp with another mask or operation than thread number " + std::to_string(other.thread) +
                 " at " + text(other.where),
             lane.where, lane);
      }
    }
    rest &= ~group;
    count_accesses_of(warp, group);
    lane.meeting(warp, group);
    warp.meeting &= ~group;
    released |= group;
  }
  if (released == 0) {
    released = std::exchange(warp.paused, 0);
    if (released != 0) count_accesses_of(warp, ~0u);
  }
  if (released == 0 && warp.meeting != 0) {
    const Lane& lane = warp.lanes[__builtin_ctz(warp.meeting)];
    const uint32_t missing = lane.mask & warp.present & ~warp.meeting;
    fail(FaultKind::kDeadlock,
         "waits for " + lanes_text(missing) + " of its warp; " +
             (missing & warp.exited ? "some have exited" : "they wait for the block"),
         lane.where, lane);
  }
  warp.ready |= released;
  return released != 0;
}

// Every thread waits for the block or has exited: lets all go on. False if all have exited.
bool Block::release_barrier() {
  const Lane* first = nullptr;
  const Lane* exited = nullptr;
  arrived_with_true_ = 0;
  for (const Warp& warp : warps_) {
    for (uint32_t rest = warp.present; rest != 0; rest &= rest - 1) {
      const Lane& lane = warp.lanes[__builtin_ctz(rest)];
      if (warp.exited & lane.bit()) {
        exited = &lane;
        continue;
      }
      if (first == nullptr) first = &lane;
      if (first->barrier != lane.barrier || !same(first->where, lane.where)) {
        fail(FaultKind::kDivergentBarrier,
             std::string("waits at ") + lane.barrier + ", but thread number " + std::to_string(first->thread) +
                 " waits at another: " + first->barrier + ", " + text(first->where),
             lane.where, lane);
      }
      arrived_with_true_ += lane.predicate;
    }
  }
  if (first == nullptr) return false;
  if (exited != nullptr) {
    fail(FaultKind::kDivergentBarrier,
         std::string("waits at ") + first->barrier + ", but thread number " + std::to_string(exited->thread) +
             " has exited",
         first->where, *first);
  }
  ++counters_.barriers;
  last_barrier_ = ++time_;
  for (Warp& warp : warps_) warp.ready = std::exchange(warp.at_barrier, 0);
  return true;
}

void Block::meet_warp(uint32_t mask, Meeting meeting, void* operand, Where where) {
  Lane& lane = *running.lane;
  lane.mask = mask;
  lane.meeting = meeting;
  lane.operand = operand;
  lane.where = where;
  if ((mask & lane.bit()) == 0) fail(FaultKind::kDeadlock, "is not in the mask that it waits with", where);
  running.warp->meeting |= lane.bit();
  yield();
}

int Block::meet_block(const char* barrier, bool predicate, Where where) {
  Lane& lane = *running.lane;
  lane.barrier = barrier;
  lane.predicate = predicate;
  lane.where = where;
  running.warp->at_barrier |= lane.bit();
  yield();
  return arrived_with_true_;
}

void Block::count(const Access& access) {
  Lane& lane = *running.lane;
  lane.accesses.push_back(access);
  if (lane.accesses.size() < kMostAccesses) return;
  running.warp->paused |= lane.bit();
  yield();
}

void Block::count_accesses_of(Warp& warp, uint32_t group) {
  std::vector<Access>* logs[kLanes] = {};
  for (uint32_t rest = group & warp.present; rest != 0; rest &= rest - 1) {
    const int number = __builtin_ctz(rest);
    logs[number] = &warp.lanes[number].accesses;
  }
  count_accesses(logs, counters_);
}

SharedMemory::Moment Block::moment(Where where) const {
  return {time_, last_barrier_, running.warp->last_sync, running.lane->thread, where};
}

void Block::land_copies(size_t groups_left, bool uncommitted) {
  Lane& lane = *running.lane;
  size_t landing = 0;
  while (lane.copy_groups.size() > groups_left) {
    landing += lane.copy_groups.front();
    lane.copy_groups.erase(lane.copy_groups.begin());
  }
  if (uncommitted) landing = lane.copies.size();
  for (size_t i = 0; i < landing; ++i) {
    const AsyncCopy& copy = lane.copies[i];
    shared_.end_copy(copy.address, copy.data, copy.bytes, moment({"", 0}));
  }
  lane.copies.erase(lane.copies.begin(), lane.copies.begin() + static_cast<std::ptrdiff_t>(landing));
}

}  // namespace s3d::emulator
