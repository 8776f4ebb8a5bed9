// The logits level: soft value and residual Q from two [N, V] tensors of logits, the gradient, and
// the customised policy's log-probabilities for decoding. Bandwidth-bound: the forward pass reads
// each row once, the backward pass reads it once more and writes the gradient.
#include "block.cuh"

namespace qadapter {
namespace {

struct Rows {
  const int64_t* actions;
  long long count;
  int columns;
};

template <class T> struct TwoStreams {
  Matrix<const T> a, b;
  Coefficients coef;
};

// Reads pairs of two rows; b's elements are zeros where nothing wants them.
template <class T> struct PairReader {
  const T *a, *b;
  bool read_a, read_b;

  template <int WIDTH> QADAPTER_DEVICE Pair<T, WIDTH> operator()(Width<WIDTH>, int column) const {
    Pair<T, WIDTH> x = {};
    if (read_a) x.a = load<WIDTH>(a + column);
    if (read_b) x.b = load<WIDTH>(b + column);
    return x;
  }
  QADAPTER_DEVICE Split split(int columns) const {
    const int head = columns_to_boundary(read_a ? a : b);
    return split_row<T>(columns, head,
                        !(read_a && read_b) || head == columns_to_boundary(b));
  }
};

constexpr int FORWARD_THREADS = 512;

struct ForwardOutputs {
  float *q, *value, *base_logprob, *base_lse;
  float* normalizer_2N;  // of the policy: the largest u (0 where it is infinite), Σ e^(u - largest)
  float* stats;
};

// Columns that are worth a block of their own where rows are too few to fill the device.
constexpr int MIN_COLUMNS = 4096;

// One row's outputs from its sums.
template <class T, class State>
QADAPTER_DEVICE void finish_row(const State& state, const TwoStreams<T>& in, const Rows& rows,
                                const float* given_base_lse, const ForwardOutputs& out,
                                long long row) {
  const Coefficients& coef = in.coef;
  const int64_t action = rows.actions[row];
  const float base_max = given_base_lse ? 0.0f : finite(state.b.max);
  const float base_rest = given_base_lse ? given_base_lse[row] : logf(state.b.sum);
  float q = 0.0f, base_logprob = 0.0f;
  if (action >= 0) {
    // An id outside the vocabulary reads nothing and is loud: NaN.
    const bool inside = action < rows.columns;
    const float b = inside ? static_cast<float>(in.b.row(row)[action]) : NAN;
    const float a = inside ? static_cast<float>(in.a.row(row)[action]) : NAN;
    q = inside ? weighted(coef.adapter, coef.adapter != 0 ? a : 0.0f,
                          coef.base, coef.base != 0 ? b : 0.0f)
               : NAN;
    // b - max first: log π keeps its digits under a large common offset.
    base_logprob = b == -INF && base_rest == base_rest ? -INF : b - base_max - base_rest;
  }
  out.q[row] = q;
  out.value[row] = coef.value(finite(state.u.max), logf(state.u.sum), base_max, base_rest);
  out.base_logprob[row] = base_logprob;
  out.base_lse[row] = base_max + base_rest;
  out.normalizer_2N[row] = finite(state.u.max);
  out.normalizer_2N[rows.count + row] = state.u.sum;
  write_statistics(state, out.stats, rows.count, row);
}

template <class State>
QADAPTER_DEVICE void finish_masked_row(const Rows& rows, const ForwardOutputs& out, long long row) {
  out.q[row] = out.value[row] = out.base_logprob[row] = 0.0f;
  out.base_lse[row] = out.normalizer_2N[row] = out.normalizer_2N[rows.count + row] = 0.0f;
  if (std::is_same<State, ComparedStreams>::value)
    out.stats[row] = out.stats[rows.count + row] = out.stats[2 * rows.count + row] = 0;
}

// The blocks on grid.y share a row, `width` columns each. One block: the row's outputs. More: their
// sums into `partials`, for merge_splits to finish.
template <class T, class State>
__global__ void __launch_bounds__(FORWARD_THREADS, 2)
logits_forward(TwoStreams<T> in, Rows rows, const float* given_base_lse, ForwardOutputs out,
               int width, State* partials) {
  constexpr bool COMPARE = std::is_same<State, ComparedStreams>::value;
  const long long row = block_x();
  const int begin = block_y() * width;
  const int columns = rows.columns - begin < width ? rows.columns - begin : width;
  if (rows.actions[row] == MASKED_ROW) {
    if (blocks_y() == 1 && thread() == 0) finish_masked_row<State>(rows, out, row);
    return;
  }
  const Coefficients& coef = in.coef;
  const bool sum_base = COMPARE || given_base_lse == nullptr;
  const PairReader<T> read = {in.a.row(row) + begin, in.b.row(row) + begin, coef.policy_a != 0,
                              coef.policy_b != 0 || sum_base};
  State state;
  for_columns<T, State::UNROLL>(block_team(), read.split(columns), read,
                                [&](auto width, int, const auto& x) {
                                  float a[width], b[width], u[width];
                                  to_float(x.a, a);
                                  to_float(x.b, b);
                                  coef.policy(a, b, u);
                                  state.add(u, b, sum_base);
                                });
  state = block_reduce(state, shared<State>());
  if (thread() != 0) return;
  if (blocks_y() > 1)
    partials[row * blocks_y() + block_y()] = state;
  else
    finish_row(state, in, rows, given_base_lse, out, row);
}

// One warp a row.
template <class T, class State>
__global__ void __launch_bounds__(WARP)
merge_splits(TwoStreams<T> in, Rows rows, const float* given_base_lse, ForwardOutputs out,
             int splits, const State* partials) {
  const long long row = block_x();
  if (rows.actions[row] == MASKED_ROW) {
    if (thread() == 0) finish_masked_row<State>(rows, out, row);
    return;
  }
  State state;
  for (int i = thread(); i < splits; i += WARP) state.merge(partials[row * splits + i]);
  for (int bit = WARP / 2; bit > 0; bit /= 2) state.merge(shuffle_xor(state, bit));
  if (thread() == 0) finish_row(state, in, rows, given_base_lse, out, row);
}

constexpr int BACKWARD_THREADS = 256;
constexpr int BACKWARD_UNROLL = 2;

// ∂a = c_a·(g·onehot + v·π̃), elementwise; `out` may be `a`: an element is read by the thread that
// writes it. Blocks of a row are on grid.y.
template <class T>
__global__ void __launch_bounds__(BACKWARD_THREADS)
logits_backward(TwoStreams<T> in, Rows rows, const float* normalizer_2N, const float* grad_q,
                const float* grad_v, Matrix<T> out_NV) {
  const long long row = block_x();
  const int64_t action = rows.actions[row];
  const Coefficients& coef = in.coef;
  const bool is_read = action != MASKED_ROW && coef.adapter != 0;
  const float sum = is_read ? normalizer_2N[rows.count + row] : 0.0f;
  const bool is_zero = sum == 0;  // not read, or no support left
  const float shift = is_zero ? 0.0f : normalizer_2N[row];
  const PairReader<T> read = {in.a.row(row), in.b.row(row), coef.policy_a != 0 && !is_zero,
                              coef.policy_b != 0 && !is_zero};
  T* out = out_NV.row(row);
  const float at_action = is_zero || action < 0 ? 0.0f : coef.adapter * grad_q[row];
  const float everywhere = is_zero ? 0.0f : coef.adapter * grad_v[row] / sum;

  const int head = columns_to_boundary(out);
  const bool together = (!read.read_a || columns_to_boundary(read.a) == head) &&
                        (!read.read_b || columns_to_boundary(read.b) == head);
  const Team team = {block_y() * threads() + thread(), blocks_y() * threads()};
  for_columns<T, BACKWARD_UNROLL>(
      team, split_row<T>(rows.columns, head, together), read,
      [&](auto width, int column, const auto& x) {
        float a[width], b[width], u[width], grad[width];
        to_float(x.a, a);
        to_float(x.b, b);
        coef.policy(a, b, u);
#pragma unroll
        for (int e = 0; e < width; ++e) {
          const float p = exp_fast(u[e] - shift);
          const float onehot = column + e == action ? at_action : 0.0f;
          grad[e] = is_zero || u[e] == -INF ? 0.0f : everywhere * p + onehot;
        }
        store_as(out + column, grad);
      });
}

// log π̃, or with strength w a row, log-softmax(w·log π̃ + (1-w)·log π). For decoding: few rows, read
// two or three times, from L2 but for the first.
template <class T>
__global__ void __launch_bounds__(FORWARD_THREADS, 1)
combine_logits(TwoStreams<T> in, int columns, const float* strength_N, Matrix<float> out_NV) {
  const long long row = block_x();
  const Coefficients& coef = in.coef;
  const bool is_mixed = strength_N != nullptr;
  const float w = is_mixed ? strength_N[row] : 1.0f;
  const PairReader<T> read = {in.a.row(row), in.b.row(row), coef.policy_a != 0,
                              coef.policy_b != 0 || is_mixed};
  const Split split = read.split(columns);
  Streams state;
  for_columns<T, 2>(block_team(), split, read, [&](auto width, int, const auto& x) {
    float a[width], b[width], u[width];
    to_float(x.a, a);
    to_float(x.b, b);
    coef.policy(a, b, u);
    state.add(u, b, is_mixed);
  });
  state = block_reduce(state, shared<Streams>());
  auto log_sum = [](const MaxSum& x) { return x.sum == 0 ? 0.0f : logf(x.sum); };
  const float log_sum_u = log_sum(state.u), log_sum_b = log_sum(state.b);

  auto log_probability = [&](float u, float b) {
    const float logp = u - finite(state.u.max) - log_sum_u;
    const float logpi = b - finite(state.b.max) - log_sum_b;
    if (!is_mixed || w == 1) return logp;
    return w == 0 ? logpi : weighted(w, logp, 1 - w, logpi);
  };
  auto for_mixture = [&](auto use) {
    for_columns<T, 2>(block_team(), split, read, [&](auto width, int column, const auto& x) {
      float a[width], b[width], u[width];
      to_float(x.a, a);
      to_float(x.b, b);
      coef.policy(a, b, u);
#pragma unroll
      for (int e = 0; e < width; ++e) u[e] = log_probability(u[e], b[e]);
      use(width, column, u);
    });
  };
  float norm = 0.0f;
  if (is_mixed) {
    MaxSum mixture;
    for_mixture([&](auto, int, const auto& x) { mixture.add(x); });
    sync();  // the first result has been read by all
    mixture = block_reduce(mixture, shared<MaxSum>());
    norm = finite(mixture.lse());
  }
  float* out = out_NV.row(row);
  for_mixture([&](auto, int column, auto& x) {
    for (float& logp : x) logp -= norm;
    store_floats(out + column, x);
  });
}

}  // namespace
}  // namespace qadapter

