// How the kernels of one variant reach its table.
#pragma once

#include "simd.h"

namespace evc::EVC_NAMESPACE {

// Each op fills its own rows of the table.
void add_entropy_calibration(Kernels& kernels);
void add_emotion_attention(Kernels& kernels);
void add_routing_aggregation(Kernels& kernels);
void add_factored_hidden(Kernels& kernels);
void add_packed_linear(Kernels& kernels);
void add_folded_encoder(Kernels& kernels);

const Kernels& kernels();

namespace {
template <class Body>
void for_each_dtype(const Body& body) {
  body(kFloat32, float{});
  body(kBFloat16, BFloat16{});
  body(kFloat64, double{});
}
}  // namespace

}  // namespace evc::EVC_NAMESPACE
