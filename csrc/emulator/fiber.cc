#include "emulator/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

namespace s3d::emulator {
namespace {

constexpr size_t kStackBytes = 192 << 10;
constexpr size_t kGuardBytes = 64 << 10;  // a multiple of every page size in use

}  // namespace

Stacks::Stacks(int count) : count_(count) {
  void* memory = mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                      -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
  for (int i = 0; i < count; ++i) mprotect(memory_ + i * kStackBytes, kGuardBytes, PROT_NONE);
}

Stacks::~Stacks() { munmap(memory_, count_ * kStackBytes); }

#ifdef S3D_EMULATOR_UCONTEXT

void Stacks::start(int number, Context& context, void (*entry)()) const {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = memory_ + number * kStackBytes + kGuardBytes;
  context.state.uc_stack.ss_size = kStackBytes - kGuardBytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

#else

extern "C" void s3d_emulator_switch(void** from, void* to);

// Saves what the calling convention asks a function to preserve, changes the stack and restores.
asm(R"(
.text
.hidden s3d_emulator_switch
.globl s3d_emulator_switch
.type s3d_emulator_switch, @function
s3d_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size s3d_emulator_switch, . - s3d_emulator_switch
)");

void Stacks::start(int number, Context& context, void (*entry)()) const {
  // The lanes of a warp run in turn with the same stack depth: were their stacks a power of two apart, all of them
  // would compete for the same few lines of the cache.
  const size_t colour = (number % 32) * 17 * 64;
  auto* top = reinterpret_cast<uint64_t*>(memory_ + (number + 1) * kStackBytes - colour);
  *--top = 0;  // the caller of `entry`: none
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = 0;
  context.stack_pointer = top;
}

void switch_context(Context& from, Context& to) { s3d_emulator_switch(&from.stack_pointer, to.stack_pointer); }

#endif

}  // namespace s3d::emulator
