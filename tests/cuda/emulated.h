// What the programs that run kernels on emulated blocks share: a 16-bit type, tensors, the check.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <random>
#include <vector>

#include "cuda/ptx/ptx.h"

namespace fastattn::cuda {

struct bf16 {
  uint16_t bits;
  bf16() = default;
  explicit bf16(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    bits = std::isnan(f) ? 0x7fff : static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  explicit operator float() const {
    const uint32_t u = static_cast<uint32_t>(bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
  }
};

// Memory as CUDA allocates it: at multiples of 256 bytes.
template <class V>
struct DeviceAllocator {
  using value_type = V;
  static constexpr std::align_val_t kAlignment{256};
  V* allocate(size_t count) {
    return static_cast<V*>(::operator new(count * sizeof(V), kAlignment));
  }
  void deallocate(V* p, size_t) { ::operator delete(p, kAlignment); }
  bool operator==(const DeviceAllocator&) const = default;
};
template <class V>
using DeviceVector = std::vector<V, DeviceAllocator<V>>;

// Where rows begin: at multiples of 16 bytes, as the launch hands them to TMA, or one behind the
// other.
enum class Pitch : int64_t { kAligned = 8, kContiguous = 1 };

// [batch, heads, rows, cols] with a box of 64 columns for TMA. What is between rows is NaN.
struct Tensor4 {
  int64_t batch, heads, rows, cols, pitch;
  DeviceVector<bf16> data;

  Tensor4(int64_t b, int64_t h, int64_t r, int64_t c, Pitch kind = Pitch::kAligned)
      : batch(b), heads(h), rows(r), cols(c) {
    const auto multiple = static_cast<int64_t>(kind);
    pitch = (c + multiple - 1) / multiple * multiple;
    data.assign(static_cast<size_t>(b * h * r * pitch), bf16(NAN));
  }
  Tensor4& fill(std::mt19937& random, float scale = 1.0f) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < batch * heads * rows * cols; ++i)
      data[static_cast<size_t>(i / cols * pitch + i % cols)] = bf16(normal(random) * scale);
    return *this;
  }
  size_t at(int64_t b, int64_t h, int64_t r, int64_t c) const {
    return static_cast<size_t>(((b * heads + h) * rows + r) * pitch + c);
  }
  double operator()(int64_t b, int64_t h, int64_t r, int64_t c) const {
    return static_cast<double>(static_cast<float>(data[at(b, h, r, c)]));
  }
  // `seen` rows of each head, the rest reads as zeros.
  ptx::TensorMap map(int box_rows, int64_t seen = -1) {
    ptx::TensorMap map;
    map.base = reinterpret_cast<char*>(data.data());
    map.rank = 4;
    const int64_t extents[] = {cols, seen < 0 ? rows : seen, heads, batch};
    const int64_t strides[] = {2, 2 * pitch, 2 * pitch * rows, 2 * pitch * rows * heads};
    for (int d = 0; d < 4; ++d) {
      map.extents[d] = extents[d];
      map.stride_bytes[d] = strides[d];
    }
    map.box[0] = 64;
    map.box[1] = box_rows;
    map.swizzle = ptx::Swizzle::k128;
    return map;
  }
};

inline int failed(const char* what, emulator::Timing timing, int64_t i, int64_t j, double got,
                  double expected) {
  std::printf("wrong: %s seed %lu at (%ld, %ld): %g for %g\n", what, timing.seed, i, j, got,
              expected);
  return 1;
}

// Which synchronisation is left out; test_emulator.py writes it into the kernels.
inline int& left_out() {
  static int number = -1;
  return number;
}

// Runs test(arguments of one case, timing) for groups of `count` arguments behind the first, which
// is what to leave out; an Error fails.
template <class F>
int run_cases(int argc, char** argv, int count, const F& test) {
  left_out() = std::atoi(argv[1]);
  try {
    for (int first = 2; first + count <= argc; first += count) {
      std::vector<int64_t> numbers;
      for (int i = 0; i < count; ++i) numbers.push_back(std::atol(argv[first + i]));
      for (uint64_t seed = 0; seed < 3; ++seed) {
        const emulator::Timing timing{seed, seed == 0, seed == 2, seed > 0, seed == 2};
        if (test(numbers, timing) != 0) return 1;
      }
    }
  } catch (const emulator::Error& error) {
    std::printf("error: %s\n", error.what());
    return 1;
  }
  return 0;
}

}  // namespace fastattn::cuda
