// The emulator's side of cuda/memory.cuh: pointers that check each access, count it and look for races.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "emulator/block.h"
#include "emulator/global_memory.h"

namespace s3d::emulator {

// An index, and the line where it was used as one.
struct Index {
  int64_t value;
  Where where;
  Index(int64_t value, Where where = here()) : value(value), where(where) {}
};

class GlobalPlace {
 public:
  static constexpr bool kGlobal = true;
  GlobalPlace() = default;
  explicit GlobalPlace(const void* pointer)
      : pointer_(reinterpret_cast<uintptr_t>(pointer)), buffer_(pointer == nullptr ? nullptr : find_buffer(pointer)) {}

  bool null() const { return pointer_ == 0; }
  void advance(int64_t bytes) { pointer_ += bytes; }

  void read(void* to, uint32_t bytes, Where where) const {
    check_alignment(bytes, where);
    read_part(to, bytes, where);
  }
  // The first bytes of a larger access, whose alignment the caller checks.
  void read_part(void* to, uint32_t bytes, Where where) const {
    std::memcpy(to, in_range(bytes, AccessKind::kGlobalRead, where), bytes);
  }
  void write(const void* from, uint32_t bytes, Where where) const {
    check_alignment(bytes, where);
    std::memcpy(in_range(bytes, AccessKind::kGlobalWrite, where), from, bytes);
  }
  void* atomic(uint32_t bytes, Where where) const {
    check_alignment(bytes, where);
    return in_range(bytes, AccessKind::kGlobalWrite, where);
  }
  void check_alignment(uint32_t bytes, Where where) const {
    if (pointer_ % bytes != 0) misaligned(bytes, where);
  }

 private:
  void* in_range(uint32_t bytes, AccessKind kind, Where where) const {
    Block& block = running_block(where);
    const uintptr_t offset = pointer_ - (buffer_ == nullptr ? 0 : buffer_->begin);
    if (buffer_ == nullptr || offset >= buffer_->bytes || buffer_->bytes - offset < bytes) out_of_range(bytes, where);
    block.count({where.file, buffer_->address + offset, where.line, kind, static_cast<uint8_t>(bytes)});
    if (kind == AccessKind::kGlobalRead) buffer_->bytes_read += bytes;
    return reinterpret_cast<void*>(pointer_);
  }
  [[noreturn]] void out_of_range(uint32_t bytes, Where where) const;
  [[noreturn]] void misaligned(uint32_t bytes, Where where) const;

  uintptr_t pointer_ = 0;
  const Buffer* buffer_ = nullptr;
};

class SharedPlace {
 public:
  static constexpr bool kGlobal = false;
  SharedPlace() = default;
  SharedPlace(uint32_t begin, uint32_t bytes) : address_(begin), begin_(begin), end_(begin + bytes) {}

  bool null() const { return end_ == 0; }
  void advance(int64_t bytes) { address_ += bytes; }
  int64_t address() const { return address_; }

  void read(void* to, uint32_t bytes, Where where) const {
    const uint32_t address = counted(bytes, AccessKind::kSharedRead, where);
    running.block->shared().read(address, to, bytes, running.block->moment(where));
  }
  void write(const void* from, uint32_t bytes, Where where) const {
    const uint32_t address = counted(bytes, AccessKind::kSharedWrite, where);
    running.block->shared().write(address, from, bytes, running.block->moment(where));
  }
  void* atomic(uint32_t bytes, Where where) const {
    const uint32_t address = counted(bytes, AccessKind::kSharedWrite, where);
    return running.block->shared().atomic(address, bytes, running.block->moment(where));
  }
  uint32_t counted(uint32_t bytes, AccessKind kind, Where where) const {
    const uint32_t address = checked(bytes, where);
    running.block->count({where.file, address, where.line, kind, static_cast<uint8_t>(bytes)});
    return address;
  }
  uint32_t checked(uint32_t bytes, Where where) const {
    running_block(where);
    if (address_ < begin_ || address_ + bytes > end_) out_of_range(bytes, where);
    if (address_ % bytes != 0) misaligned(bytes, where);
    return static_cast<uint32_t>(address_);
  }

 private:
  [[noreturn]] void out_of_range(uint32_t bytes, Where where) const;
  [[noreturn]] void misaligned(uint32_t bytes, Where where) const;

  int64_t address_ = 0;
  uint32_t begin_ = 0, end_ = 0;
};

template <typename T>
constexpr uint32_t access_bytes() {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) & (sizeof(T) - 1)) == 0 && sizeof(T) <= 16,
                "an access moves 1, 2, 4, 8 or 16 bytes");
  return sizeof(T);
}

template <typename V, typename Place>
V load_from(const Place& place, Where where) {
  std::remove_const_t<V> value;
  place.read(&value, access_bytes<V>(), where);
  return value;
}

// What pointer[index] is: reads where a T is expected, writes where one is assigned.
template <typename T, typename Place>
class Reference {
 public:
  Reference(Place place, Where where) : place_(place), where_(where) {}
  operator T() const { return load_from<T>(place_, where_); }
  T operator=(T value) const {
    place_.write(&value, access_bytes<T>(), where_);
    return value;
  }
  T operator=(const Reference& other) const { return *this = static_cast<T>(other); }
  T operator+=(T value) const { return *this = static_cast<T>(*this) + value; }

 private:
  Place place_;
  Where where_;
};

