// CUDA on a CPU, for tests: it stands in the place of CUDA's own <cuda_runtime.h>, and a C++ compiler then builds the
// shipped csrc/cuda/*.cu, unchanged, into a library with the same entry point.
//
// A CUDA thread is a fiber, which runs until it has to wait. Blocks run one after the other, those of a cooperative launch
// by turns. Shared memory is a block's own and starts as NaN. What would hang or corrupt a GPU is an error with a
// message: a barrier that some threads never reach, a wait for what nobody writes, lanes of a warp that do different
// things, writes past the end of shared memory. Within a warp, too, threads run one by one: code that relies on lanes in
// step gives other results in ascending than in descending order of threads, as does a missing barrier.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#define EVC_EMULATION 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define EVC_SHARED(type, name, count)   \
  alignas(16) static char name##_place; \
  type* const name = static_cast<type*>(evc_emulation::static_shared(&name##_place, sizeof(type) * (count)))
#define EVC_DYNAMIC_SHARED(name) unsigned char* const name = evc_emulation::dynamic_shared()

// ---- types ----

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

typedef struct CUstream_st* cudaStream_t;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union { int cooperative; } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct cudaFuncAttributes { int numRegs; };

inline uint3 threadIdx, blockIdx;  // of the thread that runs
inline dim3 blockDim, gridDim;     // of the launch that runs

// ---- threads ----

namespace evc_emulation {

constexpr int kLanes = 32, kSlotBytes = 32, kMaxThreads = 1024;
constexpr size_t kStackBytes = 256 << 10, kSharedBytes = 227 << 10, kGuardBytes = 64, kGrain = 128;
constexpr unsigned char kPoison = 0xff, kGuard = 0xa5;  // bytes of ff are NaN in every floating type
constexpr int kIdleRounds = 1000;

struct Block;

struct Warp {
  alignas(16) unsigned char slots[2][kLanes * kSlotBytes];
  const char* what = nullptr;  // the operation that its lanes meet in
  int arrived = 0;
  unsigned meetings = 0;
};

struct Fiber {
  jmp_buf here;
  ucontext_t start;
  unsigned char* stack = nullptr;
  bool entered = false;
  Block* block = nullptr;
  uint3 thread{};
  Warp* warp = nullptr;
  int lane = 0;
  const char* waits_at = nullptr;  // null: it can run

  Fiber() {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, 4096, PROT_NONE);  // a stack that overflows stops the process there
    stack = static_cast<unsigned char*>(memory);
  }
  ~Fiber() { munmap(stack, kStackBytes); }
  Fiber(const Fiber&) = delete;
};

struct Shared {
  std::vector<unsigned char> memory;
  size_t bytes = 0;
  explicit Shared(size_t bytes_) : memory(bytes_ + kGuardBytes + kGrain), bytes(bytes_) {
    memset(memory.data(), kPoison, memory.size());
    memset(data() + bytes, kGuard, kGuardBytes);
  }
  unsigned char* data() { return memory.data() + (kGrain - reinterpret_cast<uintptr_t>(memory.data()) % kGrain) % kGrain; }
  bool intact() {
    return std::all_of(data() + bytes, data() + bytes + kGuardBytes, [](unsigned char c) { return c == kGuard; });
  }
};

struct Block {
  uint3 index{};
  int threads = 0, arrived = 0, running = 0;
  std::vector<Fiber*> fibers;
  std::vector<Warp> warps;
  std::unique_ptr<Shared> dynamic;
  std::map<const void*, std::unique_ptr<Shared>> statics;  // by their place in the program
};

struct Machine {
  std::mutex one_launch;
  int multiprocessors = 2, order = 0;  // order: of threads and blocks, 0 ascending, 1 descending
  unsigned blocks_arrived = 0;         // at the grid's barriers, of all so far
  int64_t launches = 0;
  std::map<const void*, size_t> allowed_shared;  // by kernel
  std::function<void()> body;
  std::vector<std::unique_ptr<Fiber>> pool;
  std::vector<Fiber*> ready;
  jmp_buf scheduler;
  Fiber* current = nullptr;
  bool progress = false;
  std::string failure;       // of the launch that runs
  std::string last_failure;  // what cudaGetErrorString tells
};
inline Machine machine;

inline void give_up_control() {
  if (_setjmp(machine.current->here) == 0) _longjmp(machine.scheduler, 1);
}
inline std::string name(const Block& block) {
  return "block (" + std::to_string(block.index.x) + ", " + std::to_string(block.index.y) + ", " + std::to_string(block.index.z) + ")";
}
[[noreturn]] inline void fail(const std::string& message) {
  if (machine.failure.empty()) machine.failure = name(*machine.current->block) + ": " + message;
  _longjmp(machine.scheduler, 1);
}

// In a loop that waits for another thread's write.
inline void spin() {
  machine.ready.push_back(machine.current);
  give_up_control();
}

inline void wait_at(const char* what) {
  machine.current->waits_at = what;
  give_up_control();
}
inline void wake(Fiber* fiber) {
  fiber->waits_at = nullptr;
  machine.progress = true;
  machine.ready.push_back(fiber);
}

inline void sync_block() {
  Block& block = *machine.current->block;
  if (++block.arrived < block.threads) return wait_at("__syncthreads");
  block.arrived = 0;
  for (Fiber* fiber : block.fibers)
    if (fiber->waits_at) wake(fiber);
  spin();  // in turn with the others, lest the last thread to arrive always be the first to go on
}

// The grid's barrier, kept by each block's first thread; its token: how many arrivals of blocks there must have been.
inline unsigned grid_arrive() {
  sync_block();
  if (threadIdx.x != 0) return 0;
  machine.progress = true;
  return (machine.blocks_arrived++ / gridDim.x + 1) * gridDim.x;
}
inline void grid_wait(unsigned token) {
  while (machine.blocks_arrived < token) spin();
  sync_block();
}

// All lanes of a warp meet, each with a value: what they brought, by lane, until the warp meets again.
template <class T>
const T* exchange(const char* what, const T& mine) {
  static_assert(sizeof(T) <= kSlotBytes && std::is_trivially_copyable_v<T>);
  Fiber& self = *machine.current;
  Warp& warp = *self.warp;
  // Lanes may still read what they met for last, and none can be two meetings ahead of another: two buffers.
  T* slots = reinterpret_cast<T*>(warp.slots[warp.meetings % 2]);
  memcpy(static_cast<void*>(slots + self.lane), &mine, sizeof(T));
  if (warp.arrived > 0 && strcmp(warp.what, what) != 0)
    fail(std::string("lanes of one warp wait at ") + warp.what + " and at " + what);
  warp.what = what;
  if (++warp.arrived < kLanes) {
    wait_at(what);
  } else {
    warp.arrived = 0;
    ++warp.meetings;
    const int first = static_cast<int>(&warp - self.block->warps.data()) * kLanes;
    for (int lane = 0; lane < kLanes; ++lane)
      if (lane != self.lane) wake(self.block->fibers[first + lane]);
    spin();
  }
  return slots;
}
inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) fail("the emulation takes operations of whole warps only");
}

