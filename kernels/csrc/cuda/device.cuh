// What the kernels need of the machine, in one place: CUDA's intrinsics where nvcc compiles, and the
// emulator where a C++ compiler does, so that tests run these very kernels on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#include <cooperative_groups.h>
#endif

// Thread-block clusters and bulk copies are compiled for compute capability 9.x and 10.x, whose
// blocks also have the shared memory that makes them worthwhile.
#if !defined(__CUDACC__) || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1100)
#define QADAPTER_HAS_CLUSTERS 1
#endif

namespace qadapter {

constexpr float INF = INFINITY;
constexpr int WARP = 32;
constexpr int MAX_WARPS = 1024 / WARP;

using bf16 = __nv_bfloat16;
using fp16 = __half;

// WIDTH neighboring elements that move in one access.
template <class T, int WIDTH> struct alignas(WIDTH * sizeof(T)) Pack { T value[WIDTH]; };

// Elements in a 16-byte access, the widest one there is.
template <class T> constexpr int VECTOR = 16 / sizeof(T);

struct Launch {
  long long blocks_x;
  int blocks_y;
  int threads;
  int shared_bytes;
  int cluster;  // neighboring blocks that share a row; 0: an ordinary launch
};

#ifdef __CUDACC__

#define QADAPTER_DEVICE __device__ __forceinline__
#define QADAPTER_EXPORT extern "C" __attribute__((visibility("default")))

QADAPTER_DEVICE int thread() { return threadIdx.x; }
QADAPTER_DEVICE int threads() { return blockDim.x; }
QADAPTER_DEVICE long long block_x() { return blockIdx.x; }
QADAPTER_DEVICE int block_y() { return blockIdx.y; }
QADAPTER_DEVICE int blocks_y() { return gridDim.y; }
QADAPTER_DEVICE void sync() { __syncthreads(); }

template <class T> QADAPTER_DEVICE T* shared() {
  extern __shared__ __align__(128) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

// e^x in one multiplication and one special-function instruction; results below 1e-38 are 0.
QADAPTER_DEVICE float exp_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}

// The smaller one; NaN where either is NaN, which fminf passes over.
QADAPTER_DEVICE float min_or_nan(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

template <int WIDTH, class T> QADAPTER_DEVICE Pack<T, WIDTH> load(const T* p) {
  return *reinterpret_cast<const Pack<T, WIDTH>*>(p);
}
template <class T, int WIDTH> QADAPTER_DEVICE void store(T* p, const Pack<T, WIDTH>& x) {
  *reinterpret_cast<Pack<T, WIDTH>*>(p) = x;
}

// The struct of the lane whose number differs in one bit.
template <class S> QADAPTER_DEVICE S shuffle_xor(const S& mine, int bit) {
  static_assert(sizeof(S) % 4 == 0);
  uint32_t words[sizeof(S) / 4];
  memcpy(words, &mine, sizeof(S));
#pragma unroll
  for (uint32_t& word : words) word = __shfl_xor_sync(0xffffffffu, word, bit);
  S other;
  memcpy(&other, words, sizeof(S));
  return other;
}

#ifdef QADAPTER_HAS_CLUSTERS

// A barrier of all threads of the cluster, in two halves. What was written before the first half,
// in shared memory of any of its blocks or in global memory, is seen after the second.
QADAPTER_DEVICE void cluster_arrive() { cooperative_groups::this_cluster().barrier_arrive(); }
QADAPTER_DEVICE void cluster_wait() { cooperative_groups::this_cluster().barrier_wait(); }

// Where p, in this block's shared memory, stands in another block's.
template <class T> QADAPTER_DEVICE T* in_block(T* p, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(p, rank);
}

#endif  // QADAPTER_HAS_CLUSTERS

// Bytes that arrive in shared memory on their own. `done` completes once, when they are there.
// One thread starts and copies, any number wait.
struct Arrival {
  uint64_t done;

  QADAPTER_DEVICE void init() {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&done)) : "memory");
  }
  // Between the last init and the first copy: the copy engine sees the barriers.
  QADAPTER_DEVICE static void publish() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  // `from`, `to` and `bytes` are multiples of 16.
  QADAPTER_DEVICE void copy(void* to, const void* from, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 ::"r"(address(&done)), "r"(bytes) : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(address(to)), "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(address(&done))
        : "memory");
  }
  QADAPTER_DEVICE void wait() {
    uint32_t is_done = 0;
    while (!is_done)
      asm volatile(
          "{ .reg .pred p;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\n"
          "selp.u32 %0, 1, 0, p; }"
          : "=r"(is_done) : "r"(address(&done)) : "memory");
  }

 private:
  QADAPTER_DEVICE static uint32_t address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
  }
};

// Shared memory a block of a cluster may have on this device, where `kernel` can run as clusters;
// else 0. The code that the driver compiles from old PTX can't, whatever the device could.
template <class Kernel> int cluster_shared_bytes(Kernel* kernel) {
  int device, major, bytes;
  cudaFuncAttributes attributes;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      (major != 9 && major != 10) ||
      cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess || attributes.ptxVersion < 90 ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
    return 0;
  return bytes;
}

// Of the current device.
inline int multiprocessors() {
  int device, count;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 1;
  return count;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Launch& shape, cudaStream_t stream,
                   Arguments... arguments) {
  if (shape.blocks_x == 0) return cudaSuccess;
  if (shape.shared_bytes > 48 << 10) {  // what a block gets without asking
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = shape.cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks_x), shape.blocks_y);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = shape.cluster > 0;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace qadapter

#else
}  // namespace qadapter
#include "emulator.hpp"
#endif  // __CUDACC__
