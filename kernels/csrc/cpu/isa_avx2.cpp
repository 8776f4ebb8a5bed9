#include "simd_avx2.hpp"

#include "row_kernels.inl"
#include "score_kernels.inl"

namespace qadapter {
const Kernels kAvx2Kernels = {"avx2", reduce, write_exp, write_log, policy_at, exp_array, score};
}
