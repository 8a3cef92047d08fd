// Which memory of the host kernels may reach: every buffer is registered, and a Global<T> made from a raw pointer keeps
// to the buffer that the pointer lies in, so an access outside it is found however far outside.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace s3d::emulator {

struct Buffer {
  uintptr_t begin;
  size_t bytes;
  uint64_t address;  // that counters see: aligned as cudaMalloc aligns
  std::string name;
  mutable int64_t bytes_read = 0;  // by kernels
};

// Kernels may reach these bytes as long as the object lives.
class RegisteredBuffer {
 public:
  RegisteredBuffer(const void* begin, size_t bytes, std::string name);
  ~RegisteredBuffer();
  RegisteredBuffer(const RegisteredBuffer&) = delete;
  RegisteredBuffer& operator=(const RegisteredBuffer&) = delete;
  int64_t bytes_read() const { return buffer_->bytes_read; }

 private:
  const Buffer* buffer_;
};

// The buffer that holds `pointer`, of several the one registered last; null: none.
const Buffer* find_buffer(const void* pointer);

}  // namespace s3d::emulator
