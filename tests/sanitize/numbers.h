// What the kernels are called with: threads as torch has them, and memory of its exact size.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "common/parallel.h"
#include "common/problem.h"

namespace fastattn {

constexpr int kThreads = 3;

// As torch's pool: tasks are handed out one by one, and the calling thread takes part.
inline void run_tasks(int64_t tasks, Parallel::Body body, const void* context) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t task = next++; task < tasks; task = next++) body(context, task);
  };
  std::vector<std::thread> others;
  for (int t = 1; t < kThreads; ++t) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

inline const Parallel kParallel{kThreads, run_tasks};

// Of dropout: one for each half of the rows.
constexpr int64_t kSeeds[] = {5, 1234567890123};

inline int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}
inline Dtype accumulator(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
}

inline void put(Dtype dtype, char* p, double x) {
  const auto f = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  int exponent;
  const double mantissa = std::frexp(std::fabs(x), &exponent);
  const auto high = static_cast<uint16_t>(bits >> 16);
  const auto half =
      static_cast<uint16_t>((bits >> 16 & 0x8000) | static_cast<unsigned>(exponent + 14) << 10 |
                            static_cast<unsigned>((2 * mantissa - 1) * 1024));
  if (dtype == Dtype::kFloat64) std::memcpy(p, &x, 8);
  if (dtype == Dtype::kFloat32) std::memcpy(p, &f, 4);
  if (dtype == Dtype::kBFloat16) std::memcpy(p, &high, 2);
  if (dtype == Dtype::kFloat16) std::memcpy(p, &half, 2);
}

// Numbers in memory of their exact size: what is read or written past them is the sanitizer's.
class Numbers {
 public:
  // A result: NaN until it is written.
  Numbers(Dtype dtype, int64_t count)
      : dtype_(dtype),
        bytes_(count * size_of(dtype)),
        data_(static_cast<char*>(std::malloc(static_cast<size_t>(bytes_)))) {
    std::memset(data_, 0xff, static_cast<size_t>(bytes_));
  }
  Numbers(Numbers&& x) noexcept
      : dtype_(x.dtype_), bytes_(x.bytes_), data_(std::exchange(x.data_, nullptr)) {}
  ~Numbers() { std::free(data_); }

  static Numbers random(Dtype dtype, int64_t count) {
    static std::mt19937 generator(17);
    std::uniform_real_distribution<double> magnitudes(0.01, 1.0);
    Numbers x(dtype, count);
    for (int64_t i = 0; i < count; ++i) {
      const double sign = generator() % 2 == 0 ? 1.0 : -1.0;
      put(dtype, x.data_ + i * size_of(dtype), sign * magnitudes(generator));
    }
    return x;
  }

  char* data() const { return data_; }

  void expect_written(const char* what) const {
    const int64_t size = size_of(dtype_);
    const char unwritten[8] = {-1, -1, -1, -1, -1, -1, -1, -1};
    for (int64_t i = 0; i < bytes_; i += size) {
      if (std::memcmp(data_ + i, unwritten, static_cast<size_t>(size)) != 0) continue;
      std::printf("%s: element %ld was not written\n", what, static_cast<long>(i / size));
      std::exit(1);
    }
  }

 private:
  Dtype dtype_;
  int64_t bytes_;
  char* data_;
};

}  // namespace fastattn
