// device.cuh's functions on a CPU, for the tests: the kernels run as they are, thread by thread.
//
// Every CUDA thread of a block, or of a cluster of blocks, is a fiber. A warp runs as far as it gets,
// until a barrier holds all of its threads, before the next warp gets its turn, in an order the test
// chooses: what relies on another warp's progress without a barrier reads the wrong thing. Shared
// memory starts as NaN, and a copy into it lands only when somebody waits for it. What a launch
// reports as an error: misaligned accesses, writes past shared memory, barriers that don't pair up.
// What only a GPU can show: its memory model, the inline PTX of device.cuh (copies, their barriers,
// the approximate exp), launch attributes, the choice of a version by device, speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#undef __global__
#undef __launch_bounds__
#define __global__
#define __launch_bounds__(...)
#define QADAPTER_DEVICE inline
#define QADAPTER_EXPORT extern "C" __attribute__((visibility("default")))

namespace qadapter {

using std::min;

namespace emulator {

struct Options {
  int threads = 64;      // at most, of a block
  int order = 0;         // of warps and their threads. 0: ascending, 1: descending, others: a seed
  bool clusters = false;
};
inline Options options;
inline long long cluster_launches = 0;

struct Barrier {
  int size = 0, arrived = 0;
  long long generation = 0;

  void arrive() {
    if (++arrived == size) {
      arrived = 0;
      ++generation;
    }
  }
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int thread = 0, block = 0;
  const Barrier* waits_for = nullptr;
  long long generation = 0, cluster_generation = 0;
  bool is_done = false, has_arrived = false;
};

struct Warp {
  Barrier barrier;
  alignas(16) unsigned char slot[32][64];
};

struct Block {
  std::vector<unsigned char> storage;
  unsigned char* shared = nullptr;
  Barrier barrier;
  std::vector<Warp> warps;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;
  Barrier cluster;
  ucontext_t scheduler;
  Fiber* running = nullptr;
  long long first_block = 0;
  int block_y = 0, blocks_y = 1, threads = 0;
  bool has_fault = false;
  void (*call)(void*) = nullptr;
  void* kernel = nullptr;

  Block& block() { return blocks[running->block]; }
  void yield_until(const Barrier& barrier, long long generation) {
    if (barrier.generation != generation) return;
    running->waits_for = &barrier;
    running->generation = generation;
    swapcontext(&running->context, &scheduler);
  }
  void wait(Barrier& barrier) {
    const long long generation = barrier.generation;
    barrier.arrive();
    yield_until(barrier, generation);
  }
};
inline Machine machine;

inline void check(bool holds) { machine.has_fault |= !holds; }

inline void run_fiber() {
  machine.call(machine.kernel);
  check(!machine.running->has_arrived);
  machine.running->is_done = true;
  swapcontext(&machine.running->context, &machine.scheduler);
}

inline bool is_aligned(const void* p, size_t to) { return reinterpret_cast<uintptr_t>(p) % to == 0; }

constexpr size_t STACK = 64 << 10, CANARY = 64;

// Each thread to its next barrier; false if every one is done or held.
inline bool run_warp(const std::vector<Fiber*>& warp) {
  bool is_alive = false;
  for (Fiber* fiber : warp) {
    if (fiber->is_done) continue;
    if (fiber->waits_for && fiber->waits_for->generation == fiber->generation) continue;
    fiber->waits_for = nullptr;
    machine.running = fiber;
    is_alive = true;
    swapcontext(&machine.scheduler, &fiber->context);
  }
  return is_alive;
}

// One block, or one cluster, to its end.
inline void run_blocks(int count, int threads, int shared_bytes) {
  Machine& m = machine;
  m.threads = threads;
  m.blocks = std::vector<Block>(count);
  for (Block& block : m.blocks) {
    block.storage.assign(shared_bytes + CANARY + 128, 0xff);
    block.shared = block.storage.data() + (-reinterpret_cast<uintptr_t>(block.storage.data()) & 127);
    block.barrier.size = threads;
    block.warps = std::vector<Warp>(threads / 32);
    for (Warp& warp : block.warps) warp.barrier.size = 32;
  }
  m.cluster = {count * threads, 0, 0};
  m.fibers.resize(count * threads);
  std::vector<std::vector<Fiber*>> warps(count * threads / 32);
  for (int i = 0; i < count * threads; ++i) {
    Fiber& fiber = m.fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[STACK]);
    fiber.thread = i % threads;
    fiber.block = i / threads;
    fiber.waits_for = nullptr;
    fiber.is_done = fiber.has_arrived = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    makecontext(&fiber.context, run_fiber, 0);
    warps[i / 32].push_back(&fiber);
  }
  std::mt19937 random(options.order);
  auto arrange = [&](auto& items) {
    if (options.order == 1) std::reverse(items.begin(), items.end());
    if (options.order > 1) std::shuffle(items.begin(), items.end(), random);
  };
  arrange(warps);
  for (std::vector<Fiber*>& warp : warps) arrange(warp);
  for (bool is_alive = true; is_alive;) {
    is_alive = false;
    for (const std::vector<Fiber*>& warp : warps)
      while (run_warp(warp)) is_alive = true;
  }
  for (int i = 0; i < count * threads; ++i) check(m.fibers[i].is_done);
  for (const Block& block : m.blocks)
    for (size_t i = 0; i < CANARY; ++i) check(block.shared[shared_bytes + i] == 0xff);
}

}  // namespace emulator

