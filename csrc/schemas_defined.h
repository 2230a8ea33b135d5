// Whether the process has the ops' schemas already. A second definition would end it: Python's package (ops/registration.py,
// module.cpp) and libepskernels.so (standalone.cpp), which may both be loaded, ask and say so here, in libepskernels_cpu.so, which
// both load.
#pragma once

namespace epskernels {

__attribute__((visibility("default"))) bool& schemas_defined();

}  // namespace epskernels
