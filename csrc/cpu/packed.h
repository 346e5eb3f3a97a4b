// Products with fixed weights: A [rows, depth] times W^T, with W [columns, depth] packed once.
//
// A packed matrix is a row of panels of kPanelColumns columns, each [depth][kPanelColumns] (bfloat16 where the machine
// multiplies pairs: [depth / 2][kPanelColumns][2]), zeros beyond the last column and the last pair. The caller takes
// each finished row of a panel from registers, so that a bias, a GELU or a sum costs no pass of its own.
#pragma once

#include "gemm.h"

// Pairs of bfloat16 are multiplied as they are where the machine can; a test forces the same logic elsewhere.
#if !defined(EVC_BF16_PAIRS)
#if defined(__AVX512BF16__)
#define EVC_BF16_PAIRS 1
#else
#define EVC_BF16_PAIRS 0
#endif
#endif

namespace evc::EVC_NAMESPACE {
namespace {

template <class S>
constexpr bool kPairs = false;
template <>
constexpr bool kPairs<BFloat16> = EVC_BF16_PAIRS;

template <class S>
constexpr int64_t kPanelColumns = kTileVectors * kLanes<Acc<S>>;
constexpr int64_t kBlockDepth = 256;  // a panel's block (16 KB, 32 KB with 64-byte vectors) and a tile's rows stay near

template <class S>
struct Packed {
  const S* data;
  int64_t columns, depth;

