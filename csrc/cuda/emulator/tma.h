// cuda/ptx/tma.h in plain C++: copies take effect when they are waited for.
#pragma once

#include "cuda/emulator/thread.h"

namespace fastattn::cuda::ptx {

enum class Swizzle : int { kNone = 0, k128 = 1, k64 = 2, k32 = 3 };  // wgmma's descriptor code
inline int swizzle_bytes(Swizzle s) {
  return s == Swizzle::k128 ? 128 : s == Swizzle::k64 ? 64 : s == Swizzle::k32 ? 32 : 16;
}
inline int64_t swizzled(int64_t address, Swizzle s) {
  const int64_t mask = s == Swizzle::k128 ? 7 : s == Swizzle::k64 ? 3 : s == Swizzle::k32 ? 1 : 0;
  return address ^ ((address >> 7) & mask) << 4;
}

constexpr int kMostDims = 4;
struct TensorMap {
  char* base = nullptr;
  int rank = 0, element_bytes = 2;
  int64_t extents[kMostDims] = {}, stride_bytes[kMostDims] = {};  // innermost first
  int box[kMostDims] = {1, 1, 1, 1};
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

// A copy into shared memory, whose bytes count towards `barrier`; `write` is how it ends.
template <class F>
void start_load(void* to, int64_t bytes, Barrier* barrier, const F& write) {
  Block& b = *Block::current();
  const int64_t at = b.shared.offset(to, bytes);
  b.shared.poison(at, bytes);
  auto& done = b.barrier(barrier);
  b.start_copy([&b, &done, at, bytes, write] {
    write(b, at);
    done.bytes -= bytes;
    b.advance(done);
  });
}
inline void tma_load(void* to, const TensorMap* map, Barrier* barrier, int c0, int c1 = 0,
                     int c2 = 0, int c3 = 0) {
  check_box(*map, Block::current()->shared.offset(to, map->box_bytes()));
  start_load(to, map->box_bytes(), barrier, [map, c0, c1, c2, c3](Block& b, int64_t at) {
    map->walk({c0, c1, c2, c3}, [&](int64_t offset, const char* p) {
      const char zero[8] = {};
      b.shared.write(swizzled(at + offset, map->swizzle), p == nullptr ? zero : p,
                     map->element_bytes);
    });
  });
}
inline void bulk_load(void* to, const void* from, Barrier* barrier, int bytes) {
  Block& b = *Block::current();
  if (bytes % 16 != 0 || b.shared.offset(to, bytes) % 16 != 0) throw Error("bulk copy: 16 bytes");
  start_load(to, bytes, barrier,
             [from, bytes](Block& b, int64_t at) { b.shared.write(at, from, bytes); });
}

// --- bulk stores of a thread
inline void start_store(const void* from, int64_t bytes,
                        std::function<void(const std::vector<char>&)> write) {
  Block& b = *Block::current();
  const int64_t at = b.shared.offset(from, bytes);
  auto data = std::make_shared<std::vector<char>>();
  b.self().bulk_stores.push_back({[&b, data, at, bytes] {
                                    data->assign(b.shared.read(at, bytes),
                                                 b.shared.read(at, bytes) + bytes);
                                  },
                                  [data, write] { write(*data); }});
}
inline void tma_store(const TensorMap* map, const void* from, int c0, int c1 = 0, int c2 = 0,
                      int c3 = 0) {
  const int64_t at = Block::current()->shared.offset(from, map->box_bytes());
  check_box(*map, at);
  start_store(from, map->box_bytes(), [map, at, c0, c1, c2, c3](const std::vector<char>& data) {
    map->walk({c0, c1, c2, c3}, [&](int64_t offset, char* p) {
      if (p != nullptr)
        std::memcpy(p, data.data() + swizzled(at + offset, map->swizzle) - at,
                    static_cast<size_t>(map->element_bytes));
    });
  });
}
inline void bulk_store(void* to, const void* from, int bytes) {
  start_store(from, bytes,
              [to](const std::vector<char>& data) { std::memcpy(to, data.data(), data.size()); });
}
inline void bulk_add(float* to, const void* from, int bytes) {
  start_store(from, bytes, [to](const std::vector<char>& data) {
    for (size_t i = 0; i < data.size() / 4; ++i)
      to[i] += reinterpret_cast<const float*>(data.data())[i];
  });
}
inline void bulk_commit() {
  for (auto& store : Block::current()->self().bulk_stores) store.committed = true;
}
// Late as copies are: others run before.
template <class F>
void wait_for_stores(const F& finish) {
  Block& b = *Block::current();
  bool done = false;
  b.start_copy([&] {
    finish();
    done = true;
  });
  b.wait("its bulk stores", [&] { return done; });
}
inline void bulk_wait_read() {
  auto& stores = Block::current()->self().bulk_stores;
  wait_for_stores([&stores] {
    for (auto& store : stores) {
      if (!store.committed || store.has_read) continue;
      store.read();
      store.has_read = true;
    }
  });
}
inline void bulk_wait() {
  bulk_wait_read();
  auto& stores = Block::current()->self().bulk_stores;
  wait_for_stores([&stores] {
    for (auto& store : stores) {
      if (store.committed) store.write();
    }
    std::erase_if(stores, [](const auto& store) { return store.committed; });
  });
}

}  // namespace fastattn::cuda::ptx
