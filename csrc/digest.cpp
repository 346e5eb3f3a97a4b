// What evc_fast/model/stamp.py asks of weights.
#include <algorithm>
#include <cstdint>
#include <cstring>

// A number that changes with the bits of `samples` evenly spaced elements of each of `count` arrays, both ends included
// (all elements where it has no more): FNV-1a by elements. lengths: elements; sizes: bytes of one, at most 8.
extern "C" __attribute__((visibility("default"))) uint64_t evc_fast_digest(int64_t count, const void* const* arrays,
                                                                           const int64_t* lengths, const int64_t* sizes,
                                                                           const int64_t* samples) {
  uint64_t hash = 1469598103934665603u;
  for (int64_t a = 0; a < count; ++a) {
    const int64_t taken = std::min(lengths[a], samples[a]);
    const int64_t step = taken > 1 ? (lengths[a] - 1) / (taken - 1) : 0;
    for (int64_t i = 0; i < taken; ++i) {
      const int64_t at = i < taken - 1 ? i * step : lengths[a] - 1;
      uint64_t bits = 0;
      memcpy(&bits, static_cast<const char*>(arrays[a]) + at * sizes[a], static_cast<size_t>(sizes[a]));
      hash = (hash ^ bits) * 1099511628211u;
    }
  }
  return hash;
}
