// The only place that reads environment variables.
#pragma once

#include <optional>
#include <string>

namespace annulus {

struct Environment {
  std::string isa;                  // ANNULUS_ISA; empty if unset
  std::optional<int> threads;       // ANNULUS_THREADS
  std::optional<int> workers;       // ANNULUS_WORKERS
  std::optional<double> timeout_s;  // ANNULUS_TIMEOUT_S; infinity for "none"
};

// Throws ConfigError for a bad value, and for an unknown name that starts with ANNULUS_ (naming the
// nearest known one).
Environment read_environment();

}  // namespace annulus
