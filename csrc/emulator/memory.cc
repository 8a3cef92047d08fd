#include "emulator/memory.h"

namespace s3d::emulator {
namespace {

std::string access(uint32_t bytes) { return std::to_string(bytes) + "-byte access"; }

}  // namespace

void GlobalPlace::out_of_range(uint32_t bytes, Where where) const {
  std::string what = access(bytes);
  if (buffer_ == nullptr) {
    what += " through a null pointer or one into no registered buffer";
  } else {
    what += " at byte " + std::to_string(static_cast<int64_t>(pointer_ - buffer_->begin)) + " of buffer " +
            buffer_->name + ", which has " + std::to_string(buffer_->bytes);
  }
  fail(FaultKind::kOutOfRange, what, where);
}

void GlobalPlace::misaligned(uint32_t bytes, Where where) const {
  fail(FaultKind::kMisaligned, access(bytes) + " to global memory at an address that is no multiple of it", where);
}

void SharedPlace::out_of_range(uint32_t bytes, Where where) const {
  fail(FaultKind::kOutOfRange,
       access(bytes) + " at byte " + std::to_string(address_ - begin_) + " of an array in shared memory that has " +
           std::to_string(end_ - begin_),
       where);
}

void SharedPlace::misaligned(uint32_t bytes, Where where) const {
  fail(FaultKind::kMisaligned,
       access(bytes) + " at byte " + std::to_string(address_) + " of shared memory, no multiple of it", where);
}

}  // namespace s3d::emulator