using namespace qadapter;

// Blocks that share a row in logits_forward: so many that rows of this number fill the device.
QADAPTER_EXPORT int qadapter_cuda_logits_splits(long long rows, int columns) {
  const long long wanted = 2ll * multiprocessors() / (rows > 0 ? rows : 1);
  const int most = columns / MIN_COLUMNS;
  return wanted < 2 || most < 2 ? 1 : wanted < most ? int(wanted) : most;
}

// partials: room for 8 floats for each of rows * splits; not used where splits is 1.
QADAPTER_EXPORT int qadapter_cuda_logits_forward(
    const void* a, long long a_stride, int dtype, const void* b, long long b_stride, int,
    const int64_t* actions, const float* base_lse, const double* coef, long long rows, int columns,
    float* q, float* value, float* base_logprob, float* base_lse_out, float* normalizer_2N,
    float* stats, int splits, float* partials, cudaStream_t stream) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const TwoStreams<T> in = {
        {static_cast<const T*>(a), a_stride}, {static_cast<const T*>(b), b_stride}, Coefficients(coef)};
    auto run = [&](auto state) {
      using State = decltype(state);
      static_assert(sizeof(State) <= 8 * sizeof(float));
      const Rows shape = {actions, rows, columns};
      const ForwardOutputs out = {q, value, base_logprob, base_lse_out, normalizer_2N, stats};
      // Whole vectors: a row that starts on a 16-byte boundary goes on with one in every block.
      const int vectors = (columns + VECTOR<T> - 1) / VECTOR<T>;
      const int width = (vectors + splits - 1) / splits * VECTOR<T>;
      State* parts = reinterpret_cast<State*>(partials);
      const cudaError_t error = launch(
          logits_forward<T, State>,
          {rows, splits, FORWARD_THREADS, int(MAX_WARPS * sizeof(State)), 0}, stream, in,
          shape, base_lse, out, width, parts);
      if (splits == 1 || error != cudaSuccess) return error;
      return launch(merge_splits<T, State>, {rows, 1, WARP, 0, 0}, stream, in, shape, base_lse, out,
                    splits, parts);
    };
    return stats ? run(ComparedStreams()) : run(Streams());
  });
}

