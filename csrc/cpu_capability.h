// Which instruction set the CPU kernel runs with: the best the machine has, or the one forced by hand; and its normals.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#define EPSKERNELS_EXPORT __attribute__((visibility("default")))

namespace epskernels {

EPSKERNELS_EXPORT std::vector<std::string> cpu_capabilities();  // those of this machine, the best last
EPSKERNELS_EXPORT std::string cpu_capability();                 // the one in use
EPSKERNELS_EXPORT void set_cpu_capability(const std::string& name);

// Normals of elements [begin, begin + count) of a sample of any size, as the instruction set in use makes them.
EPSKERNELS_EXPORT std::vector<float> normal_elements(uint64_t seed, uint32_t draw, uint32_t stream, int64_t begin,
                                                     int64_t count);

}  // namespace epskernels