template <typename T, typename Place>
class Pointer {
 public:
  Pointer() = default;
  Pointer(std::nullptr_t) {}
  explicit Pointer(Place place) : place_(place) {}
  template <typename P = Place, typename = std::enable_if_t<P::kGlobal>>
  Pointer(T* pointer) : place_(pointer) {}
  operator Pointer<const T, Place>() const { return Pointer<const T, Place>(place_); }

  explicit operator bool() const { return !place_.null(); }
  bool operator==(std::nullptr_t) const { return place_.null(); }
  bool operator!=(std::nullptr_t) const { return !place_.null(); }

  auto operator[](Index index) const {
    Place place = place_;
    place.advance(index.value * static_cast<int64_t>(sizeof(T)));
    if constexpr (std::is_const_v<T>) {
      return load_from<std::remove_const_t<T>>(place, index.where);
    } else {
      return Reference<T, Place>(place, index.where);
    }
  }
  Pointer operator+(int64_t elements) const {
    Pointer result = *this;
    return result += elements;
  }
  Pointer operator-(int64_t elements) const { return *this + -elements; }
  Pointer& operator+=(int64_t elements) {
    place_.advance(elements * static_cast<int64_t>(sizeof(T)));
    return *this;
  }
  const Place& place() const { return place_; }

 private:
  Place place_;
};

// Reads, changes by `change` and writes; returns what was there.
template <typename T, typename Place, typename Change>
T change_atomically(const Pointer<T, Place>& pointer, Change change, Where where) {
  static_assert(std::is_integral_v<T>, "floating-point atomics give other bits from run to run");
  void* const at = pointer.place().atomic(access_bytes<T>(), where);
  T old;
  std::memcpy(&old, at, sizeof(T));
  const T next = change(old);
  std::memcpy(at, &next, sizeof(T));
  return old;
}

template <typename T>
struct Same {
  using type = T;
};
template <typename T>
using SameType = typename Same<T>::type;

#define S3D_EMULATOR_ATOMIC(name, next)                                                             \
  template <typename T, typename Place>                                                             \
  T name(const Pointer<T, Place>& pointer, SameType<T> value, Where where = here()) {               \
    return change_atomically(pointer, [=](T old) -> T { return next; }, where);                     \
  }
S3D_EMULATOR_ATOMIC(atomicAdd, old + value)
S3D_EMULATOR_ATOMIC(atomicMin, old < value ? old : value)
S3D_EMULATOR_ATOMIC(atomicMax, old > value ? old : value)
S3D_EMULATOR_ATOMIC(atomicAnd, old & value)
S3D_EMULATOR_ATOMIC(atomicOr, old | value)
S3D_EMULATOR_ATOMIC(atomicExch, (static_cast<void>(old), value))
#undef S3D_EMULATOR_ATOMIC

template <typename T, typename Place>
T atomicCAS(const Pointer<T, Place>& pointer, SameType<T> expected, SameType<T> value, Where where = here()) {
  return change_atomically(pointer, [=](T old) { return old == expected ? value : old; }, where);
}

}  // namespace s3d::emulator

namespace s3d::cuda {

template <typename T>
using Global = emulator::Pointer<T, emulator::GlobalPlace>;
template <typename T>
using Shared = emulator::Pointer<T, emulator::SharedPlace>;

template <typename V, typename T, typename Place>
V load(const emulator::Pointer<T, Place>& pointer, emulator::Where where = emulator::here()) {
  return emulator::load_from<V>(pointer.place(), where);
}

template <typename V, typename T, typename Place>
void store(const emulator::Pointer<T, Place>& pointer, const V& value, emulator::Where where = emulator::here()) {
  static_assert(!std::is_const_v<T>, "a pointer to const");
  pointer.place().write(&value, emulator::access_bytes<V>(), where);
}

template <typename U, typename T, typename Place>
emulator::Pointer<U, Place> pointer_cast(const emulator::Pointer<T, Place>& pointer) {
  static_assert(std::is_const_v<U> || !std::is_const_v<T>, "casts const away");
  return emulator::Pointer<U, Place>(pointer.place());
}

template <typename T>
Shared<T> dynamic_shared(uint32_t byte_offset, uint32_t count, emulator::Where where = emulator::here()) {
  const uint64_t bytes = uint64_t{count} * sizeof(T);
  const uint32_t available = emulator::running_block(where).shared().dynamic_bytes();
  if (byte_offset + bytes > available) {
    const std::string end = std::to_string(byte_offset + bytes);
    emulator::fail(emulator::FaultKind::kOutOfRange,
                   "takes bytes " + std::to_string(byte_offset) + " to " + end + " of " + std::to_string(available) +
                       " bytes of dynamic shared memory",
                   where);
  }
  return Shared<T>(emulator::SharedPlace(byte_offset, static_cast<uint32_t>(bytes)));
}

template <typename T>
Shared<T> static_shared(const void* key, uint32_t count, emulator::Where where = emulator::here()) {
  const auto bytes = static_cast<uint32_t>(count * sizeof(T));
  const uint32_t begin = emulator::running_block(where).shared().static_array(key, bytes, where);
  return Shared<T>(emulator::SharedPlace(begin, bytes));
}

}  // namespace s3d::cuda

// The address of `name`_key is the array's name.
#define S3D_SHARED(type, name, count) \
  static char name##_key;             \
  const ::s3d::cuda::Shared<type> name = ::s3d::cuda::static_shared<type>(&name##_key, count)
