// Compiled once per instruction set, as the kernels are.
#include "../cpu/noise_block.h"

BICM_NAMESPACE_BEGIN
namespace {

template <class Evaluate>
void in_blocks(const float* u, int64_t count, Evaluate evaluate) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t width = count - i < kLanes ? count - i : kLanes;
    Floats x = Floats{} + 1.0f;
    __builtin_memcpy(&x, u + i, static_cast<size_t>(width) * sizeof(float));
    evaluate(x, i, static_cast<size_t>(width) * sizeof(float));
  }
}

}  // namespace

void log_all(const float* u, float* out, int64_t count) {
  in_blocks(u, count, [&](Floats x, int64_t i, size_t bytes) {
    const Floats y = minus_two_log<0>(x) * -0.5f;
    __builtin_memcpy(out + i, &y, bytes);
  });
}

void cos_sin_all(const float* u, float* cosine, float* sine, int64_t count) {
  in_blocks(u, count, [&](Floats x, int64_t i, size_t bytes) {
    Floats c, s;
    cos_sin_quarters(x * 4.0f, c, s);
    __builtin_memcpy(cosine + i, &c, bytes);
    __builtin_memcpy(sine + i, &s, bytes);
  });
}

void philox_all(int64_t seed, const uint32_t* counters, uint32_t* words, int64_t count) {
  for (int64_t first = 0; first < count; first += kCounters) {
    const int width = count - first < kCounters ? static_cast<int>(count - first) : kCounters;
    Quad<PhiloxWord> quad = {};
    for (int i = 0; i < 4 * width; ++i) set_counter(quad.lane[i % 4], i / 4, counters[4 * first + i]);
    quad = philox(quad, make_key(seed));
    for (int i = 0; i < 4 * width; ++i) words[4 * first + i] = get_counter(quad.lane[i % 4], i / 4);
  }
}

BICM_NAMESPACE_END
