// The arithmetic of one row, free of any notion of threads but for what merges two partial results.
#pragma once

#include "device.cuh"

namespace qadapter {

// Subtracting an infinite maximum from itself would be NaN; 0 in its place gives the right sums
// (0 for a row of -inf, inf where there is a +inf).
QADAPTER_DEVICE float finite(float maximum) { return fabsf(maximum) == INF ? 0.0f : maximum; }

// A running log-sum-exp: sum = Σ exp(x - max) over what was added.
struct MaxSum {
  float max = -INF;
  float sum = 0.0f;

  // One rescaling for the whole pack rather than one an element.
  template <int WIDTH> QADAPTER_DEVICE void add(const float (&x)[WIDTH]) {
    float peak = max;
#pragma unroll
    for (float value : x) peak = fmaxf(peak, value);
    const float shift = finite(peak);
    float total = sum * exp_fast(max - shift);
#pragma unroll
    for (float value : x) total += exp_fast(value - shift);
    max = peak;
    sum = total;
  }

  QADAPTER_DEVICE void merge(const MaxSum& other) {
    const float peak = fmaxf(max, other.max), shift = finite(peak);
    sum = sum * exp_fast(max - shift) + other.sum * exp_fast(other.max - shift);
    max = peak;
  }

  QADAPTER_DEVICE float lse() const { return finite(max) + logf(sum); }
};

// Policy u and base b met in one pass, each on its own.
struct Streams {
  static constexpr int UNROLL = 2;  // accesses of a thread and stream in flight
  MaxSum u, b;

  template <int WIDTH>
  QADAPTER_DEVICE void add(const float (&u_x)[WIDTH], const float (&b_x)[WIDTH], bool with_base) {
    u.add(u_x);
    if (with_base) b.add(b_x);
  }
  QADAPTER_DEVICE void merge(const Streams& other) {
    u.merge(other.u);
    b.merge(other.b);
  }
};

// The two streams and how they compare. Every sum is taken relative to the running maxima m, so
// that neither a large common offset nor one between the streams costs digits:
//   log_u = Σ e^(u-m_u)·(u-m_u)    gap_u = Σ e^(u-m_u)·d    gap_b = Σ e^(b-m_b)·(-d)
// with d = (u-m_u) - (b-m_b).
struct ComparedStreams {
  static constexpr int UNROLL = 1;  // more spills registers
  MaxSum u, b;
  float log_u = 0.0f, gap_u = 0.0f, gap_b = 0.0f;
  unsigned uncovered = 0;  // POLICY: u has support where b has none; BASE: the other way around

  static constexpr unsigned POLICY = 1, BASE = 2;

  template <int WIDTH>
  QADAPTER_DEVICE void add(const float (&u_x)[WIDTH], const float (&b_x)[WIDTH], bool) {
    float peak_u = u.max, peak_b = b.max;
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) {
      peak_u = fmaxf(peak_u, u_x[e]);
      peak_b = fmaxf(peak_b, b_x[e]);
    }
    rebase(peak_u, peak_b);
    const float shift_u = finite(peak_u), shift_b = finite(peak_b);
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) {
      const float log_p = u_x[e] - shift_u, log_pi = b_x[e] - shift_b;
      const float p = exp_fast(log_p), pi = exp_fast(log_pi);
      const bool in_u = u_x[e] != -INF, in_b = b_x[e] != -INF;
      u.sum += p;
      b.sum += pi;
      if (in_u) log_u += p * log_p;
      if (in_u && in_b) {
        gap_u += p * (log_p - log_pi);
        gap_b += pi * (log_pi - log_p);
      } else if (in_u != in_b) {
        uncovered |= in_u ? POLICY : BASE;
      }
    }
  }

  QADAPTER_DEVICE void merge(ComparedStreams other) {
    const float peak_u = fmaxf(u.max, other.u.max), peak_b = fmaxf(b.max, other.b.max);
    rebase(peak_u, peak_b);
    other.rebase(peak_u, peak_b);
    u.sum += other.u.sum;
    b.sum += other.b.sum;
    log_u += other.log_u;
    gap_u += other.gap_u;
    gap_b += other.gap_b;
    uncovered |= other.uncovered;
  }

  QADAPTER_DEVICE float entropy() const { return u.sum == 0 ? 0.0f : logf(u.sum) - log_u / u.sum; }
  QADAPTER_DEVICE float kl_policy_base() const {
    return divergence(gap_u, u.sum, b.sum, uncovered & POLICY);
  }
  QADAPTER_DEVICE float kl_base_policy() const {
    return divergence(gap_b, b.sum, u.sum, uncovered & BASE);
  }

 private:
  QADAPTER_DEVICE void rebase(float peak_u, float peak_b) {
    // exp(-inf) = 0 while nothing was added; the differences are then of no consequence.
    const float scale_u = exp_fast(u.max - finite(peak_u)), move_u = moved(u.max, peak_u);
    const float scale_b = exp_fast(b.max - finite(peak_b)), move_b = moved(b.max, peak_b);
    log_u = scale_u * (log_u + u.sum * move_u);
    gap_u = scale_u * (gap_u + u.sum * (move_u - move_b));
    gap_b = scale_b * (gap_b + b.sum * (move_b - move_u));
    u = {peak_u, u.sum * scale_u};
    b = {peak_b, b.sum * scale_b};
  }
  QADAPTER_DEVICE static float moved(float from, float to) {
    return from == -INF ? 0.0f : finite(from) - finite(to);
  }
  QADAPTER_DEVICE static float divergence(float gap, float own, float other, bool is_infinite) {
    if (own == 0) return 0.0f;
    return is_infinite ? own + other + INF /* NaN stays NaN */ : gap / own - logf(own) + logf(other);
  }
};

// weight_a·a + weight_b·b. A stream of weight 0 is given as zeros, never as what it holds (0·inf
// would be NaN); what one stream excludes with -inf stays excluded, whatever the weight's sign; NaN
// in either is NaN.
QADAPTER_DEVICE float weighted(float weight_a, float a, float weight_b, float b) {
  return min_or_nan(a, b) == -INF ? -INF : fmaf(weight_a, a, weight_b * b);
}

// u = (q + α₀·b)/α̃ = policy_a·a + policy_b·b and q = adapter·a + base·b.
struct Coefficients {
  float alpha_0, alpha_tilde, adapter, base, policy_a, policy_b;

  explicit Coefficients(const double* four)
      : alpha_0(four[0]), alpha_tilde(four[1]), adapter(four[2]), base(four[3]),
        policy_a(four[2] / four[1]), policy_b((four[3] + four[0]) / four[1]) {}

  template <int WIDTH>
  QADAPTER_DEVICE void policy(const float (&a)[WIDTH], const float (&b)[WIDTH],
                              float (&u)[WIDTH]) const {
#pragma unroll
    for (int e = 0; e < WIDTH; ++e)
      u[e] = weighted(policy_a, policy_a != 0 ? a[e] : 0.0f, policy_b, policy_b != 0 ? b[e] : 0.0f);
  }

  // From max and log Σ exp(x - max) of each stream, the maxima first: what the streams have in common
  // cancels before anything is rounded at its size.
  QADAPTER_DEVICE float value(float u_max, float u_rest, float b_max, float b_rest) const {
    if (alpha_0 == 0) return alpha_tilde * u_max + alpha_tilde * u_rest;
    if (u_rest == -INF && b_rest == b_rest) return -INF;
    return (alpha_tilde * u_max - alpha_0 * b_max) + (alpha_tilde * u_rest - alpha_0 * b_rest);
  }
};

}  // namespace qadapter
