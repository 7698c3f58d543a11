// Forward and backward of one call with everything they read and write, judged by the numeric bars.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "annulus/gradient_bars.h"
#include "annulus/ring.h"
#include "testing.h"

namespace annulus::testing {

struct Training {
  Inputs in;
  Tensor dout, dq, dk, dv;
  Tensor softmax_aux, dsoftmax_aux, bias, dbias;

  Training(DType dtype, const Shape& s, unsigned seed = 1, bool outliers = false,
           Layout layout = Layout::kBshd)
      : in(dtype, s, seed, outliers, layout),
        dout(dtype, in.out.shape(), layout),
        dq(dtype, in.q.shape(), layout),
        dk(dtype, in.k.shape(), layout),
        dv(dtype, in.v.shape(), layout) {
    dout.normal(seed + 3);
    for (Tensor* t : {&dq, &dk, &dv}) t->fill([](auto...) { return 77; });
  }

  Gradients gradients() {
    Gradients g;
    g.dq = dq.mutable_view(), g.dk = dk.mutable_view(), g.dv = dv.mutable_view();
    if (dsoftmax_aux.view()) g.dsoftmax_aux = dsoftmax_aux.mutable_view();
    if (dbias.view()) g.dbias = dbias.mutable_view();
    return g;
  }

  // attention, or a ring, forwards and then backwards from the stored out and lse.
  reference::GradientCheck run_and_check(const RingOptions& options, int workers) {
    ring_attention(workers, in.q, in.k, in.v, in.out.mutable_view(), in.lse.mutable_view(),
                   options);
    const CallSummary summary = ring_attention_backward(workers, dout, in.q, in.k, in.v, in.out,
                                                        in.lse, gradients(), options)
                                    .front();
    reference::BackwardInputs inputs;
    inputs.dout = dout, inputs.out = in.out;
    reference::GradientCheckOptions check;
    check.bf16_products = summary.bf16_probabilities;
    return reference::check_gradients(in.q, in.k, in.v, inputs, options.attention, gradients(),
                                      check);
  }
};

}  // namespace annulus::testing
