// Arithmetic of row summaries: a few scalar operations a block, in double precision.
#include <cmath>

#include "row.hpp"

namespace qadapter {
namespace {

// factor * (x + shift * sum), where a vanished factor wins over an infinite x.
double rescaled(double factor, double x, double shift, double sum) {
  return factor == 0.0 ? 0.0 : factor * (x + shift * sum);
}

}  // namespace

double move_peak(double* peak, double sum, float candidate) {
  if (!std::isfinite(candidate)) return 0.0;
  if (sum != 0.0 && candidate <= *peak) return 0.0;
  const double difference = *peak - candidate;
  *peak = candidate;
  return difference;
}

void rescale(Summary* s, double policy_shift, double base_shift) {
  if (policy_shift == 0.0 && base_shift == 0.0) return;
  if (s->policy_sum != 0.0) {
    const double factor = std::exp(policy_shift), sum = s->policy_sum;
    s->policy_energy = rescaled(factor, s->policy_energy, policy_shift, sum);
    s->policy_cross = rescaled(factor, s->policy_cross, policy_shift - base_shift, sum);
    s->policy_sum = sum * factor;
  }
  if (s->base_sum != 0.0) {
    const double factor = std::exp(base_shift), sum = s->base_sum;
    s->base_cross = rescaled(factor, s->base_cross, base_shift - policy_shift, sum);
    s->base_sum = sum * factor;
  }
}

void merge(Summary* into, Summary other) {
  // An empty side takes the other's reference point; both are floats widened to double.
  const double policy_before = into->policy_peak, base_before = into->base_peak;
  if (other.policy_sum != 0.0) {
    move_peak(&into->policy_peak, into->policy_sum, float(other.policy_peak));
  }
  if (other.base_sum != 0.0) {
    move_peak(&into->base_peak, into->base_sum, float(other.base_peak));
  }
  rescale(into, policy_before - into->policy_peak, base_before - into->base_peak);
  rescale(&other, other.policy_peak - into->policy_peak, other.base_peak - into->base_peak);
  into->policy_sum += other.policy_sum;
  into->policy_energy += other.policy_energy;
  into->policy_cross += other.policy_cross;
  into->base_sum += other.base_sum;
  into->base_cross += other.base_cross;
}

double log_sum_exp(double peak, double sum) {
  return sum == 0.0 ? -HUGE_VAL : peak + std::log(sum);
}

}  // namespace qadapter