inline unsigned char* dynamic_shared() { return machine.current->block->dynamic->data(); }
inline void* static_shared(const void* place, size_t bytes) {
  auto& shared = machine.current->block->statics[place];
  if (!shared) shared = std::make_unique<Shared>(bytes);
  return shared->data();
}

// A fiber's first function: it serves one thread after the other, and never returns.
inline void serve() {
  while (true) {
    machine.body();
    machine.current->block->running--;
    machine.progress = true;
    machine.current->block = nullptr;
    give_up_control();
  }
}

inline void resume(Fiber* fiber) {
  machine.current = fiber;
  threadIdx = fiber->thread;
  blockIdx = fiber->block->index;
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber->entered) _longjmp(fiber->here, 1);
  fiber->entered = true;
  getcontext(&fiber->start);
  fiber->start.uc_stack.ss_sp = fiber->stack;
  fiber->start.uc_stack.ss_size = kStackBytes;
  fiber->start.uc_link = nullptr;
  makecontext(&fiber->start, serve, 0);
  setcontext(&fiber->start);
}

inline std::string where_threads_stand(const std::vector<std::unique_ptr<Block>>& blocks) {
  for (const auto& block : blocks) {
    std::map<std::string, int> places;
    for (Fiber* fiber : block->fibers)
      if (fiber->block != block.get()) ++places["returned"];
      else ++places[fiber->waits_at ? std::string("waiting at ") + fiber->waits_at : "waiting for another thread's write"];
    if (places.size() == 1 && places.count("returned")) continue;
    std::string text;
    for (const auto& [place, count] : places) text += (text.empty() ? "" : ", ") + std::to_string(count) + " " + place;
    return name(*block) + ": deadlock, of " + std::to_string(block->threads) + " threads " + text;
  }
  return "deadlock";
}

