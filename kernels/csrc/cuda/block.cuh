// How a team of threads walks a row and agrees on one result.
#pragma once

#include "math.cuh"

namespace qadapter {

template <class T> struct Matrix {
  T* data;
  long long stride;  // elements between rows

  QADAPTER_DEVICE T* row(long long i) const { return data + i * stride; }
};

// Threads that share a row: `index` of this one among `size`.
struct Team {
  int index, size;
};
QADAPTER_DEVICE Team block_team() { return {thread(), threads()}; }

// A width that a generic lambda takes as an argument and uses as a constant.
template <int WIDTH> struct Width {
  __host__ __device__ constexpr operator int() const { return WIDTH; }
};

// A row in two parts: `vectors` 16-byte accesses from column `head` on, which starts on a 16-byte
// boundary, and the `singles` before and after them.
struct Split {
  int head, vectors, singles, width;

  QADAPTER_DEVICE int single(int i) const { return i < head ? i : i + vectors * width; }
};

// Columns before p's first 16-byte boundary.
template <class T> QADAPTER_DEVICE int columns_to_boundary(const T* p) {
  return static_cast<int>((-reinterpret_cast<uintptr_t>(p) & 15) / sizeof(T));
}

// Where streams don't reach a boundary at the same column, their columns go one by one.
template <class T> QADAPTER_DEVICE Split split_row(int columns, int head, bool together) {
  if (!together) return {columns, 0, columns, VECTOR<T>};
  const int vectors = (columns - head) / VECTOR<T>;
  return {head, vectors, columns - vectors * VECTOR<T>, VECTOR<T>};
}

// Hands load(i), i < count, to use(i, loaded). UNROLL loads of a thread are in flight before the
// first is used: memory latency, not arithmetic, is what there is to hide. between() separates the
// loads of a round from its uses and is called by every thread of the team alike.
template <int UNROLL, class Load, class Between, class Use>
QADAPTER_DEVICE void stream(Team team, int count, Load load, Between between, Use use) {
  for (int round = 0; round < count; round += UNROLL * team.size) {
    const int first = round + team.index;
    decltype(load(0)) loaded[UNROLL];
#pragma unroll
    for (int j = 0; j < UNROLL; ++j)
      if (first + j * team.size < count) loaded[j] = load(first + j * team.size);
    between();
#pragma unroll
    for (int j = 0; j < UNROLL; ++j)
      if (first + j * team.size < count) use(first + j * team.size, loaded[j]);
  }
}

struct Nothing {
  QADAPTER_DEVICE void operator()() const {}
};
struct BlockBarrier {
  QADAPTER_DEVICE void operator()() const { sync(); }
};

// load(Width, column) -> x and use(Width, column, x) over every column of a row: the vectors first,
// then the singles, each in ascending order.
template <class T, int UNROLL, class Between = Nothing, class Load, class Use>
QADAPTER_DEVICE void for_columns(Team team, const Split& split, Load load, Use use) {
  stream<UNROLL>(
      team, split.vectors,
      [&](int i) { return load(Width<VECTOR<T>>{}, split.head + i * VECTOR<T>); }, Between(),
      [&](int i, const auto& x) { use(Width<VECTOR<T>>{}, split.head + i * VECTOR<T>, x); });
  stream<UNROLL>(
      team, split.singles, [&](int i) { return load(Width<1>{}, split.single(i)); }, Between(),
      [&](int i, const auto& x) { use(Width<1>{}, split.single(i), x); });
}

template <class T, int WIDTH>
QADAPTER_DEVICE void to_float(const Pack<T, WIDTH>& from, float (&to)[WIDTH]) {
#pragma unroll
  for (int e = 0; e < WIDTH; ++e) to[e] = static_cast<float>(from.value[e]);
}

template <class T, int WIDTH> QADAPTER_DEVICE void store_as(T* p, const float (&x)[WIDTH]) {
  Pack<T, WIDTH> out;
#pragma unroll
  for (int e = 0; e < WIDTH; ++e) out.value[e] = static_cast<T>(x[e]);
  store(p, out);
}

// The same for float32 results of rows whose 16-byte boundaries may lie elsewhere than the inputs'.
template <int WIDTH> QADAPTER_DEVICE void store_floats(float* p, const float (&x)[WIDTH]) {
  if constexpr (WIDTH % 4 == 0) {
    if (columns_to_boundary(p) == 0) {
#pragma unroll
      for (int e = 0; e < WIDTH; e += 4) store(p + e, Pack<float, 4>{x[e], x[e + 1], x[e + 2], x[e + 3]});
      return;
    }
  }
#pragma unroll
  for (int e = 0; e < WIDTH; ++e) p[e] = x[e];
}

// Elements of two rows at the same columns.
template <class T, int WIDTH> struct Pair {
  Pack<T, WIDTH> a, b;
};

// Merges one State a thread; every thread gets the block's. The order is fixed, so the result is
// the same, bit for bit, in every run. `scratch`: MAX_WARPS States of shared memory, which a sync
// must free before it is used again.
template <class State> QADAPTER_DEVICE State block_reduce(State mine, State* scratch) {
  for (int bit = WARP / 2; bit > 0; bit /= 2) mine.merge(shuffle_xor(mine, bit));
  if (thread() % WARP == 0) scratch[thread() / WARP] = mine;
  sync();
  if (thread() < WARP) {
    State all = thread() < threads() / WARP ? scratch[thread()] : State();
    for (int bit = WARP / 2; bit > 0; bit /= 2) all.merge(shuffle_xor(all, bit));
    if (thread() == 0) scratch[0] = all;
  }
  sync();
  return scratch[0];
}

// The smallest reduction there is, for plain sums.
struct Sum {
  float value = 0.0f;
  QADAPTER_DEVICE void merge(const Sum& other) { value += other.value; }
};

// Entropy of π̃, KL(π̃‖π), KL(π‖π̃) of one row into [3, N].
template <class State>
QADAPTER_DEVICE void write_statistics(const State&, float*, long long, long long) {}
QADAPTER_DEVICE void write_statistics(const ComparedStreams& state, float* stats_3N, long long rows,
                                      long long row) {
  stats_3N[row] = state.entropy();
  stats_3N[rows + row] = state.kl_policy_base();
  stats_3N[2 * rows + row] = state.kl_base_policy();
}

constexpr int MASKED_ROW = -2;  // an action; other negative ones: a row without an action

// Codes of qadapter_kernels/native.py. Calls `body` with a value of the type; false if unknown.
template <class Body> cudaError_t with_dtype(int code, Body body) {
  switch (code) {
    case 0: return body(float());
    case 1: return body(bf16());
    case 2: return body(fp16());
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace qadapter
