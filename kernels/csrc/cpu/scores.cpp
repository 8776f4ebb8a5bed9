// Evaluation: everything that is asked of the base and a customised policy at one state.
#include "driver.hpp"

using namespace qadapter;

namespace {

Mixture mixture(double weight_a, double weight_b) {  // of a = b + d and b
  return {float(weight_a + weight_b), float(weight_a)};
}

double log_probability(double logit, double peak, double sum) {
  if (sum == 0.0 || (logit == -HUGE_VAL && !std::isnan(sum))) return -HUGE_VAL;
  return (logit - peak) - std::log(sum);
}

}  // namespace

// products_b [R, V], products_d [R, V] or null (a plain model): h_b W^T and (h_a - h_b) W^T; rows are
// stride_b and stride_d elements apart. head_3: scale, softcap (0: none), 1 where rewards are wanted.
// dial_2: weights of a and b in the policy. coef_4: the trained objective's. outputs_8R: q_action,
// value, base_logprob, base_lse, policy_logprob, KL(base | policy), KL(policy | base), same top.
QADAPTER_API int32_t qadapter_cpu_score_rows(
    const float* products_b, int64_t stride_b, const float* products_d, int64_t stride_d,
    const float* bias, const double* head_3, const int64_t* actions, const double* dial_2,
    const double* coef_4, int64_t num_rows, int64_t num_columns, float* outputs_8R,
    int32_t threads) {
  if (!actions_in_range(actions, num_rows, num_columns)) return 1;
  const Coefficients c = unpack(coef_4);
  const bool customised = products_d != nullptr, rewards = customised && head_3[2] != 0.0;
  const Mixture policy = mixture(dial_2[0], dial_2[1]);
  const Mixture trained = mixture(c.adapter / c.alpha_tilde, c.base_weight() / c.alpha_tilde);
  const bool other = trained.base != policy.base || trained.difference != policy.difference;
  const auto make = [&](int64_t n) {
    ScoreRow row = {};
    row.base = products_b + n * stride_b;
    row.difference = customised ? products_d + n * stride_d : nullptr;
    row.bias = bias;
    row.scale = float(head_3[0]);
    row.softcap = float(head_3[1]);
    row.policy = policy;
    row.trained = trained;
    row.has_trained = rewards && other;
    row.action = actions[n];
    return row;
  };
  const Kernels& kernels = selected_kernels();
  threads = useful_threads(threads, num_rows, num_columns);
  const int64_t segments = (num_columns + kSegment - 1) / kSegment;
  std::vector<ScoreSummary> parts(num_rows * segments);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4) if (threads > 1)
  for (int64_t k = 0; k < num_rows * segments; ++k) {
    const int64_t begin = k % segments * kSegment;
    const int64_t end = begin + kSegment < num_columns ? begin + kSegment : num_columns;
    kernels.score(make(k / segments), begin, end, &parts[k]);
  }

  const auto finish = [&](int64_t n, const ScoreSummary& s) {
    const Summary& sums = s.sums;
    const double base_lse = log_sum_exp(sums.base_peak, sums.base_sum);
    double q = 0.0, value = 0.0, base_logprob = 0.0, policy_logprob = 0.0;
    if (s.has_action) {
      base_logprob = log_probability(s.base_action, sums.base_peak, sums.base_sum);
      policy_logprob = !customised
          ? base_logprob : log_probability(s.policy_action, sums.policy_peak, sums.policy_sum);
    }
    float stats[3] = {0.0f, 0.0f, 0.0f};
    if (customised) put_statistics(sums, 0, 1, stats);
    if (rewards) {
      const double lse = other ? log_sum_exp(s.trained_peak, s.trained_sum)
                               : log_sum_exp(sums.policy_peak, sums.policy_sum);
      value = c.alpha_tilde * lse;
      if (c.alpha_0 != 0 && !(lse == -HUGE_VAL && !std::isnan(base_lse))) value -= c.alpha_0 * base_lse;
      if (s.has_action) {
        q = s.base_action == -HUGE_VALF
            ? -HUGE_VAL : (c.adapter + c.base) * s.base_action + c.adapter * s.difference_action;
      }
    }
    // Tops pass over NaN; a row that holds one has none.
    const bool same_top = s.same_top && !std::isnan(sums.policy_sum) && !std::isnan(sums.base_sum);
    const double outputs[8] = {q, value, base_logprob, base_lse, policy_logprob, stats[2], stats[1],
                               !customised || same_top ? 1.0 : 0.0};
    for (int64_t k = 0; k < 8; ++k) outputs_8R[k * num_rows + n] = float(outputs[k]);
  };
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t n = 0; n < num_rows; ++n) {
    ScoreSummary whole = {};
    for (int64_t s = 0; s < segments; ++s) merge(&whole, parts[n * segments + s]);
    finish(n, whole);
  }
  return 0;
}
