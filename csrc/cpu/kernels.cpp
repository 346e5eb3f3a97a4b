#include "kernels.h"

namespace evc::EVC_NAMESPACE {

namespace {
Kernels fill() {
  Kernels kernels{};
  add_entropy_calibration(kernels);
  add_emotion_attention(kernels);
  add_routing_aggregation(kernels);
  add_factored_hidden(kernels);
  add_packed_linear(kernels);
  add_folded_encoder(kernels);
  return kernels;
}
}  // namespace

const Kernels& kernels() {
  static const Kernels table = fill();
  return table;
}

}  // namespace evc::EVC_NAMESPACE
