// The sequence loss over ragged rows: a few operations a token, in one pass and in order, so that
// it is deterministic; sums in double precision.
//
// Sequence i of S = 2B owns rows offsets[i] : offsets[i + 1]; pair i is (i, B + i).
// Reward r_k = q_k - gamma V_next (0 after the last row of a sequence), or q_k - gamma V_k.
#include <cmath>

#include "driver.hpp"

namespace {

double softplus(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

double sigmoid(double x) {
  return x >= 0 ? 1 / (1 + std::exp(-x)) : std::exp(x) / (1 + std::exp(x));
}

}  // namespace

// losses_3: loss, preference loss, chi-squared loss (unweighted).
QADAPTER_API void qadapter_cpu_bradley_terry_forward(
    const float* q, const float* value, const int64_t* offsets, const float* divisors,
    int64_t num_sequences, double gamma, double chi2_coef, int32_t bootstrap_next,
    double inv_pairs, double inv_actions, float* losses_3, float* sequence_rewards,
    float* token_rewards) {
  double squares = 0.0;
  for (int64_t i = 0; i < num_sequences; ++i) {
    double total = 0.0;
    for (int64_t k = offsets[i]; k < offsets[i + 1]; ++k) {
      const bool last = k + 1 == offsets[i + 1];
      const double future = !bootstrap_next ? value[k] : last ? 0.0 : value[k + 1];
      const double reward = gamma != 0 ? q[k] - gamma * future : q[k];
      token_rewards[k] = float(reward);
      total += reward;
      squares += reward * reward;
    }
    sequence_rewards[i] = float(total / divisors[i]);
  }
  const int64_t num_pairs = num_sequences / 2;
  double preference = 0.0;
  for (int64_t i = 0; i < num_pairs; ++i) {
    const double margin = double(sequence_rewards[i]) - sequence_rewards[num_pairs + i];
    preference += softplus(-margin);
  }
  preference *= inv_pairs;
  squares *= inv_actions;
  losses_3[0] = float(chi2_coef != 0 ? preference + chi2_coef * squares : preference);
  losses_3[1] = float(preference);
  losses_3[2] = float(squares);
}

// grad_q and grad_value come in as zeros: rows that no sequence owns keep them.
QADAPTER_API void qadapter_cpu_bradley_terry_backward(
    const float* token_rewards, const float* sequence_rewards, const int64_t* offsets,
    const float* divisors, int64_t num_sequences, double gamma, double chi2_coef,
    int32_t bootstrap_next, double inv_pairs, double inv_actions, const float* grad_losses_3,
    const float* grad_sequence, const float* grad_tokens, float* grad_q, float* grad_value) {
  const int64_t num_pairs = num_sequences / 2;
  const double preference_slope = -inv_pairs * (double(grad_losses_3[0]) + grad_losses_3[1]);
  const double chi2_slope = 2 * inv_actions * (grad_losses_3[0] * chi2_coef + grad_losses_3[2]);
  for (int64_t i = 0; i < num_sequences; ++i) {
    const int64_t pair = i % num_pairs;
    const double margin = double(sequence_rewards[pair]) - sequence_rewards[num_pairs + pair];
    const double slope = preference_slope * sigmoid(-margin);
    const double per_token = ((i < num_pairs ? slope : -slope) + grad_sequence[i]) / divisors[i];
    for (int64_t k = offsets[i]; k < offsets[i + 1]; ++k) {
      double grad = per_token + grad_tokens[k];
      if (chi2_slope != 0) grad += chi2_slope * token_rewards[k];  // 0 times inf would be NaN
      grad_q[k] = float(grad);
      // V of the next state enters this reward; the state after the last has none.
      const int64_t state = bootstrap_next ? k + 1 : k;
      if (state < offsets[i + 1] && gamma != 0) grad_value[state] = float(-gamma * grad);
    }
  }
}
