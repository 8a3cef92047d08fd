// How a fault in a kernel is told: what, at which line, by which thread of which block of which kernel.
#pragma once

#include <stdexcept>
#include <string>

namespace s3d::emulator {

struct Where {
  const char* file;
  int line;
};

// As a default argument: the line that calls.
constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

bool same(Where a, Where b);

enum class FaultKind {
  kLaunch,            // a shape that no GPU accepts, or device code called by the host
  kOutOfRange,        // an access outside its array
  kMisaligned,        // an address that is no multiple of the access's size
  kUninitialised,     // a read of shared memory that nobody wrote
  kPendingCopy,       // an access to shared memory that an asynchronous copy has not reached: a missing wait
  kRace,              // two threads, one of which writes, with no barrier between them
  kDivergentBarrier,  // not all threads of the block came to the same barrier
  kDeadlock,          // a lane waits for lanes that will not come
};

class Fault : public std::runtime_error {
 public:
  Fault(FaultKind kind, const std::string& what) : std::runtime_error(what), kind(kind) {}
  const FaultKind kind;
};

struct Lane;

// Throws a Fault that names the kernel, the block and the thread: the running one, or `lane`.
[[noreturn]] void fail(FaultKind kind, const std::string& what, Where where);
[[noreturn]] void fail(FaultKind kind, const std::string& what, Where where, const Lane& lane);

}  // namespace s3d::emulator
