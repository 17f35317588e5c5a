// Every kernel on several threads, without torch: `kernels all` is the program for
// ThreadSanitizer. `kernels past_the_end`, `misaligned` and `race` each hold a fault
// that a sanitizer must report inside a kernel.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/cpu_features.h"
#include "cpu/kernel_table.h"

namespace {

using namespace fastattn;

constexpr int kThreads = 3;

// As torch's pool: tasks are handed out one by one, and the calling thread takes part.
void run_tasks(int64_t tasks, Parallel::Body body, const void* context) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t task = next++; task < tasks; task = next++) body(context, task);
  };
  std::vector<std::thread> others;
  for (int t = 1; t < kThreads; ++t) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

const Parallel kParallel{kThreads, run_tasks};

int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}
Dtype accumulator(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
}

void put(Dtype dtype, char* p, double x) {
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

struct AttentionShape {
  int64_t batch, heads_q, heads_k, seq_q, seq_k, dim, dim_v;
  MaskKind mask = MaskKind::kNone;
  bool causal = false;
  double dropout_p = 0.0, scale = 0.3;
};

void call_attention(Dtype dtype, const AttentionShape& s) {
  const auto random = [&](int64_t count) { return Numbers::random(dtype, count); };
  const auto view = [&](const Numbers& x, int64_t heads, int64_t rows, int64_t cols) {
    TensorView v;
    v.data = x.data();
    v.batch_strides[0] = heads * rows * cols;
    v.head_stride = rows * cols;
    v.row_stride = cols;
    v.col_stride = 1;
    return v;
  };
  const auto view_q = [&](const Numbers& x) { return view(x, s.heads_q, s.seq_q, s.dim); };
  const auto view_k = [&](const Numbers& x) { return view(x, s.heads_k, s.seq_k, s.dim); };
  const auto view_v = [&](const Numbers& x) { return view(x, s.heads_k, s.seq_k, s.dim_v); };
  const auto view_out = [&](const Numbers& x) { return view(x, s.heads_q, s.seq_q, s.dim_v); };
  const int64_t rows = s.batch * s.heads_q * s.seq_q;
  const int64_t size_q = rows * s.dim, size_out = rows * s.dim_v;
  const int64_t size_k = s.batch * s.heads_k * s.seq_k * s.dim;
  const int64_t size_v = s.batch * s.heads_k * s.seq_k * s.dim_v;
  const cpu::KernelTable& kernels = cpu::kernels(dtype);

  const Numbers q = random(size_q), k = random(size_k), v = random(size_v);
  AttentionProblem p;
  p.dtype = dtype;
  p.batch_dims = 1;
  p.batch = p.batch_sizes[0] = s.batch;
  p.heads_q = s.heads_q;
  p.heads_k = s.heads_k;
  p.seq_q = s.seq_q;
  p.seq_k = s.seq_k;
  p.head_dim = s.dim;
  p.head_dim_v = s.dim_v;
  p.q = view_q(q);
  p.k = view_k(k);
  p.v = view_v(v);
  // A mask of the batch and one of every batch element: its gradient is summed or is not.
  const bool shared = s.mask == MaskKind::kFloat && s.causal;
  const int64_t size_mask = (shared ? 1 : s.batch) * s.heads_q * s.seq_q * s.seq_k;
  const Numbers mask = random(size_mask);
  std::vector<char> bits(static_cast<size_t>(size_mask), 1);
  p.mask_kind = s.mask;
  if (s.mask == MaskKind::kFloat) p.mask = view(mask, s.heads_q, s.seq_q, s.seq_k);
  if (s.mask == MaskKind::kBool) {
    for (size_t i = 0; i < bits.size(); i += 3) bits[i] = 0;
    p.mask = view(mask, s.heads_q, s.seq_q, s.seq_k);
    p.mask.data = bits.data();
  }
  if (shared) p.mask.batch_strides[0] = 0;
  if (s.causal) p.right = 0;
  p.scale = s.scale;
  const int64_t seed = 5;
  p.dropout_p = s.dropout_p;
  p.seeds = &seed;
  const Numbers out(dtype, size_out), lse(accumulator(dtype), rows);
  const Numbers row_max(accumulator(dtype), rows), log_sum(accumulator(dtype), rows);
  p.out = view_out(out);
  p.lse = lse.data();
  p.row_max = row_max.data();
  p.log_sum = log_sum.data();
  kernels.attention_forward(p, kParallel);
  out.expect_written("out");
  lse.expect_written("lse");
  row_max.expect_written("row_max");
  log_sum.expect_written("log_sum");

  const Numbers grad_out = random(size_out), grad_lse = Numbers::random(accumulator(dtype), rows);
  AttentionBackwardProblem b;
  b.forward = p;
  b.grad_out = view_out(grad_out);
  b.grad_lse = grad_lse.data();
  b.needs_q = b.needs_k = b.needs_v = true;
  b.needs_mask = s.mask == MaskKind::kFloat;
  b.mask_batch_sizes[0] = shared ? 1 : s.batch;
  b.mask_heads = s.heads_q;
  b.mask_rows = s.seq_q;
  b.mask_cols = s.seq_k;
  const auto gradients = [&](const char* what, const auto& call) {
    const Numbers of_q(dtype, size_q), of_k(dtype, size_k), of_v(dtype, size_v);
    const Numbers of_mask(dtype, size_mask);
    b.grad_q = view_q(of_q);
    b.grad_k = view_k(of_k);
    b.grad_v = view_v(of_v);
    b.grad_mask = of_mask.data();
    call();
    of_q.expect_written(what);
    of_k.expect_written(what);
    of_v.expect_written(what);
    if (b.needs_mask) of_mask.expect_written(what);
  };
  gradients("attention_backward", [&] { kernels.attention_backward(b, kParallel); });

  const Numbers t_q = random(size_q), t_k = random(size_k), t_v = random(size_v);
  const Numbers t_mask = random(size_mask);
  AttentionTangents tangents{view_q(t_q), view_k(t_k), view_v(t_v), {}};
  if (b.needs_mask) {
    tangents.mask = p.mask;
    tangents.mask.data = t_mask.data();
  }
  const Numbers t_out(dtype, size_out), t_lse(accumulator(dtype), rows);
  AttentionDoubleBackwardProblem forward_mode;
  forward_mode.backward.forward = p;
  forward_mode.tangents = tangents;
  forward_mode.needs_tangents = true;
  forward_mode.t_out = view_out(t_out);
  forward_mode.t_lse = t_lse.data();
  kernels.attention_double_backward(forward_mode, kParallel);
  t_out.expect_written("attention_jvp");
  t_lse.expect_written("attention_jvp");

  gradients("attention_double_backward", [&] {
    const Numbers t_out_again(dtype, size_out), t_lse_again(accumulator(dtype), rows);
    const Numbers rest(accumulator(dtype), rows), beta(accumulator(dtype), rows);
    kernels.attention_double_backward(
        {b, tangents, view_out(t_out_again), t_lse_again.data(), rest.data(), beta.data(), true},
        kParallel);
    t_out_again.expect_written("attention_double_backward");
  });
}

void call_linear(Dtype dtype, int64_t m, int64_t k, int64_t n) {
  const auto random = [&](int64_t count) { return Numbers::random(dtype, count); };
  const cpu::KernelTable& kernels = cpu::kernels(dtype);
  const Numbers x = random(m * k), w = random(n * k), bias = random(n), y(dtype, m * n);
  std::vector<uint8_t> relu_mask(static_cast<size_t>(m * ((n + 7) / 8)));
  LinearProblem p{dtype,    m, n,           k,    x.data(), k,
                  w.data(), k, bias.data(), true, y.data(), relu_mask.data()};
  kernels.linear_forward(p, kParallel);
  y.expect_written("linear_forward");

  const Numbers grad_y = random(m * n);
  for (const bool by_output : {false, true}) {
    const Numbers grad_x(dtype, m * k), grad_w(dtype, n * k), grad_bias(dtype, n);
    LinearBackwardProblem b = backward_of(p);
    b.grad_y = grad_y.data();
    b.grad_y_stride = n;
    if (by_output) {
      b.relu_output = y.data();
    } else {
      b.relu_mask = relu_mask.data();
    }
    b.grad_x = grad_x.data();
    b.grad_w = grad_w.data();
    b.grad_bias = grad_bias.data();
    kernels.linear_backward(b, kParallel);
    for (const Numbers* grad : {&grad_x, &grad_w, &grad_bias})
      grad->expect_written("linear_backward");
  }

  const Numbers t_x = random(m * k), t_w = random(n * k), t_bias = random(n), t_y(dtype, m * n);
  kernels.linear_jvp({dtype, m, n, k, x.data(), k, w.data(), k, t_x.data(), k, t_w.data(), k,
                      t_bias.data(), relu_mask.data(), t_y.data()},
                     kParallel);
  t_y.expect_written("linear_jvp");
}

void call_everything() {
  int calls = 0;
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16}) {
    for (const AttentionShape& shape : {
             AttentionShape{4, 4, 2, 30, 50, 16, 16},  // a task owns a unit
             AttentionShape{2, 2, 2, 130, 220, 40, 24, MaskKind::kFloat},
             AttentionShape{2, 2, 1, 130, 220, 40, 24, MaskKind::kFloat, true},
             AttentionShape{2, 2, 2, 130, 220, 24, 40, MaskKind::kBool, true, 0.3},
             AttentionShape{1, 1, 1, 300, 430, 17, 9, MaskKind::kNone, true},  // a block of rows
             AttentionShape{1, 4, 2, 2, 700, 40, 24},                          // few queries
             // with large scores, whose forward pass the others repeat
             AttentionShape{2, 4, 2, 2, 700, 40, 24, MaskKind::kNone, false, 0.0, 30.0},
         }) {
      call_attention(dtype, shape);
      ++calls;
    }
    // A product by blocks, one of much depth, one whose result is written past the caches, and few
    // rows.
    const int64_t shapes[][3] = {
        {200, 64, 300}, {50, 900, 77}, {600, 16, 1024}, {1, 1100, 1500}, {4, 900, 1037}};
    for (const auto& [m, k, n] : shapes) {
      call_linear(dtype, m, k, n);
      ++calls;
    }
  }
  std::printf("%d problems on %d threads, kernels of %s\n", calls, kThreads, cpu::selected_isa());
}

// One linear layer of float, of which the fault makes a mistake of its caller's.
int fault(const std::string& name) {
  const int64_t m = 12, k = 40, n = 23;
  const bool short_by_one = name == "past_the_end", beside = name == "misaligned";
  const Numbers x = Numbers::random(Dtype::kFloat32, m * k - short_by_one);
  const Numbers w = Numbers::random(Dtype::kFloat32, n * k);
  const Numbers bias = Numbers::random(Dtype::kFloat32, n + 1), y(Dtype::kFloat32, m * n);
  LinearProblem p{Dtype::kFloat32,          m,     n,        k,      x.data(), k, w.data(), k,
                  bias.data() + 2 * beside, false, y.data(), nullptr};
  const auto call = [&p] { cpu::kernels(p.dtype).linear_forward(p, {1, run_tasks}); };
  if (name == "race") {  // both write y
    std::thread other(call);
    call();
    other.join();
  } else {
    call();
  }
  std::printf("%s: nothing was reported\n", name.c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc == 2 ? argv[1] : "";
  if (name == "all") {
    call_everything();
    return 0;
  }
  return fault(name);
}
