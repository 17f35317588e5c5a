// Work distribution without torch: the caller passes its own thread pool down.
#pragma once

#include <cstdint>

namespace fastattn {

struct Parallel {
  using Body = void (*)(const void* context, int64_t task);

  int threads;
  // Runs body(context, task) once for every task in [0, tasks), in any order, on up to `threads`
  // threads.
  void (*run)(int64_t tasks, Body body, const void* context);
};

}  // namespace fastattn
