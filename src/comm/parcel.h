// Parcels that own their memory.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "annulus/communicator.h"
#include "base/aligned_buffer.h"

namespace annulus {

// What kernels read and write.
inline Parcel parcel_of(std::shared_ptr<const AlignedBuffer> buffer) {
  const std::span<const std::byte> bytes(buffer->data(),
                                         static_cast<std::size_t>(buffer->size_bytes()));
  return {bytes, std::move(buffer)};
}

inline Parcel parcel_of(std::vector<std::byte> bytes) {
  const auto owned = std::make_shared<const std::vector<std::byte>>(std::move(bytes));
  return {std::span<const std::byte>(*owned), owned};
}

}  // namespace annulus
