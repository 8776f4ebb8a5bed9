// The row work of the hidden level: log-sum-exps of a chunk of logits, and the residual in place.
#include "driver.hpp"

using namespace qadapter;

// u = scale z + bias; b = base_scale zb + base_bias. action_logits_2R: u and b at the action, known
// more exactly than z's dtype holds them, or null. zb, the biases and stats_3R may be null.
// With write_residual, P' = softmax(u) - onehot(action) lands over z, or where it is narrower than
// z in the first half of each row's bytes.
QADAPTER_API int32_t qadapter_cpu_rows_forward(
    void* z, int64_t z_stride, int32_t z_dtype, const void* zb, int64_t zb_stride, int32_t zb_dtype,
    const int64_t* actions, double scale, const float* bias, double base_scale,
    const float* base_bias, const float* action_logits_2R, int64_t num_rows, int64_t num_columns,
    int32_t write_residual, int32_t residual_dtype, float* policy_lse, float* base_lse,
    float* stats_3R, int32_t threads) {
  if (!actions_in_range(actions, num_rows, num_columns)) return 1;
  const Matrix z_RV(z, z_stride, z_dtype), zb_RV(zb, zb_stride, zb_dtype);
  const int64_t widening = size_of(z_RV.dtype) / size_of(DType(residual_dtype));
  const Matrix residual_RV(z, z_stride * widening, residual_dtype);

  const auto masked = [=](int64_t n) { return actions[n] == kMaskedRow; };
  const auto make = [&](int64_t n) {
    Row row = empty_row();
    row.num_terms = 1;
    row.policy[0] = z_RV.source(n, scale, bias);
    row.has_base = zb != nullptr;
    if (row.has_base) row.base = zb_RV.source(n, base_scale, base_bias);
    if (action_logits_2R && actions[n] >= 0) {
      row.exact_column = actions[n];
      row.exact_policy = action_logits_2R[n];
      row.exact_base = action_logits_2R[num_rows + n];
    }
    return row;
  };
  const auto finish = [&](int64_t n, const Summary& s) {
    const bool dead = masked(n);
    policy_lse[n] = dead ? 0.0f : float(log_sum_exp(s.policy_peak, s.policy_sum));
    if (zb) base_lse[n] = dead ? 0.0f : float(log_sum_exp(s.base_peak, s.base_sum));
    if (stats_3R == nullptr) return;
    if (!dead) return put_statistics(s, n, num_rows, stats_3R);
    for (int64_t k = 0; k < 3; ++k) stats_3R[k * num_rows + n] = 0.0f;
  };
  const auto write = [&](int64_t n, const Row& row, const Summary& s, int64_t begin, int64_t end) {
    if (!write_residual) return;
    if (masked(n) || s.policy_sum == 0.0) return residual_RV.zero(n, begin, end);
    const int64_t action = actions[n];
    const bool has_action = begin <= action && action < end;
    double at_action = -1.0;  // from the logits, before they are overwritten
    if (has_action) {
      const double u = selected_kernels().policy_at(row, action);
      at_action += std::exp(u - s.policy_peak) / s.policy_sum;
    }
    selected_kernels().write_exp(row, begin, end, float(s.policy_peak), float(1.0 / s.policy_sum),
                                 residual_RV.row(n), residual_RV.dtype);
    if (has_action) residual_RV.put(n, action, float(at_action));
  };
  const Plan plan = {num_rows, num_columns, threads, stats_3R != nullptr, widening == 1};
  for_rows(plan, masked, make, finish, write);
  return 0;
}
