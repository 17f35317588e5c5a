// The host's part of the watchdog (FASTATTN_WATCHDOG, ptx/watchdog.h): prints what threads report.
#pragma once

#include <chrono>
#include <cstdio>
#include <cstring>
#include <thread>

#include "cuda/kernels/attention_rows.h"
#include "cuda/launch/check.cuh"

namespace fastattn::cuda {

inline void print_report(const volatile ptx::Report& report) {
  char text[sizeof(report.text)];
  for (size_t i = 0; i < sizeof(text); ++i) text[i] = report.text[i];
  const char* name = text;  // of the file, without its folders
  for (const char* c = text; *c != '\0' && *c != ':'; ++c) {
    if (*c == '/') name = c + 1;
  }
  char value[80];
  if (report.seen < 0) {
    std::snprintf(value, sizeof(value), "parity %d", report.awaited);
  } else {
    std::snprintf(value, sizeof(value), "to be %d, it is %d,", report.awaited, report.seen);
  }
  std::fprintf(stderr, "fastattn watchdog: block %d thread %d at %s %s for 2 s\n", report.block,
               report.thread, name, value);
}

// Gives the kernels of this translation unit, on the current device, their memory for reports,
// which a thread then reads. It stays, and so does the thread: a kernel may run to the end of the
// process.
static void start_watchdog() {
  static const bool started = [] {
    alignas(4096) static ptx::Report reports[ptx::kReports];
    void* on_device = nullptr;
    check(cudaHostRegister(reports, sizeof(reports), cudaHostRegisterMapped), "cudaHostRegister");
    check(cudaHostGetDevicePointer(&on_device, reports, 0), "cudaHostGetDevicePointer");
    check(cudaMemcpyToSymbol(ptx::watchdog_reports, &on_device, sizeof(on_device)),
          "cudaMemcpyToSymbol");
    std::thread([] {
      for (int printed = 0; printed < ptx::kReports;) {
        const volatile ptx::Report& next = reports[printed];
        if (next.ready != 0) {
          print_report(next);
          ++printed;
        } else {
          std::this_thread::sleep_for(std::chrono::milliseconds(20));
        }
      }
    }).detach();
    return true;
  }();
  static_cast<void>(started);
}

}  // namespace fastattn::cuda
