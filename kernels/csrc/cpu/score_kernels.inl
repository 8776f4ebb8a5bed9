// Evaluation's row kernel over a vector type V, included after row_kernels.inl: everything that is
// asked of two streams at one state, from their products, in one pass.

namespace {

using qadapter::Mixture;
using qadapter::ScoreRow;
using qadapter::ScoreSummary;

// tanh(x) within a few units in the last place. Near 0, where 1 - exp(-2|x|) would cancel, by its
// series up to x^11 (relative error 1e-8 for |x| <= 1/4).
inline V tanh(V x) {
  const V zero = splat(0.0f), one = splat(1.0f);
  const V size = max(x, zero - x), square = x * x;
  const V e = exp(size * splat(-2.0f));
  const V far = (one - e) / (one + e);
  V p = fma(splat(-1382.0f / 155925.0f), square, splat(62.0f / 2835.0f));
  p = fma(p, square, splat(-17.0f / 315.0f));
  p = fma(p, square, splat(2.0f / 15.0f));
  p = fma(p, square, splat(-1.0f / 3.0f));
  const V near = fma(p * square, size, size);
  const V beyond = size - splat(0.25f);
  // |tanh x|, then its sign; exactly one of each pair is not 0.
  const V at_most = where_equal(max(beyond, zero), zero, near, zero);
  const V value = at_most + where_positive(beyond, far);
  const V signed_value = where_positive(x, value) - where_positive(zero - x, value);
  return where_equal(x, x, signed_value, x);  // NaN stays NaN
}

// One vector of logits: b, d and both mixtures.
struct Logits {
  V base, difference, policy, trained;
};

struct Maker {
  V scale, softcap;
  V policy_base, policy_difference, trained_base, trained_difference;
  bool capped;

  explicit Maker(const ScoreRow& row)
      : scale(splat(row.scale)), softcap(splat(row.softcap)),
        policy_base(splat(row.policy.base)), policy_difference(splat(row.policy.difference)),
        trained_base(splat(row.trained.base)), trained_difference(splat(row.trained.difference)),
        capped(row.softcap > 0) {}

  // What the base excludes (-inf) every policy excludes, whatever its weights.
  V mix(V b, V d, V base_weight, V difference_weight) const {
    const V infinity = splat(-kInf);
    return where_equal(b, infinity, infinity, fma(base_weight, b, difference_weight * d));
  }

