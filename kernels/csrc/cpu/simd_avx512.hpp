// Sixteen floats at a time: AVX-512 F, BW, VL, DQ.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "row.hpp"

namespace {

struct V {
  static constexpr int64_t kWidth = 16;
  __m512 x;
};

inline V splat(float x) { return {_mm512_set1_ps(x)}; }
inline V load_float32(const float* p) { return {_mm512_loadu_ps(p)}; }
inline V load_bfloat16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline V load_float16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
}
inline void store_float32(float* p, V v) { _mm512_storeu_ps(p, v.x); }
inline void store_bfloat16(uint16_t* p, V v) {
  // By hand: VCVTNEPS2BF16 would flush subnormals, and few processors have it.
  const __m512i bits = _mm512_castps_si512(v.x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(v.x, v.x, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
inline void store_float16(uint16_t* p, V v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v.x, _MM_FROUND_TO_NEAREST_INT));
}

inline V operator+(V a, V b) { return {_mm512_add_ps(a.x, b.x)}; }
inline V operator-(V a, V b) { return {_mm512_sub_ps(a.x, b.x)}; }
inline V operator*(V a, V b) { return {_mm512_mul_ps(a.x, b.x)}; }
inline V operator/(V a, V b) { return {_mm512_div_ps(a.x, b.x)}; }
inline V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
inline V max(V a, V b) { return {_mm512_max_ps(a.x, b.x)}; }
inline V min(V a, V b) { return {_mm512_min_ps(a.x, b.x)}; }
inline V where_equal(V a, V b, V yes, V no) {
  return {_mm512_mask_mov_ps(no.x, _mm512_cmp_ps_mask(a.x, b.x, _CMP_EQ_OQ), yes.x)};
}
inline V where_positive(V a, V yes) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.x, _mm512_setzero_ps(), _CMP_GT_OQ), yes.x)};
}
inline float reduce_max(V v) { return _mm512_reduce_max_ps(v.x); }
inline float reduce_sum(V v) { return _mm512_reduce_add_ps(v.x); }

inline V scale_by_power(V p, V n) { return {_mm512_scalef_ps(p.x, n.x)}; }

}  // namespace
