// The row kernel of devices with thread-block clusters: a row of logits is read from memory once.
//
// 128,256 columns of 16 bits are 257 KB, more than a block's shared memory, but a cluster of blocks
// holds them: each block copies its slice in, the blocks add up their (max, sum) through each
// other's shared memory, and each writes P' of its slice.
#pragma once

#include "rows.cuh"

namespace qadapter {

constexpr int CLUSTER_THREADS = 256;
constexpr int MAX_CLUSTER = 8;         // blocks; what every device with clusters can launch
constexpr int SLICE_BYTES = 72 << 10;  // three blocks a multiprocessor: one loads, another writes
constexpr int CHUNK_BYTES = 16 << 10;  // the sums of a chunk start when it is there
constexpr int MAX_CHUNKS = 16;

struct ClusterShape {
  int blocks;   // that share a row
  int vectors;  // 16-byte vectors of a block's slice
};

// A block's shared memory: the slice (first: copies need its alignment), then these.
template <class State> struct ClusterMemory {
  State scratch[MAX_WARPS];
  State of_block[MAX_CLUSTER];
  Arrival chunk[MAX_CHUNKS];
};

template <class T, class R, class State>
__global__ void __launch_bounds__(CLUSTER_THREADS, 3)
rows_forward_cluster(RowProblem<T> in, ClusterShape shape) {
#ifdef QADAPTER_HAS_CLUSTERS
  constexpr int WIDTH = VECTOR<T>, CHUNK = CHUNK_BYTES / 16;
  const long long row = block_x() / shape.blocks;
  const int rank = static_cast<int>(block_x() % shape.blocks);
  const int start = min(rank * shape.vectors, in.columns / WIDTH);
  const int count = min(shape.vectors, in.columns / WIDTH - start);
  const int first_column = start * WIDTH;
  const int64_t action = in.actions[row];
  R* out = reinterpret_cast<R*>(in.z.row(row)) + first_column;

  if (action == MASKED_ROW) {
    const float zeros[WIDTH] = {};
    for (int i = thread(); i < count; i += threads()) store_as(out + i * WIDTH, zeros);
    if (rank == 0 && thread() == 0)
      write_masked(in, std::is_same<State, ComparedStreams>::value, row);
    return;
  }
  cluster_arrive();

  T* slice = shared<T>();
  auto& memory = *reinterpret_cast<ClusterMemory<State>*>(slice + shape.vectors * WIDTH);
  if (thread() == 0) {
    for (int c = 0; c * CHUNK < count; ++c) memory.chunk[c].init();
    Arrival::publish();
    const T* z = in.z.row(row) + first_column;
    for (int c = 0; c * CHUNK < count; ++c)
      memory.chunk[c].copy(slice + c * CHUNK * WIDTH, z + c * CHUNK * WIDTH,
                           min(CHUNK, count - c * CHUNK) * 16);
  }
  sync();

  State state;
  const T* zb = in.zb.data ? in.zb.row(row) + first_column : nullptr;
  for (int c = 0; c * CHUNK < count; ++c)
    stream<2>(
        block_team(), min(CHUNK, count - c * CHUNK),
        [&](int i) {
          return zb ? load<WIDTH>(zb + (c * CHUNK + i) * WIDTH) : Pack<T, WIDTH>();
        },
        [&] { memory.chunk[c].wait(); },
        [&](int i, const auto& loaded) {
          const int column = (c * CHUNK + i) * WIDTH;
          float u[WIDTH], b[WIDTH];
          to_float(load<WIDTH>(slice + column), u);
          in.policy(u, first_column + column, action, row);
          if (zb) {
            to_float(loaded, b);
            in.base(b, first_column + column, action, row);
          }
          state.add(u, b, zb != nullptr);
        });
  state = block_reduce(state, memory.scratch);

  cluster_wait();  // every block is there: its memory can be written
  if (thread() < shape.blocks) *in_block(&memory.of_block[rank], thread()) = state;
  // After this, every block's sums are here and every block's copies are done: P' may be written
  // over any part of the row, and no block needs this one's memory again.
  cluster_arrive();
  cluster_wait();
  state = memory.of_block[0];
  for (int i = 1; i < shape.blocks; ++i) state.merge(memory.of_block[i]);
  if (rank == 0 && thread() == 0) write_outputs(in, state, row);

  const Residual residual(state.u, action);
  for (int i = thread(); i < count; i += threads()) {
    float x[WIDTH];
    to_float(load<WIDTH>(slice + i * WIDTH), x);
    in.policy(x, first_column + i * WIDTH, action, row);
    residual(x, first_column + i * WIDTH);
    store_as(out + i * WIDTH, x);
  }
#endif
}

inline bool is_aligned(const void* data, long long stride_bytes) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride_bytes % 16 == 0;
}

// How to launch it, or cluster = 0 where the general kernel has to do: no clusters here, rows that
// don't start and end on 16-byte boundaries, rows too long, or nothing to write (one reading then
// is all there is anyway).
template <class T, class R, class State>
Launch cluster_launch(const RowProblem<T>& in, ClusterShape& shape) {
  const int most = cluster_shared_bytes(rows_forward_cluster<T, R, State>);
  if (!in.write_residual || most == 0 || in.columns % VECTOR<T> != 0 ||
      !is_aligned(in.z.data, in.z.stride * sizeof(T)) ||
      (in.zb.data && !is_aligned(in.zb.data, in.zb.stride * sizeof(T))))
    return {};
  const int vectors = in.columns / VECTOR<T>, rest = sizeof(ClusterMemory<State>);
  for (int blocks = 1; blocks <= MAX_CLUSTER; blocks *= 2) {
    shape = {blocks, (vectors + blocks - 1) / blocks};
    const long long bytes = shape.vectors * 16LL;
    if (bytes <= SLICE_BYTES ||
        (blocks == MAX_CLUSTER && bytes <= MAX_CHUNKS * CHUNK_BYTES && bytes + rest <= most))
      return {in.rows * blocks, 1, CLUSTER_THREADS, int(bytes) + rest, blocks};
  }
  return {};
}

}  // namespace qadapter
