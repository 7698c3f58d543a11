// Parcels of memory that kernels read and write.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <utility>

#include "annulus/communicator.h"
#include "base/aligned_buffer.h"

namespace annulus {

inline Parcel parcel_of(std::shared_ptr<const AlignedBuffer> buffer) {
  const std::span<const std::byte> bytes(buffer->data(),
                                         static_cast<std::size_t>(buffer->size_bytes()));
  return {bytes, std::move(buffer)};
}

}  // namespace annulus
