#pragma once

namespace annulus {
inline namespace v1 {

// Semantic version of the library, the command line and the Python package.
inline constexpr const char* kVersion = "0.1.0";

}  // namespace v1
}  // namespace annulus
