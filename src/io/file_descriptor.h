// Owner of a POSIX file descriptor, and the text of errno.
#pragma once

#include <unistd.h>

#include <string>
#include <system_error>
#include <utility>

namespace annulus {

class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int fd) : fd_(fd) {}
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~FileDescriptor() {
    if (fd_ >= 0) ::close(fd_);
  }

  [[nodiscard]] int get() const { return fd_; }
  [[nodiscard]] bool valid() const { return fd_ >= 0; }
  // For writers, who must hear of what close() still finds out. Returns 0 or -1 with errno.
  int close() { return ::close(std::exchange(fd_, -1)); }

 private:
  int fd_ = -1;
};

// strerror() is not safe among threads; this is.
inline std::string errno_text(int error) { return std::generic_category().message(error); }

}  // namespace annulus
