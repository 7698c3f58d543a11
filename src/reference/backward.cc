#include "reference/backward.h"

#include "annulus/reference.h"
#include "reference/formula.h"

namespace annulus {
inline namespace v1 {
namespace reference {
namespace {

class Element {
 public:
  void add(const Coefficient& factor, double x) { sum_.add(factor.value * x); }
  [[nodiscard]] double value() const { return sum_.value(); }

 private:
  Sum sum_;
};

std::vector<double> values(const std::vector<Element>& elements) {
  std::vector<double> x;
  x.reserve(elements.size());
  for (const Element& element : elements) x.push_back(element.value());
  return x;
}

}  // namespace

DenseGradients attention_backward(const TensorView& dout, const TensorView& q, const TensorView& k,
                                  const TensorView& v, const TensorView& out,
                                  const AttentionOptions& options, const TensorView& dlse) {
  const Oracle oracle(q, k, v, options);
  const BackwardInputs inputs{.dout = dout, .out = out, .dlse = dlse};
  check_backward(oracle, inputs);
  const ExactPairs pairs(oracle, inputs);
  const Sample all{.queries = sampled_rows(oracle.q_len(), 0),
                   .keys = sampled_rows(oracle.kv_len(), 0),
                   .with_bias = static_cast<bool>(options.bias)};
  const GradientRows<Element> sums = BackwardWalk<Element, ExactPairs>(oracle, pairs, all).run();
  return {.dq = values(sums.dq),
          .dk = values(sums.dk),
          .dv = values(sums.dv),
          .dsoftmax_aux = values(sums.dsoftmax_aux),
          .dbias = values(sums.dbias)};
}

}  // namespace reference
}  // namespace v1
}  // namespace annulus
