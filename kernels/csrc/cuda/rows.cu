// The row kernel for every device and every row: one block a row, two readings of it.
#include "rows.cuh"
#include "rows_cluster.cuh"

namespace qadapter {
namespace {

// One such block fills half of a multiprocessor's threads but most of its registers, so one row a
// multiprocessor is in flight: all of them together (132 rows of 257 KB) fit in L2, which then
// serves the second reading.
constexpr int ROW_THREADS = 1024;

template <class T, class State>
QADAPTER_DEVICE State read_row(const RowProblem<T>& in, int64_t action, long long row) {
  const T* z = in.z.row(row);
  const T* zb = in.zb.data ? in.zb.row(row) : nullptr;
  State state;
  if constexpr (std::is_same<State, ComparedStreams>::value) {
    const int head = columns_to_boundary(z);
    const Split split = split_row<T>(in.columns, head, head == columns_to_boundary(zb));
    for_columns<T, State::UNROLL>(
        block_team(), split,
        [&](auto width, int column) {
          return Pair<T, width>{load<width>(z + column), load<width>(zb + column)};
        },
        [&](auto width, int column, const auto& x) {
          float u[width], b[width];
          to_float(x.a, u);
          to_float(x.b, b);
          in.policy(u, column, action, row);
          in.base(b, column, action, row);
          state.add(u, b, true);
        });
  } else {  // each stream at its own alignment
    auto sum = [&](const T* p, const Affine& affine) {
      MaxSum total;
      for_columns<T, State::UNROLL>(
          block_team(), split_row<T>(in.columns, columns_to_boundary(p), true),
          [&](auto width, int column) { return load<width>(p + column); },
          [&](auto width, int column, const auto& loaded) {
            float x[width];
            to_float(loaded, x);
            affine(x, column, action, row);
            total.add(x);
          });
      return total;
    };
    state.u = sum(z, in.policy);
    if (zb) state.b = sum(zb, in.base);
  }
  return block_reduce(state, shared<State>());
}

// T: of z. R: of P'. Where R is narrower, a row of P' takes the first half of its row's bytes:
// columns [c, d) land on what columns [c/2, d/2) held, which this or an earlier round of loads
// took, so that loads before uses, round by round in ascending order, is all it needs.
template <class T, class R, class State>
__global__ void __launch_bounds__(ROW_THREADS, 1) rows_forward(RowProblem<T> in) {
  constexpr bool NARROWED = sizeof(R) < sizeof(T);
  constexpr bool COMPARE = std::is_same<State, ComparedStreams>::value;
  const long long row = block_x();
  const int64_t action = in.actions[row];
  const bool is_masked = action == MASKED_ROW;
  State state;
  if (!is_masked) state = read_row<T, State>(in, action, row);
  if (thread() == 0) {
    if (is_masked) write_masked(in, COMPARE, row);
    else write_outputs(in, state, row);
  }
  if (!in.write_residual) return;

  const Residual residual(state.u, action);
  const T* z = in.z.row(row);
  R* out = reinterpret_cast<R*>(in.z.row(row));
  const int head = columns_to_boundary(z);
  // Past an unaligned head, 16-byte columns of z are not 8-byte columns of P'.
  for_columns<T, 2, std::conditional_t<NARROWED, BlockBarrier, Nothing>>(
      block_team(), split_row<T>(in.columns, head, !NARROWED || head == 0),
      [&](auto width, int column) {
        return residual.is_zero() ? Pack<T, width>() : load<width>(z + column);
      },
      [&](auto width, int column, const auto& loaded) {
        float x[width];
        to_float(loaded, x);
        if (!residual.is_zero()) in.policy(x, column, action, row);
        residual(x, column);
        store_as(out + column, x);
      });
}

// z's type is P's, or float32.
template <class T, class Body> cudaError_t with_residual_dtype(T, int code, Body body) {
  return with_dtype(code, [&](auto residual) -> cudaError_t {
    using R = decltype(residual);
    if constexpr (std::is_same<T, R>::value || std::is_same<T, float>::value) return body(residual);
    return cudaErrorInvalidValue;
  });
}

}  // namespace
}  // namespace qadapter

using namespace qadapter;

QADAPTER_EXPORT int qadapter_cuda_rows_forward(
    void* z, long long z_stride, int dtype, const void* zb, long long zb_stride, int,
    const int64_t* actions, double scale, const float* offset_bias, double base_scale,
    const float* base_bias, const float* action_logits, long long rows, int columns,
    int write_residual, int residual_dtype, float* policy_lse, float* base_lse, float* stats,
    cudaStream_t stream) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return with_residual_dtype(zero, residual_dtype, [&](auto residual) {
      using R = decltype(residual);
      const RowProblem<T> in = {
          {static_cast<T*>(z), z_stride}, {static_cast<const T*>(zb), zb_stride},
          {float(scale), offset_bias, action_logits},
          {float(base_scale), base_bias, action_logits ? action_logits + rows : nullptr},
          actions, rows, columns, write_residual != 0, {policy_lse, base_lse, stats}};
      auto run = [&](auto state) {
        using State = decltype(state);
        ClusterShape shape;
        const Launch clusters = cluster_launch<T, R, State>(in, shape);
        if (clusters.cluster > 0)
          return launch(rows_forward_cluster<T, R, State>, clusters, stream, in, shape);
        return launch(rows_forward<T, R, State>,
                      {rows, 1, ROW_THREADS, int(MAX_WARPS * sizeof(State)), 0}, stream, in);
      };
      return stats ? run(ComparedStreams()) : run(Streams());
    });
  });
}