QADAPTER_EXPORT int qadapter_cuda_logits_backward(
    const void* a, long long a_stride, int dtype, const void* b, long long b_stride, int,
    const int64_t* actions, const float* normalizer_2N, const float* grad_q, const float* grad_v,
    const double* coef, long long rows, int columns, void* out, long long out_stride, int,
    cudaStream_t stream) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const TwoStreams<T> in = {
        {static_cast<const T*>(a), a_stride}, {static_cast<const T*>(b), b_stride}, Coefficients(coef)};
    const int tile = BACKWARD_THREADS * BACKWARD_UNROLL * VECTOR<T>;
    const int blocks = columns / tile + 1;
    return launch(logits_backward<T>, {rows, blocks < 65535 ? blocks : 65535, BACKWARD_THREADS, 0, 0},
                  stream, in, Rows{actions, rows, columns}, normalizer_2N, grad_q, grad_v,
                  Matrix<T>{static_cast<T*>(out), out_stride});
  });
}

QADAPTER_EXPORT int qadapter_cuda_combine_logits(
    const void* a, long long a_stride, int dtype, const void* b, long long b_stride, int,
    const double* coef, const float* strength, long long rows, int columns, float* out,
    cudaStream_t stream) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const TwoStreams<T> in = {
        {static_cast<const T*>(a), a_stride}, {static_cast<const T*>(b), b_stride}, Coefficients(coef)};
    return launch(combine_logits<T>, {rows, 1, FORWARD_THREADS, int(MAX_WARPS * sizeof(Streams)), 0},
                  stream, in, columns, strength, Matrix<float>{out, columns});
  });
}
