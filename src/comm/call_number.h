// Numbers of calls. Those of a group carry it in their high bits, so that no two communicators of
// one world have one in common.
#pragma once

#include <cstdint>
#include <string>

#include "annulus/communicator.h"
#include "base/fail.h"

namespace annulus {

constexpr int kCallBits = 32;  // 4e9 calls: a million steps of 1000 layers
constexpr std::int64_t kMeshes = std::int64_t{1} << 30;  // groups from here on are meshes' rings

constexpr std::int64_t call_number(std::int64_t group, std::int64_t call) {
  return (group << kCallBits) + call;
}

// As errors name it.
inline std::string call_name(const Tag& tag) {
  const std::int64_t group = tag.call >> kCallBits, call = tag.call - call_number(group, 0);
  std::string name = concat(tag.channel == Channel::kGather ? "gathering " : "call ", call);
  if (group > 0 && group < kMeshes) name += concat(" of group ", group);
  if (group >= kMeshes) name += concat(" of mesh ", group - kMeshes);
  return name;
}

}  // namespace annulus
