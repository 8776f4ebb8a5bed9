// Which instruction set serves this process.
#include <atomic>

#include "driver.hpp"

namespace {

using namespace qadapter;

const Kernels* best_kernels() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2");
  if (fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return &kAvx512Kernels;
  }
  // Every processor with AVX2 and FMA has F16C, which older compilers can't ask for by name.
  if (fma) return &kAvx2Kernels;
#endif
  return &kPortableKernels;
}

std::atomic<const Kernels*> selected{best_kernels()};

}  // namespace

namespace qadapter {
const Kernels& selected_kernels() { return *selected.load(std::memory_order_relaxed); }
}  // namespace qadapter

// What native.py's INTERFACE has to be: raised with every change of a function's arguments.
QADAPTER_API int32_t qadapter_cpu_interface() { return 2; }

// Name of the kernels in use: "portable", "avx2" or "avx512".
QADAPTER_API const char* qadapter_cpu_isa() { return selected_kernels().name; }

// Selects the kernels by name (for tests; not while another thread is in a call). Null or "best":
// the fastest. Returns 0, or 1 if this processor or build lacks them.
QADAPTER_API int32_t qadapter_cpu_select_isa(const char* name) {
  const Kernels* best = best_kernels();
  if (name == nullptr || std::strcmp(name, "best") == 0) {
    selected = best;
    return 0;
  }
  const Kernels* known[] = {
      &kPortableKernels,
#if defined(__x86_64__)
      &kAvx2Kernels, &kAvx512Kernels,
#endif
  };
  for (const Kernels* kernels : known) {  // in ascending order: all up to the best can run
    if (std::strcmp(name, kernels->name) == 0) {
      selected = kernels;
      return 0;
    }
    if (kernels == best) break;
  }
  return 1;
}

QADAPTER_API void qadapter_cpu_exp(const float* in, float* out, int64_t count) {
  selected_kernels().exp(in, out, count);
}
