#include "simd_avx512.hpp"

#include "row_kernels.inl"
#include "score_kernels.inl"

namespace qadapter {
const Kernels kAvx512Kernels = {"avx512", reduce, write_exp, write_log, policy_at, exp_array, score};
}
