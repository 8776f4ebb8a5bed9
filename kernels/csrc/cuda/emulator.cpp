// All kernels in one library for a CPU. Built by tests/kernels/test_cuda_emulated.py, never installed.
#include "bradley_terry.cu"
#include "logits.cu"
#include "rows.cu"

QADAPTER_EXPORT void qadapter_emulator_options(int threads, int order, int clusters) {
  qadapter::emulator::options = {threads, order, clusters != 0};
}

// Launches of cluster kernels so far: a test sees which version served it.
QADAPTER_EXPORT long long qadapter_emulator_cluster_launches() {
  return qadapter::emulator::cluster_launches;
}
