// The threads of a grid as fibers: see launch.cuh.
#include "launch.cuh"

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numbers>
#include <vector>

namespace cuda_on_host {
namespace {

constexpr int WARP = 32;
constexpr size_t STACK = 64 << 10;

enum class Waits { no, warp, block, grid, ended };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[STACK]};
  jmp_buf here;
  bool started = false;
  Waits waits = Waits::ended;
  int64_t exchanges = 0;
  std::array<char, 16> brought[2]; // in turns: a neighbour may be one exchange ahead
};

struct Block {
  dim3 index;
  std::vector<Fiber*> fibers;
};

std::vector<std::unique_ptr<Fiber>> pool;
jmp_buf scheduler;
ucontext_t scheduler_context, entry_context;
Fiber* running = nullptr;
Block* running_block = nullptr;
int running_thread = 0;
Body body;
const void* context;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_host: %s\n", what);
  std::abort();
}

bool reversed() {
  const char* order = std::getenv("CUDA_ON_HOST_ORDER");
  return order && std::strcmp(order, "reverse") == 0;
}

// Its stack is entered once by makecontext; after that, jumps change stacks without a call of the system. A fiber that
// has ended waits here for another thread to be.
void fiber_main() {
  for (;;) {
    body(context);
    running->waits = Waits::ended;
    if (_setjmp(running->here) == 0) {
      _longjmp(scheduler, 1);
    }
  }
}

void pause(Waits reason) {
  running->waits = reason;
  if (_setjmp(running->here) == 0) {
    _longjmp(scheduler, 1);
  }
}

// Lets thread number i of the block run up to its next barrier.
void resume(Block& block, int i) {
  running_block = &block;
  running_thread = i;
  running = block.fibers[i];
  running->waits = Waits::no;
  threadIdx = dim3(i, 0, 0);
  blockIdx = block.index;
  if (_setjmp(scheduler) == 0) {
    if (running->started) {
      _longjmp(running->here, 1);
    }
    running->started = true;
    getcontext(&entry_context);
    entry_context.uc_stack.ss_sp = running->stack.get();
    entry_context.uc_stack.ss_size = STACK;
    entry_context.uc_link = &scheduler_context;
    makecontext(&entry_context, fiber_main, 0);
    setcontext(&entry_context);
  }
}

// All threads of [first, last) wait for the same, or have ended.
bool together(const Block& block, int first, int last, Waits reason) {
  bool any = false;
  for (int i = first; i < last; ++i) {
    const Waits waits = block.fibers[i]->waits;
    any |= waits == reason;
    if (waits != reason && waits != Waits::ended) {
      return false;
    }
  }
  return any;
}

void pass(Block& block, int first, int last, bool backwards) {
  for (int i = first; i < last; ++i) {
    const int thread = backwards ? last - 1 - (i - first) : i;
    if (block.fibers[thread]->waits != Waits::ended) {
      resume(block, thread);
    }
  }
}

// Until every thread has ended or waits for the grid.
void advance(Block& block, bool backwards) {
  const int size = int(block.fibers.size());
  pass(block, 0, size, backwards);
  for (;;) {
    bool moved = false;
    for (int first = 0; first < size; first += WARP) {
      const int last = std::min(size, first + WARP);
      while (together(block, first, last, Waits::warp)) {
        pass(block, first, last, backwards);
        moved = true;
      }
    }
    if (together(block, 0, size, Waits::block)) {
      pass(block, 0, size, backwards);
      moved = true;
    }
    if (!moved) {
      break;
    }
  }
  const bool waits_for_grid = together(block, 0, size, Waits::grid);
  for (const Fiber* fiber : block.fibers) {
    if (fiber->waits != (waits_for_grid ? Waits::grid : Waits::ended)) {
      fail("threads wait at different barriers");
    }
  }
}

} // namespace

void run(dim3 blocks, int threads, bool together, Body the_body, const void* the_context) {
  const bool backwards = reversed();
  body = the_body;
  context = the_context;
  blockDim = dim3(threads);
  gridDim = blocks;
  const int64_t count = blocks.x * blocks.y * blocks.z, at_once = together ? count : 1;
  while (int64_t(pool.size()) < at_once * threads) {
    pool.push_back(std::make_unique<Fiber>());
  }
  for (int64_t done = 0; done < count; done += at_once) {
    std::vector<Block> group(at_once);
    for (int64_t i = 0; i < at_once; ++i) {
      const int64_t number = backwards ? count - 1 - (done + i) : done + i;
      group[i].index = dim3(number % blocks.x, number / blocks.x % blocks.y, number / blocks.x / blocks.y);
      for (int thread = 0; thread < threads; ++thread) {
        Fiber* const fiber = pool[i * threads + thread].get();
        fiber->waits = Waits::no;
        fiber->exchanges = 0;
        group[i].fibers.push_back(fiber);
      }
    }
    for (bool more = true; more;) {
      more = false;
      for (Block& block : group) {
        advance(block, backwards);
        more |= block.fibers[0]->waits == Waits::grid;
      }
      for (Block& block : group) {
        if ((block.fibers[0]->waits == Waits::grid) != more || (more && !together)) {
          fail("not every block waits at the grid's barrier");
        }
      }
    }
  }
}

void block_barrier() {
  pause(Waits::block);
}

void grid_barrier() {
  pause(Waits::grid);
}

void shuffle_xor(void* value, size_t size, int lanes) {
  const int64_t turn = running->exchanges++ % 2, made = running->exchanges;
  if (size > running->brought[turn].size()) {
    fail("too large a value for a shuffle");
  }
  std::memcpy(running->brought[turn].data(), value, size);
  pause(Waits::warp);
  const Fiber* const other = running_block->fibers[running_thread ^ lanes];
  if (other->exchanges < made) {
    fail("a shuffle with a thread that takes no part in it");
  }
  std::memcpy(value, other->brought[turn].data(), size);
}

} // namespace cuda_on_host

// x is within a turn, where a multiple of a half gives its exact value.
double sinpi(double x) {
  return x == std::rint(x) ? 0.0 * x : std::sin(std::numbers::pi * x);
}

double cospi(double x) {
  return std::fabs(x) == 0.5 ? 0.0 : std::cos(std::numbers::pi * x);
}

float sinpif(float x) {
  return float(sinpi(x));
}

float cospif(float x) {
  return float(cospi(x));
}