  Logits operator()(V base, V difference, V bias) const {
    const V x = fma(base, scale, bias);
    V b = x, d = difference * scale;
    if (capped) {  // the difference before the factor: a fused b would not cancel to 0
      const V t = tanh(x / softcap);
      b = softcap * t;
      d = softcap * (tanh(fma(difference, scale, x) / softcap) - t);
    }
    return {b, d, mix(b, d, policy_base, policy_difference),
            mix(b, d, trained_base, trained_difference)};
  }
};

struct Staged {
  alignas(64) float base[kBlock], difference[kBlock], policy[kBlock], trained[kBlock];
  float base_top, policy_top, trained_top;
};

// Stages columns [begin, begin + count), padded with -inf to whole vectors.
void stage(const ScoreRow& row, const Maker& make, int64_t begin, int64_t count, Staged* out) {
  const float* sources[3] = {row.base + begin, row.difference ? row.difference + begin : nullptr,
                             row.bias ? row.bias + begin : nullptr};
  V base_top = splat(-kInf), policy_top = base_top, trained_top = base_top;
  for (int64_t k = 0; k < count; k += V::kWidth) {
    V in[3] = {splat(0.0f), splat(0.0f), splat(0.0f)};
    const bool whole = k + V::kWidth <= count;
    for (int64_t i = 0; i < 3; ++i) {
      if (sources[i] == nullptr) continue;
      if (whole) {
        in[i] = load_float32(sources[i] + k);
        continue;
      }
      float tail[V::kWidth] = {};
      for (int64_t j = 0; k + j < count; ++j) tail[j] = sources[i][k + j];
      in[i] = load_float32(tail);
    }
    const Logits x = make(in[0], in[1], in[2]);
    store_float32(out->base + k, x.base);
    if (whole) base_top = max(x.base, base_top);
    if (row.difference) {
      store_float32(out->difference + k, x.difference);
      store_float32(out->policy + k, x.policy);
      if (whole) policy_top = max(x.policy, policy_top);
    }
    if (row.has_trained) {
      store_float32(out->trained + k, x.trained);
      if (whole) trained_top = max(x.trained, trained_top);
    }
    if (whole) continue;
    for (int64_t j = count - k; j < V::kWidth; ++j) {
      out->base[k + j] = out->policy[k + j] = out->trained[k + j] = -kInf;
    }
    base_top = max(load_float32(out->base + k), base_top);
    if (row.difference) policy_top = max(load_float32(out->policy + k), policy_top);
    if (row.has_trained) trained_top = max(load_float32(out->trained + k), trained_top);
  }
  out->base_top = reduce_max(base_top);
  out->policy_top = reduce_max(policy_top);
  out->trained_top = reduce_max(trained_top);
}

// In the order of sum_statistics: logits that are b's have b's sum, to the last bit.
double sum_in_order(const float* staged, int64_t count, float peak) {
  const V shift = splat(peak);
  V sum = splat(0.0f);
  for (int64_t k = 0; k < count; k += V::kWidth) sum = sum + exp(load_float32(staged + k) - shift);
  return reduce_sum(sum);
}

// A block whose tops are below those before it changes nothing, so columns are rarely looked at.
void take_tops(const Staged& block, int64_t count, ScoreSummary* s) {
  const bool first = !s->filled;
  const float policy_top = first || block.policy_top > s->policy_top ? block.policy_top : s->policy_top;
  const float base_top = first || block.base_top > s->base_top ? block.base_top : s->base_top;
  bool same = s->filled && s->same_top && policy_top == s->policy_top && base_top == s->base_top;
  if (!same && block.policy_top == policy_top && block.base_top == base_top) {
    for (int64_t k = 0; k < count && !same; ++k) {
      same = block.policy[k] == policy_top && block.base[k] == base_top;
    }
  }
  s->same_top = same;
  s->policy_top = policy_top;
  s->base_top = base_top;
}

void score(const ScoreRow& row, int64_t begin, int64_t end, ScoreSummary* summary) {
  Staged block;
  const Maker make(row);
  ScoreSummary s = {};
  for (int64_t k = begin; k < end; k += kBlock) {
    const int64_t count = end - k < kBlock ? end - k : kBlock;
    stage(row, make, k, count, &block);
    Summary* sums = &s.sums;
    const double base_shift = qadapter::move_peak(&sums->base_peak, sums->base_sum, block.base_top);
    if (row.difference == nullptr) {
      qadapter::rescale(sums, 0.0, base_shift);
      sums->base_sum += sum_in_order(block.base, count, float(sums->base_peak));
    } else {
      const double shift =
          qadapter::move_peak(&sums->policy_peak, sums->policy_sum, block.policy_top);
      qadapter::rescale(sums, shift, base_shift);
      sum_statistics(block.policy, block.base, count, sums);
      take_tops(block, count, &s);
    }
    if (row.has_trained) {
      const double shift = qadapter::move_peak(&s.trained_peak, s.trained_sum, block.trained_top);
      s.trained_sum = qadapter::rescaled_sum(s.trained_sum, shift);
      s.trained_sum += sum_in_order(block.trained, count, float(s.trained_peak));
    }
    s.filled = true;
    const int64_t column = row.action - k;
    if (column < 0 || column >= count) continue;
    s.has_action = true;
    s.base_action = block.base[column];
    if (row.difference == nullptr) continue;
    s.difference_action = block.difference[column];
    s.policy_action = block.policy[column];
  }
  *summary = s;
}

}  // namespace
