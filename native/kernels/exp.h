// exp.h: e^x, and e^x - 1 without loss of digits near zero, with the same bits for a value in any lane.
//
//   x = n ln 2 + r with |r| <= ln 2 / 2;  e^x = 2^n e^r;  e^r by its Taylor polynomial of degree 7 (the
//   remainder is below 2^-27). Within 2 units in the last place. Above 88.8 it is infinity, below -104 zero;
//   NaN stays NaN.
//   e^x - 1 = 2^n (e^r - 1) + (2^n - 1), where n is 0 if x is small.
#pragma once

#if ARGOSY_VECTOR

namespace argosy {
namespace {

struct ReducedExp {
  Vec n, r, p;  // e^r = p r + 1

  explicit ReducedExp(Vec x) {
    // The bound comes first and x second: a comparison with NaN returns the second operand.
    x = max_or_second(broadcast(-110.0f), min_or_second(broadcast(90.0f), x));
    n = round_to_nearest(mul(x, broadcast(1.44269504f)));
    r = fma(n, broadcast(-0x1.62E4p-1f), x);  // ln 2 in two parts; n times the first part is exact
    r = fma(n, broadcast(-0x1.7F7D1Cp-20f), r);
    p = broadcast(1.0f / 5040.0f);
    p = fma(p, r, broadcast(1.0f / 720.0f));
    p = fma(p, r, broadcast(1.0f / 120.0f));
    p = fma(p, r, broadcast(1.0f / 24.0f));
    p = fma(p, r, broadcast(1.0f / 6.0f));
    p = fma(p, r, broadcast(0.5f));
    p = fma(p, r, broadcast(1.0f));
  }
};

inline Vec exp(Vec x) {
  const ReducedExp at(x);
  return scale_by_power(fma(at.p, at.r, broadcast(1.0f)), at.n);
}

inline Vec exp_minus_one(Vec x) {
  const ReducedExp at(x);
  const Vec power = scale_by_power(broadcast(1.0f), at.n);
  return fma(power, mul(at.p, at.r), sub(power, broadcast(1.0f)));
}

inline float exp(float x) {
  float lanes[kLanes];
  store(lanes, exp(broadcast(x)));
  return lanes[0];
}

}  // namespace
}  // namespace argosy

#endif
