// The instructions of cuda/ptx/ in plain C++, on the emulated block (machine.h). Semantics as in
// the PTX ISA: asynchronous copies and products take effect when they are waited for.
#pragma once

#include <cmath>

#include "cuda/emulator/machine.h"

namespace fastattn::cuda::ptx {

using emulator::Block;
using emulator::Error;
using emulator::kWarp;
using emulator::kWarpgroup;

struct Place {
  int block = 0, blocks = 1;
};
inline Place& place() {
  static thread_local Place p;
  return p;
}
inline int thread_id() { return Block::current()->id(); }
inline int block_id() { return place().block; }
inline int grid_blocks() { return place().blocks; }
inline char* dynamic_shared_memory() { return Block::current()->shared.data(); }
inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(Block::current()->shared.offset(p, 0));
}
template <int kCount>
void registers_increase() {}
template <int kCount>
void registers_decrease() {}

// --- barriers
inline void block_sync() {
  Block& b = *Block::current();
  const int64_t phase = b.arrive(0, b.threads());
  b.wait("the block's barrier", [&b, phase] { return b.named[0].phase != phase; });
}
struct alignas(8) Barrier {
  uint64_t state;
};
inline void barrier_init(Barrier* p, int arrivals) {
  Block& b = *Block::current();
  b.barriers[b.shared.offset(p, 8)] = {arrivals, arrivals, 0, 0};
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
  --b.arrivals;
  block.advance(b);
}
// Until the phase of this parity has ended.
inline void barrier_wait(Barrier* p, int parity) {
  auto& b = Block::current()->barrier(p);
  Block::current()->wait("mbarrier at " + std::to_string(shared_address(p)),
                         [&b, parity] { return (b.phase & 1) != parity; });
}

// --- between the lanes of a warp
inline uint32_t shuffle_xor(uint32_t value, int mask) {
  Block& b = *Block::current();
  auto& warp = b.warps[static_cast<size_t>(b.id() / kWarp)];
  const auto lane = static_cast<size_t>(b.id() % kWarp);
  const size_t turn = warp.turn[lane]++;
  auto& exchange = warp.exchanges[turn % 2];
  exchange.values[lane] = value;
  ++exchange.written;
  b.wait("a shuffle", [&exchange] { return exchange.written >= kWarp; });
  const uint32_t result = exchange.values[lane ^ static_cast<size_t>(mask)];
  if (++exchange.read == kWarp) exchange = {};
  return result;
}

// --- tensor copies
enum class Swizzle : int { kNone = 0, k128 = 1, k64 = 2, k32 = 3 };  // wgmma's descriptor code
inline int swizzle_bytes(Swizzle s) {
  return s == Swizzle::k128 ? 128 : s == Swizzle::k64 ? 64 : s == Swizzle::k32 ? 32 : 16;
}
inline int64_t swizzled(int64_t address, Swizzle s) {
  const int64_t mask = s == Swizzle::k128 ? 7 : s == Swizzle::k64 ? 3 : s == Swizzle::k32 ? 1 : 0;
  return address ^ ((address >> 7) & mask) << 4;
}

constexpr int kMostDims = 5;
struct TensorMap {
  char* base = nullptr;
  int rank = 0, element_bytes = 2;
  int64_t extents[kMostDims] = {}, stride_bytes[kMostDims] = {};  // innermost first
  int box[kMostDims] = {1, 1, 1, 1, 1};
  Swizzle swizzle = Swizzle::kNone;

  int64_t box_bytes() const {
    int64_t bytes = element_bytes;
    for (int d = 0; d < rank; ++d) bytes *= box[d];
    return bytes;
  }
  // f(place in the box, address or nullptr outside of the tensor) for every element.
  template <class F>
  void walk(const int (&at)[kMostDims], const F& f) const {
    int64_t elements = box_bytes() / element_bytes;
    for (int64_t e = 0; e < elements; ++e) {
      int64_t rest = e;
      char* p = base;
      bool inside = true;
      for (int d = 0; d < rank; ++d) {
        const int64_t i = at[d] + rest % box[d];
        rest /= box[d];
        inside = inside && i >= 0 && i < extents[d];
        p += i * (d == 0 ? element_bytes : stride_bytes[d]);
      }
      f(e * element_bytes, inside ? p : nullptr);
    }
  }
};

inline void check_box(const TensorMap& map, int64_t at) {
  if (at % (map.swizzle == Swizzle::kNone ? 128 : 8 * swizzle_bytes(map.swizzle)) != 0)
    throw Error("TMA: shared memory at " + std::to_string(at) + " is not aligned for its swizzle");
  if (map.swizzle != Swizzle::kNone && map.box[0] * map.element_bytes > swizzle_bytes(map.swizzle))
    throw Error("TMA: the box is wider than its swizzle");
}

inline void tma_load(void* to, const TensorMap* map, Barrier* barrier, int c0, int c1 = 0,
                     int c2 = 0, int c3 = 0, int c4 = 0) {
  Block& b = *Block::current();
  const int64_t at = b.shared.offset(to, map->box_bytes());
  check_box(*map, at);
  b.shared.poison(at, map->box_bytes());
  auto& done = b.barrier(barrier);
  b.start_copy([&b, &done, map, at, c0, c1, c2, c3, c4] {
    map->walk({c0, c1, c2, c3, c4}, [&](int64_t offset, const char* p) {
      const char zero[8] = {};
      b.shared.write(swizzled(at + offset, map->swizzle), p == nullptr ? zero : p,
                     map->element_bytes);
    });
    done.bytes -= map->box_bytes();
    b.advance(done);
  });
}

