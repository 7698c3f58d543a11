#include "io/escaped.h"

#include <gtest/gtest.h>

#include <string>

namespace annulus {
namespace {

TEST(Escaped, KeepsReadableTextAndQuotesIt) {
  EXPECT_EQ(escaped(""), "\"\"");
  EXPECT_EQ(escaped("model.layers.0/ä漢"), "\"model.layers.0/ä漢\"");
  EXPECT_EQ(escaped("a\"b\\c"), R"("a\"b\\c")");
}

TEST(Escaped, SpellsOutWhatSteersATerminal) {
  EXPECT_EQ(escaped(std::string("\0\n\x1b[2J", 6)), R"("\u0000\n\u001b[2J")");
  EXPECT_EQ(escaped("\x7f"), R"("\u007f")");
  EXPECT_EQ(escaped("\xc2\x9b"), R"("\u009b")");
  EXPECT_EQ(escaped("\xe2\x80\xae|\xe2\x81\xa9"), R"("\u202e|\u2069")");
  EXPECT_EQ(escaped("\xe2\x80\xa8\xe2\x80\xa9"), R"("\u2028\u2029")");
}

TEST(Escaped, ReplacesBrokenUtf8) {
  EXPECT_EQ(escaped("a\xff"), "\"a\xef\xbf\xbd\"");
  EXPECT_EQ(escaped("\xc2"), "\"\xef\xbf\xbd\"");
}

TEST(Escaped, CutsLongText) {
  const std::string shown = escaped(std::string(100'000, 'x'));
  EXPECT_LT(shown.size(), 300U);
  EXPECT_NE(shown.find("(100000 bytes)"), std::string::npos);
}

TEST(Escaped, TellsControlCharacters) {
  for (const char* text : {"\n", "a\x1b", "\x7f", "\xc2\x85", "\xe2\x80\xae"}) {
    EXPECT_TRUE(has_control_character(text)) << escaped(text);
  }
  for (const char* text : {"", "a b", "ä", "\xc2\xa0", "漢", "\xe2\x82\xac", "\xe2\x80\xa6"}) {
    EXPECT_FALSE(has_control_character(text)) << escaped(text);
  }
}

}  // namespace
}  // namespace annulus