  static int64_t panels(int64_t columns) { return (columns + kPanelColumns<S> - 1) / kPanelColumns<S>; }
  static int64_t padded_depth(int64_t depth) { return kPairs<S> ? (depth + 1) / 2 * 2 : depth; }
  static int64_t size(int64_t columns, int64_t depth) { return panels(columns) * kPanelColumns<S> * padded_depth(depth); }
  int64_t panels() const { return panels(columns); }
  const S* panel(int64_t i) const { return data + i * kPanelColumns<S> * padded_depth(depth); }
};

// weight: [columns, depth]; panels [begin, end) of `to`.
template <class S>
void pack_panels(const S* weight, int64_t columns, int64_t depth, int64_t begin, int64_t end, S* to) {
  constexpr int64_t kGroup = kPairs<S> ? 2 : 1;
  const int64_t padded = Packed<S>::padded_depth(depth);
  for (int64_t panel = begin; panel < end; ++panel) {
    S* block = to + panel * kPanelColumns<S> * padded;
    for (int64_t k = 0; k < padded; ++k)
      for (int64_t j = 0; j < kPanelColumns<S>; ++j) {
        const int64_t column = panel * kPanelColumns<S> + j;
        S& element = block[(k / kGroup * kPanelColumns<S> + j) * kGroup + k % kGroup];
        if (column < columns && k < depth)
          element = weight[column * depth + k];
        else
          memset(&element, 0, sizeof element);
      }
  }
}

// ---- pairs of bfloat16: c += a[2k] b[2k] + a[2k + 1] b[2k + 1], in float ----

EVC_INLINE Vec<float> dot_pairs(Vec<float> c, Words a, Words b) {
#if defined(__AVX512BF16__)
  return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
  c += (Vec<float>)(a & 0xffff0000u) * (Vec<float>)(b & 0xffff0000u);
  return c + (Vec<float>)(a << 16) * (Vec<float>)(b << 16);
#endif
}

EVC_INLINE Words load_words(const BFloat16* p) {
  Words words;
  memcpy(&words, p, sizeof words);
  return words;
}

// a: rows of `depth` pairs, a_stride elements apart.
template <int kRows>
EVC_INLINE void tile_pairs(int64_t pairs, const BFloat16* a, int64_t a_stride, const BFloat16* b, float* c) {
  constexpr int64_t kColumns = kPanelColumns<BFloat16>;
  Vec<float> sum[kRows][kTileVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors; ++j) sum[i][j] = Vec<float>{};
  for (int64_t k = 0; k < pairs; ++k, a += 2, b += 2 * kColumns) {
    Words column[kTileVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors; ++j) {
      column[j] = load_words(b + 2 * j * kLanes<float>);
      __builtin_prefetch(b + 2 * (pairs * kColumns + j * kLanes<float>), 0, 2);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      uint32_t pair;
      memcpy(&pair, a + i * a_stride, 4);
      const Words x = pair - Words{};
#pragma GCC unroll 4
      for (int j = 0; j < kTileVectors; ++j) sum[i][j] = dot_pairs(sum[i][j], x, column[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors; ++j) store(sum[i][j], c + i * kColumns + j * kLanes<float>);
}
template <int kRows = kTileRows>
EVC_INLINE void tile_rows_pairs(int64_t rows, int64_t pairs, const BFloat16* a, int64_t a_stride, const BFloat16* b, float* c) {
  if (rows == kRows) return tile_pairs<kRows>(pairs, a, a_stride, b, c);
  if constexpr (kRows > 1) tile_rows_pairs<kRows - 1>(rows, pairs, a, a_stride, b, c);
}
__attribute__((noinline)) inline void panel_pairs(int64_t rows, int64_t pairs, const BFloat16* a, int64_t a_stride,
                                                  const BFloat16* b, float* c) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t t = 0, m = 0; t < tiles; ++t) {
    const int64_t step = (rows - m) / (tiles - t);
    tile_rows_pairs(step, pairs, a + m * a_stride, a_stride, b, c + m * kPanelColumns<BFloat16>);
    m += step;
  }
}

// ---- one panel for up to kBlockRows rows ----

// Scratch of multiply_packed, in elements of the accumulation type.
template <class S>
int64_t packed_scratch(int64_t depth) {
  const int64_t sums = kBlockRows * kPanelColumns<S>;
  if (sizeof(S) == sizeof(Acc<S>)) return sums;
  return sums + (kPairs<S> ? kBlockRows * Packed<S>::padded_depth(depth) / 2 : kBlockDepth * kPanelColumns<S>);
}

// Panels follow each other in memory: while one block is multiplied, the one behind it is fetched. A prefetcher of the
// machine's own stops at every page.
template <class T, bool kFetch>
EVC_INLINE void panel_block(bool add, int64_t rows, int64_t depth, const T* a, int64_t a_stride, const T* b, T* c) {
  constexpr int64_t kColumns = kTileVectors * kLanes<T>;
  const Rows<T> weight{b, kColumns, depth * kColumns};
  if (add)
    panel<T, kTileVectors, true, kFetch>(rows, depth, {a, a_stride, 1}, weight, c, kColumns);
  else
    panel<T, kTileVectors, false, kFetch>(rows, depth, {a, a_stride, 1}, weight, c, kColumns);
}

// The sums of one panel, c: [rows, kPanelColumns]. Each is a chain over the depth in blocks, whatever the rows.
template <class S>
EVC_INLINE void multiply_panel(int64_t rows, int64_t depth, const S* a, int64_t a_stride, const S* b, S* c, S*) {
  for (int64_t k = 0; k < depth; k += kBlockDepth) {
    const int64_t step = depth - k < kBlockDepth ? depth - k : kBlockDepth;
    panel_block<S, true>(k > 0, rows, step, a + k, a_stride, b + k * kPanelColumns<S>, c);
  }
}
EVC_INLINE void multiply_panel(int64_t rows, int64_t depth, const float* a, int64_t a_stride, const BFloat16* b,
                               float* c, float* widened) {
  for (int64_t k = 0; k < depth; k += kBlockDepth) {  // widened once for all rows: a load, a shift
    const int64_t step = depth - k < kBlockDepth ? depth - k : kBlockDepth;
    const int64_t first = k * kPanelColumns<BFloat16>;
    for (int64_t i = 0; i < step * kPanelColumns<BFloat16>; i += kLanes<float>) {
      if (i % 32 == 0) __builtin_prefetch(b + first + i + kBlockDepth * kPanelColumns<BFloat16>, 0, 2);  // once a line
      store(load(b + first + i), widened + i);
    }
    panel_block<float, false>(k > 0, rows, step, a + k, a_stride, widened, c);
  }
}

// ---- several panels for one to three rows: enough sums at a time to hide the latency of a multiply-add ----

template <int kRows, int kPanels, class S, class T = Acc<S>>
EVC_INLINE void few_rows(int64_t depth, const T* a, int64_t a_stride, const S* b, int64_t b_stride, T* c, int64_t c_stride) {
  constexpr int64_t kColumns = kPanelColumns<S>;
  for (int64_t first = 0; first < depth; first += kBlockDepth) {  // the blocks of multiply_panel: equal sums
    const int64_t last = first + kBlockDepth < depth ? first + kBlockDepth : depth;
    Vec<T> sum[kRows][kPanels * kTileVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kPanels * kTileVectors; ++j) sum[i][j] = Vec<T>{};
    for (int64_t k = first; k < last; ++k)
#pragma GCC unroll 8
      for (int j = 0; j < kPanels * kTileVectors; ++j) {
        const S* from = b + j / kTileVectors * b_stride + k * kColumns + j % kTileVectors * kLanes<T>;
        const Vec<T> column = load(from);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) sum[i][j] += splat(a[i * a_stride + k]) * column;
      }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kPanels * kTileVectors; ++j) {
        T* to = c + j / kTileVectors * c_stride + i * kColumns + j % kTileVectors * kLanes<T>;
        store(first > 0 ? load(to) + sum[i][j] : sum[i][j], to);
      }
  }
}

// finish(row, column, sums): one call a vector of the product, columns up to whole vectors. Panels [begin, end).
template <class S, class Finish>
EVC_INLINE void multiply_packed(int64_t rows, const Acc<S>* a, int64_t a_stride, const Packed<S>& w, int64_t begin,
                                int64_t end, Acc<S>* scratch, const Finish& finish) {
  typedef Acc<S> T;
  constexpr int64_t kSums = kBlockRows * kPanelColumns<S>;
  T* sums = scratch;
  T* rest = scratch + kSums;
  const auto finish_panel = [&](int64_t p, const T* from) {
    for (int64_t i = 0; i < rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kTileVectors; ++j) {
        const int64_t column = p * kPanelColumns<S> + j * kLanes<T>;
        if (column < w.columns) finish(i, column, load(from + i * kPanelColumns<S> + j * kLanes<T>));
      }
  };
  if constexpr (kPairs<S>) {
    const int64_t padded = Packed<S>::padded_depth(w.depth);
    BFloat16* rounded = reinterpret_cast<BFloat16*>(rest);
    if (begin < end)
      for (int64_t i = 0; i < rows; ++i) {
        for_row<T>(w.depth, [&](int64_t k, auto part) { part.put(part.get(a + i * a_stride + k, 0), rounded + i * padded + k); });
        if (padded > w.depth) rounded[i * padded + w.depth].bits = 0;
      }
    for (int64_t p = begin; p < end; ++p) {
      panel_pairs(rows, padded / 2, rounded, padded, w.panel(p), sums);
      finish_panel(p, sums);
    }
    return;
  }
  int64_t p = begin;
  const int64_t apart = w.panel(1) - w.panel(0), each = rows * kPanelColumns<S>;
  const auto finish_panels = [&](int64_t count) {
    for (int64_t i = 0; i < count; ++i) finish_panel(p + i, sums + i * each);
    p += count;
  };
  for (; rows == 1 && p + 4 <= end; finish_panels(4)) few_rows<1, 4>(w.depth, a, a_stride, w.panel(p), apart, sums, each);
  for (; rows == 2 && p + 3 <= end; finish_panels(3)) few_rows<2, 3>(w.depth, a, a_stride, w.panel(p), apart, sums, each);
  for (; rows == 3 && p + 2 <= end; finish_panels(2)) few_rows<3, 2>(w.depth, a, a_stride, w.panel(p), apart, sums, each);
  for (; p < end; finish_panels(1)) multiply_panel(rows, w.depth, a, a_stride, w.panel(p), sums, rest);
}

}  // namespace
}  // namespace evc::EVC_NAMESPACE
