#include "base/environment.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <string>

#include "annulus/error.h"

namespace annulus {
namespace {

class ScopedVariable {
 public:
  ScopedVariable(const std::string& name, const std::string& value) : name_(name) {
    setenv(name_.c_str(), value.c_str(), 1);
  }
  ~ScopedVariable() { unsetenv(name_.c_str()); }
  ScopedVariable(const ScopedVariable&) = delete;
  ScopedVariable& operator=(const ScopedVariable&) = delete;

 private:
  std::string name_;
};

std::string refusal(const std::string& name, const std::string& value) {
  const ScopedVariable variable(name, value);
  try {
    read_environment();
  } catch (const ConfigError& error) {
    EXPECT_EQ(error.code(), ErrorCode::kConfigError);
    EXPECT_FALSE(error.fix().empty());
    return error.what();
  }
  ADD_FAILURE() << name << "=" << value << " was accepted";
  return {};
}

bool holds(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST(Environment, UnsetMeansDefaults) {
  const Environment environment = read_environment();
  EXPECT_EQ(environment.isa, "");
  EXPECT_FALSE(environment.threads.has_value());
  EXPECT_FALSE(environment.workers.has_value());
  EXPECT_FALSE(environment.timeout_s.has_value());
}

TEST(Environment, EmptyMeansUnset) {
  for (const char* name :
       {"ANNULUS_ISA", "ANNULUS_THREADS", "ANNULUS_TIMEOUT_S", "ANNULUS_VERBOSE"}) {
    const ScopedVariable variable(name, "");
    EXPECT_NO_THROW(read_environment()) << name;
  }
}

TEST(Environment, ReadsEachValue) {
  const ScopedVariable isa("ANNULUS_ISA", "avx512_bf16"), threads("ANNULUS_THREADS", "3");
  const ScopedVariable workers("ANNULUS_WORKERS", "4"), timeout("ANNULUS_TIMEOUT_S", "2.5");
  const Environment environment = read_environment();
  EXPECT_EQ(environment.isa, "avx512_bf16");
  EXPECT_EQ(environment.threads, 3);
  EXPECT_EQ(environment.workers, 4);
  EXPECT_EQ(environment.timeout_s, 2.5);
}

TEST(Environment, NoneIsAnInfiniteTimeout) {
  const ScopedVariable timeout("ANNULUS_TIMEOUT_S", "none");
  EXPECT_EQ(read_environment().timeout_s, std::numeric_limits<double>::infinity());
}

TEST(Environment, RefusesBadValues) {
  for (const char* value : {"0", "-1", "two", "2.5", "2 ", " 2", "65537", "99999999999999999999"}) {
    EXPECT_TRUE(holds(refusal("ANNULUS_WORKERS", value), "ANNULUS_WORKERS is '")) << value;
    EXPECT_TRUE(holds(refusal("ANNULUS_THREADS", value), "expected a whole number")) << value;
  }
  for (const char* value : {"0", "0.5", "-1", "inf", "nan", "None", "1s", "1e999"}) {
    EXPECT_TRUE(holds(refusal("ANNULUS_TIMEOUT_S", value), "or none")) << value;
  }
  for (const char* value : {"AVX2", "avx2 ", "avx-512"}) {
    EXPECT_TRUE(holds(refusal("ANNULUS_ISA", value), value)) << value;
  }
}

TEST(Environment, NamesTheNearestKnownVariable) {
  EXPECT_TRUE(
      holds(refusal("ANNULUS_WORKER", "2"), "'ANNULUS_WORKER', nearest known is ANNULUS_WORKERS"));
  EXPECT_TRUE(holds(refusal("ANNULUS_TIMEOUT", "2"), "nearest known is ANNULUS_TIMEOUT_S"));
  EXPECT_TRUE(holds(refusal("ANNULUS_THREAD_COUNT", "2"), "nearest known is ANNULUS_THREADS"));
  EXPECT_TRUE(holds(refusal("ANNULUS_" + std::string(100000, 'x'), "2"),
                    "...', nearest known is ANNULUS_"));
}

TEST(Environment, LeavesOtherNamesAlone) {
  const ScopedVariable other("ANNULUSWORKERS", "2"), lower("annulus_workers", "2");
  EXPECT_NO_THROW(read_environment());
}

TEST(Environment, RefusesWhatThisBuildLacks) {
  EXPECT_TRUE(holds(refusal("ANNULUS_TRANSPORT", "mpi"), "this build has no MPI transport"));
  EXPECT_TRUE(holds(refusal("ANNULUS_TRANSPORT", "tcp"), "expected auto or inproc"));
  EXPECT_TRUE(holds(refusal("ANNULUS_VERBOSE", "all"), "this build has no"));
  EXPECT_TRUE(holds(refusal("ANNULUS_VERBOSE_FILE", "/tmp/x"), "this build has no"));
  EXPECT_TRUE(holds(refusal("ANNULUS_MPI_PLUGIN", "/tmp/x.so"), "this build has no"));
  for (const char* value : {"auto", "inproc"}) {
    const ScopedVariable transport("ANNULUS_TRANSPORT", value);
    EXPECT_NO_THROW(read_environment()) << value;
  }
}

TEST(Environment, EscapesHostileText) {
  const std::string hostile = "a\n\x1b[31mred\x9b\\'" + std::string(1000, 'x');
  for (const std::string& message :
       {refusal("ANNULUS_ISA", hostile), refusal("ANNULUS_TIMEOUT_S", hostile),
        refusal("ANNULUS_" + hostile, "1")}) {
    EXPECT_LT(message.size(), 400U);
    for (const char c : message) EXPECT_TRUE(c >= ' ' && c <= '~') << message;
  }
  EXPECT_TRUE(holds(refusal("ANNULUS_ISA", hostile), "a\\x0a\\x1b[31mred\\x9b\\x5c\\x27"));
}

}  // namespace
}  // namespace annulus