// Runs blocks that are resident together to their end.
inline void run_blocks(const std::vector<uint3>& indices, size_t shared_bytes) {
  Machine& m = machine;
  std::vector<std::unique_ptr<Block>> blocks;
  const int threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  while (m.pool.size() < indices.size() * threads) m.pool.push_back(std::make_unique<Fiber>());
  auto fiber = m.pool.begin();
  m.ready.clear();
  for (const uint3& index : indices) {
    auto block = std::make_unique<Block>();
    block->index = index;
    block->threads = block->running = threads;
    block->warps.resize(threads / kLanes);
    block->dynamic = std::make_unique<Shared>(shared_bytes);
    for (int t = 0; t < threads; ++t, ++fiber) {
      Fiber& f = **fiber;
      const unsigned u = static_cast<unsigned>(t);
      f.block = block.get();
      f.thread = {u % blockDim.x, u / blockDim.x % blockDim.y, u / blockDim.x / blockDim.y};
      f.lane = t % kLanes;
      f.warp = &block->warps[t / kLanes];
      f.waits_at = nullptr;
      block->fibers.push_back(&f);
      m.ready.push_back(&f);
    }
    blocks.push_back(std::move(block));
  }
  int idle = 0;
  while (!m.ready.empty() && m.failure.empty() && idle < kIdleRounds) {
    std::vector<Fiber*> round;
    round.swap(m.ready);
    if (m.order == 1) std::reverse(round.begin(), round.end());
    m.progress = false;
    for (Fiber* f : round) {
      resume(f);
      if (!m.failure.empty()) break;
    }
    idle = m.progress ? 0 : idle + 1;
  }
  for (const auto& block : blocks) {
    if (m.failure.empty() && block->running > 0) m.failure = where_threads_stand(blocks);
    bool intact = block->dynamic->intact();
    for (const auto& [place, shared] : block->statics) intact = intact && shared->intact();
    if (m.failure.empty() && !intact) m.failure = name(*block) + ": wrote past the end of its shared memory";
  }
  if (!m.failure.empty()) m.pool.clear();  // fibers that stopped midway cannot be used again
}

