// The hidden level's row work: z = H_z·Wᵀ comes in; its log-sum-exps, the statistics and
// P' = softmax(u) - onehot(action), in z's own memory, go out.
#pragma once

#include "block.cuh"

namespace qadapter {

// logits = scale·z + bias; `exact` replaces the logit of each row's action, which a 16-bit product
// has rounded: what q(a) - V keeps in a peaked row must not hold that rounding.
struct Affine {
  float scale;
  const float* bias;   // [V] or null
  const float* exact;  // [R] or null

  template <int WIDTH>
  QADAPTER_DEVICE void operator()(float (&x)[WIDTH], int column, int64_t action, long long row) const {
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) x[e] *= scale;
    if (bias) {
#pragma unroll
      for (int e = 0; e < WIDTH; ++e) x[e] += bias[column + e];
    }
    if (exact && action >= column && action < column + WIDTH) {
#pragma unroll
      for (int e = 0; e < WIDTH; ++e)
        if (column + e == action) x[e] = exact[row];
    }
  }
};

struct RowOutputs {
  float *policy_lse, *base_lse, *stats;  // base_lse, stats: null where not asked
};

template <class T> struct RowProblem {
  Matrix<T> z;
  Matrix<const T> zb;  // data null: no base stream
  Affine policy, base;
  const int64_t* actions;
  long long rows;
  int columns;
  bool write_residual;
  RowOutputs out;
};

template <class T, class State>
QADAPTER_DEVICE void write_outputs(const RowProblem<T>& in, const State& state, long long row) {
  in.out.policy_lse[row] = state.u.lse();
  if (in.out.base_lse) in.out.base_lse[row] = state.b.lse();
  write_statistics(state, in.out.stats, in.rows, row);
}

template <class T>
QADAPTER_DEVICE void write_masked(const RowProblem<T>& in, bool compare, long long row) {
  in.out.policy_lse[row] = 0.0f;
  if (in.out.base_lse) in.out.base_lse[row] = 0.0f;
  if (compare)
    for (int i = 0; i < 3; ++i) in.out.stats[i * in.rows + row] = 0.0f;
}

// P' at some columns from their logits u. From (max, sum) rather than the rounded log-sum-exp.
struct Residual {
  float shift, inverse_sum;  // inverse_sum < 0: a masked row, or one without support
  int64_t action;

  QADAPTER_DEVICE Residual(const MaxSum& u, int64_t action)
      : shift(finite(u.max)), inverse_sum(u.sum == 0 ? -1.0f : 1.0f / u.sum), action(action) {}

  QADAPTER_DEVICE bool is_zero() const { return inverse_sum < 0; }

  template <int WIDTH> QADAPTER_DEVICE void operator()(float (&x)[WIDTH], int column) const {
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) {
      const float onehot = column + e == action ? 1.0f : 0.0f;
      x[e] = is_zero() ? 0.0f : exp_fast(x[e] - shift) * inverse_sum - onehot;
    }
  }
};

}  // namespace qadapter
