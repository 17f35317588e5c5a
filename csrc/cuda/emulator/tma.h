// cuda/ptx/tma.h in plain C++: copies take effect when they are waited for. What the hardware asks
// of addresses and sizes is checked.
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
struct alignas(64) TensorMap {
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

inline void require(bool holds, const char* what, int64_t got) {
  if (!holds) throw Error(std::string(what) + ", got " + std::to_string(got));
}
inline int64_t modulo(const void* p, uint64_t bytes) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) % bytes);
}
// A box at `at` in shared memory, of a map that an instruction has so many coordinates for.
inline void check_box(const TensorMap& map, int coordinates, int64_t at) {
  require(modulo(&map, 64) == 0, "TMA needs a map at 0 modulo 64", modulo(&map, 64));
  require(map.rank == coordinates, "TMA needs as many coordinates as the map has dims", map.rank);
  require(modulo(map.base, 16) == 0, "TMA needs a tensor at 0 modulo 16", modulo(map.base, 16));
  for (int d = 0; d < map.rank; ++d) {
    const int64_t extent = map.extents[d], stride = map.stride_bytes[d];
    require(extent >= 1 && extent <= int64_t{1} << 32, "TMA needs extents of 1 to 2^32", extent);
    require(map.box[d] >= 1 && map.box[d] <= 256, "TMA needs boxes of 1 to 256", map.box[d]);
    require(d == 0 || (stride % 16 == 0 && stride >= 0 && stride < int64_t{1} << 40),
            "TMA needs strides that are multiples of 16 bytes below 2^40", stride);
  }
  const int inner = map.box[0] * map.element_bytes, span = swizzle_bytes(map.swizzle);
  require(inner % 16 == 0, "TMA needs rows of a box of multiples of 16 bytes", inner);
  require(map.swizzle == Swizzle::kNone || inner <= span,
          "TMA needs rows of a box within the swizzle", inner);
  const int64_t aligned = map.swizzle == Swizzle::kNone ? 128 : 8 * span;
  require(at % aligned == 0, "TMA needs shared memory aligned for its swizzle", at);
}
inline void check_bulk(const void* global, int64_t at, int64_t bytes) {
  require(modulo(global, 16) == 0, "A bulk copy needs global memory at 0 modulo 16",
          modulo(global, 16));
  require(at % 16 == 0, "A bulk copy needs shared memory at 0 modulo 16", at);
  require(bytes % 16 == 0 && bytes > 0, "A bulk copy needs a multiple of 16 bytes", bytes);
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
inline void load_box(void* to, const TensorMap* map, Barrier* barrier, int coordinates, int c0,
                     int c1, int c2 = 0, int c3 = 0) {
  check_box(*map, coordinates, Block::current()->shared.offset(to, map->box_bytes()));
  start_load(to, map->box_bytes(), barrier, [map, c0, c1, c2, c3](Block& b, int64_t at) {
    map->walk({c0, c1, c2, c3}, [&](int64_t offset, const char* p) {
      const char zero[8] = {};
      b.shared.write(swizzled(at + offset, map->swizzle), p == nullptr ? zero : p,
                     map->element_bytes);
    });
  });
}
inline void tma_load(void* to, const TensorMap* map, Barrier* barrier, int c0, int c1) {
  load_box(to, map, barrier, 2, c0, c1);
}
inline void tma_load(void* to, const TensorMap* map, Barrier* barrier, int c0, int c1, int c2,
                     int c3) {
  load_box(to, map, barrier, 4, c0, c1, c2, c3);
}
inline void bulk_load(void* to, const void* from, Barrier* barrier, int bytes) {
  check_bulk(from, Block::current()->shared.offset(to, bytes), bytes);
  start_load(to, bytes, barrier,
             [from, bytes](Block& b, int64_t at) { b.shared.write(at, from, bytes); });
}

// --- bulk stores of a thread
inline void start_store(const void* from, int64_t bytes,
                        std::function<void(const std::vector<char>&)> write) {
  Block& b = *Block::current();
  const int64_t at = b.shared.offset(from, bytes);
  auto data = std::make_shared<std::vector<char>>();
  const auto read = [&b, data, at, bytes] {  // once
    if (data->empty()) data->assign(b.shared.read(at, bytes), b.shared.read(at, bytes) + bytes);
  };
  b.self().bulk_stores.push_back({read, [data, write] { write(*data); }});
  if (b.timing().eager) {
    read();
  } else if (!b.timing().latest) {
    b.start_copy(read);
  }
}
inline void store_box(const TensorMap* map, const void* from, int coordinates, int c0, int c1,
                      int c2 = 0, int c3 = 0) {
  const int64_t at = Block::current()->shared.offset(from, map->box_bytes());
  check_box(*map, coordinates, at);
  start_store(from, map->box_bytes(), [map, at, c0, c1, c2, c3](const std::vector<char>& data) {
    map->walk({c0, c1, c2, c3}, [&](int64_t offset, char* p) {
      if (p != nullptr)
        std::memcpy(p, data.data() + swizzled(at + offset, map->swizzle) - at,
                    static_cast<size_t>(map->element_bytes));
    });
  });
}
inline void tma_store(const TensorMap* map, const void* from, int c0, int c1) {
  store_box(map, from, 2, c0, c1);
}
inline void tma_store(const TensorMap* map, const void* from, int c0, int c1, int c2, int c3) {
  store_box(map, from, 4, c0, c1, c2, c3);
}
inline void bulk_store(void* to, const void* from, int bytes) {
  check_bulk(to, Block::current()->shared.offset(from, bytes), bytes);
  start_store(from, bytes,
              [to](const std::vector<char>& data) { std::memcpy(to, data.data(), data.size()); });
}
inline void bulk_add(float* to, const void* from, int bytes) {
  check_bulk(to, Block::current()->shared.offset(from, bytes), bytes);
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
