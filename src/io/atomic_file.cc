#include "io/atomic_file.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <fstream>

#include "annulus/report.h"
#include "base/fail.h"
#include "io/escaped.h"

namespace annulus {
namespace {

constexpr const char* kOperation = "write file";

std::string folder_of(const std::string& path) {
  const std::size_t slash = path.rfind('/');
  return slash == std::string::npos ? "./" : path.substr(0, slash + 1);
}

// umask() can only be read by changing it, under the feet of other threads; the kernel also tells
// it in a file.
mode_t mode_under_umask(mode_t mode) {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    unsigned mask = 0;
    if (word == "Umask:" && status >> std::oct >> mask) return mode & ~mask;
  }
  return mode & 0700U;
}

void check_target(const std::string& path) {
  if (path.find('\0') != std::string::npos) {
    fail<IoError>(kOperation, escaped(path), ": the path holds a NUL character");
  }
  struct stat found {};
  if (::stat(path.c_str(), &found) == 0 && !S_ISREG(found.st_mode)) {
    fail<IoError>(kOperation, escaped(path), " exists and is ",
                  S_ISDIR(found.st_mode) ? "a directory" : "a device, a pipe or a socket",
                  ", expected a regular file or none");
  }
}

std::string fix_for(int error) {
  if (error == ENOENT) return "create the folder first";
  if (error == ENOSPC || error == EDQUOT) return "free space or write to another file system";
  if (error == EACCES || error == EROFS) return "write to a folder that you may write to";
  return {};
}

}  // namespace

AtomicFile::AtomicFile(const std::string& path) : path_(path) {
  check_target(path);
  const std::string folder = folder_of(path);
  // Opened before anything is written: once the rename is done, it is too late to fail for want of
  // this.
  folder_ = FileDescriptor(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!folder_.valid()) fail_at("cannot open its folder", errno);
  std::string name = folder + ".annulus-XXXXXX";
  file_ = FileDescriptor(::mkostemp(name.data(), O_CLOEXEC));  // O_EXCL and 0600 by contract
  if (!file_.valid()) fail_at("cannot create a temporary file in its folder", errno);
  temporary_path_ = name;
}

AtomicFile::~AtomicFile() {
  if (!temporary_path_.empty()) ::unlink(temporary_path_.c_str());
}

void AtomicFile::write(const void* data, std::int64_t bytes) {
  const auto* from = static_cast<const std::byte*>(data);
  while (bytes > 0) {
    const ssize_t written = ::write(file_.get(), from, static_cast<std::size_t>(bytes));
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) fail_at("cannot write", written < 0 ? errno : EIO);
    from += written;
    bytes -= written;
  }
}

void AtomicFile::commit(FileAccess access) {
  const mode_t mode = access == FileAccess::kOwner ? 0600 : mode_under_umask(0644);
  if (::fchmod(file_.get(), mode) != 0) fail_at("cannot set its mode", errno);
  if (::fsync(file_.get()) != 0) fail_at("cannot sync", errno);
  if (file_.close() != 0) fail_at("cannot close", errno);
  if (::rename(temporary_path_.c_str(), path_.c_str()) != 0) {
    fail_at("cannot rename into place", errno);
  }
  temporary_path_.clear();
  // Some file systems cannot sync a folder and say EINVAL; there is nothing better to do on them.
  if (::fsync(folder_.get()) != 0 && errno != EINVAL) fail_at("cannot sync its folder", errno);
}

void AtomicFile::fail_at(const char* step, int error) const {
  fail_with_fix<IoError>(fix_for(error), kOperation, escaped(path_), ": ", step, ": ",
                         errno_text(error));
}

inline namespace v1 {

void write_text_atomically(const std::string& path, const std::string& text) {
  AtomicFile file(path);
  file.write(text.data(), static_cast<std::int64_t>(text.size()));
  file.commit(FileAccess::kOwner);
}

}  // namespace v1
}  // namespace annulus
