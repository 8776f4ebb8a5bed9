// The row kernels over a vector type V, included once an instruction set (isa_*.cpp).
//
// Every pass works on blocks of kBlock columns: a block is staged as float32 in L1 (converted,
// scaled, excluded columns at -inf, padded with -inf to whole vectors), then read from there. So
// dtypes meet the arithmetic only while staging and storing, and the online softmax rescales once
// a block instead of once a vector.

namespace {

using qadapter::DType;
using qadapter::kBlock;
using qadapter::Kernels;
using qadapter::Row;
using qadapter::Source;
using qadapter::Summary;

const float kInf = __builtin_inff();

// exp(x), within 1.1 units in the last place over the whole range (tests/kernels check it), with
// gradual underflow and exp(-inf) = 0; NaN stays NaN. x = n ln2 + r; exp(r) by a minimax polynomial
// of degree 6 (relative error 3e-9 for |r| <= ln2/2) whose first two coefficients are exactly 1.
inline V exp(V x) {
  x = min(splat(89.0f), max(splat(-104.0f), x));
  const V magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const V n = fma(x, splat(1.44269504f), magic) - magic;
  V r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  V q = fma(splat(0x1.6a23d0p-10f), r, splat(0x1.123a20p-7f));
  q = fma(q, r, splat(0x1.5558f2p-5f));
  q = fma(q, r, splat(0x1.555492p-3f));
  q = fma(q, r, splat(0x1.fffffcp-2f));
  const V p = fma(q * r, r, r) + splat(1.0f);
  return scale_by_power(p, n);
}

struct Float32 {
  using Element = float;
  static V load(const Element* p) { return load_float32(p); }
  static void store(Element* p, V v) { store_float32(p, v); }
};
struct BFloat16 {
  using Element = uint16_t;
  static V load(const Element* p) { return load_bfloat16(p); }
  static void store(Element* p, V v) { store_bfloat16(p, v); }
};
struct Float16 {
  using Element = uint16_t;
  static V load(const Element* p) { return load_float16(p); }
  static void store(Element* p, V v) { store_float16(p, v); }
};

enum class Mode {
  kScale,      // scale * x, scale > 0: -inf stays -inf by itself
  kAffine,     // scale * x + bias, -inf where x is
  kAccumulate  // staged + scale * x, -inf where either is, but NaN where either is
};

template <class T, Mode mode>
inline V transform(V x, V scale, V addend) {
  if (mode == Mode::kScale) return x * scale;
  const V infinity = splat(-kInf);
  const V sum = fma(x, scale, addend);
  if (mode == Mode::kAffine) return where_equal(x, infinity, infinity, sum);
  // min gives its second operand where either is NaN: a NaN x is handed on, and a NaN addend is no
  // -inf, so that the sum is taken.
  return where_equal(min(x, addend), infinity, min(infinity, x), sum);
}

// Stages columns [begin, begin + count) and returns their maximum (NaN is passed over).
template <class T, Mode mode>
float stage_as(const Source& source, int64_t begin, int64_t count, float* staged) {
  const auto* x = static_cast<const typename T::Element*>(source.data) + begin;
  const float* bias = mode == Mode::kAffine && source.bias ? source.bias + begin : nullptr;
  const V scale = splat(source.scale);
  V peak = splat(-kInf);
  int64_t k = 0;
  for (; k + V::kWidth <= count; k += V::kWidth) {
    const V addend = mode == Mode::kAccumulate ? load_float32(staged + k)
                     : bias                    ? load_float32(bias + k)
                                               : splat(0.0f);
    const V u = transform<T, mode>(T::load(x + k), scale, addend);
    peak = max(u, peak);
    store_float32(staged + k, u);
  }
  if (k < count) {
    typename T::Element x_tail[V::kWidth] = {};
    float addend_tail[V::kWidth] = {};
    for (int64_t i = 0; k + i < count; ++i) {
      x_tail[i] = x[k + i];
      if (mode == Mode::kAccumulate) addend_tail[i] = staged[k + i];
      if (bias) addend_tail[i] = bias[k + i];
    }
    store_float32(staged + k, transform<T, mode>(T::load(x_tail), scale, load_float32(addend_tail)));
    for (int64_t i = count; i < k + V::kWidth; ++i) staged[i] = -kInf;
    peak = max(load_float32(staged + k), peak);
  }
  return reduce_max(peak);
}

template <Mode mode>
float stage_source(const Source& source, int64_t begin, int64_t count, float* staged) {
  switch (source.dtype) {
    case DType::kBFloat16: return stage_as<BFloat16, mode>(source, begin, count, staged);
    case DType::kFloat16: return stage_as<Float16, mode>(source, begin, count, staged);
    default: return stage_as<Float32, mode>(source, begin, count, staged);
  }
}

float stage_first(const Source& source, int64_t begin, int64_t count, float* staged) {
  return source.scale > 0 && source.bias == nullptr
             ? stage_source<Mode::kScale>(source, begin, count, staged)
             : stage_source<Mode::kAffine>(source, begin, count, staged);
}

float put_exact(const Row& row, float exact, int64_t begin, int64_t count, float peak,
                float* staged) {
  const int64_t k = row.exact_column - begin;
  if (k < 0 || k >= count) return peak;
  staged[k] = exact;
  return exact > peak ? exact : peak;
}

// Policy logits u of columns [begin, begin + count); returns a bound of their maximum.
float stage_policy(const Row& row, int64_t begin, int64_t count, float* staged) {
  float peak = 0.0f;
  if (row.num_terms == 0) {
    for (int64_t k = 0; k < kBlock; ++k) staged[k] = k < count ? 0.0f : -kInf;
  } else {
    peak = stage_first(row.policy[0], begin, count, staged);
    if (row.num_terms == 2) {
      peak = stage_source<Mode::kAccumulate>(row.policy[1], begin, count, staged);
    }
  }
  return put_exact(row, row.exact_policy, begin, count, peak, staged);
}

float stage_base(const Row& row, int64_t begin, int64_t count, float* staged) {
  const float peak = stage_first(row.base, begin, count, staged);
  return put_exact(row, row.exact_base, begin, count, peak, staged);
}

float policy_at(const Row& row, int64_t column) {
  alignas(64) float staged[kBlock];
  stage_policy(row, column, 1, staged);
  return staged[0];
}

// Four independent sums hide the latency of the additions.
double sum_exp(const float* staged, int64_t count, float peak) {
  const V shift = splat(peak);
  V s0 = splat(0.0f), s1 = s0, s2 = s0, s3 = s0;
  int64_t k = 0;
  for (; k + 4 * V::kWidth <= count; k += 4 * V::kWidth) {
    const float* p = staged + k;
    s0 = s0 + exp(load_float32(p) - shift);
    s1 = s1 + exp(load_float32(p + V::kWidth) - shift);
    s2 = s2 + exp(load_float32(p + 2 * V::kWidth) - shift);
    s3 = s3 + exp(load_float32(p + 3 * V::kWidth) - shift);
  }
  for (; k < count; k += V::kWidth) s0 = s0 + exp(load_float32(staged + k) - shift);
  return reduce_sum((s0 + s1) + (s2 + s3));
}

void sum_statistics(const float* staged_policy, const float* staged_base, int64_t count,
                    Summary* s) {
  const V policy_peak = splat(float(s->policy_peak)), base_peak = splat(float(s->base_peak));
  V policy_sum = splat(0.0f), base_sum = policy_sum, energy = policy_sum;
  V policy_cross = policy_sum, base_cross = policy_sum;
  for (int64_t k = 0; k < count; k += V::kWidth) {
    const V u = load_float32(staged_policy + k) - policy_peak;
    const V b = load_float32(staged_base + k) - base_peak;
    const V p = exp(u), pi = exp(b);
    policy_sum = policy_sum + p;
    base_sum = base_sum + pi;
    // A column of zero probability contributes nothing, whatever stands beside it.
    energy = energy + where_positive(p, p * u);
    policy_cross = policy_cross + where_positive(p, p * (u - b));
    base_cross = base_cross + where_positive(pi, pi * (b - u));
  }
  s->policy_sum += reduce_sum(policy_sum);
  s->base_sum += reduce_sum(base_sum);
  s->policy_energy += reduce_sum(energy);
  s->policy_cross += reduce_sum(policy_cross);
  s->base_cross += reduce_sum(base_cross);
}

void reduce(const Row& row, int64_t begin, int64_t end, bool statistics, Summary* summary) {
  alignas(64) float staged_policy[kBlock];
  alignas(64) float staged_base[kBlock];
  Summary s = {};
  for (int64_t k = begin; k < end; k += kBlock) {
    const int64_t count = end - k < kBlock ? end - k : kBlock;
    const float policy_peak = stage_policy(row, k, count, staged_policy);
    const double policy_shift = qadapter::move_peak(&s.policy_peak, s.policy_sum, policy_peak);
    double base_shift = 0.0;
    if (row.has_base) {
      const float base_peak = stage_base(row, k, count, staged_base);
      base_shift = qadapter::move_peak(&s.base_peak, s.base_sum, base_peak);
    }
    qadapter::rescale(&s, policy_shift, base_shift);
    if (statistics) {
      sum_statistics(staged_policy, staged_base, count, &s);
      continue;
    }
    s.policy_sum += sum_exp(staged_policy, count, float(s.policy_peak));
    if (row.has_base) s.base_sum += sum_exp(staged_base, count, float(s.base_peak));
  }
  *summary = s;
}

template <class T>
void store_block(const float* staged, int64_t begin, int64_t count, void* out) {
  auto* p = static_cast<typename T::Element*>(out) + begin;
  int64_t k = 0;
  for (; k + V::kWidth <= count; k += V::kWidth) T::store(p + k, load_float32(staged + k));
  if (k < count) {
    typename T::Element tail[V::kWidth];
    T::store(tail, load_float32(staged + k));
    for (int64_t i = 0; k + i < count; ++i) p[k + i] = tail[i];
  }
}

void write_exp(const Row& row, int64_t begin, int64_t end, float shift, float factor, void* out,
               DType out_dtype) {
  alignas(64) float staged[kBlock];
  const V v_shift = splat(shift), v_factor = splat(factor);
  for (int64_t k = begin; k < end; k += kBlock) {
    const int64_t count = end - k < kBlock ? end - k : kBlock;
    stage_policy(row, k, count, staged);
    for (int64_t i = 0; i < count; i += V::kWidth) {
      store_float32(staged + i, exp(load_float32(staged + i) - v_shift) * v_factor);
    }
    switch (out_dtype) {
      case DType::kBFloat16: store_block<BFloat16>(staged, k, count, out); break;
      case DType::kFloat16: store_block<Float16>(staged, k, count, out); break;
      default: store_block<Float32>(staged, k, count, out);
    }
  }
}

void write_log(const Row& row, int64_t begin, int64_t end, float peak, float log_sum, float* out) {
  alignas(64) float staged[kBlock];
  const V v_peak = splat(peak), v_log = splat(log_sum);
  for (int64_t k = begin; k < end; k += kBlock) {
    const int64_t count = end - k < kBlock ? end - k : kBlock;
    stage_policy(row, k, count, staged);
    for (int64_t i = 0; i < count; i += V::kWidth) {
      store_float32(staged + i, (load_float32(staged + i) - v_peak) - v_log);
    }
    store_block<Float32>(staged, k, count, out);
  }
}

void exp_array(const float* in, float* out, int64_t count) {
  int64_t k = 0;
  for (; k + V::kWidth <= count; k += V::kWidth) store_float32(out + k, exp(load_float32(in + k)));
  if (k < count) {
    float tail[V::kWidth] = {};
    for (int64_t i = 0; k + i < count; ++i) tail[i] = in[k + i];
    store_float32(tail, exp(load_float32(tail)));
    for (int64_t i = 0; k + i < count; ++i) out[k + i] = tail[i];
  }
}

}  // namespace
