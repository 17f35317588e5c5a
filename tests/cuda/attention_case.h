// A case of attention for the emulated kernels: inputs, and what comes out by sums in double.
#pragma once

#include <algorithm>
#include <map>
#include <memory>

#include "cuda/tile/band.h"
#include "emulated.h"

namespace fastattn::cuda {

using Doubles = std::vector<double>;

// Sums, and the sums of their parts' sizes.
struct Sums {
  Doubles value, size;
  int64_t pitch;
  explicit Sums(const Tensor4& like)
      : value(like.data.size()), size(like.data.size()), pitch(like.pitch) {}
  void add(size_t at, double part) {
    value[at] += part;
    size[at] += std::abs(part);
  }
};

// Written as "dim heads_q heads_k seq_q seq_k left right padded blocks exponent": -1 for no bound,
// `padded` keys hidden at the end of the second batch element, and a few before. What nobody sees
// is NaN, and so is who sees nothing. With an exponent the queries are 2^exponent times as large,
// and they and the keys such that the scores are exact in every order of addition.
struct AttentionCase {
  const int64_t dim, heads_q, heads_k, seq_q, seq_k, left, right, padded;
  const int blocks;
  const int exponent;
  const int64_t batch = 2, group, reached;  // keys from `reached` on nobody sees
  const double scale;
  std::mt19937 random{7};
  Tensor4 q, k, v, out, grad_out;
  std::vector<uint8_t> mask;  // [batch, seq_k]
  std::vector<float> lse, row_max, log_sum, grad_lse;
  Sums o, dq, dk, dv;

