// Progressive emotion augmentation, equations (19)-(21), in one launch: both softmaxes and all four products on chip.
//
// A task is one head of some triplets of one video. Its rows, the triplets' frames, meet the dictionary in groups of
// 16 kTall; their candidates X stay in scratch, until every frame of a triplet is there to be gathered by the gate. Scratch
// is shared memory, and a workspace where one block's does not fit.
#include "kernels.cuh"
#include "product.cuh"
#include "reduce.cuh"

namespace evc {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kMostRows = 64;  // of a group

// A task's share of the work, and the parts of its scratch: bytes from its start, elements from row to row.
struct Plan {
  int triplets;         // of a task; all their rows are one group, unless triplets is 1
  int64_t tasks;        // B x ceil(K / triplets) x heads
  int tall;             // a group has 16 tall rows
  int query_row;        // S [group][query_row]: d / heads of the query
  int gate_query_row;   // S [group][gate_query_row]: d of the gate's query
  int words_row;        // [group][words_row]: scores of the words as float, then their softmax's numerators as S
  int gates_row;        // [group + 16][gates_row]: the same of the gate
  int candidates_row;   // S [rows][candidates_row]: X
  int64_t gate_query_at, words_at, gates_at, candidates_at, word_scale_at, gate_scale_at, bytes;
};

// Floats from one row of scores to the next: as numerators of 16 bits, rows lie as row_stride wants them.
int scores_row(int64_t width) { return static_cast<int>((width + 7) / 8 * 8) + 4; }

// Where the scratch's parts lie, for groups of 16 tall rows.
template <class S>
void lay_out(const EmotionArgs& a, int tall, Plan& plan) {
  plan.tall = tall;
  plan.query_row = plan.candidates_row = row_stride<S>(a.d / a.heads);
  plan.gate_query_row = row_stride<S>(a.d);
  plan.words_row = scores_row(a.W);
  plan.gates_row = scores_row(a.N);
  plan.bytes = 0;
  const auto reserve = [&](int64_t bytes) {
    const int64_t at = plan.bytes;
    plan.bytes += (bytes + 127) / 128 * 128;
    return at;
  };
  const int64_t group = 16 * tall, stored = sizeof(S), score = sizeof(float);
  reserve(group * plan.query_row * stored);
  plan.gate_query_at = reserve(group * plan.gate_query_row * stored);
  plan.words_at = reserve(group * plan.words_row * score);
  plan.gates_at = reserve((group + 16) * plan.gates_row * score);
  plan.candidates_at = reserve(plan.triplets * a.N * plan.candidates_row * stored);
  plan.word_scale_at = reserve(group * score);
  plan.gate_scale_at = reserve(group * score);
}

bool fits_shared(const Plan& plan) { return plan.bytes + 128 <= static_cast<int64_t>(shared_limit()); }

template <class S>
Plan make_plan(const EmotionArgs& a) {
  Plan plan{};
  const int64_t most = kMostRows / a.N;
  plan.triplets = static_cast<int>(most < 1 ? 1 : most < a.K ? most : a.K);
  // Triplets that share a task share what it reads of the dictionary, once there are tasks enough for the device.
  if (a.B * a.heads * ((a.K + plan.triplets - 1) / plan.triplets) < 2 * multiprocessors()) plan.triplets = 1;
  plan.tasks = a.B * a.heads * ((a.K + plan.triplets - 1) / plan.triplets);
  if (plan.triplets * a.N <= 16) lay_out<S>(a, 1, plan);
  if (plan.tall == 0 || !fits_shared(plan)) lay_out<S>(a, kMostRows / 16, plan);
  return plan;
}

// `count` rows of `depth` elements, `stride` apart, into `rows` rows of scratch: zero beyond `count` rows, and beyond the
// depth to a whole step. A block's work.
template <class S>
__device__ void stage(const S* from, int64_t stride, int count, int rows, int depth, S* to, int to_row) {
  constexpr int kStep = kDepthStep<S>;
  const int padded = (depth + kStep - 1) / kStep * kStep;
  const bool pairs = sizeof(S) == 2 && reinterpret_cast<uintptr_t>(from) % 4 == 0 && stride % 2 == 0;
  for (int i = threadIdx.x; i < rows * padded / 2; i += kThreads) {
    const int row = i * 2 / padded, k = i * 2 % padded;
    const S* p = from + row * stride + k;
    S* q = to + row * to_row + k;
    if (pairs && row < count && k + 1 < depth) {
      *reinterpret_cast<uint32_t*>(q) = *reinterpret_cast<const uint32_t*>(p);
    } else {
      q[0] = row < count && k < depth ? p[0] : S{};
      q[1] = row < count && k + 1 < depth ? p[1] : S{};
    }
  }
}

// A row of scores [width] becomes exp(scale (score - largest)) in storage type, zero to a whole step of a product's
// depth; returns what makes their sum 1. A warp's work.
template <class S>
__device__ float softmax_numerators(float* scores, int width, float scale) {
  constexpr int kStep = kDepthStep<S>;
  const int lane = threadIdx.x % kWarp, padded = (width + kStep - 1) / kStep * kStep;
  S* numerators = reinterpret_cast<S*>(scores);
  float best = -INFINITY, total = 0;
  for (int i = lane; i < width; i += kWarp) best = Max::join(scores[i], best);
  best = warp_max(best);
  __syncwarp();
  for (int first = 0; first < padded; first += kWarp) {
    const int i = first + lane;
    const float e = i < width ? expf((scores[i] - best) * scale) : 0.0f;
    total += e;
    __syncwarp();  // numerators [first, first + 32) lie on scores that all lanes have read by now
    if (i < padded) numerators[i] = narrow<S>(e);
  }
  return 1.0f / warp_sum(total);
}

// The warps of a block take jobs one by one: long ones do not hold up the rest.
__device__ inline int take_job(int* next) {
  int job = 0;
  if (threadIdx.x % kWarp == 0) job = atomicAdd(next, 1);
  return __shfl_sync(kAllLanes, job, 0);
}

__host__ __device__ inline int tiles(int elements, int of) { return (elements + of - 1) / of; }

template <class S, int kTall, bool kShared>
__global__ void __launch_bounds__(kThreads, 1) attend(EmotionArgs args, Plan plan, unsigned char* workspace) {
  typedef Tile<S, kTall> Tall;
  typedef Tile<S, 1> Short;
  constexpr int kGroup = 16 * kTall;
  EVC_DYNAMIC_SHARED(shared);
  EVC_SHARED(int, next_job, 1);
  unsigned char* scratch = kShared ? shared : workspace + blockIdx.x * plan.bytes;
  S* query = reinterpret_cast<S*>(scratch);
  S* gate_query = reinterpret_cast<S*>(scratch + plan.gate_query_at);
  float* words = reinterpret_cast<float*>(scratch + plan.words_at);
  float* gates = reinterpret_cast<float*>(scratch + plan.gates_at);
  S* candidates = reinterpret_cast<S*>(scratch + plan.candidates_at);
  float* word_scale = reinterpret_cast<float*>(scratch + plan.word_scale_at);
  float* gate_scale = reinterpret_cast<float*>(scratch + plan.gate_scale_at);

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int N = static_cast<int>(args.N), W = static_cast<int>(args.W), d = static_cast<int>(args.d);
  const int heads = static_cast<int>(args.heads), head = d / heads;
  const int words_row = plan.words_row * static_cast<int>(sizeof(float) / sizeof(S));  // as numerators
  const int gates_row = plan.gates_row * static_cast<int>(sizeof(float) / sizeof(S));
  const int64_t parts = (args.K + plan.triplets - 1) / plan.triplets;

  for (int64_t task = blockIdx.x; task < plan.tasks; task += gridDim.x) {
    const int64_t h = task % heads, part = task / heads % parts, b = task / heads / parts;
    const int64_t k = part * plan.triplets;
    const int triplets = static_cast<int>(args.K - k < plan.triplets ? args.K - k : plan.triplets);
    const int rows = triplets * N, groups = tiles(rows, kGroup);
    const int64_t start = (b * args.K + k) * N * args.d;  // of the task's rows
    const S* queries = static_cast<const S*>(args.query) + start + h * head;
    const S* gate_queries = static_cast<const S*>(args.gate_query) + start;
    S* context = static_cast<S*>(args.context) + start + h * head;
    const S* keys = static_cast<const S*>(args.key) + h * head;
    const Operand<S, true> values{static_cast<const S*>(args.value) + h * head, d, head, W};
    const S* gate_keys = static_cast<const S*>(args.gate_key) + b * N * args.d;

    // One group: both attentions in one pass. Else the words' for all groups, then the gate's.
    const int passes = groups == 1 ? 1 : 2 * groups;
    for (int pass = 0; pass < passes; ++pass) {
      const bool with_words = pass < groups, with_gates = groups == 1 || pass >= groups;
      const int first = pass % groups * kGroup, count = rows - first < kGroup ? rows - first : kGroup;

      if (threadIdx.x == 0) *next_job = 0;
      if (with_words) stage(queries + int64_t(first) * d, d, count, kGroup, head, query, plan.query_row);
      if (with_gates) stage(gate_queries + int64_t(first) * d, d, count, kGroup, d, gate_query, plan.gate_query_row);
      __syncthreads();

      const int row_tiles = tiles(count, Tall::kRows);
      const int gate_tiles = with_gates ? tiles(N, Tall::kColumns) : 0;
      const int jobs = row_tiles * (gate_tiles + (with_words ? tiles(W, Tall::kColumns) : 0));
      for (int job = take_job(next_job); job < jobs; job = take_job(next_job)) {
        const int row = job % row_tiles * Tall::kRows, tile = job / row_tiles;
        const bool gate = tile < gate_tiles;  // the deeper ones first
        const int column = (gate ? tile : tile - gate_tiles) * Tall::kColumns;
        const int width = gate ? N : W, from_row = gate ? plan.gate_query_row : plan.query_row;
        const int to_row = gate ? plan.gates_row : plan.words_row;
        float* to = (gate ? gates : words) + row * to_row;
        const Operand<S, false> against{gate ? gate_keys : keys, d, width, gate ? d : head};
        Tall sums;
        sums.multiply((gate ? gate_query : query) + row * from_row, from_row, against, column);
        sums.each([&](int r, int c, float sum) {
          if (column + c < width) to[r * to_row + column + c] = sum;
        });
      }
      __syncthreads();

      const int word_rows = with_words ? count : 0, gate_rows = with_gates ? count : 0;
      const float scale = 1.0f / sqrtf(static_cast<float>(head));
      for (int i = warp; i < word_rows + gate_rows; i += kWarps) {
        const bool gate = i >= word_rows;
        const int row = gate ? i - word_rows : i;
        float* from = gate ? gates + row * plan.gates_row : words + row * plan.words_row;
        const float inverse = softmax_numerators<S>(from, gate ? N : W, gate ? 1.0f : scale);  // (20): unscaled
        if (lane == 0) (gate ? gate_scale : word_scale)[row] = inverse;
      }
      __syncthreads();

      if (with_words) {
        for (int job = warp; job < row_tiles * tiles(head, Tall::kColumns); job += kWarps) {  // (19)
          const int row = job % row_tiles * Tall::kRows, column = job / row_tiles * Tall::kColumns;
          S* to = candidates + int64_t(first + row) * plan.candidates_row + column;
          Tall sums;
          sums.multiply(reinterpret_cast<const S*>(words) + row * words_row, words_row, values, column);
          sums.each([&](int r, int c, float sum) {
            if (row + r < count && column + c < head) to[r * plan.candidates_row + c] = narrow<S>(sum * word_scale[row + r]);
          });
        }
        __syncthreads();
      }
      if (with_gates) {
        const int segments = groups == 1 ? triplets : 1, length = count / segments;  // rows of one triplet
        const int length_tiles = tiles(length, Short::kRows), column_tiles = tiles(head, Short::kColumns);
        for (int job = warp; job < segments * length_tiles * column_tiles; job += kWarps) {  // (21)
          const int segment = job / column_tiles / length_tiles, column = job % column_tiles * Short::kColumns;
          const int inside = job / column_tiles % length_tiles * Short::kRows, row = segment * length + inside;
          const Operand<S, true> x{candidates + int64_t(segment) * N * plan.candidates_row, plan.candidates_row, head, N};
          S* to = context + int64_t(first + row) * d + column;
          Short sums;
          sums.multiply(reinterpret_cast<const S*>(gates) + row * gates_row, gates_row, x, column);
          sums.each([&](int r, int c, float sum) {
            if (inside + r < length && column + c < head) to[int64_t(r) * d + c] = narrow<S>(sum * gate_scale[row + r]);
          });
        }
        __syncthreads();  // the next pass, or task, writes what this one read
      }
    }
  }
}

// A workspace holds the scratch of every block: fewer of them, then.
int emotion_blocks(const CudaLaunch& how, const Plan& plan) {
  const int blocks = grid_size(how, plan.tasks), few = 2 * multiprocessors();
  return fits_shared(plan) || blocks < few ? blocks : few;
}

}  // namespace

int64_t emotion_attention_workspace(const EmotionArgs& args, const CudaLaunch& how) {
  int64_t bytes = 0;
  for_dtype(how.dtype, [&](auto storage) {
    const Plan plan = make_plan<decltype(storage)>(args);
    if (!fits_shared(plan)) bytes = plan.bytes * emotion_blocks(how, plan);
    return 0;
  });
  return bytes;
}

int emotion_attention(const EmotionArgs& args, const CudaLaunch& how) {
  return for_dtype(how.dtype, [&](auto storage) {
    typedef decltype(storage) S;
    const Plan plan = make_plan<S>(args);
    const bool fits = fits_shared(plan);
    const Grid grid{emotion_blocks(how, plan), kThreads, fits ? static_cast<size_t>(plan.bytes) : 0};
    constexpr int kTall = kMostRows / 16;
    const auto kernel = !fits ? attend<S, kTall, false> : plan.tall == 1 ? attend<S, 1, true> : attend<S, kTall, true>;
    return launch(grid, how.stream, kernel, args, plan, static_cast<unsigned char*>(how.workspace));
  });
}

}  // namespace evc
