// What the CPU implementations of the ops share: threads and results.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <optional>

#include "common/views.h"
#include "cpu/kernel_table.h"
#include "cpu/scratch.h"

namespace fastattn::cpu {

using OptionalTensor = std::optional<Tensor>;

// Tasks are handed out one by one, so that uneven ones (causal blocks) balance. Which thread runs a
// task does not change its result. The first exception ends the run and is thrown here: torch's
// interface would leave nothing of it but that there was one.
inline void run_tasks(int64_t tasks, Parallel::Body body, const void* context) {
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::once_flag failed;
  const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    try {
      for (int64_t task = next++; task < tasks; task = next++) body(context, task);
    } catch (...) {
      std::call_once(failed, [&] { error = std::current_exception(); });
      next = tasks;
    }
  });
  if (error) std::rethrow_exception(error);
}

inline Parallel parallel() {
  return {static_cast<int>(torch::stable::get_num_threads()), run_tasks};
}

// Calls a kernel; where it finds no scratch memory, the error names the op.
template <class F>
void run_kernel(const char* op, const F& kernel) {
  try {
    kernel();
  } catch (ScratchError& error) {
    error.name(op);
    throw;
  }
}

inline Tensor absent(const Tensor& like) {
  return empty_like_device(like, {0}, like.scalar_type());
}

}  // namespace fastattn::cpu
