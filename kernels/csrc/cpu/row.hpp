// What the instruction-set kernels and their driver share: one row of logits and its summary.
//
// The isa_*.cpp files are compiled with different -m flags, so nothing here may be an inline
// function or a template that the linker could merge across them: plain data only.
#pragma once

#include <cstdint>

namespace qadapter {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// One term of a row of logits: scale * x + bias. A column where x is -inf is outside the support
// whatever the scale is.
struct Source {
  const void* data;    // first column of the row
  DType dtype;
  float scale;
  const float* bias;   // [V] or null; only for the first term
};

struct Row {
  Source policy[2];     // u = sum of the terms
  int32_t num_terms;    // 0: u = 0 in every column
  Source base;          // b
  bool has_base;
  int64_t exact_column; // where u and b are given exactly instead (-1: nowhere)
  float exact_policy;
  float exact_base;
};

// Sums over some columns of a row, relative to the reference points m_u and m_b (running maxima).
// Doubles: they are rescaled and merged many times a row, at no cost beside the columns.
struct Summary {
  double policy_peak;   // m_u
  double policy_sum;    // sum exp(u - m_u)
  double policy_energy; // sum exp(u - m_u) * (u - m_u)
  double policy_cross;  // sum exp(u - m_u) * ((u - m_u) - (b - m_b))
  double base_peak;     // m_b
  double base_sum;      // sum exp(b - m_b)
  double base_cross;    // sum exp(b - m_b) * ((b - m_b) - (u - m_u))
};

// A row of two streams, told apart by the difference of their products:
//   b = cap(x), d = cap(x + scale * difference) - b with x = scale * base + bias, cap(x) = x or
//   softcap * tanh(x / softcap).
// A policy's logits are a mixture of b and d: where d is 0 and b's weight 1, they are b bit for bit.
struct Mixture {
  float base, difference;
};

struct ScoreRow {
  const float* base;
  const float* difference;  // null: a plain model's row, of which only b is summed
  const float* bias;        // [V], scaled, or null
  float scale, softcap;     // softcap 0: none
  Mixture policy;           // compared with b
  Mixture trained;          // summed besides
  bool has_trained;
  int64_t action;           // a column, or -1
};

struct ScoreSummary {
  Summary sums;             // of the policy (u) and of b
  double trained_peak, trained_sum;
  float policy_top, base_top;  // largest logits
  bool filled;              // whether there was any column; false: the tops say nothing
  bool same_top;            // whether some column holds both tops
  bool has_action;          // whether the action's column was among them; then its logits:
  float base_action, difference_action, policy_action;
};

// Moves a reference point up to a candidate maximum; returns old - new. It stays where the candidate
// is infinite, so that nothing is ever subtracted from itself at infinity.
double move_peak(double* peak, double sum, float candidate);
// Adapts the sums to reference points that moved by these differences (old - new).
void rescale(Summary* summary, double policy_shift, double base_shift);
// Adds the columns of another summary.
void merge(Summary* into, Summary other);
void merge(ScoreSummary* into, const ScoreSummary& other);
// A sum alone, after its reference point moved by shift.
double rescaled_sum(double sum, double shift);
// peak + log(sum); -inf without support.
double log_sum_exp(double peak, double sum);

// The kernels of one instruction set. Columns [begin, end) of one row, single-threaded.
struct Kernels {
  const char* name;
  void (*reduce)(const Row& row, int64_t begin, int64_t end, bool statistics, Summary* summary);
  // out[k] = factor * exp(u[k] - shift). out may overlay the row it is computed from, also where
  // its elements are narrower: every block is read before it is written, in ascending order.
  void (*write_exp)(const Row& row, int64_t begin, int64_t end, float shift, float factor,
                    void* out, DType out_dtype);
  // out[k] = u[k] - peak - log_sum
  void (*write_log)(const Row& row, int64_t begin, int64_t end, float peak, float log_sum,
                    float* out);
  // u of one column, rounded as everywhere else here: beside a large common offset that is 5e-4.
  float (*policy_at)(const Row& row, int64_t column);
  void (*exp)(const float* in, float* out, int64_t count);
  void (*score)(const ScoreRow& row, int64_t begin, int64_t end, ScoreSummary* summary);
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

constexpr int64_t kBlock = 1024;          // columns staged as float32 in L1 at a time
constexpr int64_t kSegment = 8 * kBlock;  // columns of one summary; fixed, so that results do not
                                          // depend on how many threads share a row

}  // namespace qadapter
