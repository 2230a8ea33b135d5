// libepskernels.so: torch.ops.epskernels.* for programs without Python. It defines the schemas, and brings the kernels: linking
// to libepskernels_cpu.so those for the CPU, and those for CUDA where the process has loaded a torch with CUDA.
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

#include <cstdio>
#include <string>

#include "schemas_defined.h"
#include "spec.h"

namespace {

// It lies beside this library, if it was built.
void load_cuda_kernels() {
  void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  Dl_info self;
  if (!torch_cuda || !dladdr(epskernels::SCHEMAS, &self)) return;
  dlclose(torch_cuda);
  const std::string path(self.dli_fname), folder = path.substr(0, path.rfind('/') + 1);
  if (!dlopen((folder + "libepskernels_cuda.so").c_str(), RTLD_NOW))
    std::fprintf(stderr, "epskernels: no kernels for CUDA tensors: %s\n", dlerror());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(epskernels, library) {
  if (epskernels::schemas_defined()) return;  // in a Python process: the package has loaded all that there is
  for (const char* schema : epskernels::SCHEMAS) library.def(schema);
  epskernels::schemas_defined() = true;
  load_cuda_kernels();
}
