// Eight floats at a time: AVX2, FMA, F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "row.hpp"

namespace {

struct V {
  static constexpr int64_t kWidth = 8;
  __m256 x;
};

inline V splat(float x) { return {_mm256_set1_ps(x)}; }
inline V load_float32(const float* p) { return {_mm256_loadu_ps(p)}; }
inline V load_bfloat16(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline V load_float16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))};
}
inline void store_float32(float* p, V v) { _mm256_storeu_ps(p, v.x); }
inline void store_bfloat16(uint16_t* p, V v) {
  const __m256i bits = _mm256_castps_si256(v.x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v.x, v.x, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
  const __m256i high = _mm256_srli_epi32(rounded, 16);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  _mm_storeu_si128((__m128i*)p, packed);
}
inline void store_float16(uint16_t* p, V v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v.x, _MM_FROUND_TO_NEAREST_INT));
}

inline V operator+(V a, V b) { return {_mm256_add_ps(a.x, b.x)}; }
inline V operator-(V a, V b) { return {_mm256_sub_ps(a.x, b.x)}; }
inline V operator*(V a, V b) { return {_mm256_mul_ps(a.x, b.x)}; }
inline V operator/(V a, V b) { return {_mm256_div_ps(a.x, b.x)}; }
inline V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.x, b.x, c.x)}; }
inline V max(V a, V b) { return {_mm256_max_ps(a.x, b.x)}; }
inline V min(V a, V b) { return {_mm256_min_ps(a.x, b.x)}; }
inline V where_equal(V a, V b, V yes, V no) {
  return {_mm256_blendv_ps(no.x, yes.x, _mm256_cmp_ps(a.x, b.x, _CMP_EQ_OQ))};
}
inline V where_positive(V a, V yes) {
  return {_mm256_and_ps(yes.x, _mm256_cmp_ps(a.x, _mm256_setzero_ps(), _CMP_GT_OQ))};
}
inline float reduce_max(V v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v.x), _mm256_extractf128_ps(v.x, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
inline float reduce_sum(V v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v.x), _mm256_extractf128_ps(v.x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// p * 2^n for an integral n in [-151, 129], in two halves so that no factor overflows and the
// result underflows gradually.
inline V scale_by_power(V p, V n) {
  const __m256i whole = _mm256_cvtps_epi32(n.x);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
  const __m256 scaled = _mm256_mul_ps(p.x, _mm256_castsi256_ps(first));
  return {_mm256_mul_ps(scaled, _mm256_castsi256_ps(second))};
}

}  // namespace
