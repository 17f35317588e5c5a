// cuda/ptx/thread.h and barrier.h in plain C++, on the emulated blocks of machine.h.
#pragma once

#include <bit>
#include <cmath>

#include "cuda/emulator/machine.h"

namespace fastattn::cuda::ptx {

using emulator::Block;
using emulator::Error;
using emulator::kWarp;
using emulator::kWarpgroup;

inline int thread_id() { return Block::current()->id(); }
inline int block_id() { return Block::current()->index; }
inline int grid_blocks() { return Block::current()->grid; }
inline int fresh(int value) { return value; }
inline char* dynamic_shared_memory() { return Block::current()->shared.data(); }
inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(Block::current()->shared.offset(p, 0));
}
template <int kCount>
void registers_increase() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
  Block& b = *Block::current();
  const int more = kCount - b.self().registers;
  if (more < 0) throw Error("registers: an increase to less");
  b.wait("registers", [&b, more] { return b.free_registers >= more; });
  b.free_registers -= more;
  b.self().registers = kCount;
}
template <int kCount>
void registers_decrease() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
  Block& b = *Block::current();
  const int fewer = b.self().registers - kCount;
  if (fewer < 0) throw Error("registers: a decrease to more");
  b.free_registers += fewer;
  b.self().registers = kCount;
}

// --- barriers
inline void block_sync() {
  Block& b = *Block::current();
  const int64_t phase = b.arrive(0, b.threads());
  b.wait("the block's barrier", [&b, phase] { return b.named[0].phase != phase; });
}
inline void named_sync(int id, int threads) {
  Block& b = *Block::current();
  const int64_t phase = b.arrive(id, threads);
  b.wait("named barrier " + std::to_string(id),
         [&b, id, phase] { return b.named[id].phase != phase; });
}
inline void named_arrive(int id, int threads) { Block::current()->arrive(id, threads); }

struct alignas(8) Barrier {
  uint64_t state;
};
constexpr int64_t kMostOfBarrier = (1 << 20) - 1;  // arrivals, and bytes under way
inline void barrier_init(Barrier* p, int arrivals) {
  Block& b = *Block::current();
  const int64_t at = b.shared.offset(p, 8);
  if (at % 8 != 0) throw Error("mbarrier: not at a multiple of 8 bytes");
  if (arrivals < 1 || arrivals > kMostOfBarrier) throw Error("mbarrier: 1 to 2^20 - 1 arrivals");
  b.barriers[at] = {arrivals, arrivals, 0, 0};
}
inline void barrier_init_fence() {}
inline void barrier_arrive(Barrier* p) {
  Block& block = *Block::current();
  auto& b = block.barrier(p);
  --b.arrivals;
  block.advance(b);
}
inline void barrier_arrive_expect(Barrier* p, int bytes) {
  Block& block = *Block::current();
  auto& b = block.barrier(p);
  b.bytes += bytes;
  if (bytes < 0 || b.bytes > kMostOfBarrier) throw Error("mbarrier: expects 2^20 bytes or more");
  --b.arrivals;
  block.advance(b);
}
// Until the phase of this parity has ended. A deadlock names it in the words of the source.
inline void barrier_wait_at(const char* place, Barrier* p, int parity) {
  auto& b = Block::current()->barrier(p);
  Block::current()->wait(place, [&b, parity] { return (b.phase & 1) != parity; });
}
#define FASTATTN_TEXT(x) #x
#define FASTATTN_LINE(x) FASTATTN_TEXT(x)
#define barrier_wait(barrier, parity) \
  barrier_wait_at("mbarrier " #barrier " in line " FASTATTN_LINE(__LINE__), barrier, parity)

// --- between the lanes of a warp
inline uint32_t exchange(uint32_t value, int from) {
  Block& b = *Block::current();
  auto& warp = b.warps[static_cast<size_t>(b.id() / kWarp)];
  const auto lane = static_cast<size_t>(b.id() % kWarp);
  const size_t turn = warp.turn[lane]++;
  auto& slot = warp.exchanges[turn % 2];
  slot.values[lane] = value;
  ++slot.written;
  b.wait("a shuffle", [&slot] { return slot.written >= kWarp; });
  const uint32_t result = slot.values[static_cast<size_t>(from)];
  if (++slot.read == kWarp) slot = {};
  return result;
}
inline uint32_t shuffle_xor(uint32_t value, int mask) {
  return exchange(value, Block::current()->id() % kWarp ^ mask);
}
inline float shuffle_xor(float value, int mask) {
  return std::bit_cast<float>(shuffle_xor(std::bit_cast<uint32_t>(value), mask));
}
inline bool any(bool value) {
  for (int mask = 1; mask < kWarp; mask *= 2) {
    const bool other = shuffle_xor(uint32_t{value}, mask) != 0;
    value = value || other;
  }
  return value;
}

// --- arithmetic
inline float exp2(float x) { return std::exp2(x); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline float max_or_nan(float a, float b) { return std::isnan(a) || a > b ? a : b; }
inline uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
inline float of_bits(uint32_t x) { return std::bit_cast<float>(x); }
inline float log(float x) { return std::log(x); }
inline float absolute(float x) { return std::abs(x); }
inline float product(float a, float b) { return a * b; }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
template <class T>
uint32_t pack(float low, float high) {
  const T pair[2] = {T(low), T(high)};
  uint32_t word;
  std::memcpy(&word, pair, 4);
  return word;
}

template <class T>
float sum_of_pair(uint32_t word) {
  T pair[2];
  std::memcpy(pair, &word, 4);
  return static_cast<float>(pair[0]) + static_cast<float>(pair[1]);
}
template <class T>
float add_products_of_pairs(float sum, uint32_t a, uint32_t b) {
  T x[2], y[2];
  std::memcpy(x, &a, 4);
  std::memcpy(y, &b, 4);
  for (int i = 0; i < 2; ++i) sum += static_cast<float>(x[i]) * static_cast<float>(y[i]);
  return sum;
}
template <bool kTranspose>
void load_matrices(uint32_t* d, const void* row) {
  Block& b = *Block::current();
  const int64_t at = b.shared.offset(row, 16);
  if (at % 16 != 0) throw Error("ldmatrix: a row is not aligned");
  const int lane = b.id() % kWarp;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int line = kTranspose ? 2 * (lane % 4) + i : lane / 4;
      const int element = kTranspose ? lane / 4 : 2 * (lane % 4) + i;
      const uint32_t from = exchange(static_cast<uint32_t>(at), 8 * matrix + line);
      std::memcpy(pair + i, b.shared.data() + from + 2 * element, 2);
    }
    std::memcpy(d + matrix, pair, 4);
  }
}

