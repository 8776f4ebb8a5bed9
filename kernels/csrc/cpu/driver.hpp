// How rows are shared among threads, and what the C ABI functions have in common.
//
// Many rows: a thread takes a row at a time and finds it in its L2 when it writes. Few rows
// (decoding): threads take segments of rows. A row is always summed as the same segments in the
// same order, so results are bitwise the same for any number of threads.
//
// Shapes: N rows, V columns; strides in elements. actions: a column, -1 (none) or -2 (masked row).
// C functions return 0, or 1 if an action is out of range (nothing is written then).
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "row.hpp"
#include "simd_portable.hpp"

#define QADAPTER_API extern "C" __attribute__((visibility("default")))

namespace qadapter {

constexpr int64_t kMaskedRow = -2;

// The kernels every call uses: the fastest this processor can run, unless a test chose others.
const Kernels& selected_kernels();

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

struct Matrix {
  char* data = nullptr;
  int64_t stride = 0;
  DType dtype = DType::kFloat32;

  Matrix() = default;
  Matrix(const void* data, int64_t stride, int32_t dtype)
      : data(static_cast<char*>(const_cast<void*>(data))), stride(stride), dtype(DType(dtype)) {}

  char* row(int64_t n) const { return data + n * stride * size_of(dtype); }
  Source source(int64_t n, double scale, const float* bias = nullptr) const {
    return {row(n), dtype, float(scale), bias};
  }
  float at(int64_t n, int64_t column) const {
    const char* p = row(n) + column * size_of(dtype);
    float value;
    if (dtype == DType::kFloat32) {
      std::memcpy(&value, p, 4);
      return value;
    }
    uint16_t bits;
    std::memcpy(&bits, p, 2);
    return dtype == DType::kBFloat16 ? from_bfloat16(bits) : from_float16(bits);
  }
  void put(int64_t n, int64_t column, float value) const {
    char* p = row(n) + column * size_of(dtype);
    if (dtype == DType::kFloat32) {
      std::memcpy(p, &value, 4);
      return;
    }
    const uint16_t bits = dtype == DType::kBFloat16 ? to_bfloat16(value) : to_float16(value);
    std::memcpy(p, &bits, 2);
  }
  void zero(int64_t n, int64_t begin, int64_t end) const {
    std::memset(row(n) + begin * size_of(dtype), 0, (end - begin) * size_of(dtype));
  }

};

struct Coefficients {
  double alpha_0, alpha_tilde, adapter, base;
  double base_weight() const { return base + alpha_0; }
};

inline Coefficients unpack(const double* coef_4) { return {coef_4[0], coef_4[1], coef_4[2], coef_4[3]}; }

inline bool actions_in_range(const int64_t* actions, int64_t num_rows, int64_t num_columns) {
  for (int64_t n = 0; n < num_rows; ++n) {
    if (actions[n] < kMaskedRow || actions[n] >= num_columns) return false;
  }
  return true;
}

// u = (c_a a + (c_b + alpha_0) b) / alpha_tilde; a stream of weight 0 is not looked at.
inline void set_policy(Row* row, const Matrix& a, const Matrix& b, const Coefficients& c, int64_t n) {
  row->num_terms = 0;
  if (c.adapter != 0) row->policy[row->num_terms++] = a.source(n, c.adapter / c.alpha_tilde);
  if (c.base_weight() != 0) {
    row->policy[row->num_terms++] = b.source(n, c.base_weight() / c.alpha_tilde);
  }
}

// weight_a a + weight_b b of single logits: a stream of weight 0 is given as 0; NaN, then -inf, in
// either is so in the sum.
inline double weighted(double weight_a, double a, double weight_b, double b) {
  if (std::isnan(a) || std::isnan(b)) return a + b;
  return a == -HUGE_VAL || b == -HUGE_VAL ? -HUGE_VAL : weight_a * a + weight_b * b;
}

inline Row empty_row() {
  Row row = {};
  row.exact_column = -1;
  return row;
}

// No more threads than the elements are worth: waking one costs as much as a few thousand of them,
// and far more where other processes keep the cores busy.
inline int useful_threads(int32_t threads, int64_t num_rows, int64_t num_columns) {
  const int64_t worth = 1 + num_rows * num_columns / (2 * kSegment);
  return int(worth < threads ? worth : threads < 1 ? 1 : threads);
}

struct Plan {
  int64_t num_rows, num_columns;
  int threads;
  bool statistics;
  bool split_writes;  // false where what a row writes overlays columns not yet read
};

// make(n) -> Row; finish(n, Summary); write(n, Row, Summary, begin, end). masked(n): skip the sums.
template <class Masked, class Make, class Finish, class Write>
void for_rows(const Plan& plan, Masked masked, Make make, Finish finish, Write write) {
  const Kernels& kernels = selected_kernels();
  const int64_t N = plan.num_rows, V = plan.num_columns;
  const int threads = useful_threads(plan.threads, N, V);
  const int64_t num_segments = (V + kSegment - 1) / kSegment;
  const auto segment_end = [&](int64_t s) { return (s + 1) * kSegment < V ? (s + 1) * kSegment : V; };
  const auto reduce = [&](const Row& row, int64_t s) {
    Summary summary;
    kernels.reduce(row, s * kSegment, segment_end(s), plan.statistics, &summary);
    return summary;
  };

  if (N >= 2 * threads || threads == 1 || num_segments < 2) {
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1 && N > 1)
    for (int64_t n = 0; n < N; ++n) {
      Summary summary = {};
      if (masked(n)) {
        finish(n, summary);
        write(n, empty_row(), summary, 0, V);
        continue;
      }
      const Row row = make(n);
      for (int64_t s = 0; s < num_segments; ++s) merge(&summary, reduce(row, s));
      finish(n, summary);
      write(n, row, summary, 0, V);
    }
    return;
  }

  std::vector<Summary> parts(N * num_segments, Summary{}), whole(N, Summary{});
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t k = 0; k < N * num_segments; ++k) {
    const int64_t n = k / num_segments;
    if (!masked(n)) parts[k] = reduce(make(n), k % num_segments);
  }
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t s = 0; s < num_segments; ++s) merge(&whole[n], parts[n * num_segments + s]);
    finish(n, whole[n]);
  }
  const int64_t pieces = plan.split_writes ? num_segments : 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t k = 0; k < N * pieces; ++k) {
    const int64_t n = k / pieces, s = k % pieces;
    const int64_t end = plan.split_writes ? segment_end(s) : V;
    write(n, masked(n) ? empty_row() : make(n), whole[n], s * kSegment, end);
  }
}

// Entropy of the policy, KL(policy | base), KL(base | policy) of row n into stats[3, N]. A side
// without support covers nothing: the divergence from the other side is infinite.
inline void put_statistics(const Summary& s, int64_t n, int64_t num_rows, float* stats) {
  const double log_policy = std::log(s.policy_sum), log_base = std::log(s.base_sum);
  const bool policy = s.policy_sum != 0, base = s.base_sum != 0;
  stats[n] = policy ? float(log_policy - s.policy_energy / s.policy_sum) : 0.0f;
  const float uncovered = std::numeric_limits<float>::infinity();
  stats[num_rows + n] = !policy ? 0.0f
      : !base ? float(s.policy_sum) + uncovered  // NaN stays NaN
              : float(s.policy_cross / s.policy_sum - log_policy + log_base);
  stats[2 * num_rows + n] = !base ? 0.0f
      : !policy ? float(s.base_sum) + uncovered
                : float(s.base_cross / s.base_sum - log_base + log_policy);
}

}  // namespace qadapter
