// Progressive emotion augmentation, equations (19)-(21). Scores live in blocks of at most kBlock rows of scratch.
//
// Tiles in scratch are "split": [heads][rows][padded d/heads], each head's row padded with zeros to whole vectors, so
// that a tile serves as either operand of a product without copies.
#include "gemm.h"
#include "kernels.h"
#include "rows.h"

namespace evc::EVC_NAMESPACE {
namespace {

constexpr int64_t kBlock = 64;

// Row length for n columns: whole vectors, and an odd number of cache lines, lest rows share cache sets.
template <class T>
int64_t padded(int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t lines = (n + kLine - 1) / kLine;
  return (lines | 1) * kLine;
}

template <class T>
struct Shape {
  int64_t K, N, W, d, heads, head, head_row, word_row, frame_row, width_row;
  explicit Shape(const EmotionArgs& a)
      : K(a.K), N(a.N), W(a.W), d(a.d), heads(a.heads), head(a.d / a.heads), head_row(padded<T>(head)),
        word_row(padded<T>(W)), frame_row(padded<T>(N)), width_row(padded<T>(d)) {}
  int64_t split(int64_t rows) const { return heads * rows * head_row; }
  int64_t transposed() const { return heads * head * word_row; }  // keys or values, [heads][d/heads][W]
  int64_t upright() const { return heads * W * head_row; }        // keys or values, [heads][W][d/heads]
  T scale() const { return T(1) / std::sqrt(T(head)); }
};

template <class S, class T>
void copy_row(const S* from, int64_t n, T* to) {
  for_row<T>(n, [&](int64_t i, auto part) { part.put(part.get(from + i, 0), to + i); });
}
template <class T, class S>
void store_row(const T* from, int64_t n, T scale, S* to) {
  for_row<T>(n, [&](int64_t i, auto part) { part.put(scale * part.get(from + i, 0), to + i); });
}

// from: rows of `width` elements, `stride` apart; to: rows padded with zeros to `to_row`.
template <class S, class T>
void pad_rows(const S* from, int64_t stride, int64_t rows, int64_t width, T* to, int64_t to_row) {
  for (int64_t n = 0; n < rows; ++n, from += stride, to += to_row) {
    copy_row(from, width, to);
    for (int64_t i = width; i < to_row; ++i) to[i] = 0;
  }
}
template <class S, class T>
void split_heads(const S* from, int64_t rows, const Shape<T>& shape, T* to) {
  for (int64_t h = 0; h < shape.heads; ++h)
    pad_rows(from + h * shape.head, shape.d, rows, shape.head, to + h * rows * shape.head_row, shape.head_row);
}
// to[i][n] = scale * from[n][i], rows of `to` padded with zeros.
template <class S, class T>
void transpose_rows(const S* from, int64_t stride, int64_t rows, int64_t width, T scale, T* to, int64_t to_row) {
  for (int64_t i = 0; i < width; ++i) {
    for (int64_t n = 0; n < rows; ++n) to[i * to_row + n] = scale * widen(from[n * stride + i]);
    for (int64_t n = rows; n < to_row; ++n) to[i * to_row + n] = 0;
  }
}

// The rows as the accumulation type: themselves where they are stored in it, else widened into scratch.
inline const float* as_rows(const float* from, int64_t, float*) { return from; }
inline const double* as_rows(const double* from, int64_t, double*) { return from; }
inline const float* as_rows(const BFloat16* from, int64_t n, float* scratch) {
  copy_row(from, n, scratch);
  return scratch;
}

template <class T>
void softmax(T* row, int64_t n) {
  const T scale = softmax_numerators(row, n);
  for (int64_t i = 0; i < n; i += kLanes<T>) store(load(row + i) * scale, row + i);
}
// grad becomes p (grad - <p, grad>).
template <class T>
void softmax_backward(const T* p, T* grad, int64_t n) {
  RowSum<T> dot;
  for_row_sums<T>(n, [&](int64_t i, auto part, int chain) {
    dot.chain[chain] += part.get(p + i, 0) * part.get(grad + i, 0);
  });
  const T mean = dot.total();
  for_row<T>(n, [&](int64_t i, auto part) {
    part.put(part.get(p + i, 0) * (part.get(grad + i, 0) - mean), grad + i);
  });
}

// ---- the dictionary, packed once a call; forward: [key^T scale][value], backward: [key^T scale][value^T][key scale] ----

template <class T>
struct Dictionary {
  T *key_transposed, *value, *value_transposed, *key;
  Dictionary(const EmotionArgs& args, const Shape<T>& shape) {
    T* base = static_cast<T*>(args.dictionary);
    key_transposed = base;
    value = value_transposed = base + shape.transposed();
    key = value_transposed + shape.transposed();
  }
  static size_t bytes(const EmotionArgs& args, bool backward) {
    const Shape<T> shape(args);
    return sizeof(T) * (shape.transposed() * (backward ? 2 : 1) + shape.upright());
  }
};

// A task is one head.
template <class S>
void pack(const EmotionArgs& args, int64_t begin, int64_t end, void*) {
  typedef Acc<S> T;
  const Shape<T> s(args);
  const bool backward = args.grad_context;
  const Dictionary<T> to(args, s);
  for (int64_t h = begin; h < end; ++h) {
    const S* key = static_cast<const S*>(args.key) + h * s.head;
    const S* value = static_cast<const S*>(args.value) + h * s.head;
    const int64_t lying = h * s.head * s.word_row, standing = h * s.W * s.head_row;
    transpose_rows(key, s.d, s.W, s.head, s.scale(), to.key_transposed + lying, s.word_row);
    if (!backward) {
      pad_rows(value, s.d, s.W, s.head, to.value + standing, s.head_row);
      continue;
    }
    transpose_rows(value, s.d, s.W, s.head, T(1), to.value_transposed + lying, s.word_row);
    for (int64_t w = 0; w < s.W; ++w) {
      T* row = to.key + standing + w * s.head_row;
      store_row(as_rows(key + w * s.d, s.head, row), s.head, s.scale(), row);
      for (int64_t i = s.head; i < s.head_row; ++i) row[i] = 0;
    }
  }
}

// ---- forward: a task is one (video, triplet) ----

template <class S, class T = Acc<S>>
struct ForwardScratch {
  T *query, *scores, *candidates, *gate_key, *gate_query, *context;
  int64_t bytes;
  ForwardScratch(const Shape<T>& s, void* base) {
    Arena<T> arena{static_cast<T*>(base)};
    const int64_t rows = s.N < kBlock ? s.N : kBlock;
    query = arena.take(rows * s.d);
    scores = arena.take(rows * (s.word_row > s.frame_row ? s.word_row : s.frame_row));
    candidates = arena.take(s.split(s.N));
    gate_key = arena.take(s.d * s.frame_row);
    gate_query = arena.take(rows * s.d);
    context = arena.take(rows * s.head_row);
    bytes = arena.used * sizeof(T);
  }
};

template <class S>
void forward(const EmotionArgs& args, int64_t begin, int64_t end, void* scratch) {
  typedef Acc<S> T;
  const Shape<T> s(args);
  const Dictionary<T> words(args, s);
  const ForwardScratch<S> own(s, scratch);
  T scale[kBlock];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task * s.N * s.d, b = task / s.K;
    const S* gate_key = static_cast<const S*>(args.gate_key) + b * s.N * s.d;
    if (task == begin || task % s.K == 0)
      transpose_rows(gate_key, s.d, s.N, s.d, T(1), own.gate_key, s.frame_row);
    for (int64_t n = 0; n < s.N; n += kBlock) {  // (19): X = softmax(Q K^T / sqrt(d/heads)) V
      const int64_t rows = s.N - n < kBlock ? s.N - n : kBlock;
      const T* query = as_rows(static_cast<const S*>(args.query) + first + n * s.d, rows * s.d, own.query);
      for (int64_t h = 0; h < s.heads; ++h) {
        T* x = own.candidates + (h * s.N + n) * s.head_row;
        multiply<T, false>(rows, s.W, s.head, {query + h * s.head, s.d, 1},
                           {words.key_transposed + h * s.head * s.word_row, s.word_row}, own.scores, s.word_row);
        for (int64_t i = 0; i < rows; ++i) scale[i] = softmax_numerators(own.scores + i * s.word_row, s.W);
        multiply<T, false>(rows, s.head, s.W, {own.scores, s.word_row, 1},
                           {words.value + h * s.W * s.head_row, s.head_row}, x, s.head_row);
        for (int64_t i = 0; i < rows; ++i) store_row(x + i * s.head_row, round_up(s.head, kLanes<T>), scale[i], x + i * s.head_row);
        if (args.candidates)
          for (int64_t i = 0; i < rows; ++i)
            store_row(x + i * s.head_row, s.head, T(1),
                      static_cast<S*>(args.candidates) + first + (n + i) * s.d + h * s.head);
      }
    }
    for (int64_t n = 0; n < s.N; n += kBlock) {  // (20), (21): softmax(G_q G_k^T) X
      const int64_t rows = s.N - n < kBlock ? s.N - n : kBlock;
      const T* gate_query = as_rows(static_cast<const S*>(args.gate_query) + first + n * s.d, rows * s.d, own.gate_query);
      multiply<T, false>(rows, s.N, s.d, {gate_query, s.d, 1}, {own.gate_key, s.frame_row}, own.scores, s.frame_row);
      for (int64_t i = 0; i < rows; ++i) scale[i] = softmax_numerators(own.scores + i * s.frame_row, s.N);
      for (int64_t h = 0; h < s.heads; ++h) {
        multiply<T, false>(rows, s.head, s.N, {own.scores, s.frame_row, 1},
                           {own.candidates + h * s.N * s.head_row, s.head_row}, own.context, s.head_row);
        for (int64_t i = 0; i < rows; ++i)
          store_row(own.context + i * s.head_row, s.head, scale[i],
                    static_cast<S*>(args.context) + first + (n + i) * s.d + h * s.head);
      }
    }
  }
}

// ---- backward: a task is one chunk of videos, summed into the chunk's own gradients of the dictionary ----

template <class S, class T = Acc<S>>
struct BackwardScratch {
  T *grad_candidates, *grad_context, *grad_split, *candidates_transposed, *gate_key, *gate_key_transposed;
  T *gate, *grad_gate, *gate_query, *grad_gate_query, *grad_gate_key, *query, *scores, *grad_scores, *grad_query;
  int64_t bytes;
  BackwardScratch(const Shape<T>& s, void* base) {
    Arena<T> arena{static_cast<T*>(base)};
    const int64_t rows = s.N < kBlock ? s.N : kBlock, all = s.K * s.N < kBlock ? s.K * s.N : kBlock;
    grad_candidates = arena.take(s.split(s.K * s.N));
    grad_context = arena.take(s.N * s.d);
    grad_split = arena.take(s.split(s.N));
    candidates_transposed = arena.take(s.d * s.frame_row);
    gate_key = arena.take(s.N * s.width_row);
    gate_key_transposed = arena.take(s.d * s.frame_row);
    gate = arena.take(rows * s.frame_row);
    grad_gate = arena.take(rows * s.frame_row);
    gate_query = arena.take(rows * s.width_row);
    grad_gate_query = arena.take(rows * s.width_row);
    grad_gate_key = arena.take(s.N * s.width_row);
    query = arena.take(all * s.head_row);
    scores = arena.take(all * s.word_row);
    grad_scores = arena.take(all * s.word_row);
    grad_query = arena.take(all * s.head_row);
    bytes = arena.used * sizeof(T);
  }
};

// (20), (21) for video b: gradients of the gate, and of the candidates X into own.grad_candidates.
template <class S, class T>
void gate_backward(const EmotionArgs& args, const Shape<T>& s, const BackwardScratch<S>& own, int64_t b) {
  const S* gate_key = static_cast<const S*>(args.gate_key) + b * s.N * s.d;
  pad_rows(gate_key, s.d, s.N, s.d, own.gate_key, s.width_row);
  transpose_rows(gate_key, s.d, s.N, s.d, T(1), own.gate_key_transposed, s.frame_row);
  memset(own.grad_candidates, 0, s.split(s.K * s.N) * sizeof(T));
  memset(own.grad_gate_key, 0, s.N * s.width_row * sizeof(T));
  for (int64_t k = 0; k < s.K; ++k) {
    const int64_t first = (b * s.K + k) * s.N * s.d;
    const S* grad = static_cast<const S*>(args.grad_context) + first;
    const T* grad_context = as_rows(grad, s.N * s.d, own.grad_context);
    split_heads(grad, s.N, s, own.grad_split);
    transpose_rows(static_cast<const S*>(args.candidates) + first, s.d, s.N, s.d, T(1), own.candidates_transposed,
                   s.frame_row);
    for (int64_t n = 0; n < s.N; n += kBlock) {
      const int64_t rows = s.N - n < kBlock ? s.N - n : kBlock;
      pad_rows(static_cast<const S*>(args.gate_query) + first + n * s.d, s.d, rows, s.d, own.gate_query, s.width_row);
      multiply<T, false>(rows, s.N, s.d, {own.gate_query, s.width_row, 1}, {own.gate_key_transposed, s.frame_row},
                         own.gate, s.frame_row);
      for (int64_t i = 0; i < rows; ++i) softmax(own.gate + i * s.frame_row, s.N);
      multiply<T, false>(rows, s.N, s.d, {grad_context + n * s.d, s.d, 1}, {own.candidates_transposed, s.frame_row},
                         own.grad_gate, s.frame_row);
      for (int64_t i = 0; i < rows; ++i) softmax_backward(own.gate + i * s.frame_row, own.grad_gate + i * s.frame_row, s.N);
      multiply<T, false>(rows, s.d, s.N, {own.grad_gate, s.frame_row, 1}, {own.gate_key, s.width_row},
                         own.grad_gate_query, s.width_row);
      for (int64_t i = 0; i < rows; ++i)
        store_row(own.grad_gate_query + i * s.width_row, s.d, T(1),
                  static_cast<S*>(args.grad_gate_query) + first + (n + i) * s.d);
      multiply<T, true>(s.N, s.d, rows, {own.grad_gate, 1, s.frame_row}, {own.gate_query, s.width_row},
                        own.grad_gate_key, s.width_row);
      for (int64_t h = 0; h < s.heads; ++h)
        multiply<T, true>(s.N, s.head, rows, {own.gate, 1, s.frame_row},
                          {own.grad_split + (h * s.N + n) * s.head_row, s.head_row},
                          own.grad_candidates + (h * s.K + k) * s.N * s.head_row, s.head_row);
    }
  }
  S* grad_gate_key = static_cast<S*>(args.grad_gate_key) + b * s.N * s.d;
  for (int64_t n = 0; n < s.N; ++n) store_row(own.grad_gate_key + n * s.width_row, s.d, T(1), grad_gate_key + n * s.d);
}

// (19) for video b: its K N rows attend as one; grad_key, grad_value: [heads][W][d/heads] sums of the chunk.
template <class S, class T>
void attention_backward(const EmotionArgs& args, const Shape<T>& s, const Dictionary<T>& words,
                        const BackwardScratch<S>& own, int64_t b, T* grad_key, T* grad_value) {
  const int64_t all = s.K * s.N;
  for (int64_t n = 0; n < all; n += kBlock) {
    const int64_t rows = all - n < kBlock ? all - n : kBlock, first = (b * all + n) * s.d;
    for (int64_t h = 0; h < s.heads; ++h) {
      const int64_t lying = h * s.head * s.word_row, standing = h * s.W * s.head_row;
      const T* grad_x = own.grad_candidates + (h * all + n) * s.head_row;
      pad_rows(static_cast<const S*>(args.query) + first + h * s.head, s.d, rows, s.head, own.query, s.head_row);
      multiply<T, false>(rows, s.W, s.head, {own.query, s.head_row, 1}, {words.key_transposed + lying, s.word_row},
                         own.scores, s.word_row);
      for (int64_t i = 0; i < rows; ++i) softmax(own.scores + i * s.word_row, s.W);
      multiply<T, false>(rows, s.W, s.head, {grad_x, s.head_row, 1}, {words.value_transposed + lying, s.word_row},
                         own.grad_scores, s.word_row);
      for (int64_t i = 0; i < rows; ++i)
        softmax_backward(own.scores + i * s.word_row, own.grad_scores + i * s.word_row, s.W);
      multiply<T, false>(rows, s.head, s.W, {own.grad_scores, s.word_row, 1}, {words.key + standing, s.head_row},
                         own.grad_query, s.head_row);
      for (int64_t i = 0; i < rows; ++i)
        store_row(own.grad_query + i * s.head_row, s.head, T(1),
                  static_cast<S*>(args.grad_query) + first + i * s.d + h * s.head);
      multiply<T, true>(s.W, s.head, rows, {own.scores, 1, s.word_row}, {grad_x, s.head_row}, grad_value + standing,
                        s.head_row);
      multiply<T, true>(s.W, s.head, rows, {own.grad_scores, 1, s.word_row}, {own.query, s.head_row},
                        grad_key + standing, s.head_row);
    }
  }
}

template <class S>
void backward(const EmotionArgs& args, int64_t begin, int64_t end, void* scratch) {
  typedef Acc<S> T;
  const Shape<T> s(args);
  const Dictionary<T> words(args, s);
  const BackwardScratch<S> own(s, scratch);
  const int64_t chunks = emotion_chunks(args.B);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    T* grad_key = static_cast<T*>(args.partials) + chunk * 2 * s.upright();
    T* grad_value = grad_key + s.upright();
    memset(grad_key, 0, 2 * s.upright() * sizeof(T));
    for (int64_t b = chunk * args.B / chunks; b < (chunk + 1) * args.B / chunks; ++b) {
      gate_backward(args, s, own, b);
      attention_backward(args, s, words, own, b, grad_key, grad_value);
    }
  }
}

