// The sequence loss over ragged rows: S = 2B sequences, sequence i owns rows offsets[i] to
// offsets[i + 1], pair i is (i, B + i).
//
//   r_k = q_k - γ·V_(k+1) ("next"; 0 after the last) or q_k - γ·V_k ("current"),  R = Σ r_k / divisor
//   loss = -Σ log σ(R_chosen - R_rejected) / pairs + chi2_coef·Σ r² / actions
#include "block.cuh"

namespace qadapter {
namespace {

constexpr int PAIR_THREADS = 256;

struct Sequences {
  const int64_t* offsets;
  const float* divisors;
};

struct Objective {
  float gamma, chi2_coef, inv_pairs, inv_actions;
  bool bootstrap_next;
};

struct Sums {
  float rewards = 0.0f, squares = 0.0f;
  QADAPTER_DEVICE void merge(const Sums& other) {
    rewards += other.rewards;
    squares += other.squares;
  }
};

// max(x, 0) + log(1 + e^-|x|) = -log σ(-x), without overflow.
QADAPTER_DEVICE float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

// One block a pair. Its two terms of the loss go to terms_2B, for a second kernel to add up in a
// fixed order: no atomics, the same bits in every run.
__global__ void __launch_bounds__(PAIR_THREADS)
pair_rewards(const float* q, const float* value, Sequences sequences, long long pairs,
             Objective objective, float* sequence_rewards, float* token_rewards, float* terms_2B) {
  float margin = 0.0f, squares = 0.0f;
#pragma unroll 1
  for (int is_rejected = 0; is_rejected < 2; ++is_rejected) {
    const long long sequence = block_x() + is_rejected * pairs;
    const int64_t start = sequences.offsets[sequence], end = sequences.offsets[sequence + 1];
    Sums sums;
    for (int64_t k = start + thread(); k < end; k += threads()) {
      const int64_t state = k + objective.bootstrap_next;
      float r = q[k];
      // γ = 0 reads no value: 0·inf would be NaN.
      if (objective.gamma != 0 && state < end) r -= objective.gamma * value[state];
      token_rewards[k] = r;
      sums.rewards += r;
      sums.squares += r * r;
    }
    sums = block_reduce(sums, shared<Sums>());
    sync();  // the scratch is free again
    const float reward = sums.rewards / sequences.divisors[sequence];
    if (thread() == 0) sequence_rewards[sequence] = reward;
    margin += is_rejected ? -reward : reward;
    squares += sums.squares;
  }
  if (thread() != 0) return;
  terms_2B[block_x()] = softplus(-margin);
  terms_2B[pairs + block_x()] = squares;
}

__global__ void __launch_bounds__(PAIR_THREADS)
total_loss(const float* terms_2B, long long pairs, Objective objective, float* losses_3) {
  Sums sums;
  for (long long i = thread(); i < pairs; i += threads()) {
    sums.rewards += terms_2B[i];
    sums.squares += terms_2B[pairs + i];
  }
  sums = block_reduce(sums, shared<Sums>());
  if (thread() != 0) return;
  const float preference = objective.inv_pairs * sums.rewards;
  const float chi2 = objective.inv_actions * sums.squares;
  losses_3[0] = preference + (objective.chi2_coef != 0 ? objective.chi2_coef * chi2 : 0.0f);
  losses_3[1] = preference;
  losses_3[2] = chi2;
}

// One block a sequence.
__global__ void __launch_bounds__(PAIR_THREADS)
bradley_terry_backward(const float* token_rewards, const float* sequence_rewards,
                       Sequences sequences, long long pairs, Objective objective,
                       const float* grad_losses_3, const float* grad_sequence,
                       const float* grad_tokens, float* grad_q, float* grad_v) {
  const long long sequence = block_x(), pair = sequence % pairs;
  const float margin = sequence_rewards[pair] - sequence_rewards[pairs + pair];
  const float grad_loss = grad_losses_3[0];
  // d(-log σ(m))/dm = -σ(-m) for the chosen, the opposite for the rejected.
  const float slope = (sequence < pairs ? -1.0f : 1.0f) / (1.0f + expf(margin)) *
                      (grad_loss + grad_losses_3[1]) * objective.inv_pairs;
  const float grad_reward = (slope + grad_sequence[sequence]) / sequences.divisors[sequence];
  const float chi2_slope =
      2.0f * objective.inv_actions * (objective.chi2_coef * grad_loss + grad_losses_3[2]);

  const int64_t start = sequences.offsets[sequence], end = sequences.offsets[sequence + 1];
  if (objective.bootstrap_next && start < end && thread() == 0) grad_v[start] = 0.0f;
  for (int64_t k = start + thread(); k < end; k += threads()) {
    // A coefficient of 0 reads nothing: 0·inf would be NaN.
    const float of_square = chi2_slope != 0 ? chi2_slope * token_rewards[k] : 0.0f;
    const float grad_r = grad_reward + of_square + grad_tokens[k];
    grad_q[k] = grad_r;
    const int64_t state = k + objective.bootstrap_next;
    if (state < end) grad_v[state] = objective.gamma != 0 ? -objective.gamma * grad_r : 0.0f;
  }
}

}  // namespace
}  // namespace qadapter

using namespace qadapter;

QADAPTER_EXPORT int qadapter_cuda_bradley_terry_forward(
    const float* q, const float* value, const int64_t* offsets, const float* divisors,
    long long sequences, double gamma, double chi2_coef, int bootstrap_next, double inv_pairs,
    double inv_actions, float* losses_3, float* sequence_rewards, float* token_rewards,
    float* terms, cudaStream_t stream) {
  const Objective objective = {float(gamma), float(chi2_coef), float(inv_pairs), float(inv_actions),
                               bootstrap_next != 0};
  const long long pairs = sequences / 2;
  const int scratch = MAX_WARPS * sizeof(Sums);
  const cudaError_t error =
      launch(pair_rewards, {pairs, 1, PAIR_THREADS, scratch, 0}, stream, q, value,
             Sequences{offsets, divisors}, pairs, objective, sequence_rewards, token_rewards, terms);
  if (error != cudaSuccess) return error;
  return launch(total_loss, {1, 1, PAIR_THREADS, scratch, 0}, stream, terms, pairs, objective,
                losses_3);
}

QADAPTER_EXPORT int qadapter_cuda_bradley_terry_backward(
    const float* token_rewards, const float* sequence_rewards, const int64_t* offsets,
    const float* divisors, long long sequences, double gamma, double chi2_coef, int bootstrap_next,
    double inv_pairs, double inv_actions, const float* grad_losses_3, const float* grad_sequence,
    const float* grad_tokens, float* grad_q, float* grad_v, cudaStream_t stream) {
  const Objective objective = {float(gamma), float(chi2_coef), float(inv_pairs), float(inv_actions),
                               bootstrap_next != 0};
  return launch(bradley_terry_backward, {sequences, 1, PAIR_THREADS, 0, 0}, stream, token_rewards,
                sequence_rewards, Sequences{offsets, divisors}, sequences / 2, objective,
                grad_losses_3, grad_sequence, grad_tokens, grad_q, grad_v);
}
