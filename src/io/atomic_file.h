// Files that appear whole or not at all.
#pragma once

#include <cstdint>
#include <string>

#include "io/file_descriptor.h"

namespace annulus {

enum class FileAccess : std::uint8_t {
  kOwner,  // 0600: traces and reports tell about a user's data
  kUmask,  // 0644 less the process's umask
};

// Writes into a temporary file (0600) beside `path`; commit() syncs it and renames it to `path`.
// Without commit() the temporary file goes and `path` stays as it was. Refuses to replace anything
// but a regular file: renaming over /dev/null would remove the device. Every member throws IoError
// naming `path`.
class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path);
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile();

  void write(const void* data, std::int64_t bytes);
  void commit(FileAccess access);

 private:
  [[noreturn]] void fail_at(const char* step, int error) const;

  std::string path_;
  std::string temporary_path_;  // empty once there is nothing to remove
  FileDescriptor folder_;
  FileDescriptor file_;
};

}  // namespace annulus
