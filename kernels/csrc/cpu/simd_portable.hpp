// Four floats at a time in the compilers' portable vector types: SSE2, NEON, whatever is the
// target's baseline. Also the 16-bit conversions of single elements everywhere else.
#pragma once

#include <cstdint>
#include <cstring>

#include "row.hpp"

namespace {

using Floats = float __attribute__((vector_size(16)));
using Ints = int32_t __attribute__((vector_size(16)));

struct V {
  static constexpr int64_t kWidth = 4;
  Floats x;
};

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float from_bfloat16(uint16_t x) { return from_bits(uint32_t(x) << 16); }
inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = to_bits(x);
  return x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_float16(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000) << 16, magnitude = x & 0x7fff;
  if (magnitude < 0x0400) {  // zero and subnormals
    return from_bits(to_bits(float(magnitude) * 0x1p-24f) | sign);
  }
  const uint32_t exponent = magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u;
  return from_bits(((magnitude << 13) + exponent) | sign);
}
inline uint16_t to_float16(float x) {
  const uint32_t bits = to_bits(x), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  if (x != x) return 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and more round to infinity
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 rounds to units of 2^-24
    return sign | uint16_t(to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000);
  }
  return sign | uint16_t((magnitude - 0x38000000 + 0x0fff + ((magnitude >> 13) & 1)) >> 13);
}

inline V splat(float x) { return {Floats{x, x, x, x}}; }
inline V load_float32(const float* p) {
  V v;
  std::memcpy(&v.x, p, sizeof v.x);
  return v;
}
inline V load_bfloat16(const uint16_t* p) {
  return {Floats{from_bfloat16(p[0]), from_bfloat16(p[1]), from_bfloat16(p[2]), from_bfloat16(p[3])}};
}
inline V load_float16(const uint16_t* p) {
  return {Floats{from_float16(p[0]), from_float16(p[1]), from_float16(p[2]), from_float16(p[3])}};
}
inline void store_float32(float* p, V v) { std::memcpy(p, &v.x, sizeof v.x); }
inline void store_bfloat16(uint16_t* p, V v) {
  for (int i = 0; i < 4; ++i) p[i] = to_bfloat16(v.x[i]);
}
inline void store_float16(uint16_t* p, V v) {
  for (int i = 0; i < 4; ++i) p[i] = to_float16(v.x[i]);
}

inline V operator+(V a, V b) { return {a.x + b.x}; }
inline V operator-(V a, V b) { return {a.x - b.x}; }
inline V operator*(V a, V b) { return {a.x * b.x}; }
inline V operator/(V a, V b) { return {a.x / b.x}; }
inline V fma(V a, V b, V c) { return {a.x * b.x + c.x}; }
// The second operand where either is NaN, as the x86 instructions do.
inline V max(V a, V b) { return {a.x > b.x ? a.x : b.x}; }
inline V min(V a, V b) { return {a.x < b.x ? a.x : b.x}; }
inline V where_equal(V a, V b, V yes, V no) { return {a.x == b.x ? yes.x : no.x}; }
inline V where_positive(V a, V yes) { return {a.x > 0.0f ? yes.x : Floats{}}; }
inline float reduce_max(V v) {
  const float low = v.x[0] > v.x[1] ? v.x[0] : v.x[1], high = v.x[2] > v.x[3] ? v.x[2] : v.x[3];
  return low > high ? low : high;
}
inline float reduce_sum(V v) { return (v.x[0] + v.x[1]) + (v.x[2] + v.x[3]); }

// p * 2^n for an integral n in [-151, 129], in two halves so that no factor overflows and the
// result underflows gradually.
inline V scale_by_power(V p, V n) {
  const Ints whole = __builtin_convertvector(n.x == n.x ? n.x : Floats{}, Ints);
  const Ints half = whole / 2;
  const Ints first = (half + 127) << 23, second = (whole - half + 127) << 23;
  Floats f1, f2;
  std::memcpy(&f1, &first, sizeof f1);
  std::memcpy(&f2, &second, sizeof f2);
  return {p.x * f1 * f2};
}

}  // namespace
