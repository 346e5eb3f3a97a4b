// Scratch, and softmax along rows.
#pragma once

#include "simd.h"

namespace evc::EVC_NAMESPACE {
namespace {

// Scratch is laid out by the same code that measures it: with a null base, take() only counts.
template <class T>
struct Arena {
  T* base;
  int64_t used = 0;
  T* take(int64_t n) {
    T* p = base + used;
    used += round_up(n, 64 / sizeof(T));
    return p;
  }
};

// row becomes exp(row - max), and 0 up to whole vectors; returns 1 / sum.
template <class T>
T softmax_numerators(T* row, int64_t n) {
  const int64_t whole = round_up(n, kLanes<T>);
  for (int64_t i = n; i < whole; ++i) row[i] = -T(INFINITY);
  Vec<T> best = load(row);
  for (int64_t i = kLanes<T>; i < whole; i += kLanes<T>) best = max_vec<T>(best, load(row + i));
  const T max = max_lanes<T>(best);
  Vec<T> total{};
  for (int64_t i = 0; i < whole; i += kLanes<T>) {
    Vec<T> p = exp_nonpositive<T>(load(row + i) - max);
    store(p, row + i);
    total += p;
  }
  return 1 / sum_lanes<T>(total);
}

}  // namespace
}  // namespace evc::EVC_NAMESPACE
