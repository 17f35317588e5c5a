// Which elements dropout keeps. Its random words are Philox4x32-10 (Salmon et al., SC'11), keyed by
// the seed; the counter is (key column / 4, query row, head, batch element of the seed), or of a
// matrix (column / 4, the low and the high word of the seed's row, 0).
#pragma once

#include <cstdint>

namespace fastattn {

// An element is kept iff its 32-bit word is at least this.
inline uint64_t philox_keep_threshold(double dropout_p) {
  return static_cast<uint64_t>(dropout_p * 4294967296.0);
}

}  // namespace fastattn
