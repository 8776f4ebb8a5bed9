#include "simd_portable.hpp"

#include "row_kernels.inl"
#include "score_kernels.inl"

namespace qadapter {
const Kernels kPortableKernels = {"portable", reduce, write_exp, write_log, policy_at, exp_array, score};
}
