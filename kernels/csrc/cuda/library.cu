// What the Python side asks before it uses the library.
#include <cuda_runtime.h>

#define QADAPTER_EXPORT extern "C" __attribute__((visibility("default")))

namespace {
__global__ void probe() {}
}  // namespace

// What native.py's INTERFACE has to be: raised with every change of a function's arguments.
QADAPTER_EXPORT int qadapter_cuda_interface() { return 2; }

// The name of an error the other functions returned.
QADAPTER_EXPORT const char* qadapter_cuda_error_name(int error) {
  return cudaGetErrorName(static_cast<cudaError_t>(error));
}

// 0 if this library holds code for the current device and the driver can run it.
QADAPTER_EXPORT int qadapter_cuda_probe() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
  cudaGetLastError();  // not to be found by someone else
  return error;
}
