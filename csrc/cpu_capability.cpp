#include "cpu_capability.h"

#include <atomic>
#include <stdexcept>

#include "step_cpu.h"

#if defined(EPSKERNELS_X86)
#include <cpuid.h>
#endif

namespace epskernels {
namespace {

#if defined(EPSKERNELS_X86)
// Not every compiler's __builtin_cpu_supports knows the name.
bool has_f16c() {
  unsigned eax, ebx, ecx = 0, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

[[maybe_unused]] bool machine_has(const CpuKernels& kernels) {  // only x86 has more than one
#if defined(EPSKERNELS_X86)
  if (&kernels == &avx2::kernels) return __builtin_cpu_supports("avx2") && has_f16c();
  if (&kernels == &avx512::kernels)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && has_f16c();
#endif
  return &kernels == &generic::kernels;
}

std::vector<const CpuKernels*> available_kernels() {
  std::vector<const CpuKernels*> available{&generic::kernels};
#if defined(EPSKERNELS_X86)
  __builtin_cpu_init();
  for (const CpuKernels* kernels : {&avx2::kernels, &avx512::kernels})
    if (machine_has(*kernels)) available.push_back(kernels);
#endif
  return available;
}

std::atomic<const CpuKernels*>& chosen_kernels() {
  static std::atomic<const CpuKernels*> chosen{available_kernels().back()};
  return chosen;
}

}  // namespace

const CpuKernels& cpu_kernels() { return *chosen_kernels().load(std::memory_order_relaxed); }

std::vector<std::string> cpu_capabilities() {
  std::vector<std::string> names;
  for (const CpuKernels* kernels : available_kernels()) names.push_back(kernels->name);
  return names;
}

std::string cpu_capability() { return chosen_kernels().load()->name; }

void set_cpu_capability(const std::string& name) {
  std::string known;
  for (const CpuKernels* kernels : available_kernels()) {
    if (name == kernels->name) {
      chosen_kernels().store(kernels);
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::invalid_argument("cpu capability: expected one of " + known + " on this machine, got '" + name + "'");
}

std::vector<float> normal_elements(uint64_t seed, uint32_t draw, uint32_t stream, int64_t begin, int64_t count) {
  if (begin < 0 || begin % 4 != 0) throw std::invalid_argument("begin: expected a multiple of 4, at least 0");
  if (count < 1 || count > TILE) throw std::invalid_argument("count: expected 1 to " + std::to_string(TILE));
  if (begin > INT64_MAX - count) throw std::invalid_argument("begin: expected less than 2^63 - count");
  std::vector<float> elements(count);
  char* out = reinterpret_cast<char*>(elements.data());
  cpu_kernels().normal(seed, draw, stream, Dtype::float32, out, begin, begin + count);
  return elements;
}

}  // namespace epskernels