// --- memory
struct alignas(16) Words4 {
  uint32_t word[4];
};
struct alignas(16) Floats4 {
  float x, y, z, w;
};
inline void check_aligned(const char* what, const void* p, uint64_t bytes) {
  const uint64_t beyond = reinterpret_cast<uintptr_t>(p) % bytes;
  if (beyond != 0)
    throw Error(std::string(what) + ": an address " + std::to_string(beyond) +
                " bytes beyond a multiple of " + std::to_string(bytes));
}
template <class V>
V load_global(const void* p) {
  check_aligned("a load", p, sizeof(V));
  V value;
  std::memcpy(&value, p, sizeof(V));
  return value;
}
template <class V>
void store_global(void* p, const V& value) {
  check_aligned("a store", p, sizeof(V));
  std::memcpy(p, &value, sizeof(V));
}
// Unseen by the asynchronous units before the thread's fence.
template <class V>
void store_shared(void* p, const V& value) {
  Block& b = *Block::current();
  const int64_t at = b.shared.offset(p, sizeof(V));
  if (at % sizeof(V) != 0) throw Error("a store to shared memory is not aligned");
  std::memcpy(p, &value, sizeof(V));
  b.self().unfenced.push_back({at, static_cast<int64_t>(sizeof(V))});
}
inline void fence_async_proxy() {
  Block& b = *Block::current();
  for (const auto& [at, size] : b.self().unfenced) b.shared.publish(at, size);
  b.self().unfenced.clear();
}

// --- counters of the grid
inline int fetch_increment(int* counter) { return (*counter)++; }
inline void counter_wait(const int* counter, int count) {
  Block::current()->wait("a counter of the grid", [counter, count] { return *counter == count; });
}
inline void counter_release(int* counter) { ++*counter; }
inline void fence_async_proxy_global() {}

// --- what tells the compiler something
inline int uniform(int value) { return value; }
inline void settle(uint32_t) {}

}  // namespace fastattn::cuda::ptx
