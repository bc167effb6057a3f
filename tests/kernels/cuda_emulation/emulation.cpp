#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace monet::cuda {
constexpr size_t kSharedBytes = 227 << 10;  // the most that a block can have on sm_90
alignas(16) unsigned char dynamic_shared[kSharedBytes];
}  // namespace monet::cuda

namespace emulation {
namespace {

using monet::cuda::dynamic_shared;
using monet::cuda::kSharedBytes;

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 64 << 10;

// One thread of a block. Contexts start it; jumps, which ask nothing of the kernel, go back and forth.
struct Fiber {
  ucontext_t start;
  jmp_buf here;
  std::unique_ptr<char[]> stack;
  bool started = false, done = true;
  Barrier waits_at = Barrier::none;
  unsigned exchanges = 0;  // of its warp so far
  uint64_t shown[2];       // what it showed in the last two
};

std::vector<Fiber> fibers;
unsigned current;
jmp_buf scheduler;
const std::function<void()>* kernel;
bool backwards = false;

[[noreturn]] void work_for_ever() {
  for (;;) {
    (*kernel)();
    fibers[current].done = true;
    if (!_setjmp(fibers[current].here)) _longjmp(scheduler, 1);
  }
}

void resume(unsigned index) {
  Fiber& fiber = fibers[index];
  current = index;
  threadIdx = dim3(index);
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.start, work_for_ever, 0);
  setcontext(&fiber.start);
}

// Lets go these threads if all of them have come to a barrier.
bool release(unsigned begin, unsigned end, Barrier barrier) {
  for (unsigned i = begin; i < end; ++i)
    if (fibers[i].done || fibers[i].waits_at != barrier) return false;
  for (unsigned i = begin; i < end; ++i) fibers[i].waits_at = Barrier::none;
  return true;
}

void run_block(unsigned count) {
  for (unsigned i = 0; i < count; ++i) {
    fibers[i].done = false;
    fibers[i].waits_at = Barrier::none;
    fibers[i].exchanges = 0;
  }
  const auto in_order = [](unsigned index, unsigned of) { return backwards ? of - 1 - index : index; };
  // Each warp goes as far as it can before the next one does anything: the farther apart they are, the worse for sources
  // that lack a barrier.
  do {
    for (unsigned i = 0; i < count / kWarp; ++i) {
      const unsigned first = in_order(i, count / kWarp) * kWarp;
      do {
        for (unsigned j = 0; j < kWarp; ++j) {
          const unsigned index = first + in_order(j, kWarp);
          if (!fibers[index].done && fibers[index].waits_at == Barrier::none) resume(index);
        }
      } while (release(first, first + kWarp, Barrier::warp));
    }
  } while (release(0, count, Barrier::block));
  if (std::all_of(&fibers[0], &fibers[0] + count, [](const Fiber& fiber) { return fiber.done; })) return;
  for (Fiber& fiber : fibers) fiber.started = false;
  throw std::runtime_error("emulation: threads of a block wait at different barriers, or for some that have returned");
}

}  // namespace

void wait(Barrier barrier) {
  fibers[current].waits_at = barrier;
  if (!_setjmp(fibers[current].here)) _longjmp(scheduler, 1);
}

uint64_t exchange(uint64_t value, unsigned lane) {
  Fiber* warp = &fibers[current / kWarp * kWarp];
  const unsigned turn = fibers[current].exchanges++ % 2;  // who is late may still read the last one
  fibers[current].shown[turn] = value;
  wait(Barrier::warp);
  return warp[lane].shown[turn];
}

unsigned vote(bool predicate) {
  Fiber* warp = &fibers[current / kWarp * kWarp];
  const unsigned turn = fibers[current].exchanges++ % 2;
  fibers[current].shown[turn] = predicate;
  wait(Barrier::warp);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) bits |= static_cast<unsigned>(warp[lane].shown[turn]) << lane;
  return bits;
}

void run(const cudaLaunchConfig_t& config, const std::function<void()>& body) {
  const unsigned count = config.blockDim.x, blocks = config.gridDim.x * config.gridDim.y;
  if (count == 0 || count > 1024 || count % kWarp != 0) throw std::runtime_error("emulation: not a size of blocks");
  if (config.dynamicSmemBytes > kSharedBytes) throw std::runtime_error("emulation: too much shared memory");
  while (fibers.size() < count) {
    fibers.emplace_back();
    fibers.back().stack = std::make_unique<char[]>(kStackBytes);
  }
  kernel = &body;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  for (unsigned i = 0; i < blocks; ++i) {
    const unsigned index = backwards ? blocks - 1 - i : i;
    blockIdx = dim3(index % gridDim.x, index / gridDim.x);
    const size_t filled = std::min(kSharedBytes, config.dynamicSmemBytes + 64);
    std::memset(dynamic_shared, 0xff, filled);  // NaN, or -1
    run_block(count);
    if (std::any_of(dynamic_shared + config.dynamicSmemBytes, dynamic_shared + filled, [](unsigned char byte) {
          return byte != 0xff;
        }))
      throw std::runtime_error("emulation: more shared memory written than asked for");
  }
}

}  // namespace emulation

// Warps, their threads, and blocks from the last to the first, or from the first to the last.
extern "C" __attribute__((visibility("default"))) void run_backwards(bool yes) { emulation::backwards = yes; }
