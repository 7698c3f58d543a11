// Offsets beyond 2^31 elements, through sparse mappings: rows, heads and dims gigabytes apart give
// the bits of dense tensors.

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "annulus/ring.h"
#include "testing.h"
#include "training_testing.h"

namespace annulus::testing {
namespace {

constexpr std::int64_t kFar = (std::int64_t{1} << 31) + 192;  // elements

// Address space that takes no memory until it is touched.
class SparseTensor {
 public:
  // `axis` has the large stride, the others are dense.
  SparseTensor(DType dtype, const std::array<std::int64_t, 4>& shape, std::size_t axis)
      : dtype_(dtype), shape_(shape) {
    std::int64_t next = 1;
    for (const std::size_t a : {std::size_t{3}, std::size_t{2}, std::size_t{1}, std::size_t{0}}) {
      strides_[a] = a == axis ? kFar : next;
      if (a != axis) next *= shape[a];
    }
    bytes_ = static_cast<std::size_t>((shape[axis] * kFar + next) * size_bytes(dtype));
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  ~SparseTensor() {
    if (ok()) munmap(data_, bytes_);
  }
  SparseTensor(const SparseTensor&) = delete;
  SparseTensor& operator=(const SparseTensor&) = delete;

  [[nodiscard]] bool ok() const { return data_ != MAP_FAILED; }
  [[nodiscard]] MutableTensorView view() const { return {data_, dtype_, shape_, strides_}; }

 private:
  DType dtype_;
  std::array<std::int64_t, 4> shape_;
  std::array<std::int64_t, 4> strides_{};
  std::size_t bytes_ = 0;
  void* data_ = nullptr;
};

template <class Body>
void for_elements(const std::array<std::int64_t, 4>& shape, const Body& body) {
  for (std::int64_t a = 0; a < shape[0]; ++a)
    for (std::int64_t b = 0; b < shape[1]; ++b)
      for (std::int64_t c = 0; c < shape[2]; ++c)
        for (std::int64_t d = 0; d < shape[3]; ++d) body(a, b, c, d);
}

void copy(const TensorView& from, const MutableTensorView& to) {
  const auto size = static_cast<std::size_t>(size_bytes(from.dtype));
  for_elements(from.shape, [&](auto... at) { std::memcpy(to.at(at...), from.at(at...), size); });
}

void expect_same(const std::string& what, const TensorView& a, const TensorView& b) {
  const auto size = static_cast<std::size_t>(size_bytes(a.dtype));
  std::int64_t different = 0;
  for_elements(a.shape, [&](auto... at) {
    different += std::memcmp(a.at(at...), b.at(at...), size) != 0 ? 1 : 0;
  });
  EXPECT_EQ(different, 0) << what;
}

void run_far(DType dtype, std::size_t axis, int workers) {
  SCOPED_TRACE(::testing::Message() << name(dtype) << " axis " << axis << " workers " << workers);
  const Shape shape{.batch = 2,
                    .q_len = 5,
                    .kv_len = 5,
                    .heads = 2,
                    .kv_heads = 2,
                    .head_dim = 4,
                    .v_head_dim = 4};
  Training t(dtype, shape);
  t.bias = Tensor(dtype, {2, 2, 5, 5});
  t.bias.normal(9);
  t.dbias = Tensor(DType::kFloat32, {2, 2, 5, 5});
  RingOptions options;
  options.attention.causal = true, options.attention.bias = t.bias;
  const std::array<std::int64_t, 4> like = t.in.q.shape(), square = t.bias.shape();
  const SparseTensor q(dtype, like, axis), k(dtype, like, axis), v(dtype, like, axis),
      out(dtype, like, axis), dout(dtype, like, axis), dq(dtype, like, axis), dk(dtype, like, axis),
      dv(dtype, like, axis), bias(dtype, square, axis), dbias(DType::kFloat32, square, axis);
  for (const SparseTensor* s : {&q, &k, &v, &out, &dout, &dq, &dk, &dv, &bias, &dbias}) {
    if (!s->ok()) GTEST_SKIP() << "the system grants no address space";
  }
  copy(t.in.q, q.view()), copy(t.in.k, k.view()), copy(t.in.v, v.view());
  copy(t.dout, dout.view()), copy(t.bias, bias.view());

  ring_attention_with_gradients(workers, t.dout, t.in.q, t.in.k, t.in.v, t.in.out.mutable_view(),
                                t.in.lse.mutable_view(), t.gradients(), options);
  RingOptions far = options;
  far.attention.bias = bias.view();
  Gradients gradients;
  gradients.dq = dq.view(), gradients.dk = dk.view(), gradients.dv = dv.view();
  gradients.dbias = dbias.view();
  Tensor lse(DType::kFloat32, t.in.lse.shape());
  ring_attention_with_gradients(workers, dout.view(), q.view(), k.view(), v.view(), out.view(),
                                lse.mutable_view(), gradients, far);
  expect_same("out", t.in.out, out.view()), expect_same("lse", t.in.lse, lse);
  expect_same("dq", t.dq, dq.view()), expect_same("dk", t.dk, dk.view());
  expect_same("dv", t.dv, dv.view()), expect_same("dbias", t.dbias, dbias.view());
}

TEST(LargeIndex, EveryAxisOfEveryTensor) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const std::size_t axis : {0U, 1U, 2U, 3U}) {
      for (const int workers : {1, 3}) run_far(dtype, axis, workers);
    }
  }
}

}  // namespace
}  // namespace annulus::testing
