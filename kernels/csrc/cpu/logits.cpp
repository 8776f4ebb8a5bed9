// The logits level: soft value from two [N, V] matrices of logits, and its gradient.
#include "driver.hpp"

using namespace qadapter;

// outputs_6N: q_action, value, base_logprob, base_lse and the policy's normalizer: the largest u and
// sum exp(u - largest), 0 of a masked row. stats_3N: or null.
QADAPTER_API int32_t qadapter_cpu_logits_forward(
    const void* a, int64_t a_stride, int32_t a_dtype, const void* b, int64_t b_stride,
    int32_t b_dtype, const int64_t* actions, const float* base_lse, const double* coef_4,
    int64_t num_rows, int64_t num_columns, float* outputs_6N, float* stats_3N, int32_t threads) {
  if (!actions_in_range(actions, num_rows, num_columns)) return 1;
  const Matrix a_NV(a, a_stride, a_dtype), b_NV(b, b_stride, b_dtype);
  const Coefficients c = unpack(coef_4);
  float* const q_N = outputs_6N;
  float* const value_N = q_N + num_rows;
  float* const logprob_N = value_N + num_rows;
  float* const base_lse_N = logprob_N + num_rows;
  float* const peak_N = base_lse_N + num_rows;
  float* const total_N = peak_N + num_rows;
  const bool need_base = base_lse == nullptr || stats_3N != nullptr;

  const auto masked = [=](int64_t n) { return actions[n] == kMaskedRow; };
  const auto make = [&](int64_t n) {
    Row row = empty_row();
    set_policy(&row, a_NV, b_NV, c, n);
    row.has_base = need_base;
    row.base = b_NV.source(n, 1.0);
    return row;
  };
  const auto finish = [&](int64_t n, const Summary& s) {
    if (masked(n)) {
      for (int64_t k = 0; k < 6; ++k) outputs_6N[k * num_rows + n] = 0.0f;
      for (int64_t k = 0; stats_3N && k < 3; ++k) stats_3N[k * num_rows + n] = 0.0f;
      return;
    }
    const double policy_lse = log_sum_exp(s.policy_peak, s.policy_sum);
    const double lse = base_lse ? double(base_lse[n]) : log_sum_exp(s.base_peak, s.base_sum);
    double value = c.alpha_tilde * policy_lse;
    if (c.alpha_0 != 0 && !(policy_lse == -HUGE_VAL && !std::isnan(lse))) value -= c.alpha_0 * lse;
    double q = 0.0, logprob = 0.0;
    if (actions[n] >= 0) {
      const double b_action = b_NV.at(n, actions[n]);
      q = weighted(c.adapter, c.adapter != 0 ? a_NV.at(n, actions[n]) : 0.0f, c.base,
                   c.base != 0 ? b_action : 0.0);
      logprob = b_action == -HUGE_VAL && !std::isnan(lse) ? -HUGE_VAL : b_action - lse;
    }
    q_N[n] = float(q);
    value_N[n] = float(value);
    logprob_N[n] = float(logprob);
    base_lse_N[n] = float(lse);
    peak_N[n] = float(s.policy_peak);
    total_N[n] = float(s.policy_sum);
    if (stats_3N) put_statistics(s, n, num_rows, stats_3N);
  };
  const Plan plan = {num_rows, num_columns, threads, stats_3N != nullptr, true};
  const auto write = [](int64_t, const Row&, const Summary&, int64_t, int64_t) {};
  for_rows(plan, masked, make, finish, write);
  return 0;
}

// out = c_a (g onehot + v softmax(u)); out may be a itself.
QADAPTER_API int32_t qadapter_cpu_logits_backward(
    const void* a, int64_t a_stride, int32_t a_dtype, const void* b, int64_t b_stride,
    int32_t b_dtype, const int64_t* actions, const float* normalizer_2N, const float* grad_q,
    const float* grad_v, const double* coef_4, int64_t num_rows, int64_t num_columns, void* out,
    int64_t out_stride, int32_t out_dtype, int32_t threads) {
  if (!actions_in_range(actions, num_rows, num_columns)) return 1;
  const Matrix a_NV(a, a_stride, a_dtype), b_NV(b, b_stride, b_dtype);
  const Matrix out_NV(out, out_stride, out_dtype);
  const Coefficients c = unpack(coef_4);
  const Kernels& kernels = selected_kernels();
  threads = useful_threads(threads, num_rows, num_columns);

  // Few rows: pieces of rows, so that all threads have work.
  const int64_t piece = num_rows >= 2 * threads ? num_columns : kSegment;
  const int64_t pieces = piece > 0 ? (num_columns + piece - 1) / piece : 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (int64_t k = 0; k < num_rows * pieces; ++k) {
    const int64_t n = k / pieces, begin = k % pieces * piece;
    const int64_t end = begin + piece < num_columns ? begin + piece : num_columns;
    const int64_t action = actions[n];
    const bool has_action = begin <= action && action < end;
    const float peak = normalizer_2N[n], total = normalizer_2N[num_rows + n];
    if (action == kMaskedRow || total == 0.0f || c.adapter == 0) {
      out_NV.zero(n, begin, end);
      continue;
    }
    Row row = empty_row();
    set_policy(&row, a_NV, b_NV, c, n);
    const double factor = c.adapter * grad_v[n] / total;
    const auto gradient = [&](int64_t column, double of_q) {  // 0 outside the support
      const float u = kernels.policy_at(row, column);
      return u == -HUGE_VALF ? 0.0 : c.adapter * of_q + factor * std::exp(double(u) - peak);
    };
    double at_action = 0.0;  // from the logits, before out, which may be a, overwrites them
    if (has_action) at_action = gradient(action, grad_q[n]);
    if (!std::isfinite(float(factor))) {  // times a vanished weight it would be NaN
      for (int64_t k = begin; k < end; ++k) out_NV.put(n, k, float(gradient(k, 0.0)));
    } else if (grad_v[n] == 0.0f && std::isfinite(total)) {
      out_NV.zero(n, begin, end);
    } else {
      kernels.write_exp(row, begin, end, peak, float(factor), out_NV.row(n), out_NV.dtype);
    }
    if (has_action) out_NV.put(n, action, float(at_action));
  }
  return 0;
}
