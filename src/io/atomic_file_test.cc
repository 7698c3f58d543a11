#include "io/atomic_file.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <cstddef>
#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include "annulus/error.h"
#include "annulus/report.h"
#include "annulus/safetensors.h"
#include "io/file_testing.h"

namespace annulus {
namespace {

using std::string_literals::operator""s;

class AtomicFiles : public FileTest {};

namespace fs = std::filesystem;

void expect_write_fails(const std::string& path) {
  const std::byte data[2] = {};
  try {
    write_safetensors(path, {{"a", "U8", {2}, data, 2}}, {});
    ADD_FAILURE() << path;
  } catch (const IoError& error) {
    EXPECT_NE(std::string(error.what()).find(fs::path(path).filename().string()), std::string::npos)
        << error.what();
  }
  EXPECT_THROW(write_text_atomically(path, "text"), IoError) << path;
}

TEST_F(AtomicFiles, FailsToWriteWhereItCannotAndLeavesNothingBehind) {
  write_raw(path("file"), "old");
  fs::create_directory(path("folder"));
  ASSERT_EQ(::mkfifo(path("pipe").c_str(), 0600), 0);
  fs::create_symlink("/dev/null", path("link"));
  const std::set<std::string> before = names_in_folder();
  expect_write_fails(path("missing/x"));
  expect_write_fails(path("file/x"));
  expect_write_fails(path("folder"));
  expect_write_fails(path("folder/"));
  expect_write_fails(path("pipe"));
  expect_write_fails(path("link"));
  expect_write_fails("/dev/null");
  EXPECT_THROW(write_text_atomically("", "text"), IoError);
  EXPECT_THROW(write_text_atomically(path("a\0b"s), "text"), IoError);
  EXPECT_EQ(names_in_folder(), before);
  EXPECT_EQ(read_raw(path("file")), "old");
}

// A limit on the size of files stands for a full disk: the write comes back short, then fails.
TEST_F(AtomicFiles, KeepsTheOldContentWhenTheDiskIsFull) {
  const std::vector<std::byte> data(100'000);
  const std::vector<NamedTensor> tensors = {{"a", "U8", {100'000}, data.data(), 100'000}};
  write_raw(path(), "old content");
  rlimit old_limit{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &old_limit), 0);
  auto* const old_handler = ::signal(SIGXFSZ, SIG_IGN);
  const rlimit limit{.rlim_cur = 50'000, .rlim_max = old_limit.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &limit), 0);
  EXPECT_THROW(write_safetensors(path(), tensors, {}), IoError);
  EXPECT_THROW(write_text_atomically(path(), std::string(100'000, 'x')), IoError);
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &old_limit), 0);
  ::signal(SIGXFSZ, old_handler);
  EXPECT_EQ(read_raw(path()), "old content");
  EXPECT_EQ(names_in_folder(), std::set<std::string>{"x.safetensors"});

  write_safetensors(path(), tensors, {});
  EXPECT_EQ(SafetensorsFile::open(path()).tensors().at(0).bytes, 100'000);
  EXPECT_EQ(names_in_folder(), std::set<std::string>{"x.safetensors"});
}

TEST_F(AtomicFiles, WithoutCommitChangeNothing) {
  write_raw(path(), "old content");
  {
    AtomicFile file(path());
    file.write("new", 3);
    EXPECT_EQ(names_in_folder().size(), 2U);
  }
  EXPECT_EQ(read_raw(path()), "old content");
  EXPECT_EQ(names_in_folder(), std::set<std::string>{"x.safetensors"});
}

mode_t mode_of(const std::string& path) {
  struct stat found {};
  return ::stat(path.c_str(), &found) == 0 ? found.st_mode & 0777U : 0;
}

TEST_F(AtomicFiles, ModesFollowTheUmaskAndTextsStayPrivate) {
  for (const mode_t mask : {mode_t{0022}, mode_t{0027}, mode_t{0}}) {
    const mode_t old_mask = ::umask(mask);
    write_safetensors(path(), {}, {});
    write_text_atomically(path("text"), "a\nb");
    ::umask(old_mask);
    EXPECT_EQ(mode_of(path()), 0644U & ~mask);
    EXPECT_EQ(mode_of(path("text")), 0600U);
  }
  EXPECT_EQ(read_raw(path("text")), "a\nb");
}

TEST_F(AtomicFiles, WritesIntoTheCurrentFolderAndOverAReadOnlyOldFile) {
  const fs::path old_folder = fs::current_path();
  fs::current_path(folder_);
  write_text_atomically("text", "one");
  ASSERT_EQ(::chmod("text", 0400), 0);
  write_text_atomically("text", "two");
  fs::current_path(old_folder);
  EXPECT_EQ(read_raw(path("text")), "two");
}

}  // namespace
}  // namespace annulus
