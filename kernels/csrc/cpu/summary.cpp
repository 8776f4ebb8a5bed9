// Arithmetic of row summaries: a few scalar operations a block, in double precision.
#include <cmath>

#include "row.hpp"

namespace qadapter {
namespace {

// An infinite sum stays one beside a factor that vanished.
double scaled(double sum, double factor) { return std::isinf(sum) ? sum : sum * factor; }

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
    s->policy_sum = scaled(sum, factor);
  }
  if (s->base_sum != 0.0) {
    const double factor = std::exp(base_shift), sum = s->base_sum;
    s->base_cross = rescaled(factor, s->base_cross, base_shift - policy_shift, sum);
    s->base_sum = scaled(sum, factor);
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

double rescaled_sum(double sum, double shift) {
  return sum == 0.0 ? 0.0 : scaled(sum, std::exp(shift));
}

void merge(ScoreSummary* into, const ScoreSummary& other) {
  if (!other.filled) return;
  merge(&into->sums, other.sums);
  if (other.trained_sum != 0.0) {
    const double shift = move_peak(&into->trained_peak, into->trained_sum, float(other.trained_peak));
    into->trained_sum = rescaled_sum(into->trained_sum, shift) +
                        rescaled_sum(other.trained_sum, other.trained_peak - into->trained_peak);
  }
  const auto holds = [&](const ScoreSummary& s, float policy_top, float base_top) {
    return s.filled && s.same_top && s.policy_top == policy_top && s.base_top == base_top;
  };
  const auto larger = [&](float ours, float theirs) {
    return !into->filled || theirs > ours ? theirs : ours;
  };
  const float policy_top = larger(into->policy_top, other.policy_top);
  const float base_top = larger(into->base_top, other.base_top);
  into->same_top = holds(*into, policy_top, base_top) || holds(other, policy_top, base_top);
  into->policy_top = policy_top;
  into->base_top = base_top;
  into->filled = true;
  if (!other.has_action) return;
  into->has_action = true;
  into->base_action = other.base_action;
  into->difference_action = other.difference_action;
  into->policy_action = other.policy_action;
}

double log_sum_exp(double peak, double sum) {
  return sum == 0.0 ? -HUGE_VAL : peak + std::log(sum);
}

}  // namespace qadapter
