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

template <class S>
Plan make_plan(const EmotionArgs& a) {
  Plan plan{};
  const int64_t most = kMostRows / a.N;
  plan.triplets = static_cast<int>(most < 1 ? 1 : most < a.K ? most : a.K);
  // Triplets that share a task share what it reads of the dictionary, once there are tasks enough for the device.
  if (a.B * a.heads * ((a.K + plan.triplets - 1) / plan.triplets) < 2 * multiprocessors()) plan.triplets = 1;
  plan.tasks = a.B * a.heads * ((a.K + plan.triplets - 1) / plan.triplets);
  const int64_t rows = plan.triplets * a.N;
  plan.tall = rows <= 16 ? 1 : kMostRows / 16;
  const int64_t group = 16 * plan.tall;
  plan.query_row = plan.candidates_row = row_stride<S>(a.d / a.heads);
  plan.gate_query_row = row_stride<S>(a.d);
  plan.words_row = scores_row(a.W);
  plan.gates_row = scores_row(a.N);
  const auto reserve = [&](int64_t bytes) {
    const int64_t at = plan.bytes;
    plan.bytes += (bytes + 127) / 128 * 128;
    return at;
  };
  constexpr int64_t kStored = sizeof(S), kScore = sizeof(float);
  reserve(group * plan.query_row * kStored);
  plan.gate_query_at = reserve(group * plan.gate_query_row * kStored);
  plan.words_at = reserve(group * plan.words_row * kScore);
  plan.gates_at = reserve((group + 16) * plan.gates_row * kScore);
  plan.candidates_at = reserve(rows * plan.candidates_row * kStored);
  plan.word_scale_at = reserve(group * kScore);
  plan.gate_scale_at = reserve(group * kScore);
  return plan;
}

bool fits_shared(const Plan& plan) { return plan.bytes + 128 <= static_cast<int64_t>(shared_limit()); }

