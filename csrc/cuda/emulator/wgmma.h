// cuda/ptx/wgmma.h in plain C++: products take effect when they are waited for.
#pragma once

#include "cuda/emulator/tma.h"

namespace fastattn::cuda::ptx {

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
  bool accumulate = false, transpose_a = false, transpose_b = false, a_in_registers = false;
  const uint32_t* a_registers[kWarpgroup] = {};
  std::vector<float> sums[kWarpgroup / kWarp];  // of the warps that have read their operands
  int asked[kWarpgroup / kWarp] = {};
  std::vector<float> before[kWarpgroup];  // d's values where no earlier product is under way

  static int row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + 8 * (i / 2 % 2); }
  static int column(int thread, int i) { return 8 * (i / 4) + 2 * (thread % 4) + i % 2; }

  // The rows of one warp: reads the operands.
  void read(const Block& block, int warp) {
    float left[16 * 16], right[16 * kN];
    for (int m = 0; m < 16 && !a_in_registers; ++m) {
      for (int k = 0; k < 16; ++k)
        left[m * 16 + k] =
            static_cast<float>(Descriptor{a}.load<T>(block, warp * 16 + m, k, transpose_a));
    }
    for (int t = warp * kWarp; t < (warp + 1) * kWarp && a_in_registers; ++t) {
      for (int r = 0; r < 4; ++r) {
        T pair[2];
        std::memcpy(pair, a_registers[t] + r, 4);
        float* to = left + (t % 32 / 4 + 8 * (r % 2)) * 16 + 2 * (t % 4) + 8 * (r / 2);
        to[0] = static_cast<float>(pair[0]);
        to[1] = static_cast<float>(pair[1]);
      }
    }
    for (int n = 0; n < kN; ++n) {
      for (int k = 0; k < 16; ++k)
        right[n * 16 + k] = static_cast<float>(Descriptor{b}.load<T>(block, n, k, transpose_b));
    }
    sums[warp].resize(kWarp * kN / 2);
    for (int t = 0; t < kWarp; ++t) {
      for (int i = 0; i < kN / 2; ++i) {
        const float* x = left + (row(t, i) % 16) * 16;
        const float* y = right + column(t, i) * 16;
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += x[k] * y[k];
        sums[warp][static_cast<size_t>(t * kN / 2 + i)] = sum;
      }
    }
  }
  // The result appears.
  void multiply(const Block& block) {
    for (int t = 0; t < kWarpgroup; ++t) {
      if (sums[t / kWarp].empty()) read(block, t / kWarp);
      for (int i = 0; i < kN / 2; ++i) {
        const float old = before[t].empty() ? d[t][i] : before[t][static_cast<size_t>(i)];
        d[t][i] = (accumulate ? old : 0.0f) +
                  sums[t / kWarp][static_cast<size_t>(t % kWarp * kN / 2 + i)];
      }
    }
  }
};

template <class T, int kN>
void ask_for_product(float* d, const ProductState<T, kN>& wanted, const uint32_t* a_registers) {
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
  state.a_registers[t] = a_registers;
  if (!under_way) {
    state.before[t].assign(d, d + kN / 2);
    for (int i = 0; i < kN / 2; ++i) d[i] = NAN;  // not to be read before the wait
  }
  ++product.asked;
  const auto warp = static_cast<int>(t) / kWarp;
  if (++state.asked[warp] == kWarp && block.timing().eager) state.read(block, warp);
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
  ask_for_product(d, wanted, nullptr);
}
// A in registers.
template <class T, int kN, bool kTransposeB = false>
void wgmma_rs(float (&d)[kN / 2], const uint32_t* a, uint64_t b, bool accumulate) {
  ProductState<T, kN> wanted;
  wanted.b = b;
  wanted.accumulate = accumulate;
  wanted.transpose_b = kTransposeB;
  wanted.a_in_registers = true;
  ask_for_product(d, wanted, a);
}

}  // namespace fastattn::cuda::ptx
