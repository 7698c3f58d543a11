// Attention of three queries over three keys, once in one pass and once in a ring of two workers.

#include <annulus/attention.h>
#include <annulus/error.h>
#include <annulus/ring.h>
#include <annulus/tensor.h>

#include <array>
#include <cstdint>
#include <cstdio>

namespace {

using Shape = std::array<std::int64_t, 4>;

constexpr Shape kShape = {1, 3, 1, 2};     // batch, tokens, heads, head_dim
constexpr Shape kLseShape = {1, 3, 1, 1};  // batch, tokens, heads

struct Result {
  std::array<float, 6> out{};
  std::array<float, 3> lse{};
};

annulus::TensorView view(const std::array<float, 6>& values) {
  return {values.data(), annulus::DType::kFloat32, kShape, annulus::dense_strides(kShape)};
}

Result causal_attention(int workers) {
  const std::array<float, 6> q = {1, 0, 0, 1, 1, 1};
  const std::array<float, 6> k = {1, 0, 0, 1, 1, 1};
  const std::array<float, 6> v = {1, 2, 3, 4, 5, 6};
  Result result;
  const annulus::MutableTensorView out = {result.out.data(), annulus::DType::kFloat32, kShape,
                                          annulus::dense_strides(kShape)};
  const annulus::MutableTensorView lse = {result.lse.data(), annulus::DType::kFloat32, kLseShape,
                                          annulus::dense_strides(kLseShape)};
  if (workers == 1) {
    annulus::attention(view(q), view(k), view(v), out, lse, {.causal = true});
  } else {
    annulus::RingOptions options;
    options.attention.causal = true;
    options.partition = annulus::Partition::zigzag();
    annulus::ring_attention(workers, view(q), view(k), view(v), out, lse, options);
  }
  return result;
}

void print(const char* name, const Result& result) {
  for (std::size_t t = 0; t < 3; ++t) {
    std::printf("%s token %zu: out %.4f %.4f lse %.4f\n", name, t,
                static_cast<double>(result.out[2 * t]), static_cast<double>(result.out[2 * t + 1]),
                static_cast<double>(result.lse[t]));
  }
}

}  // namespace

int main() {
  try {
    print("one pass", causal_attention(1));
    print("ring", causal_attention(2));
  } catch (const annulus::Error& error) {
    std::fprintf(stderr, "%s: %s\n", annulus::error_name(error.code()), error.what());
    return static_cast<int>(error.code());
  }
  return 0;
}
