#include "emulator/global_memory.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

namespace s3d::emulator {
namespace {

constexpr uint64_t kAlignment = 256;

std::vector<std::unique_ptr<Buffer>>& buffers() {
  static std::vector<std::unique_ptr<Buffer>> all;
  return all;
}

}  // namespace

RegisteredBuffer::RegisteredBuffer(const void* begin, size_t bytes, std::string name) {
  static uint64_t next_address = 0;
  const uint64_t address = next_address;
  next_address += (bytes / kAlignment + 1) * kAlignment;
  const auto place = reinterpret_cast<uintptr_t>(begin);
  buffers().push_back(std::make_unique<Buffer>(Buffer{place, bytes, address, std::move(name), 0}));
  buffer_ = buffers().back().get();
}

RegisteredBuffer::~RegisteredBuffer() {
  auto& all = buffers();
  all.erase(std::find_if(all.begin(), all.end(), [&](const auto& buffer) { return buffer.get() == buffer_; }));
}

const Buffer* find_buffer(const void* pointer) {
  const auto place = reinterpret_cast<uintptr_t>(pointer);
  const auto& all = buffers();
  for (auto buffer = all.rbegin(); buffer != all.rend(); ++buffer) {
    // The begin of an empty buffer counts as its inside.
    if (place == (*buffer)->begin || place - (*buffer)->begin < (*buffer)->bytes) return buffer->get();
  }
  return nullptr;
}

}  // namespace s3d::emulator
