// Threads that hand the processor to each other by a function call: a stack each, and where it was left.
//
// On x86-64 with ELF a switch is ten instructions; elsewhere, and with S3D_EMULATOR_UCONTEXT, it is swapcontext, which
// asks the kernel for the signal mask each time and is some fifty times slower.
#pragma once

#include <cstddef>

#if !defined(S3D_EMULATOR_UCONTEXT) && !(defined(__x86_64__) && defined(__ELF__))
#define S3D_EMULATOR_UCONTEXT
#endif
#ifdef S3D_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

namespace s3d::emulator {

struct Context {
#ifdef S3D_EMULATOR_UCONTEXT
  ucontext_t state;
#else
  void* stack_pointer;
#endif
};

// Leaves the running context as `from` and goes on with `to`.
void switch_context(Context& from, Context& to);

// Stacks for `count` fibers, with a page that nobody may touch below each.
class Stacks {
 public:
  explicit Stacks(int count);
  ~Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  int count() const { return count_; }
  // A context that calls `entry` on stack `number`; `entry` must not return.
  void start(int number, Context& context, void (*entry)()) const;

 private:
  int count_;
  char* memory_;
};

}  // namespace s3d::emulator
