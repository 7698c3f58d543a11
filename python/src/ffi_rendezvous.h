// Where the devices of a ring meet. XLA runs a program once per device, each with threads of its
// own choice; a device's call waits here until every rank of its ring has come, and then the ring
// runs on threads of ours. No thread of XLA's ever waits: a pool of any size will do, and devices
// may come in any order.
#pragma once

#include <compare>
#include <cstdint>
#include <functional>
#include <string>

#include "annulus/communicator.h"
#include "ffi_frame.h"

namespace annulus::python {

// Calls meet iff they agree in all of this. `site` is one call in one compiled program, which all
// its devices share; `run` one execution of that program; `turn` counts how often the device has
// come to the site in that run (a loop comes often); `group` tells rings of one mesh apart.
struct MeetingPlace {
  std::int64_t site = 0, run = 0, turn = 0, group = 0;
  auto operator<=>(const MeetingPlace&) const = default;
};

struct MeetingTerms {
  const char* operation = "";
  std::string axis;    // name of the ring's axis, for errors
  int world_size = 1;  // how many ranks are waited for
  double timeout_s = 30;
};

struct Arrival {
  std::function<void(Communicator&)> work;  // on a thread of ours
  FfiPromise promise;                       // kept, whatever happens
};

// Returns at once. Ranks that have not come within timeout_s after the first one did end the
// meeting with a PeerTimeout that names them; an error of one rank ends the others' calls with it.
// Two arrivals of one rank (devices that hold the same data) form two rings.
void meet(const MeetingPlace& place, const MeetingTerms& terms, int rank, Arrival arrival);

}  // namespace annulus::python