  explicit AttentionCase(const std::vector<int64_t>& a)
      : dim(a[0]),
        heads_q(a[1]),
        heads_k(a[2]),
        seq_q(a[3]),
        seq_k(a[4]),
        left(a[5] < 0 ? kNoBound : a[5]),
        right(a[6] < 0 ? kNoBound : a[6]),
        padded(a[7]),
        blocks(static_cast<int>(a[8])),
        exponent(static_cast<int>(a[9])),
        group(heads_q / heads_k),
        reached(std::min(seq_k, seq_q + right)),
        scale(static_cast<double>(static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim))))),
        q(batch, heads_q, seq_q, dim),
        k(batch, heads_k, seq_k, dim),
        v(k),
        out(batch, heads_q, seq_q, dim, Pitch::kContiguous),  // as users get it
        grad_out(q),
        mask(static_cast<size_t>(batch * seq_k), 1),
        o(q),
        dq(q),
        dk(k),
        dv(k) {
    q.fill(random, 2.0f), k.fill(random), v.fill(random), grad_out.fill(random);
    if (exponent != 0) {
      for (bf16& x : q.data)
        x = bf16(std::ldexp(std::round(4 * static_cast<float>(x)), exponent - 2));
      for (bf16& x : k.data) x = bf16(std::round(4 * static_cast<float>(x)) / 4);
    }
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t j = 0; j < seq_k; ++j) {
        if (b == 1 && padded > 0 && (j + padded >= seq_k || j % 11 == 3))
          mask[static_cast<size_t>(b * seq_k + j)] = 0;
        if (seen(b, j)) continue;
        for (int64_t h = 0; h < heads_k; ++h) {
          for (int64_t d = 0; d < dim; ++d)
            k.data[k.at(b, h, j, d)] = v.data[v.at(b, h, j, d)] = bf16(NAN);
        }
      }
    }
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t h = 0; h < heads_q; ++h) {
        for (int64_t i = 0; i < seq_q; ++i) row(b, h, i);
      }
    }
  }

  static AttentionCase& of(const std::vector<int64_t>& a) {
    static std::map<std::vector<int64_t>, std::unique_ptr<AttentionCase>> cases;
    auto& found = cases[a];
    if (!found) found = std::make_unique<AttentionCase>(a);
    return *found;
  }

  // The bits of the mask, for key blocks of kBlockK.
  std::vector<uint32_t> key_words(int block) const {
    const int64_t words = (seq_k + block - 1) / block * block / 32;
    std::vector<uint32_t> bits(static_cast<size_t>(batch * words), 0);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t j = 0; j < seq_k; ++j)
        bits[static_cast<size_t>(b * words + j / 32)] |=
            static_cast<uint32_t>(mask[static_cast<size_t>(b * seq_k + j)]) << j % 32;
    }
    return bits;
  }
  Band band(int block, const std::vector<uint32_t>& words) const {
    return {static_cast<int>(seq_q),
            static_cast<int>(reached),
            static_cast<int>(left),
            static_cast<int>(right),
            words.data(),
            static_cast<int>((seq_k + block - 1) / block * block / 32)};
  }
  HeadBlocks tiles(int64_t heads, int64_t rows, int64_t block) const {
    return {static_cast<int>(batch * heads), static_cast<int>(heads),
            static_cast<int>((rows + block - 1) / block)};
  }

 private:
  bool seen(int64_t b, int64_t j) const {
    return j < reached && mask[static_cast<size_t>(b * seq_k + j)] != 0;
  }
  static double dot(const Tensor4& x, const Tensor4& y, int64_t b, int64_t hx, int64_t i,
                    int64_t hy, int64_t j) {
    double sum = 0;
    for (int64_t d = 0; d < x.cols; ++d) sum += x(b, hx, i, d) * y(b, hy, j, d);
    return sum;
  }

  // E1 to E10 for query i of head h.
  void row(int64_t b, int64_t h, int64_t i) {
    const int64_t hk = h / group;
    Doubles p(static_cast<size_t>(seq_k), 0.0);
    const int64_t first = std::max<int64_t>(0, i - left), last = std::min(seq_k - 1, i + right);
    double sum = 0, most = -INFINITY;
    for (int64_t j = first; j <= last; ++j) {
      if (!seen(b, j)) continue;
      most = std::max(most, p[static_cast<size_t>(j)] = scale * dot(q, k, b, h, i, hk, j));
    }
    for (int64_t j = first; j <= last; ++j) {
      double& score = p[static_cast<size_t>(j)];
      if (seen(b, j)) sum += score = std::exp(score - most);
    }
    for (int64_t d = 0; d < dim && sum == 0.0; ++d)  // what sees nothing harms nobody
      q.data[q.at(b, h, i, d)] = grad_out.data[q.at(b, h, i, d)] = bf16(NAN);
    lse.push_back(static_cast<float>(sum == 0.0 ? -INFINITY : most + std::log(sum)));
    row_max.push_back(static_cast<float>(most / scale));
    log_sum.push_back(sum == 0.0 ? 0.0f : static_cast<float>(std::log(sum)));
    grad_lse.push_back(std::normal_distribution<float>()(random));
    for (int64_t j = 0; j < seq_k; ++j) {
      double& weight = p[static_cast<size_t>(j)];
      if (weight == 0.0) continue;
      weight /= sum;
      for (int64_t d = 0; d < dim; ++d) o.add(q.at(b, h, i, d), weight * v(b, hk, j, d));
    }
    for (int64_t d = 0; d < dim; ++d) {
      const size_t at = q.at(b, h, i, d);
      out.data[out.at(b, h, i, d)] = bf16(static_cast<float>(o.value[at]));
    }
    const double delta = dot(grad_out, out, b, h, i, h, i) - static_cast<double>(grad_lse.back());
    for (int64_t j = 0; j < seq_k; ++j) {
      const double weight = p[static_cast<size_t>(j)];
      if (weight == 0.0) continue;
      const double ds = weight * (dot(grad_out, v, b, h, i, hk, j) - delta);
      for (int64_t d = 0; d < dim; ++d) {
        dq.add(q.at(b, h, i, d), scale * ds * k(b, hk, j, d));
        dk.add(k.at(b, hk, j, d), scale * ds * q(b, h, i, d));
        dv.add(k.at(b, hk, j, d), weight * grad_out(b, h, i, d));
      }
    }
  }
};

// What is summed has been rounded to bf16, and so is the result. Nothing is written between rows.
inline int compare(const char* what, emulator::Timing timing, const Tensor4& got,
                   const Sums& expected) {
  for (int64_t i = 0; i < got.batch * got.heads * got.rows; ++i) {
    for (int64_t j = 0; j < got.pitch; ++j) {
      const double value =
          static_cast<double>(static_cast<float>(got.data[static_cast<size_t>(i * got.pitch + j)]));
      const auto at = static_cast<size_t>(i * expected.pitch + j);
      const bool good = j >= got.cols
                            ? std::isnan(value)
                            : std::abs(value - expected.value[at]) <=
                                  (expected.size[at] + std::abs(expected.value[at])) / 256 + 1e-6;
      if (!good) return failed(what, timing, i, j, value, expected.value[at]);
    }
  }
  return 0;
}

}  // namespace fastattn::cuda
