// Which instruction set the CPU kernel runs with: the best the machine has, or the one forced by hand.
#pragma once

#include <string>
#include <vector>

#define EPSKERNELS_EXPORT __attribute__((visibility("default")))

namespace epskernels {

EPSKERNELS_EXPORT std::vector<std::string> cpu_capabilities();  // those of this machine, the best last
EPSKERNELS_EXPORT std::string cpu_capability();                 // the one in use
EPSKERNELS_EXPORT void set_cpu_capability(const std::string& name);

}  // namespace epskernels
