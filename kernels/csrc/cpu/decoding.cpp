// Decoding: log-probabilities of the customised policy, optionally at another strength.
#include "driver.hpp"

using namespace qadapter;

// out[N, V] = log softmax(u), or with a strength w per row log softmax(w log pi~ + (1 - w) log pi).
QADAPTER_API int32_t qadapter_cpu_combine_logits(
    const void* a, int64_t a_stride, int32_t a_dtype, const void* b, int64_t b_stride,
    int32_t b_dtype, const double* coef_4, const float* strength, int64_t num_rows,
    int64_t num_columns, float* out, int32_t threads) {
  const Matrix a_NV(a, a_stride, a_dtype), b_NV(b, b_stride, b_dtype);
  const Matrix out_NV(out, num_columns, int32_t(DType::kFloat32));
  const Coefficients c = unpack(coef_4);

  const auto make = [&](int64_t n) {
    Row row = empty_row();
    const double w = strength ? strength[n] : 1.0;
    if (w == 0.0) {
      row.policy[row.num_terms++] = b_NV.source(n, 1.0);
      return row;
    }
    if (w == 1.0) {
      set_policy(&row, a_NV, b_NV, c, n);
      return row;
    }
    // Up to a constant a row; b is read even where its weight cancels: what it excludes stays so.
    const double weight_a = w * c.adapter / c.alpha_tilde;
    const double weight_b = w * c.base_weight() / c.alpha_tilde + (1.0 - w);
    if (c.adapter != 0) row.policy[row.num_terms++] = a_NV.source(n, weight_a);
    row.policy[row.num_terms++] = b_NV.source(n, weight_b);
    return row;
  };
  const auto write = [&](int64_t n, const Row& row, const Summary& s, int64_t begin, int64_t end) {
    const float log_sum = s.policy_sum == 0.0 ? 0.0f : float(std::log(s.policy_sum));
    selected_kernels().write_log(row, begin, end, float(s.policy_peak), log_sum,
                                 reinterpret_cast<float*>(out_NV.row(n)));
  };
  const auto masked = [](int64_t) { return false; };
  const auto finish = [](int64_t, const Summary&) {};
  for_rows({num_rows, num_columns, threads, false, true}, masked, make, finish, write);
  return 0;
}