// Rows of B's columns into scratch, zero beyond `b.columns` rows and beyond b.depth to a whole step. A block's work.
template <class S>
__device__ void stage(const Operand<S, false>& b, int rows, S* to, int to_row) {
  constexpr int kStep = kDepthStep<S>;
  const int depth = (b.depth + kStep - 1) / kStep * kStep;
  if constexpr (std::is_same_v<S, float>) {
    for (int i = threadIdx.x; i < rows * depth; i += kThreads) to[i / depth * to_row + i % depth] = b.get(i / depth, i % depth);
  } else {
    const int half = depth / 2;
    for (int i = threadIdx.x; i < rows * half; i += kThreads)
      *reinterpret_cast<uint32_t*>(to + i / half * to_row + i % half * 2) = b.pair(i / half, i % half * 2);
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
__global__ void __launch_bounds__(kThreads) attend(EmotionArgs args, Plan plan, unsigned char* workspace) {
  typedef Tile<S, kTall> Scores;   // and X
  typedef Tile<S, 1> Context;
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
    const int rows = triplets * N;
    const bool whole = rows <= kGroup;
    const int64_t start = (b * args.K + k) * N * args.d;  // of the task's rows
    const S* queries = static_cast<const S*>(args.query) + start + h * head;
    const S* gate_queries = static_cast<const S*>(args.gate_query) + start;
    S* context = static_cast<S*>(args.context) + start + h * head;
    const Operand<S, false> keys{static_cast<const S*>(args.key) + h * head, d, W, head};
    const Operand<S, true> values{static_cast<const S*>(args.value) + h * head, d, head, W};
    const Operand<S, false> gate_keys{static_cast<const S*>(args.gate_key) + b * N * args.d, d, N, d};

    // Scores of a group's rows with the words, the frames or both, and their numerators.
    const auto scores = [&](int first, bool with_words, bool with_gates) {
      const int count = rows - first < kGroup ? rows - first : kGroup;
      if (threadIdx.x == 0) *next_job = 0;
      if (with_words) stage(Operand<S, false>{queries + int64_t(first) * d, d, count, head}, kGroup, query, plan.query_row);
      if (with_gates)
        stage(Operand<S, false>{gate_queries + int64_t(first) * d, d, count, d}, kGroup, gate_query, plan.gate_query_row);
      __syncthreads();
      const int gate_tiles = with_gates ? tiles(N, Scores::kColumns) : 0;
      const int word_tiles = with_words ? tiles(W, Scores::kColumns) : 0;
      const int row_tiles = tiles(count, Scores::kRows), jobs = (gate_tiles + word_tiles) * row_tiles;
      for (int job = take_job(next_job); job < jobs; job = take_job(next_job)) {
        const int row = job % row_tiles * Scores::kRows, tile = job / row_tiles;
        const bool gate = tile < gate_tiles;  // the deeper ones first
        const int column = (gate ? tile : tile - gate_tiles) * Scores::kColumns;
        const int width = gate ? N : W, stride = gate ? plan.gates_row : plan.words_row;
        float* to = gate ? gates : words;
        Scores sums;
        if (gate) sums.multiply(gate_query + row * plan.gate_query_row, plan.gate_query_row, gate_keys, column);
        else sums.multiply(query + row * plan.query_row, plan.query_row, keys, column);
        sums.each([&](int r, int c, float sum) {
          if (column + c < width) to[(row + r) * stride + column + c] = sum;
        });
      }
      __syncthreads();
      const float scale = 1.0f / sqrtf(static_cast<float>(head));
      const int word_rows = with_words ? count : 0, gate_rows = with_gates ? count : 0;
      for (int row = warp; row < word_rows + gate_rows; row += kWarps) {
        const bool gate = row >= word_rows;
        const int at = gate ? row - word_rows : row;
        const float inverse = gate ? softmax_numerators<S>(gates + at * plan.gates_row, N, 1.0f)  // (20)
                                   : softmax_numerators<S>(words + at * plan.words_row, W, scale);
        if (lane == 0) (gate ? gate_scale : word_scale)[at] = inverse;
      }
      __syncthreads();
      return count;
    };

    for (int first = 0; first < rows; first += kGroup) {
      const int count = scores(first, true, whole);
      const int row_tiles = tiles(count, Scores::kRows);
      for (int job = warp; job < row_tiles * tiles(head, Scores::kColumns); job += kWarps) {  // (19)
        const int row = job % row_tiles * Scores::kRows, column = job / row_tiles * Scores::kColumns;
        Scores sums;
        sums.multiply(reinterpret_cast<const S*>(words) + row * words_row, words_row, values, column);
        sums.each([&](int r, int c, float sum) {
          if (row + r < count && column + c < head)
            candidates[int64_t(first + row + r) * plan.candidates_row + column + c] = narrow<S>(sum * word_scale[row + r]);
        });
      }
      __syncthreads();
    }
    for (int first = 0; first < rows; first += kGroup) {
      const int count = whole ? rows : scores(first, false, true);
      const int segments = whole ? triplets : 1, length = count / segments;  // rows of one triplet
      const int row_tiles = tiles(length, Context::kRows), column_tiles = tiles(head, Context::kColumns);
      for (int job = warp; job < segments * row_tiles * column_tiles; job += kWarps) {  // (21)
        const int segment = job / column_tiles / row_tiles, column = job % column_tiles * Context::kColumns;
        const int inside = job / column_tiles % row_tiles * Context::kRows, row = segment * length + inside;
        const Operand<S, true> x{candidates + int64_t(segment) * N * plan.candidates_row, plan.candidates_row, head, N};
        Context sums;
        sums.multiply(reinterpret_cast<const S*>(gates) + row * gates_row, gates_row, x, column);
        sums.each([&](int r, int c, float sum) {
          if (inside + r < length && column + c < head)
            context[int64_t(first + row + r) * d + column + c] = narrow<S>(sum * gate_scale[row + r]);
        });
      }
      __syncthreads();  // the next group, or task, writes what this one read
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
    auto* workspace = static_cast<unsigned char*>(how.workspace);
    constexpr int kTall = kMostRows / 16;
    if (!fits) {
      const auto kernel = plan.tall == 1 ? attend<S, 1, false> : attend<S, kTall, false>;
      return launch(grid, how.stream, kernel, args, plan, workspace);
    }
    return launch(grid, how.stream, plan.tall == 1 ? attend<S, 1, true> : attend<S, kTall, true>, args, plan, workspace);
  });
}

}  // namespace evc
