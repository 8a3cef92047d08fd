#include "emulator/tensor_core.h"

#include <array>
#include <numeric>

namespace s3d::emulator {
namespace {

constexpr int kM = 16, kN = 8;
constexpr uint32_t kAllLanes = 0xFFFFFFFF;

struct MmaOperand {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

// The two values that a register holds, from the lower bits up.
template <MmaFormat kFormat>
std::array<float, kFormat == MmaFormat::kTf32 ? 1 : 2> values(uint32_t bits) {
  const auto low = static_cast<uint16_t>(bits), high = static_cast<uint16_t>(bits >> 16);
  if constexpr (kFormat == MmaFormat::kTf32) {
    return {float_of(bits & 0xFFFFE000)};  // the hardware does not look at the other bits
  } else if constexpr (kFormat == MmaFormat::kBf16) {
    return {bf16_to_float(low), bf16_to_float(high)};
  } else {
    return {fp16_to_float(low), fp16_to_float(high)};
  }
}

void need_whole_warp(const Warp& warp, uint32_t group, const char* what) {
  if (group == kAllLanes) return;
  const Lane& lane = warp.lanes[__builtin_ctz(group)];
  fail(FaultKind::kDeadlock, std::string(what) + " needs all 32 lanes of a warp", lane.where, lane);
}

// D += A B. A register of A holds row g or g + 8 and of B column g, where g is the lane's number / 4; along k, lane t
// of the four holds the t-th register of its half.
template <MmaFormat kFormat>
void meet_to_mma(Warp& warp, uint32_t group) {
  need_whole_warp(warp, group, "mma.sync");
  constexpr int kPacked = kFormat == MmaFormat::kTf32 ? 1 : 2;
  constexpr int kK = 8 * kPacked, kHalf = 4 * kPacked;
  float a[kM][kK], b[kK][kN], d[kM][kN];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& operand = *static_cast<const MmaOperand*>(warp.lanes[lane].operand);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const auto value = values<kFormat>(operand.a[i]);
      for (int p = 0; p < kPacked; ++p) a[g + i % 2 * 8][i / 2 * kHalf + t * kPacked + p] = value[p];
      d[g + i / 2 * 8][t * 2 + i % 2] = operand.d[i];
    }
    for (int i = 0; i < 2; ++i) {
      const auto value = values<kFormat>(operand.b[i]);
      for (int p = 0; p < kPacked; ++p) b[i * kHalf + t * kPacked + p][g] = value[p];
    }
  }
  for (int row = 0; row < kM; ++row) {
    float sum[kN];
    std::memcpy(sum, d[row], sizeof sum);
    for (int k = 0; k < kK; ++k) {
      for (int column = 0; column < kN; ++column) sum[column] += a[row][k] * b[k][column];
    }
    std::memcpy(d[row], sum, sizeof sum);
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* const to = static_cast<const MmaOperand*>(warp.lanes[lane].operand)->d;
    for (int i = 0; i < 4; ++i) to[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
  Counters& counters = running.block->counters();
  ++counters.mmas;
  counters.mma_flops += 2 * kM * kN * kK;
}

struct LdmatrixOperand {
  uint32_t* registers;
  int matrices;
  SharedPlace row;
};

template <bool kTransposed>
void meet_to_ldmatrix(Warp& warp, uint32_t group) {
  need_whole_warp(warp, group, "ldmatrix");
  Block& block = *running.block;
  Lane* const last_to_come = running.lane;
  const int matrices = static_cast<const LdmatrixOperand*>(warp.lanes[0].operand)->matrices;
  for (int matrix = 0; matrix < matrices; ++matrix) {
    uint16_t rows[8][8];
    uint64_t words[32];
    for (int row = 0; row < 8; ++row) {
      Lane& lane = warp.lanes[8 * matrix + row];
      running.lane = &lane;  // whose address it is, and whom a fault names
      const uint32_t address = static_cast<const LdmatrixOperand*>(lane.operand)->row.checked(16, lane.where);
      block.shared().read_for_warp(address, rows[row], 16, block.moment(lane.where));
      std::iota(words + 4 * row, words + 4 * row + 4, address / 4);
    }
    block.counters().shared_read_conflicts += bank_conflicts(words, 32);
    for (int lane = 0; lane < 32; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      const uint32_t low = kTransposed ? rows[j][i] : rows[i][j];
      const uint32_t high = kTransposed ? rows[j + 1][i] : rows[i][j + 1];
      static_cast<const LdmatrixOperand*>(warp.lanes[lane].operand)->registers[matrix] = low | high << 16;
    }
  }
  running.lane = last_to_come;
  ++block.counters().ldmatrix;
}

}  // namespace

void mma(MmaFormat format, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
  MmaOperand operand{d, a, b};
  const Meeting meeting = format == MmaFormat::kBf16   ? meet_to_mma<MmaFormat::kBf16>
                          : format == MmaFormat::kFp16 ? meet_to_mma<MmaFormat::kFp16>
                                                       : meet_to_mma<MmaFormat::kTf32>;
  running_block(where).meet_warp(kAllLanes, meeting, &operand, where);
}

void ldmatrix(uint32_t* registers, int matrices, bool transposed, const SharedPlace& row, Where where) {
  LdmatrixOperand operand{registers, matrices, row};
  running_block(where).meet_warp(kAllLanes, transposed ? meet_to_ldmatrix<true> : meet_to_ldmatrix<false>, &operand,
                                 where);
}

void cp_async(const SharedPlace& to, const GlobalPlace& from, uint32_t bytes, uint32_t source_bytes, Where where) {
  if (source_bytes > bytes) fail(FaultKind::kOutOfRange, "cp.async takes more bytes than it copies", where);
  AsyncCopy copy{};
  copy.bytes = bytes;
  copy.address = to.counted(bytes, AccessKind::kSharedCopy, where);
  from.check_alignment(bytes, where);
  if (source_bytes > 0) from.read_part(copy.data, source_bytes, where);
  running.block->shared().begin_copy(copy.address, bytes, running.block->moment(where));
  running.lane->copies.push_back(copy);
}

void cp_async_commit(Where where) {
  running_block(where);
  Lane& lane = *running.lane;
  const auto earlier = std::accumulate(lane.copy_groups.begin(), lane.copy_groups.end(), 0u);
  lane.copy_groups.push_back(static_cast<uint32_t>(lane.copies.size()) - earlier);
}

}  // namespace s3d::emulator