inline cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> body) {
  Machine& m = machine;
  std::lock_guard<std::mutex> lock(m.one_launch);
  const uint64_t blocks = uint64_t(config.gridDim.x) * config.gridDim.y * config.gridDim.z;
  const uint64_t threads = uint64_t(config.blockDim.x) * config.blockDim.y * config.blockDim.z;
  const auto refuse = [&](cudaError_t error, const std::string& why) {
    m.last_failure = why;
    return error;
  };
  if (threads == 0 || threads > kMaxThreads || blocks == 0 || config.gridDim.x > 0x7fffffffu || config.gridDim.y > 65535 || config.gridDim.z > 65535)
    return refuse(cudaErrorInvalidConfiguration, "a grid of " + std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads");
  if (threads % kLanes) return refuse(cudaErrorInvalidConfiguration, "the emulation takes blocks of whole warps only");
  const auto allowed = m.allowed_shared.find(kernel);
  if (config.dynamicSmemBytes > (allowed == m.allowed_shared.end() ? size_t(48) << 10 : allowed->second))
    return refuse(cudaErrorInvalidValue, "more dynamic shared memory than the kernel was allowed");
  bool cooperative = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) cooperative |= config.attrs[i].id == cudaLaunchAttributeCooperative && config.attrs[i].val.cooperative;
  if (cooperative && blocks > static_cast<uint64_t>(m.multiprocessors))
    return refuse(cudaErrorCooperativeLaunchTooLarge, "too many blocks in a cooperative launch");

  m.failure.clear();
  m.blocks_arrived = 0;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  m.body = std::move(body);
  ++m.launches;
  std::vector<uint3> together;
  for (uint64_t turn = 0; turn < blocks && m.failure.empty(); ++turn) {
    const uint64_t i = m.order == 1 ? blocks - 1 - turn : turn;
    together.push_back({unsigned(i % gridDim.x), unsigned(i / gridDim.x % gridDim.y), unsigned(i / gridDim.x / gridDim.y)});
    if (cooperative && turn + 1 < blocks) continue;
    run_blocks(together, config.dynamicSmemBytes);
    together.clear();
  }
  m.body = nullptr;
  return m.failure.empty() ? cudaSuccess : refuse(cudaErrorLaunchFailure, m.failure);
}

}  // namespace evc_emulation

// ---- what kernels use ----

inline void __syncthreads() { evc_emulation::sync_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  evc_emulation::check_mask(mask);
  evc_emulation::exchange("__syncwarp", 0);
}
inline void __threadfence() {}
inline void __nanosleep(unsigned) { evc_emulation::spin(); }

namespace evc_emulation {
// What lane `from(lane)` of the group of `width` holds; the own value where that is outside the group.
template <class T, class From>
T shuffle(const char* what, unsigned mask, T value, int width, From from) {
  check_mask(mask);
  const T* lanes = exchange(what, value);
  const int lane = machine.current->lane, first = lane / width * width, source = from(lane - first);
  return source >= 0 && source < width ? lanes[first + source] : value;
}
}  // namespace evc_emulation
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return evc_emulation::shuffle("__shfl_sync", mask, value, width, [&](int) { return source & (width - 1); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return evc_emulation::shuffle("__shfl_xor_sync", mask, value, width, [&](int lane) { return lane ^ bits; });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  evc_emulation::check_mask(mask);
  const int* lanes = evc_emulation::exchange("__ballot_sync", int(predicate != 0));
  unsigned votes = 0;
  for (int lane = 0; lane < evc_emulation::kLanes; ++lane) votes |= unsigned(lanes[lane]) << lane;
  return votes;
}
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }

template <class T>
T atomicAdd(T* at, T value) {
  evc_emulation::machine.progress = true;
  const T before = *at;
  *at = before + value;
  return before;
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// ---- what launchers use ----

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || size_t(bytes) > evc_emulation::kSharedBytes) return cudaErrorInvalidValue;
  evc_emulation::machine.allowed_shared[reinterpret_cast<const void*>(kernel)] = size_t(bytes);
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  *attributes = {};
  return cudaSuccess;
}
template <class... Expected, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Given&&... given) {
  const std::tuple<Expected...> arguments(static_cast<Expected>(given)...);
  return evc_emulation::launch(*config, reinterpret_cast<const void*>(kernel), [=] { std::apply(kernel, arguments); });
}
// One block a multiprocessor, whatever it needs: grids stay small.
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int threads, size_t shared_bytes) {
  *blocks = threads <= evc_emulation::kMaxThreads && shared_bytes <= evc_emulation::kSharedBytes;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = evc_emulation::machine.multiprocessors; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(evc_emulation::kSharedBytes); return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return evc_emulation::machine.last_failure.c_str(); }

// ---- what tests use: the size of the emulated GPU, the order of its threads, and how many kernels it has run ----

#define EVC_EXPORT extern "C" __attribute__((visibility("default"), used)) inline
EVC_EXPORT void evc_fast_emulation(int multiprocessors, int order) {
  evc_emulation::machine.multiprocessors = multiprocessors;
  evc_emulation::machine.order = order;
}
EVC_EXPORT int64_t evc_fast_emulation_launches() { return evc_emulation::machine.launches; }