// A task is one word: the chunks' sums, added in order.
template <class S>
void reduce(const EmotionArgs& args, int64_t begin, int64_t end, void* scratch) {
  typedef Acc<S> T;
  const Shape<T> s(args);
  const int64_t chunks = emotion_chunks(args.B);
  T* sum = static_cast<T*>(scratch);  // [padded d/heads]
  for (int64_t w = begin; w < end; ++w)
    for (int64_t h = 0; h < s.heads; ++h)
      for (int of = 0; of < 2; ++of) {
        memset(sum, 0, s.head_row * sizeof(T));
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const T* from = static_cast<const T*>(args.partials) + (chunk * 2 + of) * s.upright() + (h * s.W + w) * s.head_row;
          for (int64_t i = 0; i < s.head_row; i += kLanes<T>) store(load(sum + i) + load(from + i), sum + i);
        }
        S* to = static_cast<S*>(of ? args.grad_value : args.grad_key) + w * s.d + h * s.head;
        store_row(sum, s.head, of ? T(1) : s.scale(), to);
      }
}

template <class S>
size_t partial_bytes(const EmotionArgs& args) {
  return 2 * Shape<Acc<S>>(args).upright() * sizeof(Acc<S>);
}

}  // namespace

void add_emotion_attention(Kernels& kernels) {
  for_each_dtype([&](Dtype dtype, auto storage) {
    typedef decltype(storage) S;
    typedef Acc<S> T;
    kernels.emotion_dictionary_bytes[dtype] = Dictionary<T>::bytes;
    kernels.emotion_partial_bytes[dtype] = partial_bytes<S>;
    kernels.emotion_pack[dtype] = {[](const EmotionArgs&) -> size_t { return 0; }, pack<S>};
    kernels.emotion_forward[dtype] = {
        [](const EmotionArgs& args) -> size_t { return ForwardScratch<S>(Shape<T>(args), nullptr).bytes; }, forward<S>};
    kernels.emotion_backward[dtype] = {
        [](const EmotionArgs& args) -> size_t { return BackwardScratch<S>(Shape<T>(args), nullptr).bytes; }, backward<S>};
    kernels.emotion_reduce[dtype] = {
        [](const EmotionArgs& args) -> size_t { return Shape<T>(args).head_row * sizeof(T); }, reduce<S>};
  });
}

}  // namespace evc::EVC_NAMESPACE
