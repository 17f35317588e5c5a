// Thread blocks on the CPU: their threads are fibers, taken in an order drawn from a seed; copies
// and matrix products that the hardware does asynchronously are done as late as what waits for them
// allows, or at a drawn moment before. Shared memory begins as NaN, is NaN again while a copy into
// it is under way, and has guard pages around it. What the hardware would leave undefined shows as
// a NaN, as a stale value, as a deadlock or as an Error.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastattn::cuda::emulator {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr int kWarp = 32, kWarpgroup = 128;
constexpr int64_t kMostSharedBytes = 227 * 1024;
constexpr int kNamedBarriers = 16, kRegisters = 64 << 10;

// When things happen; the seed draws the rest.
struct Timing {
  uint64_t seed = 0;
  // Asynchronous copies end only when every thread is blocked, otherwise at drawn moments too.
  bool latest = true;
  // Products and stores read shared memory as soon as they are asked for. Else products do at their
  // wait, and stores do if copies end late, or at a drawn moment before.
  bool eager = false;
  // uneven: one warp runs as far as it can before another is drawn. by_group: a warp of the same
  // warpgroup is drawn before others.
  bool uneven = false, by_group = false;
};

// Shared memory as the threads see it, and as the asynchronous units do: what a thread stores
// reaches those only by its proxy fence.
class SharedMemory {
 public:
  explicit SharedMemory(int64_t bytes) : bytes_(bytes) {
    if (bytes > kMostSharedBytes) throw Error("shared memory: more than a block can have");
    const int64_t page = 4096, body = (bytes + page - 1) / page * page;
    mapped_ = body + 2 * page;
    base_ = static_cast<char*>(
        mmap(nullptr, static_cast<size_t>(mapped_), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    // The last byte ends at a guard page; addresses are then aligned as the size is.
    mprotect(base_ + page, static_cast<size_t>(body), PROT_READ | PROT_WRITE);
    data_ = base_ + page + (body - bytes) / 1024 * 1024;
    async_.assign(static_cast<size_t>(bytes), '\xff');
    std::memset(data_, 0xff, static_cast<size_t>(bytes));
  }
  ~SharedMemory() { munmap(base_, static_cast<size_t>(mapped_)); }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  int64_t offset(const void* p, int64_t size) const {
    const int64_t at = static_cast<const char*>(p) - data_;
    check(at, size);
    return at;
  }
  void check(int64_t at, int64_t size) const {
    if (at < 0 || size < 0 || at + size > bytes_)
      throw Error("shared memory: [" + std::to_string(at) + ", " + std::to_string(at + size) +
                  ") of " + std::to_string(bytes_) + " bytes");
  }
  // The asynchronous units' view.
  const char* read(int64_t at, int64_t size) const {
    check(at, size);
    return async_.data() + at;
  }
  void write(int64_t at, const void* from, int64_t size) {
    check(at, size);
    std::memcpy(async_.data() + at, from, static_cast<size_t>(size));
    std::memcpy(data_ + at, from, static_cast<size_t>(size));
  }
  void poison(int64_t at, int64_t size) {
    check(at, size);
    std::memset(async_.data() + at, 0xff, static_cast<size_t>(size));
    std::memset(data_ + at, 0xff, static_cast<size_t>(size));
  }
  // A thread's store is seen by the asynchronous units from here on.
  void publish(int64_t at, int64_t size) {
    std::memcpy(async_.data() + at, data_ + at, static_cast<size_t>(size));
  }

 private:
  int64_t bytes_, mapped_;
  char *base_, *data_;
  std::vector<char> async_;
};

// One thread block of a grid.
class Block {
 public:
  // A bulk store of a thread: it reads shared memory, later it writes.
  struct BulkStore {
    std::function<void()> read, write;
    bool committed = false, has_read = false;
  };
  struct Thread {
    ucontext_t context;  // where it begins
    jmp_buf place;       // where it waits
    char* stack = nullptr;
    bool begun = false;
    std::function<bool()> ready;  // of a waiting thread: may it go on?
    std::string waits_for;
    bool done = false;
    std::vector<std::pair<int64_t, int64_t>> unfenced;  // stores that its proxy fence publishes
    std::vector<BulkStore> bulk_stores;
    int registers = 0;
  };
  enum class Step { kDone, kRan, kStuck };

  const int index, grid;  // the block's number, and of how many

  // Runs `body` on every thread.
  Block(int block, int blocks, int threads, int64_t shared_bytes, Timing timing,
        std::function<void()> body)
      : index(block),
        grid(blocks),
        shared(shared_bytes),
        groups(static_cast<size_t>((threads + kWarpgroup - 1) / kWarpgroup)),
        warps(static_cast<size_t>((threads + kWarp - 1) / kWarp)),
        threads_(static_cast<size_t>(threads)),
        timing_(timing),
        random_(timing.seed + static_cast<uint64_t>(block)),
        body_(std::move(body)),
        favoured_(warps.size() - 1) {  // thread 0 makes the barriers: others go first
    // As many as a multiprocessor has for the block, in eights.
    const int registers = std::min(255, kRegisters / threads / 8 * 8);
    for (Thread& t : threads_) {
      t.registers = registers;
      t.stack = take_stack();
      getcontext(&t.context);
      t.context.uc_stack.ss_sp = t.stack;
      t.context.uc_stack.ss_size = kStackBytes;
      makecontext(&t.context, &Block::enter, 0);
    }
  }

  ~Block() {
    for (const Thread& t : threads_) free_stacks().push_back(t.stack);
  }

  static Block*& current() {
    static thread_local Block* block = nullptr;
    return block;
  }

  // Lets every thread that can go on do so once, in a drawn order. At the block's end nothing may
  // be left half done.
  Step step() {
    current() = this;
    const Step result = advance_threads();
    if (result == Step::kDone) finish();
    current() = nullptr;
    return result;
  }

  int id() const { return static_cast<int>(id_); }
  Thread& self() { return threads_[id_]; }
  int threads() const { return static_cast<int>(threads_.size()); }
  const Timing& timing() const { return timing_; }
  size_t draw(size_t below) { return static_cast<size_t>(random_() % below); }

  // The running thread goes on when `ready` says so; others run meanwhile.
  void wait(std::string what, std::function<bool()> ready) {
    Thread& t = self();
    t.waits_for = std::move(what);
    t.ready = std::move(ready);
    if (_setjmp(t.place) == 0) _longjmp(scheduler_, 1);
  }
  void start_copy(std::function<void()> finish) { copies_.push_back(std::move(finish)); }

  // --- mbarriers
  struct Barrier {
    int64_t expected = 0, arrivals = 0, bytes = 0, phase = 0;
  };
  std::map<int64_t, Barrier> barriers;  // by their place in shared memory
  Barrier& barrier(const void* p) {
    const auto found = barriers.find(shared.offset(p, 8));
    if (found == barriers.end()) throw Error("mbarrier: used before its init");
    return found->second;
  }
  // A phase ends when all have arrived and all bytes are there.
  void advance(Barrier& b) {
    if (b.arrivals < 0) throw Error("mbarrier: more arrivals than it was made for");
    if (b.arrivals > 0 || b.bytes != 0) return;
    b.arrivals = b.expected;
    ++b.phase;
  }

  // --- named barriers
  struct Named {
    int64_t arrived = 0, phase = 0, threads = 0;
  };
  Named named[kNamedBarriers];
  // Returns the phase that the arrival belongs to.
  int64_t arrive(int barrier, int64_t threads) {
    if (barrier < 0 || barrier >= kNamedBarriers) throw Error("named barrier: 0 to 15");
    if (threads % kWarp != 0 || threads <= 0) throw Error("named barrier: whole warps");
    Named& n = named[barrier];
    if (n.arrived > 0 && n.threads != threads)
      throw Error("named barrier: two counts of threads in one phase");
    n.threads = threads;
    const int64_t phase = n.phase;
    if (++n.arrived == threads) {
      n.arrived = 0;
      ++n.phase;
    }
    return phase;
  }

  // --- matrix products of a warpgroup: what its 128 threads ask for, one by one, in order
  struct Product {
    int asked = 0;  // threads so far
    int64_t group = 0;
    std::shared_ptr<void> state;
    std::function<void()> multiply;
  };
  struct Warpgroup {
    std::vector<Product> products;
    size_t done = 0;                                                       // of them, in order
    std::vector<size_t> asked = std::vector<size_t>(kWarpgroup, 0);        // by each thread
    std::vector<int64_t> committed = std::vector<int64_t>(kWarpgroup, 0);  // groups, likewise
    std::vector<char> fenced = std::vector<char>(kWarpgroup, 0);
    bool pending() const { return done < products.size(); }
  };

  // --- values that the lanes of a warp exchange; a lane can be one exchange ahead of another
  struct Exchange {
    uint32_t values[kWarp] = {};
    int written = 0, read = 0;
  };
  struct Warp {
    size_t turn[kWarp] = {};
    Exchange exchanges[2];
  };

  std::string waiting() const {
    std::map<std::string, int> count;
    for (const Thread& t : threads_) {
      if (!t.done) ++count[t.waits_for];
    }
    std::string text;
    for (const auto& [what, threads] : count)
      text += (text.empty() ? "" : ", ") + std::to_string(threads) + " threads wait for " + what;
    return text;
  }

  SharedMemory shared;
  std::vector<Warpgroup> groups;
  std::vector<Warp> warps;
  int free_registers = 0;  // that threads of the block gave up

 private:
  Step advance_threads() {
    std::vector<size_t> order;
    bool all_done = true;
    for (size_t i = 0; i < threads_.size(); ++i) {
      Thread& t = threads_[i];
      all_done = all_done && t.done;
      if (!t.done && (!t.ready || t.ready())) order.push_back(i);
    }
    if (all_done) return Step::kDone;
    const bool early = !timing_.latest && !copies_.empty() && draw(4) == 0;
    if (order.empty() || early) {
      if (copies_.empty()) return Step::kStuck;
      finish_copy(draw(copies_.size()));
      return Step::kRan;
    }
    std::shuffle(order.begin(), order.end(), random_);
    if (timing_.uneven) {
      const auto other = [&](size_t i) { return i / kWarp != favoured_; };
      const auto of_group = [&](size_t i) {
        return i / kWarpgroup == favoured_ * kWarp / kWarpgroup;
      };
      if (std::all_of(order.begin(), order.end(), other)) {
        const auto next = std::find_if(order.begin(), order.end(), of_group);
        const bool stays = timing_.by_group && next != order.end();
        favoured_ = (stays ? *next : order.front()) / kWarp;
      }
      std::erase_if(order, other);
    }
    for (const size_t i : order) {
      Thread& t = threads_[i];
      if (t.ready && !t.ready()) continue;
      t.ready = nullptr;
      id_ = i;
      resume(t);
      if (failure_) std::rethrow_exception(failure_);
    }
    return Step::kRan;
  }

  void finish() {
    while (!copies_.empty()) finish_copy(draw(copies_.size()));
    for (Thread& t : threads_) {
      for (BulkStore& store : t.bulk_stores) {
        if (!store.has_read) throw Error("a thread ended before its bulk store had read");
        store.write();
      }
    }
    for (const Warpgroup& group : groups) {
      if (group.pending()) throw Error("a thread block ended with matrix products under way");
    }
  }

  void finish_copy(size_t i) {
    const std::function<void()> finish = std::move(copies_[i]);
    copies_.erase(copies_.begin() + static_cast<int64_t>(i));
    finish();
  }

  static constexpr size_t kStackBytes = 64 << 10;
  static std::vector<char*>& free_stacks() {  // of earlier blocks; kept to the program's end
    static std::vector<char*> stacks;
    return stacks;
  }
  static char* take_stack() {
    if (free_stacks().empty()) return static_cast<char*>(std::malloc(kStackBytes));
    char* stack = free_stacks().back();
    free_stacks().pop_back();
    return stack;
  }

  static void enter() {
    Block& block = *current();
    try {
      block.body_();
    } catch (...) {
      block.failure_ = std::current_exception();
    }
    block.self().done = true;
    _longjmp(block.scheduler_, 1);
  }
  // To the thread and back, without the system calls of swapcontext.
  __attribute__((noinline)) void resume(Thread& t) {
    if (_setjmp(scheduler_) != 0) return;
    if (t.begun) _longjmp(t.place, 1);
    t.begun = true;
    setcontext(&t.context);
  }

  std::vector<Thread> threads_;
  std::vector<std::function<void()>> copies_;

  Timing timing_;
  std::mt19937_64 random_;
  std::function<void()> body_;
  jmp_buf scheduler_;
  size_t id_ = 0, favoured_;
  std::exception_ptr failure_;
};

// Runs `body` on every thread of every block to the end, kResident blocks at a time.
constexpr size_t kResident = 4;
inline void run_grid(int blocks, int threads, int64_t shared_bytes, Timing timing,
                     const std::function<void()>& body) {
  std::vector<std::unique_ptr<Block>> running;
  std::mt19937_64 random(timing.seed);
  int next = 0;
  while (next < blocks || !running.empty()) {
    for (; next < blocks && running.size() < kResident; ++next)
      running.push_back(std::make_unique<Block>(next, blocks, threads, shared_bytes, timing, body));
    std::shuffle(running.begin(), running.end(), random);
    bool stuck = true;
    for (auto& block : running) {
      const Block::Step step = block->step();
      stuck = stuck && step == Block::Step::kStuck;
      if (step == Block::Step::kDone) block.reset();
    }
    if (stuck) throw Error("deadlock: " + running.front()->waiting());
    std::erase(running, nullptr);
  }
}

}  // namespace fastattn::cuda::emulator