// --- warpgroup matrix products
struct Descriptor {
  uint64_t bits;
  int64_t start() const { return static_cast<int64_t>(bits & 0x3fff) << 4; }
  int64_t leading() const { return static_cast<int64_t>(bits >> 16 & 0x3fff) << 4; }
  int64_t stride() const { return static_cast<int64_t>(bits >> 32 & 0x3fff) << 4; }
  Swizzle swizzle() const { return static_cast<Swizzle>(bits >> 62); }

  // Element (i, k) of an operand: i along M or N, k of the 16 along K.
  template <class T>
  T load(const Block& block, int i, int k, bool transposed) const {
    const int64_t width = swizzle_bytes(swizzle());
    int64_t address = start();
    if (transposed) {
      const int64_t per_atom = width / 2;
      address += i / per_atom * leading() + k / 8 * stride() + k % 8 * width + i % per_atom * 2;
    } else {
      address += i / 8 * stride() + i % 8 * width + k * 2;
    }
    T value;
    std::memcpy(&value, block.shared.read(swizzled(address, swizzle()), 2), 2);
    return value;
  }
};

inline void wgmma_fence() {
  Block& b = *Block::current();
  b.groups[static_cast<size_t>(b.id() / kWarpgroup)]
      .fenced[static_cast<size_t>(b.id() % kWarpgroup)] = 1;
}
inline void wgmma_commit() {
  Block& b = *Block::current();
  ++b.groups[static_cast<size_t>(b.id() / kWarpgroup)]
        .committed[static_cast<size_t>(b.id() % kWarpgroup)];
}
template <int kPending>
void wgmma_wait() {
  Block& b = *Block::current();
  auto& g = b.groups[static_cast<size_t>(b.id() / kWarpgroup)];
  const auto t = static_cast<size_t>(b.id() % kWarpgroup);
  const int64_t due = g.committed[t] - kPending;  // groups before this one
  b.wait("the products of its warpgroup", [&g, due] {
    for (size_t i = g.done; i < g.products.size() && g.products[i].group < due; ++i) {
      if (g.products[i].asked < kWarpgroup) return false;
    }
    return true;
  });
  while (g.done < g.products.size() && g.products[g.done].group < due) {
    g.products[g.done].multiply();
    g.products[g.done].multiply = nullptr;
    g.products[g.done].state.reset();
    ++g.done;
  }
  g.fenced[t] = 0;
}

struct ProductBase {
  float* d[kWarpgroup] = {};
};

template <class T, int kN>
struct ProductState : ProductBase {
  uint64_t a = 0, b = 0;
  bool accumulate = false, transpose_a = false, transpose_b = false;
  std::vector<float> before[kWarpgroup];  // d's values where no earlier product is under way

  static int row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + 8 * (i / 2 % 2); }
  static int column(int thread, int i) { return 8 * (i / 4) + 2 * (thread % 4) + i % 2; }

  void multiply(const Block& block) {
    std::vector<float> left(64 * 16), right(static_cast<size_t>(kN) * 16);
    for (int m = 0; m < 64; ++m) {
      for (int k = 0; k < 16; ++k)
        left[static_cast<size_t>(m * 16 + k)] =
            static_cast<float>(Descriptor{a}.load<T>(block, m, k, transpose_a));
    }
    for (int n = 0; n < kN; ++n) {
      for (int k = 0; k < 16; ++k)
        right[static_cast<size_t>(n * 16 + k)] =
            static_cast<float>(Descriptor{b}.load<T>(block, n, k, transpose_b));
    }
    for (int t = 0; t < kWarpgroup; ++t) {
      for (int i = 0; i < kN / 2; ++i) {
        const float* x = left.data() + row(t, i) * 16;
        const float* y = right.data() + column(t, i) * 16;
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += x[k] * y[k];
        const float old = before[t].empty() ? d[t][i] : before[t][static_cast<size_t>(i)];
        d[t][i] = (accumulate ? old : 0.0f) + sum;
      }
    }
  }
};

template <class T, int kN>
void ask_for_product(float* d, const ProductState<T, kN>& wanted) {
  Block& block = *Block::current();
  auto& g = block.groups[static_cast<size_t>(block.id() / kWarpgroup)];
  const auto t = static_cast<size_t>(block.id() % kWarpgroup);
  if (!g.fenced[t]) throw Error("wgmma: no wgmma.fence since its registers were free");
  const size_t index = g.asked[t]++;
  if (index == g.products.size()) {
    auto state = std::make_shared<ProductState<T, kN>>(wanted);
    g.products.push_back({0, g.committed[t], state, [state, &block] { state->multiply(block); }});
  }
  auto& product = g.products[index];
  auto& state = *static_cast<ProductState<T, kN>*>(product.state.get());
  if (state.a != wanted.a || state.b != wanted.b || state.accumulate != wanted.accumulate ||
      product.group != g.committed[t])
    throw Error("wgmma: the threads of a warpgroup ask for different products");
  bool under_way = false;
  for (size_t i = g.done; i < index; ++i) {
    under_way = under_way || static_cast<ProductBase*>(g.products[i].state.get())->d[t] == d;
  }
  state.d[t] = d;
  if (!under_way) {
    state.before[t].assign(d, d + kN / 2);
    for (int i = 0; i < kN / 2; ++i) d[i] = NAN;  // not to be read before the wait
  }
  ++product.asked;
}

// d [64, kN] (+)= A [64, 16] B [16, kN], both in shared memory.
template <class T, int kN, bool kTransposeA = false, bool kTransposeB = false>
void wgmma_ss(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  ProductState<T, kN> wanted;
  wanted.a = a;
  wanted.b = b;
  wanted.accumulate = accumulate;
  wanted.transpose_a = kTransposeA;
  wanted.transpose_b = kTransposeB;
  ask_for_product(d, wanted);
}

}  // namespace fastattn::cuda::ptx
