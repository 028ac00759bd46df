// Cases of every kernel of csrc/cpu/kernels.h but for the generator's, whose bits are torch's on each processor.
#include "case.h"

namespace bicm {
namespace bits {

namespace {

int64_t units_of(const Layout& layout) { return layout.batch * units_per_sample(layout); }
int64_t sums_of(const Layout& layout) { return layout.batch * sum_chunks(layout); }

Layout one_row(int64_t elements) {
  Layout layout = {};
  layout.batch = 1;
  layout.dims = 2;
  layout.sizes[0] = 1;
  layout.sizes[1] = layout.elements = elements;
  return layout;
}

// One sample of more elements than a partial sum has.
Layout long_layout(Case& c) {
  Layout layout = {};
  layout.dims = 2;
  layout.batch = 1 + c.below(2);
  layout.sizes[0] = 3;
  layout.sizes[1] = kUnitsPerSum * kChunk / 3 + c.below(3000);
  layout.elements = layout.sizes[0] * layout.sizes[1];
  c.about += "long";
  return layout;
}

Layout any_layout(Case& c) { return c.one_in(40) ? long_layout(c) : c.layout(); }

Distribution any_distribution(Case& c) {
  const bool uniform = c.one_in(3);
  c.about += uniform ? "uniform, " : "normal, ";
  return uniform ? Distribution::uniform : Distribution::normal;
}

// --- noise ---

void noise(Case& c, const Kernels& kernels) {
  Noise p = {};
  p.layout = any_layout(c);
  p.distribution = any_distribution(c);
  p.key = c.key(p.layout);
  p.out = c.output(p.layout, c.floating());
  c.run(kernels.noise, p, units_of(p.layout));
}

void many_numbers(Case& c, const Kernels& kernels) {
  Noise p = {};
  p.layout = one_row(int64_t{1} << 18);
  p.distribution = any_distribution(c);
  p.key = c.key(p.layout);
  const int64_t elements = p.layout.elements;
  p.out = {c.floats(elements), elements, {elements, 1}, DType::float32, true, false};
  c.run(kernels.noise, p, units_of(p.layout));
}

// Where a quad's number needs more than 32 bits: two units of a sample that is longer than memory.
void far_numbers(Case& c, const Kernels& kernels) {
  Noise p = {};
  const int64_t elements = int64_t{1} << 40, unit = (c.one_in(2) ? int64_t{1} << 24 : c.below(int64_t{1} << 30)) - 1;
  p.layout = one_row(elements);
  p.distribution = any_distribution(c);
  p.key = c.key(p.layout);
  const uintptr_t first = reinterpret_cast<uintptr_t>(c.floats(2 * kChunk));
  const uintptr_t before = static_cast<uintptr_t>(unit * kChunk) * sizeof(float);
  p.out = {reinterpret_cast<void*>(first - before), elements, {elements, 1}, DType::float32, true, false};
  kernels.noise(p, unit, unit + 2);
}

void noisy_pair(Case& c, const Kernels& kernels) {
  NoisyPair p = {};
  p.layout = any_layout(c);
  const DType dtype = c.floating();
  p.x = c.input(p.layout, c.mostly(dtype));
  p.x_hat = c.input(p.layout, c.mostly(dtype));
  p.generates = c.one_in(2);
  p.to_least = c.one_in(2);
  p.scales = c.one_in(2);
  if (c.one_in(2)) p.mask = c.flags(p.layout.batch);
  p.mask_stride = 1;
  if (p.generates && p.mask == nullptr && c.one_in(2)) {
    // Places past the last are the last.
    p.last_place = c.below(p.layout.batch);
    p.places = c.places(p.layout.batch, p.last_place + 1);
    c.about += ", placed";
  }
  p.sigma_low = c.number(p.layout);
  p.sigma_high = c.number(p.layout);
  p.sigma_data = c.number(p.layout);
  p.end = c.number(p.layout);
  p.float64 = p.x.dtype == DType::float64 || p.x_hat.dtype == DType::float64;
  p.key = c.key(p.layout);
  p.low = c.output(p.layout, p.x.dtype);
  p.high = c.output(p.layout, p.x.dtype);
  c.run(kernels.noisy_pair, p, units_of(p.layout));
}

// --- multistep ---

// Inputs, weights, guidance and noise.
void form_map(Case& c, Multistep& m, DType dtype) {
  const auto add = [&](Operand& x) {
    x = c.input(m.layout, c.mostly(dtype));
    m.float64 = m.float64 || x.dtype == DType::float64;
  };
  for (int k = 0; k < m.terms; ++k) add(m.input[k]);
  for (Number& weight : m.coefficient) weight = c.number(m.layout);
  m.guided = c.one_in(3);
  if (m.guided) add(m.conditional);
  m.guidance_scale = c.number(m.layout);
  m.draws = c.one_in(2);
  m.noise_weight = c.number(m.layout, true);
  m.key = c.key(m.layout);
}

void multistep(Case& c, const Kernels& kernels) {
  Multistep m = {};
  m.layout = any_layout(c);
  m.form = static_cast<Form>(c.one_in(2) ? 0 : c.below(8));
  const int64_t terms[] = {1 + c.below(kMaxTerms), 3, 3, 2, 2, 2, 2, 1};
  m.terms = static_cast<int32_t>(terms[static_cast<int>(m.form)]);
  const DType dtype = c.floating();
  form_map(c, m, dtype);
  if (m.form >= Form::bcm && m.form <= Form::cm_scaled && c.one_in(3)) {
    m.takes_second = true;
    m.terms = 1;
  }
  m.out = c.output_over(m.layout, m.input[0]);
  m.denoises = c.one_in(3);
  m.clips = c.one_in(2);
  m.clip = c.number(m.layout, true);
  m.scales = c.one_in(4);
  m.next_scale_is_sigma = c.one_in(2);
  m.next_scale = c.number(m.layout);
  m.x0_weight = c.number(m.layout);
  for (Number& weight : m.x0_coefficient) weight = c.number(m.layout);
  if (m.denoises) m.x0 = c.output(m.layout, c.mostly(dtype));
  if (m.scales) m.next = c.output(m.layout, c.mostly(dtype));
  c.about += ", form " + std::to_string(static_cast<int>(m.form)) + ", terms " + std::to_string(m.terms);
  if (m.guided) c.about += ", guided";
  if (m.draws) c.about += ", draws";
  if (m.denoises) c.about += ", denoises";
  c.run(kernels.multistep, m, units_of(m.layout));
}

// --- pseudo_huber ---

void pseudo_huber(Case& c, const Kernels& kernels) {
  PseudoHuber p = {};
  p.layout = any_layout(c);
  const DType dtype = c.floating();
  const auto add = [&](Operand& x) {
    x = c.input(p.layout, c.mostly(dtype));
    p.float64 = p.float64 || x.dtype == DType::float64;
  };
  add(p.prediction);
  add(p.target);
  p.denoises = c.one_in(2);
  if (p.denoises) add(p.x);
  p.parameterization = static_cast<Parameterization>(c.below(3));
  p.scaled = c.one_in(2);
  p.t = c.number(p.layout);
  p.u = c.number(p.layout);
  p.sigma_data = c.number(p.layout);
  p.sigma_min = c.number(p.layout);
  p.distance = static_cast<Distance>(c.below(3));
  p.reduction = static_cast<Reduction>(c.below(3));
  p.given_c = c.one_in(2);
  p.c = c.number(p.layout, true);
  p.weight = c.number(p.layout, true);
  p.weighs = c.one_in(4);
  if (p.weighs) p.element_weight = c.input(p.layout, c.mostly(dtype));
  p.upstream = c.number(p.layout);
  for (int k = 0; k < (p.denoises ? 3 : 2); ++k) {
    p.wanted[k] = k == 0 || c.one_in(2);
    const Operand* const inputs[] = {&p.prediction, &p.target, &p.x};
    if (p.wanted[k]) p.gradient[k] = c.output(p.layout, inputs[k]->dtype);
  }
  c.about += ", distance " + std::to_string(static_cast<int>(p.distance));
  const int64_t chunks = sum_chunks(p.layout), items = sums_of(p.layout);
  double* const partial = c.doubles(items);
  p.sums = partial;
  if (gradient_follows_sum(p) && c.one_in(2)) return c.run(kernels.pseudo_huber_with_gradient, p, items);
  c.run(kernels.pseudo_huber, p, items);
  p.sums = c.doubles(p.layout.batch);
  for (int64_t sample = 0; sample < p.layout.batch; ++sample) {
    double total = 0.0;
    for (int64_t i = 0; i < chunks; ++i) {
      total = (p.float64 ? add_sums<double> : add_sums<float>)(p, total, partial[sample * chunks + i]);
    }
    p.sums[sample] = total;
  }
  c.run(kernels.pseudo_huber_gradient, p, units_of(p.layout));
}

void scale_gradient(Case& c, const Kernels& kernels) {
  KeptGradient p = {};
  p.layout = any_layout(c);
  p.gradient = c.in_place(c.input(p.layout, c.floating()));
  p.upstream = c.number(p.layout);
  c.run(kernels.scale_gradient, p, units_of(p.layout));
}

// --- gaussian ---

void gaussian(Case& c, const Kernels& kernels) {
  Gaussian g = {};
  g.layout = any_layout(c);
  g.terms = static_cast<int32_t>(1 + c.below(kMaxTerms));
  const DType dtype = c.floating();
  form_map(c, g, dtype);
  const int64_t kind = c.below(3);
  g.steps = g.draws = kind == 0;
  g.diverges = kind == 1;
  g.guided = g.guided && !g.diverges;
  const auto add = [&](Operand& x) {
    x = c.input(g.layout, c.mostly(dtype));
    g.float64 = g.float64 || x.dtype == DType::float64;
  };
  if (g.steps) g.out = c.output(g.layout, g.input[0].dtype);
  if (g.diverges) {
    for (int k = 0; k < g.terms; ++k) add(g.reference[k]);
  }
  if (!g.steps && !g.diverges) add(g.next);
  g.adds_up = c.one_in(2);
  g.upstream = c.number(g.layout);
  const int wanted = g.diverges ? 2 * g.terms : g.steps ? 0 : 1 + g.terms + g.guided;
  for (int k = 0; k < wanted; ++k) {
    g.wanted[k] = c.one_in(2);
    g.differentiates = g.differentiates || g.wanted[k];
    if (g.wanted[k]) g.gradient[k] = c.output(g.layout, c.mostly(dtype));
  }
  c.about += g.steps ? ", steps" : g.diverges ? ", diverges" : ", density";
  if (g.differentiates && c.one_in(2)) return c.run(kernels.gaussian_gradient, g, units_of(g.layout));
  g.totals = c.doubles(sums_of(g.layout));
  c.run(g.differentiates ? kernels.gaussian_with_gradient : kernels.gaussian, g, sums_of(g.layout));
}

// --- reversible ---

int any_bits(Case& c, DType dtype) { return dtype == DType::int32 ? 30 : c.one_of({20, 40, 46, 48, 50, 52, 61, 63}); }

void reversible(Case& c, const Kernels& kernels) {
  Reversible p = {};
  p.layout = any_layout(c);
  p.steps = !c.one_in(4);
  p.inverse = c.one_in(2);
  p.multiplies = p.steps && c.one_in(2);
  const DType state = p.multiplies || c.one_in(2) ? DType::int64 : DType::int32;
  if (p.steps) p.last = c.integers(p.layout, state, any_bits(c, state));
  p.increment = p.steps && c.one_in(3) ? Increment::bdia : Increment::affine;
  p.terms = static_cast<int32_t>(!p.steps ? 1 : p.increment == Increment::bdia ? 2 : 1 + c.below(kMaxTerms));
  for (int k = 0; k < p.terms; ++k) {
    const bool encoded = p.steps && c.one_in(3);
    p.input[k] = encoded ? c.integers(p.layout, state, any_bits(c, state)) : c.input(p.layout, c.floating());
  }
  for (Number& weight : p.coefficient) weight = c.number(p.layout);
  p.fraction_bits = static_cast<int32_t>(c.below(state == DType::int32 ? 31 : 51));
  p.guided = p.steps && c.one_in(4);
  if (p.guided) p.conditional = c.input(p.layout, c.floating());
  p.guidance_scale = c.number(p.layout);
  p.out = c.output(p.layout, state);
  if (p.multiplies) {
    p.n = c.integer(p.layout, 1, c.one_of({4, 100, 1 << 20}));
    p.m = c.integer(p.layout, 1, c.one_of({4, 100, 1 << 20}));
    p.info = c.integers(p.layout, DType::int64, any_bits(c, DType::int64));
    p.info_out = c.output(p.layout, DType::int64);
  }
  if (c.one_in(2)) {
    p.overflow = c.zeros(2 * p.layout.batch);
    p.overflow_stride = 2;
    p.mark = c.integer(p.layout, 1, 100);
  }
  c.run(kernels.reversible, p, units_of(p.layout));
}

void fixed_point_decode(Case& c, const Kernels& kernels) {
  FixedPointDecode p = {};
  p.layout = any_layout(c);
  const DType state = c.one_of({DType::int32, DType::int64});
  p.q = c.integers(p.layout, state, any_bits(c, state));
  p.out = c.output(p.layout, c.floating());
  p.fraction_bits = static_cast<int32_t>(c.below(state == DType::int32 ? 31 : 51));
  c.run(kernels.fixed_point_decode, p, units_of(p.layout));
}

}  // namespace

const std::vector<Family>& families() {
  static const std::vector<Family> all = {
      {"noise", 120, noise},
      {"many_numbers", 8, many_numbers},
      {"far_numbers", 12, far_numbers},
      {"noisy_pair", 150, noisy_pair},
      {"multistep", 400, multistep},
      {"pseudo_huber", 400, pseudo_huber},
      {"scale_gradient", 60, scale_gradient},
      {"gaussian", 300, gaussian},
      {"reversible", 300, reversible},
      {"fixed_point_decode", 60, fixed_point_decode},
  };
  return all;
}

}  // namespace bits
}  // namespace bicm
