// epskernels._C: build information, CPU capability, host utilities. Never tensors: those go through torch.ops.epskernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cpu_capability.h"
#include "philox.h"
#include "schemas_defined.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  epskernels::schemas_defined() = true;  // by ops/registration.py, before it imports this module
  module.doc() = "Build information and host utilities of epskernels.";
  module.def("cpu_capabilities", &epskernels::cpu_capabilities,
             "Instruction sets that the CPU kernel can use on this machine, the best last.");
  module.def("cpu_capability", &epskernels::cpu_capability, "The instruction set in use.");
  module.def("set_cpu_capability", &epskernels::set_cpu_capability, py::arg("name"),
             "Force an instruction set; ValueError lists those of this machine.");
  module.def(
      "philox",
      [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
        const auto w = epskernels::philox({counter[0], counter[1], counter[2], counter[3]}, key[0], key[1]);
        return std::array<uint32_t, 4>{w.w0, w.w1, w.w2, w.w3};
      },
      py::arg("counter"), py::arg("key"), "Philox4x32-10: four words from a counter of four and a key of two.");
  module.def("normal_elements", &epskernels::normal_elements, py::arg("seed"), py::arg("draw"), py::arg("stream"),
             py::arg("begin"), py::arg("count"),
             "Normals of elements [begin, begin + count) of a sample: a look into noise of any size.");
  module.def("build_info", [] {
    py::dict info;
    info["version"] = EPSKERNELS_VERSION;
    info["compiler"] = EPSKERNELS_COMPILER;
    info["build_type"] = EPSKERNELS_BUILD_TYPE;
    info["torch_headers"] = EPSKERNELS_TORCH_VERSION;
    info["torch_target"] = "2.11";
    return info;
  });
}
