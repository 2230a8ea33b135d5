// torch's device guard and stream, for a torch without CUDA: there is one device, the host.
#define USE_CUDA

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "cuda_runtime.h"

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

extern "C" __attribute__((visibility("default"))) void epskernels_launch_elsewhere(Launch launch) { launch_elsewhere = launch; }