inline int thread() { return emulator::machine.running->thread; }
inline int threads() { return emulator::machine.threads; }
inline long long block_x() { return emulator::machine.first_block + emulator::machine.running->block; }
inline int block_y() { return emulator::machine.block_y; }
inline int blocks_y() { return emulator::machine.blocks_y; }
inline void sync() { emulator::machine.wait(emulator::machine.block().barrier); }

template <class T> T* shared() { return reinterpret_cast<T*>(emulator::machine.block().shared); }

inline float exp_fast(float x) { return std::exp(x); }
inline float min_or_nan(float a, float b) { return a != a || b != b ? a + b : min(a, b); }

template <int WIDTH, class T> Pack<T, WIDTH> load(const T* p) {
  Pack<T, WIDTH> x;
  emulator::check(emulator::is_aligned(p, sizeof(x)));
  std::memcpy(static_cast<void*>(&x), p, sizeof(x));
  return x;
}
template <class T, int WIDTH> void store(T* p, const Pack<T, WIDTH>& x) {
  emulator::check(emulator::is_aligned(p, sizeof(x)));
  std::memcpy(static_cast<void*>(p), &x, sizeof(x));
}

template <class S> S shuffle_xor(const S& mine, int bit) {
  static_assert(sizeof(S) <= 64);
  emulator::Warp& warp = emulator::machine.block().warps[thread() / 32];
  const int lane = thread() % 32;
  std::memcpy(warp.slot[lane], &mine, sizeof(S));
  emulator::machine.wait(warp.barrier);
  S other;
  std::memcpy(static_cast<void*>(&other), warp.slot[lane ^ bit], sizeof(S));
  emulator::machine.wait(warp.barrier);
  return other;
}

inline void cluster_arrive() {
  emulator::Fiber& fiber = *emulator::machine.running;
  emulator::check(!fiber.has_arrived);
  fiber.has_arrived = true;
  fiber.cluster_generation = emulator::machine.cluster.generation;
  emulator::machine.cluster.arrive();
}
inline void cluster_wait() {
  emulator::Fiber& fiber = *emulator::machine.running;
  emulator::check(fiber.has_arrived);
  fiber.has_arrived = false;
  emulator::machine.yield_until(emulator::machine.cluster, fiber.cluster_generation);
}
template <class T> T* in_block(T* p, int rank) {
  const auto offset = reinterpret_cast<unsigned char*>(p) - emulator::machine.block().shared;
  return reinterpret_cast<T*>(emulator::machine.blocks[rank].shared + offset);
}

struct Arrival {
  void* to;
  const void* from;
  int bytes;

  void init() { bytes = 0; }
  static void publish() {}
  void copy(void* to_, const void* from_, int bytes_) {
    emulator::check(emulator::is_aligned(to_, 16) && emulator::is_aligned(from_, 16) &&
                    bytes_ % 16 == 0);
    to = to_;
    from = from_;
    bytes = bytes_;
  }
  void wait() {
    if (bytes > 0) std::memcpy(to, from, bytes);
    bytes = 0;
  }
};

inline int multiprocessors() { return 4; }

template <class Kernel> int cluster_shared_bytes(Kernel*) {
  return emulator::options.clusters ? 227 << 10 : 0;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Launch& shape, cudaStream_t,
                   Arguments... arguments) {
  emulator::Machine& m = emulator::machine;
  auto call = [&] { kernel(Parameters(arguments)...); };
  m.call = [](void* closure) { (*static_cast<decltype(call)*>(closure))(); };
  m.kernel = &call;
  m.has_fault = false;
  const int blocks = shape.cluster > 0 ? shape.cluster : 1;
  emulator::cluster_launches += shape.cluster > 0;
  m.blocks_y = shape.blocks_y;
  for (m.block_y = 0; m.block_y < shape.blocks_y; ++m.block_y)
    for (m.first_block = 0; m.first_block < shape.blocks_x; m.first_block += blocks)
      emulator::run_blocks(blocks, min(shape.threads, emulator::options.threads), shape.shared_bytes);
  return m.has_fault ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace qadapter
