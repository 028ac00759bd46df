// Normal numbers from the words of torch's CPU generator, with torch's bits: Box-Muller on polynomials of the Cephes
// library (Moshier), with fused multiply-adds as in torch's own vector code. Generic over a
// lane type F. Another build of torch may round differently: callers compare with torch first.
#pragma once

#include "normal.h"

BICM_NAMESPACE_BEGIN

// log x for normal x > 0: x = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
template <class F>
BICM_HD F fused_log(F x) {
  using Ops = LaneOps<F>;
  using I = typename Ops::Int;
  constexpr float kPowers[] = {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                               -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
  const I above = bit_cast<I>(x) - 0x3F3504F3;
  const F f = bit_cast<F>((above & 0x7FFFFF) + 0x3F3504F3) - 1.0f;
  const F e = Ops::to_float(above >> 23);
  const F f2 = f * f;
  F p = Ops::all(7.0376836292e-2f);
  BICM_UNROLL(8)
  for (float power : kPowers) p = Ops::fused(p, f, Ops::all(power));
  // ln 2 in two parts; the larger has few enough bits that its product with e is exact.
  p = Ops::fused(p * f, f2, e * -2.12194440e-4f);
  p = Ops::fused(f2, Ops::all(-0.5f), p);
  return Ops::fused(e, Ops::all(0.693359375f), f + p);
}

// (cos x, sin x) for x in [0, 2 pi]: an even number of eighths of a turn is subtracted, in three parts.
template <class F>
BICM_HD void fused_cos_sin(F x, F& cosine, F& sine) {
  using Ops = LaneOps<F>;
  using I = typename Ops::Int;
  const I eighths = (Ops::truncate(x * 1.27323954473516f) + 1) & ~1;
  const F y = Ops::to_float(eighths);
  F r = Ops::fused(y, Ops::all(-0.78515625f), x);
  r = Ops::fused(y, Ops::all(-2.4187564849853515625e-4f), r);
  r = Ops::fused(y, Ops::all(-3.77489497744594108e-8f), r);
  const F t = r * r;
  F c = Ops::fused(t, Ops::all(2.443315711809948e-5f), Ops::all(-1.388731625493765e-3f));
  c = Ops::fused(c, t, Ops::all(4.166664568298827e-2f));
  c = Ops::fused(c * t, t, t * -0.5f) + 1.0f;
  F s = Ops::fused(t, Ops::all(-1.9515295891e-4f), Ops::all(8.3321608736e-3f));
  s = Ops::fused(s, t, Ops::all(-1.6666654611e-1f));
  s = Ops::fused(s * t, r, r);
  const I odd = -((eighths >> 1) & 1);
  using W = typename Ops::Word;
  cosine = Ops::flip_sign(Ops::select(odd, s, c), bit_cast<W>((eighths + 2) << 29));
  sine = Ops::flip_sign(Ops::select(odd, c, s), bit_cast<W>(eighths << 29));
}

// 24 bits of a word as a number in [0, 1).
template <class F>
BICM_HD F generator_uniform(typename LaneOps<F>::Word word) {
  return LaneOps<F>::to_float(bit_cast<typename LaneOps<F>::Int>(word & 0xFFFFFFu)) * 0x1p-24f;
}

// A pair of normal numbers from two uniform ones, radius and angle. Adding 0 removes negative zeros.
template <class F>
BICM_HD void generator_normal(F first, F second, F& cosine, F& sine) {
  const F radius = LaneOps<F>::square_root(fused_log(-first + 1.0f) * -2.0f);
  fused_cos_sin(second * 6.283185307179586f, cosine, sine);
  cosine = radius * cosine + 0.0f;
  sine = radius * sine + 0.0f;
}

BICM_NAMESPACE_END
